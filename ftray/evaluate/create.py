"""Rows made by a teacher: asked, journalled, judged in the calls' order, until there are as many as were wanted.

    OUTPUT/journal.jsonl     every answer that was paid, appended before it is judged
    OUTPUT/rows.jsonl        what passed the filters
    OUTPUT/refused.jsonl     what did not, with its reason
    OUTPUT/creation.json     counts, cost, the teacher and its sampling, SHA-256 of the rows
    OUTPUT/recipe.yaml       the recipe, resolved

Calls wait for the network and need no processor, so a few threads of one process send them: one budget, one rate, one
journal, which many workers would have to share over a network. What is judged is a function of the journal, so the
same answers give the same rows whenever they came.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftray.config.creation import Creation
from ftray.errors import RunError, RunStopped
from ftray.evaluate.calls import Call, Calls, Given, body_of, calls_of, shape_of
from ftray.evaluate.endpoint import Endpoint, EndpointRefused, answer_of
from ftray.evaluate.journal import Journal
from ftray.evaluate.questions import read_rows
from ftray.evaluate.sieve import Refusal, Sieve
from ftray.manifest import filesystem, sha256, write_text

OnEvent = Callable[[dict[str, Any]], None]
_AHEAD = 4
"""Calls that wait to be judged behind a slow one are at most this many times those in flight."""
_CHARACTERS_PER_TOKEN = 3
"""Few, so that a budget is rather kept than met."""


@dataclass
class Made:
    """What came of the answers that were judged."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Rows by why they were refused."""
    offered: int = 0
    """Rows that answers held."""
    surplus: int = 0
    """Good rows beyond those that were wanted."""
    judged: int = 0
    """Calls whose answers were."""
    failed: int = 0
    """Calls that brought none."""
    idle: int = 0
    """Calls since the last row that was kept."""


def create(
    creation: Creation, on_event: OnEvent, stopping: Callable[[], bool] = lambda: False
) -> tuple[dict[str, Any], str | None]:
    """Make the rows, or go on making them. Returns (what is kept in `creation.json`, why it ended before all rows were
    made; None: it did not). Raises ConfigError, DataError; RunStopped when `stopping`, RunError when the teacher cannot
    be asked at all. In any case the rows so far are written."""
    began = time.monotonic()
    calls = calls_of(creation)
    tests = read_rows(creation.filters.held_apart) if creation.filters.held_apart else []
    sieve = Sieve(calls.columns, calls.compared, creation.filters, tests)
    folder = Path(filesystem(creation.output)[1])
    if isinstance(calls, Given) and calls.refused:
        place, reason = calls.refused[0]
        on_event({"kind": "warning", "text": f"{len(calls.refused):,} rows hold no prompt; {place}: {reason}"})
    with Journal.opened(folder / "journal.jsonl", shape_of(creation, calls)) as journal:
        write_text(folder / "recipe.yaml", creation.to_yaml())
        work = _Work(creation, calls, sieve, journal, on_event, stopping)
        try:
            why = work.run()
        finally:
            facts = _write(creation, calls, journal, work.made, folder, time.monotonic() - began)
    return facts, why


