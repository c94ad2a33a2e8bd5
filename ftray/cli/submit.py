"""`ftray submit`: a command as a job on a cluster, followed to its end."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from ftray.errors import EXIT_OK, UserError
from ftray.jobs.commandline import CommandLine
from ftray.jobs.package import COMMANDS, Package, pack, variables

if TYPE_CHECKING:
    from ftray.jobs.cluster import Cluster

SHARED = "FTRAY_SHARED"

Say = Callable[[str], None]


def submit_command(
    arguments: Sequence[str],
    commands: dict[str, Any],
    *,
    address: str | None,
    token_file: str | None,
    name: str | None,
    shared: Sequence[str],
    upload_data: bool,
    with_ftray: bool,
    pip: Sequence[str],
    env: Sequence[str],
    cpus: float | None,
    gpus: float | None,
    memory_gib: float | None,
    stop_seconds: int,
    wait: bool,
    dry_run: bool,
    as_json: bool,
    verbose: bool,
) -> int:
    """Returns the exit code of the job; 0 once it is submitted, without `wait`. `commands` are the command line's own,
    by name."""
    from ftray.jobs.luggage import Luggage

    say = _say(as_json)
    folders = [*shared, *filter(None, os.environ.get(SHARED, "").split(os.pathsep))]
    package = pack(_parsed(arguments, commands), Luggage(upload=upload_data, shared=folders))
    found, theirs = variables(package, env, os.environ)
    for path in dict.fromkeys(package.luggage.theirs):
        say(f"{path}: taken as a path of the cluster, which all its hosts must see")
    for variable in theirs:
        say(f"{variable} may be a secret and stays here: the cluster's hosts must bring it")
    program = ["python", "-m", "ftray.cli.main"] if with_ftray else ["ftray"]
    entrypoint = package.line.shell(program)
    plan = {
        "entrypoint": entrypoint,
        "files": sorted(package.luggage.files),
        "runs": [{"name": run, "folder": folder} for run, folder in package.runs],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_seconds), **found},
    }
    if dry_run:
        print(json.dumps(plan, indent=2) if as_json else _plan_text(plan))
        return EXIT_OK

    from ftray.jobs.cluster import Cluster

    cluster = Cluster.open(address, token_file)
    _refuse_twice(cluster, package)
    job = f"{name or package.name}-{secrets.token_hex(3)}"
    resources = {
        "entrypoint_num_cpus": cpus,
        "entrypoint_num_gpus": gpus,
        "entrypoint_memory": int(memory_gib * 2**30) if memory_gib else None,
    }
    with tempfile.TemporaryDirectory(prefix="ftray-submit-") as staged:
        package.luggage.lay_out(Path(staged))
        runtime_env: dict[str, Any] = {"env_vars": plan["env_vars"]}
        if package.luggage.files:
            runtime_env["working_dir"] = staged
        if with_ftray:
            runtime_env["py_modules"] = _own_packages()
        if pip:
            runtime_env["pip"] = list(pip)
        with _rays_silence(verbose):
            cluster.submit(
                entrypoint,
                job,
                runtime_env=runtime_env,
                metadata=_metadata(package, name or package.name),
                **{key: value for key, value in resources.items() if value is not None},
            )
    if as_json:
        print(json.dumps({"kind": "submitted", "job": job, **plan}), flush=True)
    else:
        say(f"submitted as {job}: {entrypoint}")
    if not wait:
        say(f"`ftray runs logs -f {job}` follows it, `ftray runs stop {job}` lets it commit and end")
        return EXIT_OK
    return follow(cluster, job, as_json=as_json, verbose=verbose)


def _parsed(arguments: Sequence[str], commands: dict[str, Any]) -> CommandLine:
    """The command line, checked by the command itself. Raises UserError, and its own usage errors."""
    if arguments and arguments[0] == "ftray":  # a copied line
        arguments = arguments[1:]
    if not arguments or arguments[0] not in COMMANDS:
        what = f"ftray {arguments[0]} is no job for a cluster" if arguments else "submit what?"
        raise UserError(what, hint=f"ftray submit [OPTIONS] -- train RUN.yaml; or one of: {', '.join(COMMANDS)}")
    command = commands[arguments[0]]
    command.make_context(arguments[0], list(arguments[1:]))
    takes_value = {
        option: not getattr(parameter, "is_flag", False)
        for parameter in command.params
        for option in [*getattr(parameter, "opts", []), *getattr(parameter, "secondary_opts", [])]
        if option.startswith("-")
    }
    line = CommandLine.parse(arguments, takes_value)
    if line.name == "serve":
        from serve.config import load_serve

        for word in line.positionals[:1]:
            load_serve(word.text, line.overrides)
    return line


def _metadata(package: Package, name: str) -> dict[str, str]:
    from ftray import __version__
    from ftray.jobs.listing import COMMAND, FOLDERS, NAME

    return {
        NAME: name,
        COMMAND: package.line.shell(["ftray"]),
        FOLDERS: json.dumps(package.runs),
        "ftray.version": __version__,
    }


def _refuse_twice(cluster: Cluster, package: Package) -> None:
    """Raises UserError while another job fills one of the folders: two would overwrite each other's commits."""
    from ftray.jobs.listing import runs_of

    folders = {folder.rstrip("/") for _, folder in package.runs}
    for job in cluster.jobs():
        if not job.is_over and (both := folders & {folder.rstrip("/") for _, folder in runs_of(job)}):
            raise UserError(
                f"job {job.id} is at work in this folder already",
                where=min(both),
                hint=f"`ftray runs logs -f {job.id}` follows it, `ftray runs stop {job.id}` lets it commit and end",
            )


