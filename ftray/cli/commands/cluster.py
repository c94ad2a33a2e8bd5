"""Commands about clusters, and about what a crash left."""

from __future__ import annotations

from typing import Annotated

import typer

from ftray.cli.app import Json, RunName, Verbose, app

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


OneRun = Annotated[str, typer.Argument(metavar="RUN", help="A run's file, folder or name, or a job's id.")]


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
    Of a search, steps are trials. ? is what only a folder knows that cannot be read from here; below stands why.
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
