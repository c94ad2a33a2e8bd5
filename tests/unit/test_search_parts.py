"""What a search decides, without a cluster: the ledger, TPE, the verdicts that hold, the outcome."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import yaml

from ftray.config import parse_run
from ftray.errors import ArtefactError, ConfigError, RunError
from ftray.train import commits
from ftray.train.commits import Commit, Progress, State
from ftray.tune import driver
from ftray.tune.driver import Hunt, open_ledger
from ftray.tune.host import adopt
from ftray.tune.ledger import Ledger
from ftray.tune.outcome import front, outcome
from ftray.tune.samplers import sampler_of
from ftray.tune.schedulers import Recorded, scheduler_of
from ftray.tune.space import draw
from tests.toys import toy_run
from tests.unit.test_search_config import a_search


def told(ledger: Ledger, index: int, *losses: float, end: str = "finish", **parameters) -> None:
    """A trial in the ledger, evaluated every 10 steps."""
    ledger.write("trial", index=index, parameters=parameters, planned={"memory": 1.0 + index})
    for i, loss in enumerate(losses):
        ledger.write("result", index=index, step=10 * i + 10, loss=loss, trained_tokens=100 * i + 100)
    if end == "finish":
        ledger.write("finish", index=index, summary={"artefact": f"a/{index}"})
    elif end == "stop":
        ledger.write("stop", index=index, step=10 * len(losses))
    elif end == "fail":
        ledger.write("fail", index=index, error="no finite loss", aside=True)


def state(ledger: Ledger) -> list[dict]:
    return [vars(trial) for trial in ledger.trials]


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path) -> str:
    return str(tmp_path / "s") if request.param == "local" else f"memory://ledger-{tmp_path.name}"


def test_the_ledger_is_what_was_written(folder) -> None:
    ledger = Ledger(folder)
    told(ledger, 0, 3.0, 2.0, **{"train.learning_rate": 1e-3})
    told(ledger, 1, 3.0, math.nan, end="stop")
    told(ledger, 2, end="fail")
    told(ledger, 3, 2.5, end="open")
    ledger.write("result", index=3, step=10, loss=2.5)  # made again after a crash
    again = Ledger(folder)
    assert state(again) == state(ledger)
    assert [t.state for t in again.trials] == ["finished", "stopped", "aside", "open"]
    assert again.trials[1].best(a_search()) == (10, 3.0)
    assert len(again.trials[3].results) == 1
    assert again.seconds_before > 0


def test_a_line_that_was_cut_off_never_counted(tmp_path) -> None:
    ledger = Ledger(str(tmp_path))
    told(ledger, 0, 3.0, end="open")
    whole, before = (tmp_path / "search.jsonl").read_bytes(), state(ledger)
    for cut in (1, 20, 40):
        (tmp_path / "search.jsonl").write_bytes(whole + b'{"kind":"result","index":0,"step":20,"loss":1.5}\n'[:cut])
        again = Ledger(str(tmp_path))
        assert state(again) == before
        again.write("result", index=0, step=20, loss=1.0)
        assert Ledger(str(tmp_path)).trials[0].results[-1]["loss"] == 1.0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"kind":"trial","index":0,"parameters":{}}', "trial 0 is proposed where trial 1 would be next"),
        (b'{"kind":"result","index":7,"step":20}', "IndexError"),
        (b'{"kind":"resu{"kind":"result","index":0,"step":20}', "line 3"),
        (b"[]", "line 3"),
        (b'{"kind":"finish","index":0}', "KeyError"),
    ],
)
def test_a_ledger_that_two_wrote_says_where_and_what_to_do(tmp_path, line, says) -> None:
    ledger = Ledger(str(tmp_path))
    told(ledger, 0, 3.0, end="open")
    file = tmp_path / "search.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + line + b"\n" + b'{"kind":"result","index":0,"step":20,"loss":1.5}\n')
    with pytest.raises(ArtefactError) as caught:
        Ledger(str(tmp_path))
    assert says in str(caught.value)
    assert "move line 3 and those after it out of the file" in str(caught.value)
    file.write_bytes(whole)
    assert state(Ledger(str(tmp_path))) == state(ledger)


def test_a_second_search_in_a_folder_is_refused_by_the_name_of_the_first(tmp_path) -> None:
    code = f"""