def _own_packages() -> list[str]:
    """The folders of the packages that a wheel of ftray holds."""
    import importlib.util

    found = [importlib.util.find_spec(name) for name in ("ftray", "serve")]
    return [str(Path(spec.origin).parent) for spec in found if spec is not None and spec.origin]


def _plan_text(plan: dict[str, Any]) -> str:
    from ftray.cli.words import facts

    pairs = [("command", plan["entrypoint"])]
    pairs += [("run", f"{run['name']} in {run['folder']}") for run in plan["runs"]]
    pairs.append(("files", "\n".join(plan["files"]) or "none"))
    pairs.append(("variables", "\n".join(f"{name}={value}" for name, value in plan["env_vars"].items())))
    return facts(pairs, indent=0)


def _say(as_json: bool) -> Say:
    """Our own lines, beside those of the job's log."""

    def say(text: str) -> None:
        print(json.dumps({"kind": "status", "text": text}) if as_json else text, flush=True)

    return say


@contextmanager
def _rays_silence(verbose: bool) -> Iterator[None]:
    """Keep Ray's lines about packages off the console."""
    import logging

    disabled = logging.root.manager.disable
    logging.disable(disabled if verbose else logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


# ------------------------------------------------------------------------------------------------------------ following


def follow(cluster: Cluster, job: str, *, as_json: bool, verbose: bool) -> int:
    """Show a job's log until it is over; returns its exit code.

    Ctrl-C on a terminal asks what is meant; anywhere else it leaves, as SIGTERM does: the job goes on. Leaving is no
    success: 128 and the signal's number.
    """
    from ftray.jobs.follow import Follower, OwnLines
    from ftray.jobs.outcome import outcome

    say = _say(as_json)
    own: Callable[[str], str] = (lambda text: text) if verbose else OwnLines()
    follower = Follower(cluster, job)
    stopping = False
    with _rays_silence(verbose), _signals() as came:
        follower.start()
        for event in follower.events():
            if came:
                meant = "detach" if stopping else _meant(job, came[0])
                if meant == "detach":
                    say(f"{job} goes on; `ftray runs logs -f {job}` follows it again, `ftray runs stop {job}` ends it")
                    return 128 + came[0]
                if meant == "stop":
                    stopping = True
                    cluster.stop(job)
                    say(f"asked {job} to commit and end; Ctrl-C leaves without waiting for it")
                came.clear()
            if event is None:
                continue
            kind, what = event
            if kind == "text":
                print(own(what), end="", flush=True)
            elif kind == "lost":
                say(f"{what}; trying again, and the job goes on")
            elif kind == "error":
                raise what
            elif kind == "over":
                if isinstance(own, OwnLines):
                    print(own.end(), end="", flush=True)
                found = outcome(what)
                if as_json:
                    print(
                        json.dumps({"kind": "outcome", "job": job, "status": what.status, "exit_code": found.exit_code})
                    )
                else:
                    print(found.text, file=sys.stderr if found.exit_code else sys.stdout)
                return found.exit_code
    raise AssertionError


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that came; a second Ctrl-C leaves at once."""
    came: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if came:
            os._exit(128 + number)
        came.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _meant(job: str, number: int) -> Literal["stop", "detach", "continue"]:
    """What a signal means: asked on a terminal. Elsewhere the safe thing: nothing is lost where the job goes on."""
    if number == signal.SIGTERM or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return "detach"
    print(f"\n{job} is running: [s]top it with a commit, [d]etach and let it go on, [c]ontinue watching? [d] ", end="")
    sys.stdout.flush()
    answer = sys.stdin.readline().strip().lower()
    return "stop" if answer.startswith("s") else "continue" if answer.startswith("c") else "detach"
