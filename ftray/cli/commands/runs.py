"""Commands about runs, from the rows to the artefact."""

from __future__ import annotations

from typing import Annotated

import typer

from ftray.cli.app import RUN, Json, Overrides, RunName, UsageError, Verbose, app, load, print_json


@app.command()
def quickstart(
    output: Annotated[str, typer.Option(help="Folder for both runs.", metavar="DIR")] = "runs",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """The whole story in minutes, without network or GPU.

    Two tenants' adapters, a cheese expert's and a restaurant describer's, are trained with QLoRA over the embedded
    base by two Ray Train workers on a local Ray, and compared with the base on held-out rows. Their run files are the
    recipes quickstart-cheese and quickstart-restaurant.
    """
    from ftray.cli.quickstart import quickstart_command

    quickstart_command(output, as_json=as_json, verbose=verbose)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print this one.", show_default=False)] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """List the shipped recipes, or print one.

    To start a run file of your own: ftray recipes NAME > run.yaml
    """
    from ftray.cli.recipes import list_recipes, list_search_recipes, recipe_text
    from ftray.cli.words import facts

    if name:
        print(recipe_text(name), end="")
    elif as_json:
        print_json(dict([*list_recipes(), *list_search_recipes()]))
    else:
        print(f"{facts(list_recipes(), indent=0)}\n\nfor ftray tune:\n{facts(list_search_recipes(), indent=0)}")


@app.command()
def check(
    run: Annotated[str | None, RUN] = None,
    overrides: Overrides = None,
    as_json: Json = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the run file's JSON schema, for editors.")] = False,
    verbose: Verbose = False,
) -> None:
    """Validate a run and show what it comes to; start nothing.

    Prints the resolved run with every default filled in, the batch arithmetic, the schedule, the trained parameters,
    the data files found, and the memory plan of a worker. With workers.gpu_memory_gib it says whether the run fits, and
    otherwise the cheapest change that makes it fit. Needs no weights, no GPU and no Ray.
    """
    if schema:
        from ftray.config import Run

        print_json(Run.model_json_schema())
        return
    if run is None:
        raise UsageError("Missing argument 'RUN'.")
    from ftray.cli.check import check as check_run
    from ftray.cli.check import describe, require_data

    result = check_run(load(run, overrides))
    if as_json:
        print_json(result.to_json())
    else:
        print(result.run.to_yaml())
        print(describe(result))
    require_data(result)


@app.command()
def data(
    run: RunName,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(help="Sample rows to show; 0: none.", min=0)] = 3,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Prepare a run's data and show them.

    Reads, renders and tokenizes the rows as `ftray train` would, and keeps the result for it. Shows counts, row
    lengths, which rows were put aside and why, and samples with the target tokens marked: what the model learns to say.
    """
    from ftray.cli.data import data_command

    data_command(load(run, overrides), samples=samples, as_json=as_json, verbose=verbose)


@app.command()
def train(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN… [KEY=VALUE…]",
            help="Run files (YAML), runs' folders or names of recipes; then keys to change in all of them, dotted.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a run, or go on where it left off; or several at once on one base.

    Several runs (lora, dora, qlora, qdora; the same base) go through the base in one batch, each with its own data,
    steps, commits, artefact and report, and each as if it were alone.

    Ctrl-C or SIGTERM commits and leaves with exit code 75; a second one leaves at once. With --json each event is a
    line of JSON, and the summary the last. Exit codes: 0 finished, 2 a mistake in what you gave, 3 the run failed, 75
    stopped: the same command goes on.
    """
    from ftray.cli.train import train_command, train_many

    names = [name for name in runs if "=" not in name]
    overrides = [name for name in runs if "=" in name]
    if not names:
        raise UsageError("Missing argument 'RUN'.")
    loaded = [load(name, overrides) for name in names]
    if len(loaded) == 1:
        train_command(loaded[0], as_json=as_json, verbose=verbose)
        return
    code = train_many(loaded, as_json=as_json, verbose=verbose)
    if code:
        raise typer.Exit(code)


@app.command()
def tune(
    search: Annotated[
        str | None,
        typer.Argument(metavar="SEARCH", help="A search file, a search's folder, or a recipe.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys to change: samples=64 scheduler=asha overrides.train.steps=100"),
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the search file's JSON schema, for editors.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Search for the best run: a run file, and a space over any of its keys.

    Trials of low-rank methods share one base, as lanes of one batch; others are runs of their own, as many at once as
    there are places for. Random, grid or TPE; ASHA, HyperBand, median rule or population based training. Each trial's
    folder is a run's folder. In the end: best.yaml, a complete run file, its artefact, and a report.

    Ctrl-C lets every trial commit, and leaves with exit code 75. The same command goes on, also after any kill: what is
    finished or was stopped is not trained again.

    ftray tune e2e-asha samples=16 budget.minutes=30
    """
    from ftray.config.search import Search, load_search

    if schema:
        print_json(Search.model_json_schema())
        return
    if search is None:
        raise UsageError("Missing argument 'SEARCH'.")
    from ftray.cli.tune import tune_command

    tune_command(load_search(search, overrides or []), as_json=as_json, verbose=verbose)
