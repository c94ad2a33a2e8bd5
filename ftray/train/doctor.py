"""What a crash left in a run's folder, and how it is mended. The folder is a path or any fsspec URI.

Nothing that could count is ever deleted: what is damaged is set aside, in RUN/set-aside/, and only what never counted
(parts, folders without a manifest, stale leases) is removed.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from ftray.config import Run, load_run
from ftray.errors import ArtefactError, ConfigError, FtrayError, RunError
from ftray.manifest import MANIFEST, atomic_write, filesystem, is_local, join, read_manifest, read_text, wrong_files
from ftray.storage import make_folder, reached
from ftray.train import commits
from ftray.train.artefact import FACTS, place_of
from ftray.train.commits import Progress
from ftray.train.lease import holders

SET_ASIDE = "set-aside"
_PART = re.compile(r"\.[0-9a-f]{8}(\.old)?\.part$")
"""What `atomic_write`, shards and staged folders are called until they are finished."""


@dataclass(frozen=True)
class Finding:
    where: str
    """A path or URI."""
    what: str
    remedy: str
    """What mends it, or who."""
    mend: Callable[[], None] | None = None
    """None: not ours to mend, or nothing to do."""
    hinders: bool = False
    """The same command does not go on as long as it is so."""


@dataclass
class Diagnosis:
    folder: str
    running: str | None = None
    """Who writes the folder right now."""
    goes_on_from: int | None = None
    """Step of the newest whole commit; None: from the beginning."""
    finished: bool = False
    """That commit is the run's last."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def goes_on(self) -> bool:
        """Whether the same command would."""
        return self.running is None and not any(finding.hinders for finding in self.findings)


def examine(folder: str) -> Diagnosis:
    """Look a run's folder over; every file of it that has a digest is read. Raises ConfigError where there is no such
    folder, RunError where the store cannot be reached."""
    fs, root = filesystem(folder)
    with reached(folder):
        if not fs.exists(root):
            raise ConfigError("there is no such folder", where=folder, hint="give a run's folder, or its run file")
        if fs.isfile(root):
            raise ConfigError("this is a file, not a run's folder", where=folder)
    found = Diagnosis(folder)
    for holder in holders(folder):
        where, who = join(folder, holder.name), holder.who
        if holder.alive:
            found.running = found.running or who
        else:
            found.findings.append(
                Finding(where, f"the lease of {who}, which is gone", "remove it", partial(_remove, where))
            )
    run, problem = _run_file(folder)
    found.findings += problem
    newest, whole = _commits(folder, found)
    found.findings += _metrics(folder, newest)
    found.findings += _artefact(folder, run, newest, whole)
    found.findings += _prepared(folder)
    found.findings += _parts(folder)
    return found


def mend(found: Diagnosis) -> Diagnosis:
    """Mend what can be, and look again. Raises RunError where somebody writes the folder."""
    if found.running:
        raise RunError(
            f"this run is being written right now, by {found.running}: nothing was touched",
            where=found.folder,
            hint="stop it first, or wait until it has ended",
        )
    for finding in found.findings:
        if finding.mend:
            with reached(finding.where):
                finding.mend()
    return examine(found.folder)


# ------------------------------------------------------------------------------------------------------------- looking


def _run_file(folder: str) -> tuple[Run | None, list[Finding]]:
    where = join(folder, "run.yaml")
    try:
        return load_run(where), []
    except ConfigError as error:
        remedy = "start the run with the file that you wrote: that writes this one anew"
        return None, [Finding(where, error.what, remedy, hinders=True)]
    except (OSError, ValueError) as error:
        return None, [Finding(where, f"it cannot be read: {error}", "start the run with your own file", hinders=True)]


def _commits(folder: str, found: Diagnosis) -> tuple[Progress | None, set[int]]:
    """Progress of the newest whole commit; the steps of all that are whole."""
    newest: Progress | None = None
    whole: set[int] = set()
    for step in commits.steps_of(folder):
        where = commits.place_of(folder, step)
        try:
            manifest = read_manifest(where)
            wrong = [] if manifest is None else list(wrong_files(where, manifest["files"]))
            if manifest is not None and not wrong:
                newest = Progress.of(json.loads(read_text(join(where, "state.json")))["progress"])
                whole.add(step)
        except (ArtefactError, ValueError, KeyError, TypeError, FileNotFoundError) as error:
            manifest, wrong = {}, [error.what if isinstance(error, FtrayError) else f"state.json: {error}"]
        if manifest is None:
            what = "a commit that was never completed: it has no manifest, so it does not count"
            found.findings.append(Finding(where, what, "remove it", partial(_remove, where)))
        elif wrong:
            what = f"a damaged commit: {'; '.join(wrong)}"
            remedy = f"set it aside, in {SET_ASIDE}; a run passes it over, with a warning"
            found.findings.append(Finding(where, what, remedy, partial(_set_aside, folder, where)))
    found.goes_on_from = newest.step if newest else None
    found.finished = bool(newest and newest.finished)
    return newest, whole


def _metrics(folder: str, newest: Progress | None) -> Iterator[Finding]:
    where = join(folder, "metrics.jsonl")
    fs, path = filesystem(where)
    with reached(where):
        if not fs.exists(path):
            return
        content = bytes(fs.cat_file(path))
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        cut = partial(_write, where, content[:whole])
        yield Finding(where, f"the last line was torn off after {len(content) - whole:,} bytes", "cut it off", cut)
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            json.loads(line)
        except ValueError:
            yield Finding(where, f"line {number:,} is no JSON", "none: the report leaves it out")
    if newest and newest.metrics_bytes > len(content):
        lost = newest.metrics_bytes - len(content)
        what = f"{lost:,} bytes fewer than when step {newest.step:,} was committed: lines were lost"
        yield Finding(where, what, "none: the run goes on, its report has a gap")


