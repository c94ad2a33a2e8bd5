"""The command line. Each command is a few lines here and a module of its own, imported when it is called.

`--help`, `check` and every mistake in a run file answer within a second, so nothing here imports torch or Ray.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from ftray.errors import EXIT_BUG, EXIT_OK, EXIT_STOPPED, EXIT_USER, FtrayError, RunStopped

UsageError: Any = typer.BadParameter.__base__
"""Of click, or of the copy of it that newer versions of typer carry: what a wrong command line raises."""

app = typer.Typer(
    name="ftray",
    help="Fine-tune language models on Ray, and serve every adapter that comes out from one 4-bit base.",
    epilog="A run is one YAML file. Start with `ftray quickstart`, or with `ftray recipes` and `ftray check RECIPE`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_RUN = typer.Argument(
    metavar="RUN", help="A run file (YAML), a run's folder, or the name of a recipe.", show_default=False
)
RunName = Annotated[str, _RUN]
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
def check(
    run: Annotated[str | None, _RUN] = None,
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

        _print_json(Run.model_json_schema())
        return
    if run is None:
        raise UsageError("Missing argument 'RUN'.")
    from ftray.cli.check import check as check_run
    from ftray.cli.check import describe, require_data

    result = check_run(_load(run, overrides))
    if as_json:
        _print_json(result.to_json())
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

    data_command(_load(run, overrides), samples=samples, as_json=as_json, verbose=verbose)


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
    loaded = [_load(name, overrides) for name in names]
    if len(loaded) == 1:
        train_command(loaded[0], as_json=as_json, verbose=verbose)
        return
    code = train_many(loaded, as_json=as_json, verbose=verbose)
    if code:
        raise typer.Exit(code)


@app.command()
def evaluate(
    systems: Annotated[
        list[str],
        typer.Argument(
            metavar="SYSTEM… [KEY=VALUE…]",
            help="Finished runs, adapters' or models' folders, names in a registry, endpoints (https://host/v1#model);"
            " and keys of the run file's `evaluate` to change: decoding.max_tokens=60",
            show_default=False,
        ),
    ],
    like: Annotated[
        str | None,
        typer.Option("--like", metavar="RUN", help="Ask as this run says; default: the first SYSTEM that is a run."),
    ] = None,
    metrics: Annotated[str | None, typer.Option(metavar="NAME,…", help="Judge answers by these; e2e: five.")] = None,
    examples: Annotated[
        str | None, typer.Option(metavar="K,…", help="Baselines: the base with K training rows in its prompt.")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="FOLDER", help="Keep the result there; default: the first run's.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option("--judge", metavar="URL#MODEL", help="A model that says whose answers are better."),
    ] = None,
    judge_price: Annotated[
        str | None,
        typer.Option(metavar="READ,WRITTEN", help="What a million tokens cost the judge's user; the cost is told."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Share the work among so many Ray actors, each with the base; default: this process, or on a cluster"
            " an actor a GPU.",
            show_default=False,
        ),
    ] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Every system on every run's held-out rows: what each forgot.")
    ] = False,
    general: Annotated[
        list[str] | None,
        typer.Option("--general", metavar="FILE", help="With --matrix: general text, a row a line; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task, at most.", min=1)] = None,
    registry: RegistryUri = None,
    as_json: Json = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="The libraries' output, and tracebacks.")] = False,
) -> None:
    """Measure what tuning changed: each system beside the base that it began as.

    Losses on target tokens of the run's held-out rows (or of `evaluate.rows`); and, with metrics, answers to them,
    judged against their references, with 95 % intervals and paired tests, since test sets are small. The base is asked
    as it is and with examples in its prompt. Each base is loaded once, and all adapters on it answer in one pass. Every
    answer is kept in the run's folder, and the report shows them.

    Metrics: bleu nist meteor coco_rouge_l cider (together: e2e), chrf, rouge_1 rouge_2 rouge_l, exact_match, accuracy,
    macro_f1, numeric_answer, valid_json, json_schema, distinct_1 distinct_2, words. Most need ftray[evaluate].

    ftray evaluate runs/cheese

    ftray evaluate runs/e2e-lora runs/e2e-full --metrics e2e --examples 0,5 decoding.max_tokens=80

    ftray evaluate runs/one runs/two runs/three --matrix --general english.txt
    """
    from ftray.cli.evaluate import evaluate_command, matrix_command

    if matrix:
        given = {"--like": like, "--metrics": metrics, "--examples": examples, "--judge": judge}
        given["--judge-price"] = judge_price
        if odd := next((option for option, value in given.items() if value), None):
            raise UsageError(f"{odd} does not go with --matrix, which asks each task as its own run says")
        matrix_command(
            systems,
            general=general or [],
            limit=limit,
            to=to,
            registry=registry,
            workers=workers,
            as_json=as_json,
            verbose=verbose,
        )
        return
    if general:
        raise UsageError("--general goes with --matrix")
    if limit:
        systems = [*systems, f"limit={limit}"]
    evaluate_command(
        systems,
        like=like,
        metrics=metrics,
        examples=examples,
        judge=judge,
        prices=judge_price,
        to=to,
        registry=registry,
        workers=workers,
        as_json=as_json,
        verbose=verbose,
    )


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Runs: folders, run files or recipes.")],
    to: Annotated[
        str, typer.Option("--to", metavar="FILE", help="Of several runs: where the page goes.")
    ] = "comparison.html",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make a run's page anew; or one page that compares several runs.

    A page is one file that needs no network. `ftray train` and `ftray evaluate` make a run's own, report.html, by
    themselves.

    ftray report runs/e2e-lora runs/e2e-full --to e2e.html
    """
    from ftray.cli.report import report_command

    report_command(runs, to, as_json=as_json)


