"""A worker for trials that trains nothing: each trial's loss is a function of its parameters and its step. What it
does is what a worker with lanes does: commits at evaluations, goes on from them, stands still until it is asked.

    python -m tests.ray.curves SEARCH.yaml      ftray tune, with this worker
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from pathlib import Path
from typing import Any

from ftray.errors import ModelError, RunError
from ftray.tune.desk import NotHere

PAUSE_SECONDS = 0.02


def loss_of(rate: float, rank: int, step: int) -> float:
    """Best at a rate of 1e-2 and a large rank; falls with the steps."""
    return 1 + abs(math.log10(rate) + 2) + 1 / rank + 2 / (1 + step)


class Curves:
    """The methods of `ftray.tune.host`, and `trained.jsonl` in the search's folder: a line for each step made."""

    def __init__(self, *_: Any) -> None:
        self.lanes: dict[str, dict[str, Any]] = {}

    async def join(self, trial: str, run: dict[str, Any], *, waits: bool, source: str | None = None) -> None:
        rate = run["train"]["learning_rate"]
        if rate > 1:
            raise ModelError(f"a rate of {rate:g} fits no base")
        folder = Path(run["output"])
        folder.mkdir(parents=True, exist_ok=True)
        at = Path(source) if source else folder / "curve.json"
        step = json.loads(at.read_text())["step"] if at.exists() else 0
        self.lanes[trial] = {"run": run, "step": step, "folder": folder}

    async def next(self, trial: str) -> dict[str, Any]:
        if trial not in self.lanes:
            raise NotHere(f"no trial {trial} here")
        lane = self.lanes[trial]
        if lane.get("stopped"):
            return {"kind": "end", "summary": {"reason": "stopped"}}
        train, rank = lane["run"]["train"], lane["run"]["method"]["rank"]
        if lane["step"] >= train["steps"]:
            (lane["folder"] / "artefact").touch()
            return {"kind": "end", "summary": {"artefact": str(lane["folder"] / "artefact"), "reason": "finished"}}
        await asyncio.sleep(PAUSE_SECONDS)
        lane["step"] = step = min(train["steps"], lane["step"] + train["evaluate_every"])
        if rank == 13:
            raise RunError("6 steps in a row had no finite loss")
        loss = loss_of(train["learning_rate"], rank, step)
        event = {"kind": "evaluation", "step": step, "loss": loss, "trained_tokens": 10 * step, "target_tokens": 7}
        with open(lane["folder"] / "metrics.jsonl", "a") as file:
            file.write(json.dumps(event) + "\n")
        await self.commit(trial)
        with open(lane["folder"].parent.parent / "trained.jsonl", "a") as file:
            file.write(json.dumps([trial, step]) + "\n")
        return event

    async def commit(self, trial: str) -> str:
        lane = self.lanes[trial]
        file = lane["folder"] / "curve.json"
        file.write_text(json.dumps({"step": lane["step"]}))
        return str(file)

    async def stop(self, trial: str) -> None:
        self.lanes[trial]["stopped"] = True

    async def leave(self, trial: str) -> None:
        self.lanes.pop(trial, None)

    async def load(self) -> dict[str, int]:
        return {"lanes": len(self.lanes), "room": 2 - len(self.lanes)}


class Abreast(Curves):
    """Trials that go on side by side, however late one of them begins: the first stands still until there is a second,
    and none evaluates again before all that are here have come as far."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.met = False

    async def next(self, trial: str) -> dict[str, Any]:
        while self._is_ahead(trial):
            await asyncio.sleep(PAUSE_SECONDS)
        return await super().next(trial)

    def _is_ahead(self, trial: str) -> bool:
        lane = self.lanes.get(trial)
        if lane is None or lane.get("stopped"):
            return False
        self.met |= len(self.lanes) > 1
        return not self.met or any(other["step"] < lane["step"] for other in self.lanes.values())


if __name__ == "__main__":
    from ftray.cli.main import call
    from ftray.tune import ordinary

    ordinary.Ordinary = Curves  # type: ignore[assignment,misc]
    sys.exit(call(["tune", *sys.argv[1:]]))
