"""Commands about what comes out of runs: exported, published, served."""

from __future__ import annotations

from typing import Annotated

import typer

from ftray.cli.app import AdapterName, Json, RegistryUri, UsageError, Verbose, app


@app.command()
def export(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Finished runs: folders, run files or recipes.")],
    to: Annotated[str, typer.Option("--to", metavar="FOLDER", help="A new folder, or an fsspec URI.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge into the base: a transformers model.")] = False,
    precision: Annotated[
        str | None, typer.Option(metavar="bf16|fp32", help="Of the merged model; default: the run's train.precision.")
    ] = None,
    combine: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune, …_svd"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,…", help="A weight for each run; default: even shares of 1.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of values that ties, dare and pruning keep.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of what an …svd makes; default: the largest.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Of what dare drops; default: 0.", min=0)] = None,
    as_json: Json = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="The libraries' output, and tracebacks.")] = False,
) -> None:
    """Copy what a run left, merge it into its base, or combine several.

    One run: its adapter or model as it is, every file checked against ftray.json. With --merge an adapter goes into its
    base, freshly loaded and never quantized, and the result is a plain transformers model: nothing of ftray or PEFT is
    needed to run it, and it decodes as fast as the base. Runs of lora, dora, qlora, qdora, adalora, vera and ia3 can be
    merged; virtual tokens (prefix, prompt, p_tuning) and bottleneck layers are no weights of the base: they stay
    adapters.

    Several runs of lora or qlora on one base: --combine makes one adapter of them, or with --merge one model. `svd` and
    `cat` are the exact weighted sum (cut to --rank, or as wide as all together); `linear`, `ties`, `dare_…` and
    `magnitude_prune` work on A and B apart and need equal ranks; `ties_svd`, `dare_linear_svd`, `dare_ties_svd` and
    `magnitude_prune_svd` work on whole updates.

    ftray export runs/cheese --to cheese-model --merge --precision bf16

    ftray export runs/cheese runs/restaurant --to both --combine svd --weights 0.6,0.4 --rank 16
    """
    from ftray.cli.export import export_command

    if precision not in (None, "bf16", "fp32"):
        raise UsageError(f"--precision {precision}: bf16 or fp32")
    export_command(
        runs,
        to,
        merge=merge,
        precision=precision,
        combine=combine,
        weights=weights,
        density=density,
        rank=rank,
        seed=seed,
        as_json=as_json,
        verbose=verbose,
    )


@app.command()
def publish(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run, as for export, or an artefact's folder.")],
    as_name: Annotated[str, typer.Option("--as", metavar="[TENANT/]NAME", help="Without a tenant: default.")],
    registry: RegistryUri = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The base, to compare its digest too; default: as ftray.json calls it."),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Put a run's adapter into a registry, where `ftray serve` finds it.

    The adapter is checked whole first: plain safetensors and nothing else, every SHA-256, only fields that ftray knows,
    exactly the tensors and shapes that base and configuration imply, finite values, sizes. Then it is uploaded under
    its digest, and last the name is moved to it, in one step: servers take it up without a restart, and requests in
    flight end on the version they began with. Any number may publish at once; one that is killed loses nothing.

    ftray publish runs/cheese --as anna/cheese --registry s3://bucket/adapters
    """
    from ftray.cli.publish import publish_command

    publish_command(run, as_name, registry=registry, base=base, as_json=as_json)


adapters = typer.Typer(
    help="Look at a registry, and keep it in order.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)


app.add_typer(adapters, name="adapters")


@adapters.command("list")
def list_adapters(
    tenant: Annotated[str | None, typer.Argument(metavar="TENANT", help="Of this one alone.")] = None,
    registry: RegistryUri = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Every name, which version it means, and how many there are."""
    from ftray.cli.adapters import list_command

    list_command(tenant, registry=registry, as_json=as_json)


@adapters.command("show")
def show_adapter(
    name: AdapterName, registry: RegistryUri = None, as_json: Json = False, verbose: Verbose = False
) -> None:
    """One name: its versions, and what the one it means was trained from."""
    from ftray.cli.adapters import show_command

    show_command(name, registry=registry, as_json=as_json)


@adapters.command("pin")
def pin_adapter(
    name: AdapterName,
    hold: Annotated[
        bool, typer.Option("--hold", help="And let the name mean it, whatever is published, until unpin.")
    ] = False,
    registry: RegistryUri = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Protect a version from removal; without a digest, the one that the name means."""
    from ftray.cli.adapters import pin_command

    pin_command(name, hold=hold, registry=registry, as_json=as_json)


@adapters.command("unpin")
def unpin_adapter(
    name: AdapterName, registry: RegistryUri = None, as_json: Json = False, verbose: Verbose = False
) -> None:
    """Take a pin away, and a hold: the name means what was published or rolled back to last."""
    from ftray.cli.adapters import unpin_command

    unpin_command(name, registry=registry, as_json=as_json)


@adapters.command("remove")
def remove_adapter(
    name: AdapterName,
    everything: Annotated[bool, typer.Option("--all", help="The whole name, with all its versions.")] = False,
    registry: RegistryUri = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Remove a version, or with --all a name. What is pinned stays, and a version that its name means."""
    from ftray.cli.adapters import remove_command

    remove_command(name, everything=everything, registry=registry, as_json=as_json)


@adapters.command("rollback")
def roll_back_adapter(
    name: AdapterName, registry: RegistryUri = None, as_json: Json = False, verbose: Verbose = False
) -> None:
    """Let a name mean an older version again; without a digest, the one before."""
    from ftray.cli.adapters import rollback_command

    rollback_command(name, registry=registry, as_json=as_json)


@app.command()
def serve(
    file: Annotated[str | None, typer.Argument(metavar="SERVE.yaml", help="The endpoint.", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys to change: engine.slots=8 http_options.port=9000"),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Check the file and show it; start nothing.")] = False,
    new_key: Annotated[bool, typer.Option("--new-key", help="Print a new key and its SHA-256; start nothing.")] = False,
    example: Annotated[bool, typer.Option("--example", help="Print a SERVE.yaml to start from.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Serve a base and every adapter that was published for it, to OpenAI's clients and on a page.

    One 4-bit base answers for all adapters at once; a request names its own in `model`. New versions are taken up
    while it runs. Without a file of tenants and their keys it answers this machine alone. Ctrl-C ends it.

    The file is a Ray Serve config: `serve deploy SERVE.yaml` puts the same endpoint on a cluster, where paths should be
    absolute or URIs, since Ray starts elsewhere. Ray passes over keys that it does not know: `--check` first, which
    refuses them.

    ftray serve --example > serve.yaml

    ftray serve serve.yaml registry=s3://team/adapters http_options.port=9000
    """
    from ftray.cli.serve import example_command, new_key_command, serve_command

    if new_key:
        new_key_command(as_json=as_json)
    elif example:
        example_command()
    elif file is None:
        raise UsageError("Missing argument 'SERVE.yaml'.")
    else:
        serve_command(file, overrides or [], check=check, as_json=as_json, verbose=verbose)
