"""What a search came to: the best trial, the trade-offs, what it cost. And the best run file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftray.config.search import Search
from ftray.manifest import join, write_text
from ftray.tune.ledger import Ledger, Trial


def outcome(search: Search, ledger: Ledger, *, budget_spent: bool = False) -> dict[str, Any]:
    """The outcome as plain values; writes SEARCH/best.yaml. `best` is None when no trial has a value.

    The best is of the trials that ran to their end, since these have an artefact; only where there is none, of all.
    """
    trials = ledger.trials
    finished = [t for t in trials if t.state == "finished"]
    ranked = best_first(finished, search) or best_first([t for t in trials if t.state != "aside"], search)
    best = ranked[0] if ranked else None
    states = [t.state for t in trials]
    found: dict[str, Any] = {
        "name": search.name,
        "folder": search.folder,
        "reason": reason(states, budget_spent),
        "metric": search.metric,
        "mode": search.modes,
        "trials": len(trials),
        **{state: states.count(state) for state in ("finished", "stopped", "aside", "open")},
        "steps": sum(t.step for t in trials),
        "target_tokens": sum(t.trained_tokens for t in trials),
        "seconds": ledger.seconds,
        "best": shown(best, search) if best else None,
        "best_file": None,
        "each": [shown(t, search) | {"curve": t.values(search.metric[0])} for t in trials],
        "front": [shown(t, search) for t in front(finished, search)] if len(search.metric) > 1 else [],
    }
    if best:
        found["best_file"] = join(search.folder, "best.yaml")
        head = f"# The best of {len(trials)} trials of search {search.name}: trial {best.name}\n"
        write_text(found["best_file"], head + search.run_of(best.parameters, best.index).to_yaml())
    return found


def reason(states: Sequence[str], budget_spent: bool) -> str:
    """Why the search is where it is: `finished`, `budget`, or `stopped` before its end."""
    return "finished" if "open" not in states else "budget" if budget_spent else "stopped"


def shown(trial: Trial, search: Search) -> dict[str, Any]:
    """A trial as a program or a page shows it."""
    best = [trial.best(search, i) for i in range(len(search.metric))]
    return {
        "index": trial.index,
        "state": trial.state,
        "parameters": trial.parameters,
        "values": {name: pair[1] if pair else None for name, pair in zip(search.metric, best, strict=True)},
        "step": best[0][0] if best[0] else None,
        "steps": trial.step,
        "all_steps": trial.steps,
        "folder": search.trial_folder(trial.index),
        "artefact": trial.summary.get("artefact"),
        "artefact_step": trial.summary.get("artefact_step"),
        "artefact_loss": trial.summary.get("artefact_loss"),
        "error": trial.error,
    }


def best_first(trials: list[Trial], search: Search) -> list[Trial]:
    """Trials with a value of the first metric, the best first; of equals the one that was proposed first."""
    sign = 1 if search.modes[0] == "min" else -1
    valued = [(best[1], trial) for trial in trials if (best := trial.best(search))]
    return [trial for _, trial in sorted(valued, key=lambda pair: (sign * pair[0], pair[1].index))]


def front(trials: list[Trial], search: Search) -> list[Trial]:
    """Trials of which none other is at least as good by every metric and better by one, in the order of the first."""
    signs = [1 if mode == "min" else -1 for mode in search.modes]
    scored = [(t, [s * v for s, v in zip(signs, scores, strict=True)]) for t in trials if (scores := t.scores(search))]

    def beaten(mine: list[float]) -> bool:
        return any(other != mine and all(o <= m for o, m in zip(other, mine, strict=True)) for _, other in scored)

    return [t for t, mine in sorted(scored, key=lambda pair: (pair[1], pair[0].index)) if not beaten(mine)]
