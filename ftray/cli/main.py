"""The command line. Each command is a few lines in `commands/` and a module of its own, imported when it is called.

`--help`, `check` and every mistake in a run file answer within a second, so nothing here imports torch or Ray.
"""

from __future__ import annotations

import os
import sys

import typer

from ftray.cli.app import UsageError, app
from ftray.cli.commands import artefacts, cluster, evaluation, runs  # noqa: F401 - each adds its commands to `app`
from ftray.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED, EXIT_USER, FtrayError, RunStopped
from ftray.session import THREADS


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `ftray` script: runs a command and leaves with its exit code."""
    for name, value in THREADS.items():  # for what this process computes itself
        os.environ.setdefault(name, value)
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
        return EXIT_INTERRUPTED
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
