"""What a trial will be, before it starts: its run, where it can run, its steps, what the memory plan says, its rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ftray.config import Run
from ftray.config.search import PLANNED, Search
from ftray.data.order import Order
from ftray.data.prepare import prepare
from ftray.data.prepared import PreparedData
from ftray.errors import ConfigError, ModelError
from ftray.manifest import digest_of, join, write_text
from ftray.model.plan import make_plan
from ftray.model.shapes import Shapes
from ftray.model.source import find_shapes
from ftray.train.sharing import difference, refusal

Kind = Literal["lanes", "runs"]


@dataclass(frozen=True)
class Planned:
    run: Run
    kind: Kind
    facts: dict[str, float]
    """`memory` (GiB of a worker) and `trained` (parameters), empty where the base's shape is not at hand."""


class Plans:
    """Plans of a search's trials; what they have in common is looked up once."""

    def __init__(self, search: Search, on_event: Callable[[dict[str, Any]], None]) -> None:
        self._search, self._on_event = search, on_event
        self._shapes: dict[str, Shapes | None] = {}
        self._data: dict[str, str] = {}
        """Digest of what decides the rows → where they are prepared."""
        self._base: Run | None = None
        """The run whose base lanes share: the first that can be a lane."""
        self._told: set[str] = set()
        """Reasons why trials are no lanes that the user knows."""

    def of(self, parameters: dict[str, Any], index: int) -> Planned:
        """Raises ConfigError and ModelError for a run that cannot be."""
        run = self._search.run_of(parameters, index)
        reason = self._refusal(run)
        kind: Kind = "lanes" if reason is None else "runs"
        if reason and reason not in self._told and self._search.lanes != "off":
            self._told.add(reason)
            self._on_event({"kind": "status", "text": f"trials that are runs of their own, and no lanes: {reason}"})
        if kind == "runs" and self._search.scheduler.name == "pbt":
            raise ConfigError(
                f"scheduler pbt: trial {index:04d} cannot be a lane, and only lanes go on from each other's commits:"
                f" {reason}",
                where=self._search.name,
                hint="change that in the run, or take another scheduler",
            )
        shapes = self._shapes_of(run)
        facts = {}
        if shapes is not None:
            plan = make_plan(run, shapes)
            facts = {"memory": plan.total_gib, "trained": float(plan.trained)}
        elif wanted := [name for name in self._search.metric if name in PLANNED]:
            raise ModelError(f"metric {wanted[0]} needs the shape of the base", where=run.model.path)
        return Planned(run, kind, facts)

    def _shapes_of(self, run: Run) -> Shapes | None:
        key = digest_of(run.model.model_dump(mode="json"))
        if key not in self._shapes:
            try:
                self._shapes[key] = find_shapes(run.model)[0]
            except ModelError:  # its config.json is not at hand here; the workers will see
                self._shapes[key] = None
        return self._shapes[key]

    def _refusal(self, run: Run) -> str | None:
        """Why the trial is no lane; None if it is one."""
        if self._search.lanes == "off":
            return "lanes is off"
        if (reason := refusal(run)) is not None:
            return reason
        if key := difference(self._base or run, run):
            return f"{key} differs from that of the first"
        self._base = self._base or run
        return None

    def prepare(self, run: Run) -> str:
        """Prepare the run's rows, or find them; note them and the run in its folder. Returns their URI. Needs Ray."""
        data = run.data.model_dump(mode="json")
        seed = run.seed if run.data.held_out_fraction else None
        key = digest_of([data, seed, run.model.model_dump(mode="json")])
        write_text(join(run.folder, "run.yaml"), run.to_yaml())
        if key not in self._data:
            self._data[key] = prepare(run, self._on_event)
        else:
            uri = self._data[key]
            digest = PreparedData.open(uri).digest
            write_text(join(run.folder, "data.json"), json.dumps({"uri": uri, "digest": digest}) + "\n")
        return self._data[key]

    def steps(self, run: Run) -> int:
        """The run's optimizer steps, its rows being prepared."""
        if run.train.steps is not None:
            return run.train.steps
        rows = PreparedData.open(self.prepare(run)).train
        return run.total_steps(Order(run.seed, rows.sizes, rows.weights).rows_per_epoch)