def _artefact(folder: str, run: Run | None, newest: Progress | None, whole: set[int]) -> Iterator[Finding]:
    where = place_of(folder)
    fs, path = filesystem(where)
    ended, again = bool(newest and newest.finished), "the run writes it at its end"
    meant = source = 0
    if newest:
        meant = newest.meant(run is None or run.train.keep_best)
        source = meant if meant in whole else newest.step  # as the loop chooses
        if ended:
            again = f"the same command writes it anew, from the commit of step {source:,}"
    with reached(where):
        there = fs.exists(path)
    if not there:
        if ended:
            yield Finding(where, "the run ended, and its artefact is missing", again)
        return
    aside = partial(_set_aside, folder, where)
    try:
        facts = json.loads(read_text(join(where, FACTS)))
        wrong, step = list(wrong_files(where, facts["files"])), facts["step"]
    except FileNotFoundError:
        yield Finding(where, f"the artefact is half: it has no {FACTS}", f"set it aside; {again}", aside)
        return
    except (ValueError, KeyError, TypeError, FtrayError) as error:
        yield Finding(where, f"{FACTS} of the artefact is damaged: {error}", f"set it aside; {again}", aside)
        return
    if wrong:
        yield Finding(where, f"a damaged artefact: {'; '.join(wrong)}", f"set it aside; {again}", aside)
    elif newest and run and not (ended and step in (meant, source)):
        what = f"the artefact is of step {step:,}, and the commits stand at step {newest.step:,}"
        what += f", the best at {source:,}" if source != newest.step else ""
        yield Finding(where, what, f"set it aside; {again}", aside)


def _prepared(folder: str) -> Iterator[Finding]:
    """Of the data prepared for this run, and what lies beside it in RUN/data."""
    named: str | None = None
    where = join(folder, "data.json")
    try:
        named = json.loads(read_text(where))["uri"]
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        yield Finding(where, f"it cannot be read: {error}", "remove it: a run writes it anew", partial(_remove, where))
    own = _children(join(folder, "data"))
    for place in dict.fromkeys([*([named] if named else []), *own]):
        try:
            manifest = read_manifest(place)
            wrong = [] if manifest is None else list(wrong_files(place, manifest["files"]))
        except ArtefactError as error:
            manifest, wrong = {}, [error.what]
        if wrong:
            remedy = f"set it aside, in {SET_ASIDE}; the same command prepares the data again"
            what = f"damaged prepared data: {'; '.join(wrong)}"
            yield Finding(place, what, remedy, partial(_set_aside, folder, place), hinders=place == named)
        elif manifest is None and place in own:
            if named is None:
                yield Finding(place, "data whose preparation broke off", "none: the same command completes it")
            elif not _same(place, named):
                what = "parts of data whose preparation broke off, and which this run does not use"
                yield Finding(place, what, "remove them", partial(_remove, place))


def _parts(folder: str) -> Iterator[Finding]:
    """Files and folders that never got their names."""
    if not is_local(folder):
        return  # an object store's put leaves none
    places = [folder, *(join(folder, name) for name in ("commits", "data"))]
    for place in [*places, *_children(join(folder, "data"))]:
        for child in _names(place):
            if _PART.search(child):
                where = join(place, child)
                yield Finding(where, "half of a file or folder, left by a crash", "remove it", partial(_remove, where))


def _same(a: str, b: str) -> bool:
    return filesystem(a)[1].rstrip("/") == filesystem(b)[1].rstrip("/")


def _names(where: str) -> list[str]:
    """What is directly in a folder; nothing if there is none."""
    fs, path = filesystem(where)
    with reached(where):
        try:
            found = fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(name for entry in found if (name := entry.rstrip("/").rsplit("/", 1)[-1]))


def _children(where: str) -> list[str]:
    """The folders in a folder."""
    fs, path = filesystem(where)
    return [join(where, name) for name in _names(where) if not _PART.search(name) and fs.isdir(f"{path}/{name}")]


# ------------------------------------------------------------------------------------------------------------- mending


def _remove(where: str) -> None:
    fs, path = filesystem(where)
    fs.rm(path, recursive=True)


def _write(where: str, content: bytes) -> None:
    fs, path = filesystem(where)
    if is_local(where):
        with atomic_write(path) as file:
            file.write(content)
    else:
        fs.pipe_file(path, content)


def _set_aside(folder: str, where: str) -> None:
    """Move it to RUN/set-aside, under a name that is free. Its manifest goes first, so that half of it never counts."""
    fs, path = filesystem(where)
    _, aside = filesystem(join(folder, SET_ASIDE))
    target = f"{aside}/{path.rstrip('/').rsplit('/', 1)[-1]}-{uuid.uuid4().hex[:8]}"
    make_folder(fs, aside)
    if is_local(where):
        fs.mv(path, target, recursive=True)
        return
    for file in sorted(fs.find(path), key=lambda file: not file.endswith(f"/{MANIFEST}")):
        fs.copy(file, target + file[len(path) :])
        fs.rm_file(file)
    with suppress(FileNotFoundError):  # stores with folders of their own
        fs.rm(path, recursive=True)
