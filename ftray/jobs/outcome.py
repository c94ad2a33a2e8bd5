"""What a job ended as, for a shell: ftray's own exit codes come through, and a job that was stopped is no success."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from ftray.errors import EXIT_BUG, EXIT_OK, EXIT_RUN, EXIT_STOPPED, EXIT_USER
from ftray.jobs.cluster import Job


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    text: str
    """A line for the user."""


_TEXTS = {
    EXIT_BUG: "it ended with an unexpected error",
    EXIT_USER: "a mistake in what was given; the log says which",
    EXIT_RUN: "the run failed; the log says why, and the same command goes on from the last commit",
    126: "the cluster's hosts cannot run the command",
    127: "the cluster's hosts have no such command; --with-ftray ships ftray along",
}


def outcome(job: Job) -> Outcome:
    """Of a job that is over.

    Ray tells of a stopped job no exit code, and `ray job submit` calls it a success. Exit codes of the command are
    passed on; where there was no command (no runtime environment, no place, a lost head) the run failed.
    """
    if job.status == "SUCCEEDED":
        return Outcome(EXIT_OK, f"{job.id} finished")
    if job.status == "STOPPED" or job.exit_code == EXIT_STOPPED:
        return Outcome(EXIT_STOPPED, f"{job.id} was stopped; the same command goes on where it left off")
    code = job.exit_code
    if code is None:
        lines = [line.strip() for line in job.message.splitlines() if line.strip()]
        return Outcome(EXIT_RUN, f"{job.id} did not run: {' '.join(lines[:3])[:600] or 'Ray says no more'}")
    number = -code if code < 0 else code - 128 if 128 < code < 160 else 0
    if number:
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        memory = ", as when a host has no memory left" if number == signal.SIGKILL else ""
        return Outcome(128 + number, f"{job.id} was ended by {name}{memory}; the same command goes on")
    return Outcome(code, f"{job.id} failed with exit code {code}: {_TEXTS.get(code, 'the log says why')}")