class _Work:
    def __init__(
        self,
        creation: Creation,
        calls: Calls,
        sieve: Sieve,
        journal: Journal,
        on_event: OnEvent,
        stopping: Callable[[], bool],
    ) -> None:
        self.creation, self.calls, self.sieve, self.journal = creation, calls, sieve, journal
        self.on_event, self.stopping = on_event, stopping
        self.made = Made()
        teacher = creation.teacher
        url = teacher.url.rstrip("/")
        url = url if url.endswith("/v1") else f"{url}/v1"
        self._endpoint = Endpoint(url, teacher.model, teacher.timeout_seconds, teacher.tries)
        self._pace = _Pace(teacher.requests_per_minute, teacher.tokens_per_minute, stopping)
        self._wanted = creation.rows if creation.rows is not None else math.inf
        self._failed: dict[int, str] = {}
        """Calls of this run that brought nothing, with what happened."""
        self._flying: dict[Future[None], int] = {}
        self._reserved: dict[int, int] = {}
        """Tokens that a call in flight may cost yet, by its number."""
        self._counting = threading.Lock()
        """Over the reservations and what the journal has counted: a try is always in one of both, and never in two."""
        self._next = 0
        """The first call that is not judged yet."""
        self._launched = 0
        """The first call that was never sent."""

    def run(self) -> str | None:
        self._judge()
        if self.journal.answers:
            known = f"{len(self.journal.answers):,} answers were paid before, {len(self.made.rows):,} rows of them kept"
            self.on_event({"kind": "status", "text": f"going on: {known}"})
        pool = ThreadPoolExecutor(self.creation.teacher.at_once, thread_name_prefix="teacher")
        try:
            while (why := self._end()) is None:
                blocked = self._launch(pool)
                if not self._flying:
                    why = blocked
                    break
                done, _ = wait(self._flying, timeout=0.5, return_when=FIRST_COMPLETED)
                self._land(done)
                self._judge()
            return self._settle(why)
        finally:
            self._land_all(pool)

    def _end(self) -> str | None:
        """Why no more calls are to be sent; None: they are."""
        if self.stopping():
            raise RunStopped("stopped; every answer that was paid is kept, and the same command goes on")
        if len(self.made.rows) >= self._wanted or self._next >= len(self.calls):
            return "done"
        if self.made.idle >= self.creation.patience:
            last = next(reversed(self._failed.values()), None)
            why = f"; the last failure: {last}" if last else ""
            return f"{self.made.idle} calls in a row brought no row that could be kept (patience){why}"
        return None

    def _settle(self, why: str | None) -> str | None:
        """What is in flight at the end is paid: it is waited for, and judged where rows are still wanted."""
        if self._flying:
            self.on_event({"kind": "status", "text": f"waiting for {len(self._flying):,} calls that are on their way"})
            self._land(wait(self._flying).done)
            self._judge()
        if len(self.made.rows) >= self._wanted:
            return None
        if why != "done":
            return why
        if self._failed:
            first = next(iter(self._failed.values()))
            return f"{len(self._failed):,} calls failed; the first: {first}"
        wanted = self.creation.rows
        return None if wanted is None else f"all {len(self.calls):,} calls are answered"

    # ----------------------------------------------------------------------------------------------------------- calls

    def _launch(self, pool: ThreadPoolExecutor) -> str | None:
        """Send what may be sent now. Returns why nothing more can be, where that will not change by itself."""
        teacher = self.creation.teacher
        while len(self._flying) < teacher.at_once and not self._enough_under_way():
            number = self._launched
            while number in self.journal.answers:
                number += 1
            if number >= len(self.calls) or number - self._next >= self._ahead():
                return "done" if number >= len(self.calls) else None
            call = self.calls.call(number)
            reserve = teacher.sampling.max_tokens + math.ceil(call.characters / _CHARACTERS_PER_TOKEN)
            if (spent := self._over_budget(1, reserve)) is not None:
                return spent
            self._launched = number + 1
            with self._counting:
                self._reserved[number] = reserve
            self._flying[pool.submit(self._ask, call, reserve)] = number
        return None

    def _ahead(self) -> int:
        """Calls that may be sent and not judged yet: what fills the threads, or what patience waits for."""
        at_once = self.creation.teacher.at_once
        return min(_AHEAD * at_once, max(at_once, self.creation.patience - self.made.idle))

    def _enough_under_way(self) -> bool:
        """Whether what is on its way will do, by what calls have brought so far."""
        if self._wanted is math.inf:
            return False
        made = self.made
        each = self.calls.rows_per_call
        if made.judged >= 4:
            each = max(each * 0.1, len(made.rows) / made.judged)  # type: ignore[assignment]
        waiting = len(self.journal.answers) - made.judged
        return len(made.rows) + (len(self._flying) + waiting) * each >= self._wanted

    def _over_budget(self, more_calls: int, more_tokens: int) -> str | None:
        """Why no more may be sent, what is in flight being reckoned at the most it can cost. From any thread."""
        budget = self.creation.budget
        with self._counting:
            calls, tokens = self.journal.calls, self.journal.all_tokens
            calls_ahead, tokens_ahead = len(self._reserved) + more_calls, sum(self._reserved.values()) + more_tokens
        if budget.calls is not None and calls + calls_ahead > budget.calls:
            return f"budget.calls: {calls:,} of {budget.calls:,} calls are spent"
        if budget.tokens is not None and tokens + tokens_ahead > budget.tokens:
            return (
                f"budget.tokens: {tokens:,} of {budget.tokens:,} tokens are spent, and a call may take"
                f" {more_tokens or self.creation.teacher.sampling.max_tokens:,}"
            )
        return None

    def _count(self, entry: dict[str, Any], *, last: bool) -> None:
        """Journal what a try came to; with `last` its call has no further one to come. From any thread."""
        with self._counting:
            self.journal.append(entry)
            if last:
                self._reserved.pop(entry["call"], None)

    def _ask(self, call: Call, reserve: int) -> None:
        """In a thread: one call, until its answer is in the journal, or it is given up."""
        try:
            self._try(call, reserve)
        finally:
            with self._counting:
                self._reserved.pop(call.number, None)

    def _try(self, call: Call, reserve: int) -> None:
        body = body_of(call, self.creation.teacher, self.calls)
        began, tries = time.monotonic(), 0

        def before() -> None:
            nonlocal tries
            tries += 1
            if (spent := self._over_budget(0, 0)) is not None:  # its own tries without an answer have spent it
                raise RunError(spent)
            self._pace.wait(reserve)

        def lost(why: str) -> None:
            entry = {"call": call.number, "lost": why, "tokens": reserve}
            self._count(entry, last=tries == self.creation.teacher.tries)

        found = self._endpoint.post("chat/completions", body, before=before, lost=lost)
        answer = answer_of(found, self._endpoint)
        entry = {
            "call": call.number,
            "answer": answer.text,
            "finish_reason": answer.reason,
            "prompt_tokens": answer.prompt_tokens or math.ceil(call.characters / _CHARACTERS_PER_TOKEN),
            "tokens": answer.tokens or math.ceil(len(answer.text) / _CHARACTERS_PER_TOKEN),
            "model": str(found.get("model", "")),
            "seconds": round(time.monotonic() - began, 3),
        }
        self._count(entry, last=True)

    def _land(self, done: set[Future[None]]) -> None:
        for future in done:
            number = self._flying.pop(future)
            error = None if future.cancelled() else future.exception()
            if error is None:
                continue
            if isinstance(error, RunStopped):
                raise error
            if not isinstance(error, RunError):
                raise error
            self._failed[number] = error.what
            self.journal.append({"call": number, "failed": error.what})
            if isinstance(error, EndpointRefused):
                raise error
            self.on_event({"kind": "warning", "text": f"call {number + 1:,} failed: {error.what}"})

    def _land_all(self, pool: ThreadPoolExecutor) -> None:
        """Whatever ended the run: answers on their way are paid, so they go into the journal."""
        pool.shutdown(wait=True, cancel_futures=True)

    # --------------------------------------------------------------------------------------------------------- judging

    def _judge(self) -> None:
        """Judge what has come, in the order of the calls."""
        made = self.made
        while len(made.rows) < self._wanted:
            number = self._next
            if number in self.journal.answers:
                self._judge_answer(self.calls.call(number), self.journal.answers[number])
            elif number in self._failed:
                made.failed += 1
                made.idle += 1
            else:
                break
            self._next += 1
            self._launched = max(self._launched, self._next)
            self._tell()

    def _judge_answer(self, call: Call, entry: dict[str, Any]) -> None:
        made = self.made
        rows, broken = self.calls.rows(call, entry)
        made.judged += 1
        made.idle += 1
        if broken is not None:
            self._refuse(call, broken, entry["answer"])
        for row in rows:
            made.offered += 1
            refusal = self.sieve.judge(row)
            if refusal is not None:
                self._refuse(call, refusal, row)
            elif len(made.rows) >= self._wanted:
                made.surplus += 1
            else:
                kept = {name: row[name] for name in (*self.calls.columns, "messages") if name in row}
                made.rows.append({**kept, **call.about, "call": call.number})
                made.idle = 0

    def _refuse(self, call: Call, refusal: Refusal, what: Any) -> None:
        self.made.counts[refusal.reason] += 1
        entry = {"call": call.number, "reason": refusal.reason, "detail": refusal.detail, "row": what}
        self.made.refused.append(entry)

    def _tell(self) -> None:
        total = self.creation.rows if self.creation.rows is not None else len(self.calls)
        self.on_event(
            {"kind": "progress", "what": "create", "done": len(self.made.rows), "total": total, "unit": "rows"}
        )


