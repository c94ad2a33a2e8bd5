"""Commands that ask what runs are worth, and that make rows."""

from __future__ import annotations

from typing import Annotated

import typer

from ftray.cli.app import Json, RegistryUri, UsageError, Verbose, app, print_json


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
    kept: Annotated[
        bool, typer.Option("--kept", help="With --judge: it judges the answers that are kept; nothing else is asked.")
    ] = False,
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
        given: dict[str, object] = {"--like": like, "--metrics": metrics, "--examples": examples, "--judge": judge}
        given |= {"--judge-price": judge_price, "--kept": kept}
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
    if kept and not judge:
        raise UsageError("--kept goes with --judge")
    if limit:
        systems = [*systems, f"limit={limit}"]
    evaluate_command(
        systems,
        like=like,
        metrics=metrics,
        examples=examples,
        judge=judge,
        prices=judge_price,
        kept=kept,
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

        print_json(Creation.model_json_schema())
        return
    if recipe is None:
        raise UsageError("Missing argument 'RECIPE'.")
    from ftray.cli.create import create_command

    create_command(recipe, overrides or [], dry=dry_run, as_json=as_json)
