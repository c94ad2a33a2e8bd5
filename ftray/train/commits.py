"""Commits: what a run can go on from. A commit counts when its manifest is there; see `ftray.manifest`.

    RUN/commits/step-00000200/  model.safetensors  optimizer.safetensors  state.json  manifest.json

What is large goes on in model-2.safetensors and so on, a GiB each, so that it is written and read a tensor at a time.
No file of it is pickled. On a local disk the whole folder appears by one rename; on an object store the manifest is
written last.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ftray.errors import ArtefactError
from ftray.manifest import MANIFEST, describe_files, filesystem, is_local, join, read_manifest, read_text, seal, verify
from ftray.storage import make_folder, reached

_NAME = re.compile(r"^step-(\d{8})$")


@dataclass
class Progress:
    """Where a run stands, beside its tensors."""

    step: int = 0
    """Steps done, skipped ones included."""
    cursor: int = 0
    """Rows consumed."""
    best_loss: float | None = None
    """The lowest held-out loss after a step; the base's is not among them."""
    best_step: int | None = None
    to_beat: float | None = None
    """Held-out loss below which, by early stopping's margin, the next one must be to count as better: the base's at
    first."""
    since_best: int = 0
    """Evaluations since one that counted as better."""
    base_loss: float | None = None
    final_loss: float | None = None
    """Held-out loss of the last evaluation."""
    evaluated_at: int | None = None
    """Step of the last evaluation."""
    last_loss: float | None = None
    skipped: int = 0
    skipped_in_a_row: int = 0
    target_tokens: int = 0
    train_seconds: float = 0.0
    metrics_bytes: int = 0
    """Length of metrics.jsonl when this was committed: what stands behind it belongs to steps that were lost."""
    finished: str | None = None
    """Why the run ended, once it has."""

    @classmethod
    def of(cls, kept: dict[str, Any]) -> Progress:
        """What a commit keeps. Older ones had one mark for the best and for early stopping, which the base's loss set
        as well. Raises TypeError."""
        progress = cls(**kept)
        if "to_beat" not in kept:
            progress.to_beat = progress.best_loss
            if progress.best_step == 0:
                progress.best_loss = progress.best_step = None
        return progress

    def meant(self, keep_best: bool) -> int:
        """The step that the artefact is of; where its commit is no longer whole, the last step."""
        return self.best_step if keep_best and self.best_step is not None else self.step

    def loss_at(self, step: int) -> float | None:
        """Held-out loss of the best step, or of the last; None where it was not measured, or is not finite."""
        if step == self.best_step:
            return self.best_loss
        known = self.evaluated_at == step and self.final_loss is not None and math.isfinite(self.final_loss)
        return self.final_loss if known else None


class Lazy(Mapping[str, Tensor]):
    """Tensors that are made, or read, when they are asked for."""

    def __init__(self, names: Iterable[str], get: Callable[[str], Tensor]) -> None:
        self._names, self._get = dict.fromkeys(names), get

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass
class State:
    """What a strategy must have again to go on. Either mapping may be lazy."""

    model: Mapping[str, Tensor]
    """Trained parameters by name."""
    optimizer: Mapping[str, Tensor]
    """Tensors of the optimizer's state by path: the parameter's name, `/`, the state's."""
    plain: dict[str, Any] = field(default_factory=dict)
    """Everything else: numbers, words, None."""

    def pass_through(self) -> None:
        """Ask for each tensor as a writer does: what a worker that does not write does for the one that gathers."""
        for tensors in (self.model, self.optimizer):
            for _ in tensors.values():
                pass


@dataclass
class Commit:
    progress: Progress
    state: State
    identity: dict[str, Any] = field(default_factory=dict)
    """What must not change between a run's parts; see `ftray.train.identity`."""


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def place_of(folder: str, step: int) -> str:
    return join(folder, "commits", name_of(step))


def write(folder: str, commit: Commit) -> str:
    """Write RUN/commits/step-N and return its path. An older folder of that name, damaged or not, is replaced. Raises
    RunError."""
    staged = stage(folder, commit)
    try:
        return complete(staged)
    finally:
        staged.discard()


@dataclass
class Staged:
    """The files of a commit that does not count yet, on this machine."""

    folder: str
    """The run's."""
    step: int
    files: Path
    """Where they are: beside the commits on a local disk, in a temporary folder on the way to an object store."""

    def discard(self) -> None:
        """Leave nothing of what was not completed."""
        shutil.rmtree(self.files, ignore_errors=True)


def stage(folder: str, commit: Commit) -> Staged:
    """Write the files of a commit; `complete` makes them one. Raises RunError."""
    root, step = join(folder, "commits"), commit.progress.step
    if is_local(root):
        files = Path(filesystem(root)[1]) / f".{name_of(step)}.{uuid.uuid4().hex[:8]}.part"
    else:
        files = Path(tempfile.mkdtemp(prefix="ftray-commit-"))
    staged = Staged(folder, step, files)
    try:
        with reached(files):
            _write_files(files, commit)
    except BaseException:
        staged.discard()
        raise
    return staged


def complete(staged: Staged) -> str:
    """Let a staged commit count, and return its path. May be repeated when it failed. Raises RunError."""
    target, facts = place_of(staged.folder, staged.step), {"step": staged.step}
    fs, path = filesystem(target)
    with reached(target):
        if is_local(target):
            seal(staged.files, facts)
            _sync(staged.files)
            take_place(staged.files, Path(path))
            return target
        if fs.exists(f"{path}/{MANIFEST}"):
            fs.rm_file(f"{path}/{MANIFEST}")
        make_folder(fs, path)
        files = describe_files(staged.files)
        for name in files:
            fs.put_file(str(staged.files / name), f"{path}/{name}")
        seal(target, facts, files)
    return target


