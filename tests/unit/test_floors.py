"""The floors of the design: who may import whom, and what stays out of a quick command."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FLOORS = [
    {"errors", "config", "manifest", "session", "redact", "storage", "embedded", ""},
    {"data", "model", "jobs"},
    {"registry"},
    {"engine", "train"},
    {"tune", "evaluate"},
    {"cli"},
]
NEIGHBOURS = {("model", "data")}
"""One way across a floor: the model's loader asks the tokenizer's module for the base's folder."""

SERVE_MAY_USE = FLOORS[0] | {"registry", "model", "engine"}
SERVE_MAY_USE_OF_DATA = {"ftray.data.tokenizer", "ftray.data.remote"}
"""A base's tokenizer, and where local copies lie: nothing of Ray Data comes with them."""
HEAVY = ("torch", "ray", "transformers", "datasets", "matplotlib", "peft", "bitsandbytes", "deepspeed", "pyarrow")


def floor_of(part: str) -> int:
    return next(i for i, parts in enumerate(FLOORS) if part in parts)


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(full name of an imported module or of a name in it, whether at the module's top level)."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    inside = path.relative_to(ROOT).with_suffix("").parts
    top_level = set(_run_at_import(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: -node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names = [module] if module not in ("ftray", "serve") else [f"{module}.{a.name}" for a in node.names]
        else:
            continue
        yield from ((name, node in top_level) for name in names)


def _run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not those in functions, nor under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _run_at_import(node)


def part_of(name: str) -> str:
    """`ftray.data.order` → `data`; `ftray.__version__` → ``."""
    part = [*name.split("."), ""][1]
    return "" if part.startswith("__") else part


@pytest.mark.parametrize("path", modules("ftray"), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_from_lower_floors_only(path: Path) -> None:
    own = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name, top_level in imports(path):
        if name.split(".")[0] == "serve":
            assert own == "cli", f"{path.name} imports {name}"
            assert not top_level, f"{path.name} imports {name} when it is imported itself"
        if name.split(".")[0] != "ftray":
            continue
        part = part_of(name)
        allowed = part == own or floor_of(part) < floor_of(own) or (own, part) in NEIGHBOURS
        assert allowed or floor_of(own) == 0 == floor_of(part), f"{own} may not import {name}: {part} is not below it"


@pytest.mark.parametrize("path", modules("serve"), ids=lambda p: str(p.relative_to(ROOT)))
def test_serve_imports_what_the_serving_image_has(path: Path) -> None:
    for name, _ in imports(path):
        if name.split(".")[0] == "ftray":
            allowed = part_of(name) in SERVE_MAY_USE or name in SERVE_MAY_USE_OF_DATA
            assert allowed, f"serve may not import {name}"


@pytest.mark.parametrize("path", [p for p in modules("ftray") if "cli" in p.parts], ids=lambda p: p.name)
def test_the_cli_imports_nothing_heavy_at_the_top(path: Path) -> None:
    heavy = [name for name, top_level in imports(path) if top_level and name.split(".")[0] in HEAVY]
    assert not heavy


def _loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint('|'.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.strip().splitlines()[-1].split("|"))


@pytest.mark.parametrize(
    "code",
    [
        "import ftray.config, ftray.errors, ftray.manifest, ftray.session",
        "import ftray.cli.main",
        "from ftray.cli.main import call; assert call(['check', 'llama-3.1-8b-qlora-1gpu']) == 0",
        "from ftray.cli.main import call; assert call(['check', 'llama-3.1-8b-qlora-1gpu', 'train.stepz=3']) == 2",
        "from ftray.cli.main import call; assert call(['train', 'no-such-run']) == 2",
        "from ftray.cli.main import call; assert call(['recipes']) == 0",
        "from ftray.cli.main import call; assert call(['create', 'no-such-recipe']) == 2",
    ],
)
def test_quick_commands_import_nothing_heavy(code: str) -> None:
    assert not _loaded_after(code) & set(HEAVY)


def test_a_teacher_is_asked_without_torch_and_ray() -> None:
    assert not _loaded_after("import ftray.cli.create, ftray.evaluate.create") & {"torch", "ray", "transformers"}
