"""`ftray doctor`: what a crash left in a run's folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftray.cli.words import json_text
from ftray.config import load_run
from ftray.errors import EXIT_OK, EXIT_RUN
from ftray.manifest import filesystem
from ftray.redact import redact

if TYPE_CHECKING:
    from ftray.train.doctor import Diagnosis


def doctor_command(run: str, *, mends: bool, as_json: bool) -> int:
    """Returns the exit code."""
    from ftray.train.doctor import examine, mend

    before = examine(folder_of(run))
    after = mend(before) if mends else before
    if as_json:
        print(json_text(to_json(before, after, mends=mends), indent=2, ensure_ascii=False))
    else:
        print(describe(before, after, mends=mends))
    return EXIT_OK if after.goes_on else EXIT_RUN


def folder_of(run: str) -> str:
    """The folder that a run's name, file or folder means; a folder need not have a run.yaml that can be read."""
    if not run.endswith((".yaml", ".yml")):
        fs, path = filesystem(run)
        if "://" in run or fs.isdir(path):
            return run
    return load_run(run).folder


def to_json(before: Diagnosis, after: Diagnosis, *, mends: bool) -> dict[str, Any]:
    return {
        "folder": redact(before.folder),
        "running": before.running,
        "findings": [
            {
                "where": redact(finding.where),
                "what": finding.what,
                "remedy": finding.remedy,
                "hinders": finding.hinders,
                "can_be_mended": finding.mend is not None,
                "mended": mends and finding.mend is not None,
            }
            for finding in before.findings
        ],
        "goes_on": after.goes_on,
        "goes_on_from": after.goes_on_from,
        "finished": after.finished,
    }


def describe(before: Diagnosis, after: Diagnosis, *, mends: bool) -> str:
    lines = [redact(before.folder)]
    if before.running:
        lines.append(f"being written right now, by {before.running}: what follows may be on its way")
    for finding in before.findings:
        done = "done: " if mends and finding.mend else ""
        lines += [f"- {redact(finding.where)}", f"  {finding.what}", f"  → {done}{finding.remedy}"]
    if not before.findings:
        lines.append("nothing is wrong here")
    elif not mends and any(finding.mend for finding in before.findings):
        lines.append("`ftray doctor --mend` does what stands after the arrows")
    if after.running:
        lines.append("the same command must wait until that process has ended")
    elif not after.goes_on:
        lines.append("the same command does not go on as it is")
    elif after.finished:
        lines.append(f"the run is finished, at step {after.goes_on_from:,}")
    else:
        at = f"step {after.goes_on_from:,}" if after.goes_on_from is not None else "the beginning: there is no commit"
        lines.append(f"the same command goes on, from {at}")
    return "\n".join(lines)
