"""DeepSpeed's native parts, which it compiles on the machine that uses them: CPU Adam, and file input and output for
offload to NVMe. Each is compiled once a machine, by one process, before the workers need it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from ftray.config import Run
from ftray.errors import ConfigError, RunError
from ftray.manifest import digest_of

_BUILDERS = {"cpu_adam": "CPUAdamBuilder", "async_io": "AsyncIOBuilder"}


def parts(run: Run) -> list[str]:
    """Names of the native parts that `run` needs."""
    strategy = run.strategy
    if strategy is None:
        return []
    offloads = (strategy.offload_optimizer, strategy.offload_parameters)
    adam = ["cpu_adam"] if strategy.offload_optimizer != "none" else []
    return adam + (["async_io"] if "nvme" in offloads else [])


def refuse_nvme(run: Run) -> None:
    """Raises ConfigError where this machine cannot write to `strategy.nvme_path`, or make it."""
    if run.strategy is None or run.strategy.nvme_path is None:
        return
    wanted = Path(os.path.abspath(run.strategy.nvme_path))
    there = next(path for path in (wanted, *wanted.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".ftray-", dir=there):
            return
    except OSError as error:
        raise ConfigError(
            f"{wanted} cannot be written to on {socket.gethostname()}: {there}: {error.strerror}",
            where="strategy.nvme_path",
            hint="give a folder on a fast local disk that the workers may write to",
        ) from None


def missing(names: list[str]) -> list[str]:
    """Those of `names` that this machine has not compiled yet."""
    return [name for name in names if not (_folder(name) / f"{name}.so").exists()]


def compile_parts(names: list[str]) -> None:
    """Compile those of `names` that are missing; another process that does the same waits. Raises RunError where that
    fails, ConfigError where this machine lacks what it takes."""
    if not missing(names):
        return
    refuse_without_tools(names)
    import deepspeed.ops.op_builder as builders

    for name in names:
        folder = _folder(name)
        with _alone(folder.with_name(f"{name}.ftray")):
            (folder / "lock").unlink(missing_ok=True)  # of a process that was killed: torch would wait for it forever
            try:
                getattr(builders, _BUILDERS[name])().load(verbose=False)
            except (RuntimeError, OSError, ImportError) as error:
                raise RunError(
                    f"DeepSpeed's {name} cannot be compiled here: {str(error).strip()[-2000:]}",
                    where=str(folder),
                    hint="set strategy.offload_optimizer (and offload_parameters) to none to do without it",
                ) from None


def _folder(name: str) -> Path:
    """Where torch puts a compiled extension; see torch.utils.cpp_extension. Each installation has a place of its own:
    torch compiles again what another one, with other paths, has left."""
    from torch.utils.cpp_extension import _get_build_directory

    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        versions = [f"{package} {version(package)}" for package in ("deepspeed", "torch")]
        own = digest_of([sys.prefix, sys.version, *versions])[:12]
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        os.environ["TORCH_EXTENSIONS_DIR"] = os.path.join(cache, "ftray", "extensions", own)

    return Path(_get_build_directory(name, verbose=False))


def refuse_without_tools(names: list[str]) -> None:
    """Raises ConfigError where this machine lacks what it takes to compile those of `names` that are missing."""
    if not (names := missing(names)):
        return
    if not shutil.which("ninja"):  # pip's lies beside Python, where a shell may not look
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    absent = [tool for tool in (os.environ.get("CXX", "c++"), "ninja") if not shutil.which(tool)]
    if "async_io" in names:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible():
            absent.append("libaio with its headers")
    if absent:
        raise ConfigError(
            f"offload compiles DeepSpeed's {' and '.join(names)}, and {socket.gethostname()} has no"
            f" {', no '.join(absent)}",
            where="strategy",
            hint="install them (Debian: apt install g++ ninja-build libaio-dev), or set strategy.offload_* to none",
        )


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system gives it back when the process dies
        yield