import threading, time
from ftray.train.lease import driving
with driving({str(tmp_path)!r}, print, threading.Event(), commanded=True):
    print("ready", flush=True)
    time.sleep(600)
"""
    search, stop = a_search(f"output={tmp_path}"), threading.Event()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(RunError, match=f"process {process.pid} of this machine"):
            driver.search(search, on_event=lambda _: None, stop=stop)
        process.kill()
    assert not (tmp_path / "search.yaml").exists()


# ------------------------------------------------------------------------------------------------------------- samplers


def trials_of(search, count: int) -> list:
    sampler = sampler_of(search)
    return [sampler.propose(index, []) for index in range(count)]


def different(parameters: list) -> set[str]:
    return {json.dumps(each, sort_keys=True) for each in parameters}


def test_a_space_that_has_an_end_is_gone_through_before_anything_comes_twice(tmp_path) -> None:
    space = "space={train.learning_rate: {choice: [0.001, 0.003, 0.01]}, method.rank: {choice: [1, 2, 4, 8]}}"
    search = a_search(f"output={tmp_path}", "samples=36", space)
    proposed = trials_of(search, 36)
    for first in (0, 12, 24):
        assert len(different(proposed[first : first + 12])) == 12
    assert [sampler_of(search).propose(index, []) for index in (35, 7)] == [proposed[35], proposed[7]]
    assert proposed[:12] != proposed[12:24], "each time in another order"


def test_a_value_that_is_listed_twice_is_more_likely_to_come_first(tmp_path) -> None:
    space = "space={method.name: {choice: [qlora, qlora, qlora, qdora]}, method.rank: {choice: [4, 4]}}"
    proposed = trials_of(a_search(f"output={tmp_path}", "samples=7", space), 7)
    assert [len(different(proposed[first : first + 2])) for first in (0, 2, 4)] == [2, 2, 2]


def test_grid_keys_that_count_for_some_alone_come_to_an_end(tmp_path) -> None:
    space = "space={method.name: {grid: [lora, dora]}, method.rank: {choice: [2, 4], when: {method.name: lora}}}"
    proposed = trials_of(a_search(f"output={tmp_path}", "samples=4", space), 8)
    assert len(different(proposed[:4])) == 3


def test_grid_keys_keep_their_combinations_together(tmp_path) -> None:
    space = "space={method.rank: {choice: [1, 2, 4]}, train.learning_rate: {grid: [0.001, 0.01]}}"
    search = a_search(f"output={tmp_path}", "samples=3", space)
    proposed = trials_of(search, 6)
    assert len(different(proposed)) == 6
    assert all(a["method.rank"] == b["method.rank"] for a, b in zip(proposed[::2], proposed[1::2], strict=True))


def test_a_space_without_an_end_is_drawn_from_as_ever(tmp_path) -> None:
    search = a_search(f"output={tmp_path}")
    assert trials_of(search, 5) == [draw(search, index) for index in range(5)]


def test_tpe_learns_and_proposes_again_what_it_proposed(tmp_path) -> None:
    search = a_search("sampler={name: optuna, startup: 6}", f"output={tmp_path}")
    ledger, sampler = Ledger(str(tmp_path)), sampler_of(search)
    proposed = []
    for index in range(24):
        parameters = sampler.propose(index, ledger.trials)
        assert parameters == sampler_of(search).propose(index, Ledger(str(tmp_path)).trials)
        proposed.append(parameters)
        told(ledger, index, abs(math.log10(parameters["train.learning_rate"]) + 2), **parameters)
    distance = [abs(math.log10(p["train.learning_rate"]) + 2) for p in proposed]
    assert sum(distance[-8:]) < sum(distance[:8]) / 2


def test_tpe_with_conditions_failures_and_trials_that_still_run(tmp_path) -> None:
    search = a_search(
        "sampler={name: optuna, startup: 2}",
        "metric=[loss, memory]",
        "space={method.name: {choice: [lora, ia3]}, method.rank: {choice: [2, 4], when: {method.name: lora}}, "
        "train.schedule: {choice: [cosine, {name: wsd, decay: 0.5}]}}",
    )
    ledger, sampler = Ledger(str(tmp_path)), sampler_of(search)
    for index in range(9):
        parameters = sampler.propose(index, ledger.trials)
        assert ("method.rank" in parameters) == (parameters["method.name"] == "lora")
        search.run_of(parameters, index)
        told(ledger, index, 3.0 - index / 9, end=("finish", "stop", "fail", "open")[index % 4], **parameters)


# ----------------------------------------------------------------------------------------------------------- schedulers


@dataclass(eq=False)
class TuneTrial:
    trial_id: str
    config: dict
    status: str = "RUNNING"

    def should_recover(self) -> bool:
        return True

    # what population based training asks of Tune

    experiment_tag = ""
    run_metadata = SimpleNamespace(checkpoint_manager=SimpleNamespace())

    def is_finished(self) -> bool:
        return self.status == "TERMINATED"

    def set_experiment_tag(self, tag: str) -> None:
        pass

    def set_config(self, config: dict) -> None:
        self.config = config


class Controller:
    def __init__(self) -> None:
        self.trials: list[TuneTrial] = []

    def _schedule_trial_save(self, trial, result):
        return f"commit of {trial.trial_id}"

    def pause_trial(self, trial, should_checkpoint) -> None:
        trial.status = "PAUSED"

    def get_trials(self):
        return self.trials

    def get_live_trials(self):
        return self.trials


class Played:
    """Trials whose losses are known, through the scheduler in front of the ledger, in a given order of arrival."""

    def __init__(self, search, folder) -> None:
        self.search, self.ledger, self.events = search, Ledger(str(folder)), []
        self.scheduler = Recorded(scheduler_of(search, 10, 90), search, self.ledger, self.events.append)
        self.controller, self.trials, self.decisions = Controller(), {}, {}

    def begin(self, index: int, **parameters) -> None:
        parameters = parameters or {"seed": index}
        if index >= len(self.ledger.trials):
            self.ledger.write("trial", index=index, parameters=parameters)
        trial = TuneTrial(f"t{index}", {"index": index, "parameters": parameters})
        self.trials[index] = trial
        self.controller.trials.append(trial)
        self.scheduler.on_trial_add(self.controller, trial)

    def report(self, index: int, step: int, loss: float) -> str:
        result = {"step": step, "loss": loss, "trained_tokens": step * 10}
        decision = self.scheduler.on_trial_result(self.controller, self.trials[index], result)
        self.decisions[index, step] = decision
        if decision == "STOP":
            self.scheduler.on_trial_complete(self.controller, self.trials[index], result)
        return decision

    def finish(self, index: int, step: int, loss: float) -> None:
        result = {"step": step, "loss": loss, "summary": json.dumps({"artefact": "a"})}
        self.scheduler.on_trial_complete(self.controller, self.trials[index], result)


def loss_of(index: int, step: int) -> float:
    return 1 + (index * 7 % 8) / 8 + 1 / step


def play(played: Played, order) -> None:
    """Every report in the order of arrival; a trial that was stopped reports no more."""
    for index in range(8):
        played.begin(index)
    for index, step in order:
        if played.ledger.trials[index].state != "stopped" or (index, step) not in played.decisions:
            ended = any(played.decisions.get((index, s)) == "STOP" for s in range(10, step, 10))
            if not ended:
                played.report(index, step, loss_of(index, step))


@pytest.mark.parametrize("scheduler", ["{name: asha, grace: 10, reduction: 3}", "{name: median, trials: 2}"])
def test_verdicts_hold_when_reports_come_again_in_another_order(tmp_path, scheduler) -> None:
    search = a_search(f"scheduler={scheduler}")
    first = Played(search, tmp_path)
    play(first, [(index, step) for step in range(10, 90, 10) for index in range(8)])
    stopped = {t.index: t.step for t in first.ledger.trials if t.state == "stopped"}
    assert 2 <= len(stopped) < 8
    assert 0 not in stopped, "the best"

    again = Played(search, tmp_path)
    text = (tmp_path / "search.jsonl").read_bytes()
    play(again, [(i, s) for i in reversed(range(8)) for s in range(10, first.ledger.trials[i].step + 1, 10)])
    assert {t.index: t.step for t in again.ledger.trials if t.state == "stopped"} == stopped
    assert {k: v for k, v in again.decisions.items() if v == "STOP"} == dict.fromkeys(stopped.items(), "STOP")
    assert (tmp_path / "search.jsonl").read_bytes() == text, "nothing is told twice"


def test_asha_knows_afterwards_what_it_knew_before(tmp_path) -> None:
    """The next new trial is judged as in the search that was never broken off."""
    search = a_search("scheduler={name: asha, grace: 10, reduction: 3}")
    first = Played(search, tmp_path)
    play(first, [(index, 10) for index in range(8)])
    again = Played(search, tmp_path)
    play(again, [(index, 10) for index in reversed(range(8))])
    for played in (first, again):
        rungs = played.scheduler._inner._brackets[0]._rungs
        assert sorted(rungs[-1][1].values()) == sorted(-loss_of(i, 10) for i in range(8))


def test_a_report_is_written_before_it_is_judged(tmp_path) -> None:
    played = Played(a_search("scheduler=asha"), tmp_path)
    played.begin(0)
    seen = []

    def judge(controller, trial, result):
        seen.extend(Ledger(str(tmp_path)).trials[0].results)
        raise KeyboardInterrupt

    played.scheduler._inner.on_trial_result = judge
    with pytest.raises(KeyboardInterrupt):
        played.report(0, 10, 3.0)
    assert [r["loss"] for r in seen] == [3.0]


def test_losses_that_are_not_finite_are_the_worst(tmp_path) -> None:
    played = Played(a_search("scheduler={name: asha, grace: 10, reduction: 3}"), tmp_path)
    for index in range(5):
        played.begin(index)
        decision = played.report(index, 10, math.nan if index == 4 else 2.0 - index / 10)
    assert decision == "STOP"
    assert played.ledger.trials[4].best(played.search) is None


def test_ends_failures_and_lost_actors(tmp_path) -> None:
    played = Played(a_search(), tmp_path)
    for index in range(4):
        played.begin(index)
    played.report(0, 10, 2.0)
    played.finish(0, 20, 1.5)
    assert (played.ledger.trials[0].state, played.ledger.trials[0].step) == ("finished", 20)
    retry = {"retry": "a worker was lost", "step": 10}
    assert played.scheduler.on_trial_result(played.controller, played.trials[1], retry) == "CONTINUE"
    assert (played.ledger.trials[1].failures, played.ledger.trials[1].state) == (1, "open")
    played.scheduler.on_trial_complete(played.controller, played.trials[1], {"failed": "it did it again"})
    assert (played.ledger.trials[1].state, played.ledger.trials[1].error) == ("aside", "it did it again")
    played.report(2, 10, 2.0)
    played.scheduler.on_trial_error(played.controller, played.trials[2])
    played.scheduler.on_trial_add(played.controller, played.trials[2])
    assert played.report(2, 10, 2.0) == "CONTINUE"
    assert len(played.ledger.trials[2].results) == 1
    played.scheduler.on_trial_complete(played.controller, played.trials[3], {"interrupted": True})
    assert played.ledger.trials[3].state == "open"


# ----------------------------------------------------------------------------------------- population based training

RATE = "train.learning_rate"


def populated(folder, seed: int = 0, rates: str = "{loguniform: [1e-4, 1e-1]}", trials: int = 8) -> Played:
    search = a_search("scheduler={name: pbt, interval: 10}", f"space={{{RATE}: {rates}}}", f"seed={seed}")
    played = Played(search, folder)
    for index in range(trials):
        played.begin(index, **{RATE: 1e-2 if index % 2 else 1e-3})
    return played


def test_the_same_seed_changes_trials_to_the_same(tmp_path) -> None:
    found = []
    for number, seed in enumerate((0, 0, 1)):
        random.seed(number)
        played = populated(tmp_path / str(number), seed)
        for step in (10, 20, 30):
            for index in range(8):
                played.trials[index].status = "RUNNING"
                played.report(index, step, loss_of(index, step))
        kept = ("source", "step", "source_step", "parameters")
        found.append([[{k: change[k] for k in kept} for change in trial.changes] for trial in played.ledger.trials])
    assert any(found[0])
    assert found[0] == found[1] != found[2]


def test_a_trial_changed_to_what_it_was_keeps_its_number(tmp_path) -> None:
    """Tune hands it the whole configuration of the other one, which with the only rate there is has its parameters."""
    played = populated(tmp_path, rates="{choice: [0.01]}", trials=4)
    for index, loss in ((1, 2.0), (0, 1.0), (2, 3.0), (3, 9.0)):
        played.report(index, 10, loss)
    changed, trial = played.trials[3], played.ledger.trials[3]
    assert changed.config["index"] == 3
    assert changed.config["changes"] == len(trial.changes) == 1
    assert trial.changes[0]["source"] == 0


def test_a_changed_trial_is_judged_by_the_weights_that_it_has(tmp_path) -> None:
    played = populated(tmp_path, trials=4)
    for index, step, loss in ((3, 10, 0.2), (1, 10, 2.0), (2, 10, 3.0), (0, 10, 1.0), (3, 20, 2.0), (0, 20, 0.4)):
        played.report(index, step, loss)  # the last one was good once
        played.trials[index].status = "RUNNING"
    played.report(3, 30, 9.0)
    trial, config = played.ledger.trials[3], played.trials[3].config
    assert [(c["source"], c["step"], c["source_step"]) for c in trial.changes] == [(0, 30, 20)]
    assert trial.best(played.search) == (20, 0.4), "of the commit that it goes on from"
    assert [r["step"] for r in trial.results] == [10, 20], "step 30 is undone"
    assert json.loads(config["replay"]) == trial.results
    for step, loss in ((10, 0.2), (20, 2.0), (30, 0.5), (40, 0.3)):  # what it reports again, and what is new
        played.trials[3].status = "RUNNING"
        played.report(3, step, loss)
    assert [r["loss"] for r in trial.results] == [0.2, 2.0, 0.5, 0.3]
    assert trial.best(played.search) == (40, 0.3)
    assert state(Ledger(str(tmp_path))) == state(played.ledger)


@pytest.mark.parametrize("taken", [True, False])
def test_a_search_taken_up_again_knows_whether_a_change_was_made(tmp_path, taken) -> None:
    search = a_search("scheduler=pbt", f"space={{{RATE}: {{choice: [0.01, 0.02]}}}}", "samples=2", f"output={tmp_path}")
    ledger = Ledger(str(tmp_path))
    for index in range(2):
        told(ledger, index, 3.0 - index, end="open", **{RATE: 0.01})
    ledger.write("change", index=0, parameters={RATE: 0.01}, step=10, source=1, source_step=10)
    for step in (10, 20):
        (tmp_path / f"trials/0001/commits/step-{step:08d}").mkdir(parents=True)
    if taken:
        (tmp_path / "trials/0000").mkdir()
        (tmp_path / "trials/0000/source.json").write_text(json.dumps({"commit": "some", "changes": 1}))
    hunt = Hunt(search, ledger, lambda _: None, SimpleNamespace(is_set=lambda: False))  # type: ignore[arg-type]
    source = hunt._source(ledger.trials[0])
    assert source == (None if taken else f"{tmp_path}/trials/0001/commits/step-00000010")
    assert hunt._source(ledger.trials[1]) is None


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("run.method={name: ia3}", "method ia3 trains something else"),
        ("run.train.optimizer=lion", "train.optimizer is not adamw"),
        ("run.workers={count: 2}", "it wants several workers"),
    ],
)
def test_trials_that_cannot_be_lanes_are_no_population(tmp_path, override, reason) -> None:
    space = f"space={{{RATE}: {{loguniform: [1e-4, 1e-1]}}}}"
    search = a_search("scheduler=pbt", space, override, f"output={tmp_path}")
    hunt = Hunt(search, Ledger(str(tmp_path)), lambda _: None, SimpleNamespace(is_set=lambda: False))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=reason):
        hunt.check_ahead()


# -------------------------------------------------------------------------------------------------- outcome and budgets


def test_the_outcome_and_the_best_run_file(tmp_path) -> None:
    search = a_search(f"output={tmp_path}")
    ledger = Ledger(str(tmp_path))
    told(ledger, 0, 3.0, 2.0, **{"train.learning_rate": 0.01})
    told(ledger, 1, 1.0, end="stop", **{"train.learning_rate": 0.02})
    told(ledger, 2, 3.0, 1.5, 1.7, **{"train.learning_rate": 0.03})
    told(ledger, 3, end="fail", **{"train.learning_rate": 0.04})
    found = outcome(search, ledger)
    assert (found["finished"], found["stopped"], found["aside"], found["steps"]) == (2, 1, 1, 60)
    assert found["best"]["index"] == 2, "the best of those that have an artefact"
    assert (found["best"]["values"], found["best"]["step"]) == ({"loss": 1.5}, 20)
    run = parse_run((tmp_path / "best.yaml").read_text(), "best.yaml")
    assert run == search.run_of({"train.learning_rate": 0.03}, 2)


def test_the_outcome_says_of_which_step_an_artefact_is(tmp_path) -> None:
    """That is a matter of the held-out loss, whatever the search goes by."""
    search, ledger = a_search(f"output={tmp_path}"), Ledger(str(tmp_path))
    told(ledger, 0, 3.0, 1.0, 2.0, end="open")
    ledger.write("finish", index=0, summary={"artefact": "a/0", "artefact_step": 20, "artefact_loss": 1.0})
    told(ledger, 1, 3.0, end="stop")
    found = outcome(search, ledger)
    assert [(t["artefact_step"], t["artefact_loss"]) for t in found["each"]] == [(20, 1.0), (None, None)]
    assert found["best"]["artefact_step"] == found["best"]["step"] == 20


def test_the_front_has_what_nothing_beats(tmp_path) -> None:
    search = a_search("sampler=optuna", "metric=[loss, memory]", f"output={tmp_path}")
    ledger = Ledger(str(tmp_path))  # memory is 1, 2, 3 … GiB
    for index, loss in enumerate([2.0, 2.5, 1.0, 1.5, 1.0, 0.5]):
        told(ledger, index, loss)
    assert [t.index for t in front(ledger.trials, search)] == [5, 2, 0]


@pytest.mark.parametrize(("budget", "spent"), [("steps=50", True), ("steps=51", False), ("target_tokens=500", True)])
def test_budgets_count_all_trials(tmp_path, budget, spent) -> None:
    search = a_search(f"budget.{budget}", f"output={tmp_path}")
    ledger = Ledger(str(tmp_path))
    told(ledger, 0, 3.0, 2.0, 1.0)
    told(ledger, 1, 3.0, 2.0, end="open")
    hunt = Hunt(search, ledger, lambda _: None, SimpleNamespace(is_set=lambda: False))  # type: ignore[arg-type]
    assert hunt.budget_spent() is spent
    assert (hunt.suggest() == "FINISHED") is spent


def test_a_budget_of_minutes_counts_those_of_earlier_parts(tmp_path, monkeypatch) -> None:
    now = 1000.0
    monkeypatch.setattr("ftray.tune.ledger.time", SimpleNamespace(monotonic=lambda: now))
    search, first = a_search("budget.minutes=2", f"output={tmp_path}"), Ledger(str(tmp_path))
    now += 90
    told(first, 0, 3.0, 2.0)
    told(first, 1, 3.0, end="open")
    now += 500  # nobody is at it
    ledger = Ledger(str(tmp_path))
    hunt = Hunt(search, ledger, lambda _: None, SimpleNamespace(is_set=lambda: False))  # type: ignore[arg-type]
    now += 29
    assert not hunt.is_over()
    assert isinstance(hunt.suggest(), dict)
    now += 1
    assert hunt.is_over()
    assert hunt.suggest() == "FINISHED"
    found = outcome(search, ledger, budget_spent=hunt.budget_spent())
    assert (found["reason"], found["seconds"]) == ("budget", 120)


def test_a_folder_of_another_search_is_refused_and_what_is_free_may_change(tmp_path) -> None:
    told(open_ledger(a_search(f"output={tmp_path}")), 0, 3.0)
    with pytest.raises(ConfigError, match=r"space\.method\.rank\.choice"):
        open_ledger(a_search(f"output={tmp_path}", "space.method.rank.choice=[2]"))
    assert yaml.safe_load((tmp_path / "search.yaml").read_text())["samples"] == 16
    assert len(open_ledger(a_search(f"output={tmp_path}", "samples=99", "budget.steps=5")).trials) == 1


@pytest.mark.parametrize("sampler", ["random", "optuna"])
def test_rows_are_prepared_before_trials_hold_all_cpus(tmp_path, monkeypatch, sampler) -> None:
    """Afterwards Ray Data would wait for a CPU that no trial gives back."""
    search = a_search(f"sampler={sampler}", "samples=3", f"output={tmp_path}")
    hunt = Hunt(search, Ledger(str(tmp_path)), lambda _: None, SimpleNamespace(is_set=lambda: False))  # type: ignore[arg-type]
    prepared = []
    monkeypatch.setattr(hunt.plans, "prepare", lambda run: prepared.append(run.data))
    hunt.check_ahead()
    hunt.prepare_ahead()
    assert prepared
    assert {str(data) for data in prepared} == {str(search.run_of({}, 0).data)}


@pytest.mark.parametrize(
    ("nodes", "free", "found"),
    [
        ({"a": {"CPU": 2.0}, "b": {"CPU": 4.0}}, {"CPU": 6.0, "GPU": 0.0}, [("b", 4.0, 0), ("a", 2.0, 0)]),
        ({"a": {"CPU": 2.0}, "b": {"CPU": 4.0}}, {"CPU": 5.0, "GPU": 0.0}, [("b", 4.0, 0), ("a", 1.0, 0)]),
        ({"head": {}, "a": {"CPU": 2.0}}, {"CPU": 2.0, "GPU": 0.0}, [("a", 2.0, 0)]),
        ({"a": {"CPU": 8.0}, "b": {"CPU": 4.0, "GPU": 2.0}}, {"CPU": 12.0, "GPU": 2.0}, [("b", 4.0, 2)]),
    ],
)
def test_each_node_has_workers_with_a_base_of_its_own(nodes, free, found) -> None:
    from ftray.tune.driver import divided

    assert divided(nodes, free) == found


@pytest.mark.parametrize(("best", "evaluated_at", "kept"), [(4, 8, (8, 2.0)), (8, 8, (8, 1.0)), (4, 6, (None, None))])
def test_weights_of_another_trial_do_not_bring_its_best_commit_along(tmp_path, best, evaluated_at, kept) -> None:
    """A commit of that step in the trial's own folder is of other weights."""
    theirs = Progress(step=8, best_step=best, best_loss=1.0, final_loss=2.0, evaluated_at=evaluated_at)
    source = commits.write(str(tmp_path / "theirs"), Commit(theirs, State({"a": torch.ones(1)}, {})))
    run = toy_run(tmp_path / "mine")
    for step in (4, 12):
        commits.write(run.folder, Commit(Progress(step=step), State({"a": torch.zeros(1)}, {})))
    adopt(run, "digest", source, {"a": (1,)})
    assert commits.steps_of(run.folder) == [4, 8]
    progress = commits.read(commits.place_of(run.folder, 8)).progress
    assert (progress.best_step, progress.best_loss) == kept