class _Pace:
    """Tries are evenly apart, so that no minute has more than it may. Safe for threads."""

    def __init__(self, requests: float | None, tokens: float | None, stopping: Callable[[], bool]) -> None:
        self._requests, self._tokens, self._stopping = requests, tokens, stopping
        self._free = time.monotonic()
        self._lock = threading.Lock()

    def wait(self, tokens: int) -> None:
        """Until a try of so many tokens may be sent. Raises RunStopped."""
        apart = max(60 / self._requests if self._requests else 0, 60 * tokens / self._tokens if self._tokens else 0)
        with self._lock:
            at = max(self._free, time.monotonic())
            self._free = at + apart
        while True:
            if self._stopping():
                raise RunStopped("stopped; every answer that was paid is kept, and the same command goes on")
            left = at - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, 0.2))


# ------------------------------------------------------------------------------------------------------------- writing


def _write(
    creation: Creation, calls: Calls, journal: Journal, made: Made, folder: Path, seconds: float
) -> dict[str, Any]:
    for name, rows in (("rows.jsonl", made.rows), ("refused.jsonl", made.refused)):
        write_text(folder / name, "".join(_line(row) for row in rows))
    models = sorted({entry["model"] for entry in journal.answers.values()})
    facts: dict[str, Any] = {
        "name": creation.name,
        "rows": len(made.rows),
        "wanted": creation.rows,
        "offered": made.offered,
        "refused": dict(made.counts.most_common()),
        "surplus": made.surplus,
        "calls": {
            "answered": len(journal.answers),
            "judged": made.judged,
            "failed": made.failed,
            "lost": journal.calls - len(journal.answers),
        },
        "tokens": {"prompt": journal.prompt_tokens, "answer": journal.tokens, "lost_at_most": journal.lost_tokens},
        "teacher": {
            "url": creation.teacher.url,
            "model": creation.teacher.model,
            "called_itself": models,
            "sampling": creation.teacher.sampling.model_dump(mode="json"),
        },
        "sha256": sha256(folder / "rows.jsonl"),
        "seconds": round(seconds, 1),
        "folder": str(folder),
    }
    if isinstance(calls, Given):
        facts["prompts_refused"] = len(calls.refused)
    write_text(folder / "creation.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return facts


def _line(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        text = json.dumps(row)
    return text + "\n"
