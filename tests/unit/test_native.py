"""What of DeepSpeed a run needs compiled, and what a machine without tools is told."""

from __future__ import annotations

import pytest

from ftray.config import load_run
from ftray.errors import ConfigError
from ftray.train import native


@pytest.mark.parametrize(
    ("strategy", "needed"),
    [
        ("null", []),
        ("{zero: 2}", []),
        ("{zero: 2, offload_optimizer: cpu}", ["cpu_adam"]),
        ("{zero: 3, offload_optimizer: nvme, nvme_path: /fast}", ["cpu_adam", "async_io"]),
        (
            "{zero: 3, offload_optimizer: cpu, offload_parameters: nvme, nvme_path: /fast}",
            ["cpu_adam", "async_io"],
        ),
    ],
)
def test_parts(strategy, needed):
    assert native.parts(load_run("tiny-full-zero3-offload", [f"strategy={strategy}"])) == needed


def test_what_is_compiled_is_not_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert native.missing(["cpu_adam", "async_io"]) == ["cpu_adam", "async_io"]
    (tmp_path / "cpu_adam").mkdir(exist_ok=True)
    (tmp_path / "cpu_adam/cpu_adam.so").touch()
    assert native.missing(["cpu_adam", "async_io"]) == ["async_io"]


def test_a_machine_without_a_compiler_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"compiles DeepSpeed's cpu_adam, and \S+ has no no-such-compiler"):
        native.compile_parts(["cpu_adam"])
