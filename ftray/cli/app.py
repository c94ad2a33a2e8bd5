"""The command line's application, and the options that several commands take."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

UsageError: Any = typer.BadParameter.__base__
"""Of click, or of the copy of it that newer versions of typer carry: what a wrong command line raises."""

ORDER = ["quickstart", "recipes", "check", "data", "train", "tune", "evaluate", "report", "generate", "create"]
ORDER += ["export", "publish", "adapters", "serve", "submit", "runs", "doctor"]


class _InOrder(TyperGroup):
    """Lists commands in the order of a user's work, whichever module they stand in."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    cls=_InOrder,
    name="ftray",
    help="Fine-tune language models on Ray, and serve every adapter that comes out from one 4-bit base.",
    epilog="A run is one YAML file. Start with `ftray quickstart`, or with `ftray recipes` and `ftray check RECIPE`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RUN = typer.Argument(
    metavar="RUN", help="A run file (YAML), a run's folder, or the name of a recipe.", show_default=False
)
RunName = Annotated[str, RUN]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Keys of the run file to change, dotted: train.steps=100 data.sources.0.path=rows.jsonl",
        show_default=False,
    ),
]
AdapterName = Annotated[
    str, typer.Argument(metavar="[TENANT/]NAME[@DIGEST]", help="An adapter; a digest may be cut to 6 digits or more.")
]
RegistryUri = Annotated[
    str | None,
    typer.Option("--registry", metavar="URI", help="Folder or fsspec URI; default: FTRAY_REGISTRY."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Ray's own output, and tracebacks of errors.")]


def _version(asked: bool) -> None:
    if asked:
        from ftray import __version__

        print(f"ftray {__version__}")
        raise typer.Exit


_VERSION = typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and end.")


@app.callback()
def _all(version: Annotated[bool, _VERSION] = False) -> None:
    pass


def load(run: str, overrides: list[str] | None) -> Any:
    """The run of this name, with its overrides. Raises ConfigError."""
    from ftray.config import load_run

    return load_run(run, overrides or [])


def print_json(value: Any) -> None:
    """On standard output, for programs."""
    from ftray.cli.words import json_text

    print(json_text(value, indent=2, ensure_ascii=False))