def _write_files(stage: Path, commit: Commit) -> None:
    stage.mkdir(parents=True, exist_ok=True)
    write_shards(commit.state.model.items(), lambda n: stage / f"model{f'-{n}' if n > 1 else ''}.safetensors")
    write_shards(commit.state.optimizer.items(), lambda n: stage / f"optimizer{f'-{n}' if n > 1 else ''}.safetensors")
    state = {"progress": asdict(commit.progress), "optimizer": commit.state.plain, "identity": commit.identity}
    (stage / "state.json").write_text(json.dumps(state, indent=1))


def write_shards(tensors: Iterable[tuple[str, Tensor]], file: Callable[[int], Path]) -> dict[str, int]:
    """Write `tensors` to file(1), file(2), … of about a GiB each, holding one of them at a time; there is always a
    first. Returns the file's number of each name."""
    numbers: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    number, size = 1, 0
    for name, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        if shard and size + tensor.nbytes > SHARD_BYTES:
            save_file(shard, file(number), metadata={"format": "pt"})
            shard, number, size = {}, number + 1, 0
        shard[name] = tensor
        numbers[name] = number
        size += tensor.nbytes
    save_file(shard, file(number), metadata={"format": "pt"})
    return numbers


SHARD_BYTES = 1 << 30
"""A file of tensors is at most this large, unless one tensor alone is larger."""


def read_shards(files: Iterable[Path], copy: Any = None) -> Mapping[str, Tensor]:
    """The tensors of safetensors files, each read when it is asked for; `copy` keeps the files there as long as they
    may be. Raises SafetensorError, OSError."""
    where: dict[str, Path] = {}
    for path in sorted(files):
        with safe_open(path, "pt") as file:
            where |= dict.fromkeys(file.keys(), path)

    def get(name: str, _copy: Any = copy) -> Tensor:
        with safe_open(where[name], "pt") as file:
            return file.get_tensor(name)

    return Lazy(where, get)


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def take_place(stage: Path, target: Path) -> None:
    """Give a finished folder its name, in place of an older one. Raises OSError where a file is in its way."""
    if target.is_dir():
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old.part")
        os.rename(target, old)
        os.rename(stage, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(stage, target)


def steps_of(folder: str) -> list[int]:
    """Steps that have a commit folder, whole or not, oldest first."""
    fs, path = filesystem(join(folder, "commits"))
    with reached(folder):
        if not fs.exists(path):
            return []
        names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)]
    return sorted(int(match[1]) for name in names if (match := _NAME.match(name)))


def latest(folder: str, warn: Callable[[str], None]) -> Commit | None:
    """The newest commit that verifies, or None. A damaged one is passed over with a warning."""
    for step in reversed(steps_of(folder)):
        where = place_of(folder, step)
        try:
            if read_manifest(where) is None:
                continue  # litter of a crash: it never counted
            return read(where)
        except ArtefactError as error:
            warn(f"commit {name_of(step)} is damaged and passed over: {error.what}")
    return None


def counts(where: str) -> bool:
    """Whether a commit was completed; its files are not looked at."""
    try:
        return read_manifest(where) is not None
    except ArtefactError:
        return False


def newest_identity(folder: str) -> dict[str, Any] | None:
    """The identity in the newest commit that can be read at all; None without one. Tensors are not looked at."""
    for step in reversed(steps_of(folder)):
        where = place_of(folder, step)
        try:
            if read_manifest(where) is not None:
                return json.loads(read_text(join(where, "state.json")))["identity"]
        except (ArtefactError, OSError, ValueError, KeyError):
            continue  # damaged: `latest` will say so
    return None


def read(where: str) -> Commit:
    """A verified commit, its tensors still in their files. Raises ArtefactError, RunError."""
    fs, path = filesystem(where)
    root, copy = Path(path), None
    if not is_local(where):  # verified is what came here
        copy = tempfile.TemporaryDirectory(prefix="ftray-commit-")
        root = Path(copy.name)
        with reached(where):
            for file in fs.find(path):
                fs.get_file(file, str(root / file.rsplit("/", 1)[-1]))
    try:
        verify(root)
    except ArtefactError as error:  # by its own name, not that of a copy
        raise ArtefactError(error.what, where=where) from None
    try:
        state = json.loads((root / "state.json").read_text())
        return Commit(
            progress=Progress.of(state["progress"]),
            state=State(
                model=read_shards(root.glob("model*.safetensors"), copy),
                optimizer=read_shards(root.glob("optimizer*.safetensors"), copy),
                plain=state["optimizer"],
            ),
            identity=state["identity"],
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"it verifies but cannot be read: {error}", where=where) from None


def to_keep(steps: Iterable[int], *, keep_last: int, best: int | None) -> set[int]:
    """Which commits stay: the newest `keep_last` and the best."""
    newest = sorted(steps)[-keep_last:]
    return set(newest) | ({best} if best is not None else set())


def prune(folder: str, *, newest: int, keep_last: int, best: int | None) -> None:
    """After the commit of step `newest`: remove the commits that need not stay, those of later steps, which were
    damaged when the run went on from before them, and on a local disk the litter of crashes."""
    steps = steps_of(folder)
    keep = to_keep([step for step in steps if step <= newest], keep_last=keep_last, best=best)
    fs, root = filesystem(join(folder, "commits"))
    with reached(folder):
        for step in set(steps) - keep:
            path = f"{root}/{name_of(step)}"
            if fs.exists(f"{path}/{MANIFEST}"):
                fs.rm_file(f"{path}/{MANIFEST}")  # first, so that a half-removed commit does not count
            fs.rm(path, recursive=True)
    if is_local(root):
        for litter in Path(root).glob(".step-*.part"):
            shutil.rmtree(litter, ignore_errors=True)