@app.command()
def tune(
    search: Annotated[str, typer.Argument(metavar="SEARCH", help="A search file, a search's folder, or a recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys to change: samples=64 scheduler=asha overrides.train.steps=100"),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Search for the best run: a run file, and a space over any of its keys.

    Trials of low-rank methods share one base, as lanes of one batch; others are runs of their own, as many at once as
    there are places for. Random, grid or TPE; ASHA, HyperBand, median rule or population based training. Each trial's
    folder is a run's folder. In the end: best.yaml, a complete run file, its artefact, and a report.

    Ctrl-C lets every trial commit, and leaves with exit code 75. The same command goes on, also after any kill: what is
    finished or was stopped is not trained again.

    ftray tune e2e-asha samples=64 budget.minutes=30
    """
    from ftray.cli.tune import tune_command
    from ftray.config.search import load_search

    tune_command(load_search(search, overrides or []), as_json=as_json, verbose=verbose)


@app.command()
def generate(
    prompts: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="JSONL, CSV, Parquet, …: a file, glob, folder or fsspec URI.")
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out", metavar="FILE", help="The answers, JSONL, or Parquet if its name ends so; any fsspec URI."
        ),
    ],
    prompt: Annotated[
        str | None, typer.Option(metavar="TEMPLATE", help="The prompt, of a row's columns; default: {prompt}")
    ] = None,
    messages: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The column of conversations, the user's turn last.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn, in the chat template.")] = False,
    adapter_column: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Names each row's adapter: a run, a folder, a registry's; empty: none."),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="NAME", help="Answers rows that name none; default: the base does.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A folder, hub name or run; default: the first adapter's.")
    ] = None,
    nf4: Annotated[
        bool | None, typer.Option("--nf4/--no-nf4", help="The base in NF4; default: as the first adapter's run.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(metavar="FILE", help="For all rows; default: each adapter's own.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of an answer; default: 128.", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: 0, greedy.", min=0)] = None,
    top_p: Annotated[float | None, typer.Option(help="Default: 1, all tokens.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Default: 0, all tokens.", min=0)] = None,
    seed: Annotated[int | None, typer.Option(help="With the row's number: of its draws; default: 0.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="An answer ends before it; repeated.")] = None,
    limit: Annotated[int | None, typer.Option(help="The first rows alone.", min=1)] = None,
    workers: Annotated[
        int | None, typer.Option(help="Each holds the base; default: one a GPU, or one a machine.", min=1)
    ] = None,
    slots: Annotated[int | None, typer.Option(help="Answers a worker writes at once.", min=1)] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of prompt and answer; default: up to 4096.")] = None,
    part_rows: Annotated[int, typer.Option(help="Rows that a kill loses at most, of each worker.", min=1)] = 256,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away what FILE or its parts hold.")] = False,
    registry: RegistryUri = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Answer every row of a file, with any mix of adapters.

    One base a worker answers for all adapters in one batch, on Ray Data. FILE has one line a row, in the rows' order:
    row, input, adapter, answer, finish_reason, prompt_tokens, tokens, error. A row that cannot be answered (too long,
    an unknown adapter) has its error in its own line.

    Whatever is killed, the same command goes on: finished parts are kept in FILE.parts, and FILE appears when it is
    whole, with FILE.manifest.json beside it.

    ftray generate prompts.csv --out answers.jsonl --adapter runs/cheese --chat --prompt "{question}"

    ftray generate prompts.jsonl --out answers.jsonl --messages messages --adapter-column tenant --registry s3://r
    """
    from ftray.cli.generate import generate_command

    generate_command(
        prompts,
        out,
        prompt=prompt,
        messages=messages,
        chat=chat,
        decoding={
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "seed": seed,
            "stop": stop,
        },
        limit=limit,
        registry=registry,
        as_json=as_json,
        verbose=verbose,
        adapter=adapter,
        adapter_column=adapter_column,
        base=base,
        quantized=nf4,
        chat_template=chat_template,
        workers=workers,
        slots=slots,
        context=context,
        part_rows=part_rows,
        overwrite=overwrite,
    )


@app.command()
def create(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A YAML file, the folder of one begun, or a recipe: cheese-expert.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Keys to change, dotted: rows=100 teacher.model=NAME", show_default=False
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the first call, and send nothing.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the recipe's JSON schema, for editors.")] = False,
    as_json: Json = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks of errors.")] = False,
) -> None:
    """Make rows to learn from, by a teacher model at an OpenAI-compatible endpoint.

    `ask: instructions` has it make up questions with answers about topics, several a call; `ask: answers` has it answer
    given prompts. Rows are filtered: form, length, refusals, language, test files, exact and near duplicates; what was
    refused is counted and kept, with its reason.

    Every answer is written to a journal before it is judged, so that whatever is killed, the same command goes on and
    pays nothing twice. Filters, rows and budget may be changed afterwards: the journal is judged again. The key is
    taken from FTRAY_API_KEY or OPENAI_API_KEY. Exit codes: 0 all rows, 2 a mistake in what you gave, 3 fewer rows
    (budget, failures), 75 stopped.

    ftray create cheese-expert teacher.url=https://host/v1 teacher.model=NAME rows=200
    """
    if schema:
        from ftray.config.creation import Creation

        _print_json(Creation.model_json_schema())
        return
    if recipe is None:
        raise UsageError("Missing argument 'RECIPE'.")
    from ftray.cli.create import create_command

    create_command(recipe, overrides or [], dry=dry_run, as_json=as_json)


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
    absolute or URIs, since Ray starts elsewhere.

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


@app.command()
def doctor(
    run: RunName,
    mend: Annotated[bool, typer.Option("--mend", help="Do what is proposed; without it nothing is touched.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Look a run's folder over, and mend what a crash left.

    Every file with a digest is read. Found are: commits and data that were never completed, damaged commits (the older
    one is used), a last line of metrics.jsonl that was torn off, a damaged, half or outdated artefact, parts of files,
    leases of processes that are gone, a run.yaml that cannot be read. With --mend, what is damaged is moved to
    RUN/set-aside, and only what never counted is removed; a run that is being written right now is not touched. The
    exit code is 0 where the same command goes on, and 3 where it does not.

    ftray doctor s3://bucket/runs/cheese --mend
    """
    from ftray.cli.doctor import doctor_command

    if code := doctor_command(run, mends=mend, as_json=as_json):
        raise typer.Exit(code)


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


# --------------------------------------------------------------------------------------------------------- on a cluster

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        "-a",
        metavar="URL",
        help="The dashboard's: http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine.",
    ),
]
TokenFile = Annotated[
    str | None,
    typer.Option(
        "--token-file",
        metavar="FILE",
        help="The cluster's token; default: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.",
    ),
]


@app.command()
def submit(
    command: Annotated[
        list[str],
        typer.Argument(metavar="-- COMMAND…", help="train, tune, evaluate, generate, serve or data, with its words."),
    ],
    address: Address = None,
    token_file: TokenFile = None,
    name: Annotated[str | None, typer.Option(help="Of the job; default: the run's name.")] = None,
    upload_data: Annotated[
        bool, typer.Option("--upload-data", help="Ship data that are only here, up to 100 MiB in all.")
    ] = False,
    shared: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER",
            help="The hosts have this folder at the same path (NFS); repeated. Also FTRAY_SHARED, with colons.",
        ),
    ] = None,
    with_ftray: Annotated[
        bool, typer.Option("--with-ftray", help="Ship this ftray, for images without it; its libraries must be there.")
    ] = False,
    pip: Annotated[
        list[str] | None,
        typer.Option(metavar="PACKAGE", help="Ray installs it for the job (runtime_env's `pip`); repeated."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=VALUE]", help="A variable for the job; repeated. Secrets are refused."),
    ] = None,
    cpus: Annotated[
        float | None, typer.Option(help="That the command itself needs, beside its workers.", min=0)
    ] = None,
    gpus: Annotated[float | None, typer.Option(help="The same of GPUs: for evaluate.", min=0)] = None,
    memory_gib: Annotated[float | None, typer.Option(help="The same of memory.", min=0)] = None,
    stop_seconds: Annotated[
        int, typer.Option(help="How long a job that is stopped may take to commit before it is killed.", min=3)
    ] = 600,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Leave once it is submitted.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent; ask no cluster.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a command on a Ray cluster, as a job, and show its log.

    The run file travels with the job. Data and output must lie where the cluster's hosts find them: a URI (s3://…), or
    a folder that all of them share. A path that is only here is refused before anything is sent, or shipped with
    --upload-data. Variables that the run file mentions go along, secrets never: the hosts must bring those.

    The exit code is the command's own: 0 finished, 2 a mistake in what you gave, 3 the run failed, 75 stopped. The same
    command again goes on where the run left off; while a job is at work in a run's folder, a second one is refused.

    Ctrl-C on a terminal asks whether to stop the job or to leave it running. Elsewhere Ctrl-C and SIGTERM leave the job
    running, with exit code 130 or 143. A lost connection is taken up again for ten minutes.

    ftray submit -a http://head:8265 -- train cheese.yaml output=s3://team/runs/cheese train.steps=500

    ftray submit -a http://head:8265 --shared /nfs --no-wait -- tune search.yaml output=/nfs/searches/one
    """
    from ftray.cli.submit import submit_command

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    code = submit_command(
        command,
        commands,
        address=address,
        token_file=token_file,
        name=name,
        shared=shared or [],
        upload_data=upload_data,
        with_ftray=with_ftray,
        pip=pip or [],
        env=env or [],
        cpus=cpus,
        gpus=gpus,
        memory_gib=memory_gib,
        stop_seconds=stop_seconds,
        wait=not no_wait,
        dry_run=dry_run,
        as_json=as_json,
        verbose=verbose,
    )
    if code:
        raise typer.Exit(code)


runs = typer.Typer(
    help="Runs of a cluster and in folders: what they do, their logs, their end.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)
app.add_typer(runs, name="runs")
OneRun = Annotated[str, typer.Argument(metavar="RUN", help="A run's name or folder, or a job's id.")]


@runs.command("list")
def list_runs(
    folders: Annotated[
        list[str] | None,
        typer.Argument(metavar="FOLDER", help="Runs' folders, or folders of runs; paths or any fsspec URIs."),
    ] = None,
    address: Address = None,
    token_file: TokenFile = None,
    every: Annotated[bool, typer.Option("--all", help="More than the 40 that moved last.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Every run once, those that moved last first: state, step, loss, job, folder.

    Without FOLDER: the runs of the cluster's jobs. With it: the runs in these folders too; and if no cluster is named
    (--address, RAY_API_SERVER_ADDRESS, RAY_ADDRESS), those alone.

    States: waiting (its job has not begun), running, finished, stopped (it committed first), failed (with its exit
    code), interrupted (it ended without a word). From what is stopped, failed or interrupted the same command goes on.
    Of a search, steps are trials.
    """
    from ftray.cli.runs import list_command

    list_command(folders or [], address=address, token_file=token_file, every=every, as_json=as_json)


@runs.command("show")
def show_run(
    run: OneRun, address: Address = None, token_file: TokenFile = None, as_json: Json = False, verbose: Verbose = False
) -> None:
    """One run: where it stands, its job and how that ended."""
    from ftray.cli.runs import show_command

    show_command(run, address=address, token_file=token_file, as_json=as_json)


@runs.command("logs")
def logs_of_run(
    run: OneRun,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until it is over; the exit code is then the job's.")
    ] = False,
    address: Address = None,
    token_file: TokenFile = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """The log of a run's newest job. With -f as `ftray submit` shows it, Ctrl-C included."""
    from ftray.cli.runs import logs_command

    code = logs_command(run, address=address, token_file=token_file, follow=follow, as_json=as_json, verbose=verbose)
    if code:
        raise typer.Exit(code)


@runs.command("stop")
def stop_run(
    run: OneRun,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Ask, and leave.")] = False,
    address: Address = None,
    token_file: TokenFile = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Ask a run to commit and end, and tell when it has.

    A job of `ftray submit` may take its --stop-seconds for that (600 s). One of plain `ray job submit` is killed after
    3 s, unless its runtime environment has RAY_JOB_STOP_WAIT_TIME_S: then it goes on from the commit before.
    """
    from ftray.cli.runs import stop_command

    stop_command(run, address=address, token_file=token_file, wait=not no_wait, as_json=as_json)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print this one.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, or print one.

    To start a run file of your own: ftray recipes NAME > run.yaml
    """
    from ftray.cli.recipes import list_recipes, list_search_recipes, recipe_text
    from ftray.cli.words import facts

    if name:
        print(recipe_text(name), end="")
    elif as_json:
        _print_json(dict([*list_recipes(), *list_search_recipes()]))
    else:
        print(f"{facts(list_recipes(), indent=0)}\n\nfor ftray tune:\n{facts(list_search_recipes(), indent=0)}")


def _load(run: str, overrides: list[str] | None) -> Any:
    from ftray.config import load_run

    return load_run(run, overrides or [])


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False))


# ------------------------------------------------------------------------------------------------------------ the end


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `ftray` script: runs a command and leaves with its exit code."""
    sys.exit(call(sys.argv[1:] if arguments is None else arguments))


def call(arguments: list[str]) -> int:
    """Run a command line; returns the exit code. What the user can mend is told in a few lines on standard error; a bug
    goes through, with its traceback."""
    try:
        return app(arguments, standalone_mode=False) or EXIT_OK
    except UsageError as error:
        error.show()
        return EXIT_USER
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has left
        sys.stderr.close()
        return EXIT_OK
    except Exception as error:
        from ftray.storage import explained

        told = error if isinstance(error, FtrayError) else explained(error)
        if told:
            if "--verbose" in arguments or "-v" in arguments:
                import traceback

                traceback.print_exc()
            print(_told(told), file=sys.stderr)
            return told.exit_code
        print("This is a bug in ftray; please report it, with the command and what follows.\n", file=sys.stderr)
        raise


def _told(error: FtrayError) -> str:
    if isinstance(error, RunStopped) or error.exit_code == EXIT_STOPPED:
        return str(error)
    return f"error: {error}" if error.exit_code != EXIT_BUG else str(error)


if __name__ == "__main__":
    main()
