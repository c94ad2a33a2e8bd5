"""Runs on Ray Train: workers agree with one, the artefact stands alone, failures are told once."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from ftray.config import load_run
from ftray.errors import ArtefactError, ConfigError, DataError, RunError, RunStopped
from ftray.train.launch import train
from tests.ray.runs import steps_of, tensors, train_alone, write_run

pytestmark = pytest.mark.usefixtures("local_ray")


def fit(file, on_event=lambda _event: None, stop=None, released=None):
    return train(load_run(file), on_event=on_event, stop=stop or threading.Event(), released=released)


def losses(folder):
    return [event["loss"] for event in steps_of(folder)]


def assert_close(mine, theirs, relative):
    assert len(mine) == len(theirs)
    assert max(abs(a - b) / b for a, b in zip(mine, theirs, strict=True)) < relative


def test_two_workers_equal_one_and_a_run_may_change_hands(tmp_path):
    """Two workers → one → two: the same rows, the same losses as with one throughout."""
    slow = {"train__steps": 36, "train__micro_batch_rows": 1, "train__learning_rate": 5e-4, "train__evaluate_every": 12}
    train_alone(load_run(write_run(tmp_path, "one", workers__count=1, **slow)))

    # a stop that has not come by then is waited for after the next evaluation
    for until, passes, count in ((5, 0, 2), (14, 12, 1), (None, None, 2)):
        stop = threading.Event()

        def on_event(event, until=until, stop=stop):
            if until and event["kind"] == "step" and event["step"] >= until:
                stop.set()

        file = write_run(tmp_path, "changing", workers__count=count, **slow)
        if until:
            with pytest.raises(RunStopped):
                fit(file, on_event, stop, lambda passes=passes: passes)
        else:
            fit(file, on_event, stop)
    assert_close(losses(tmp_path / "changing"), losses(tmp_path / "one"), 1e-3)
    cursors = [event["cursor"] for event in steps_of(tmp_path / "changing")]
    assert cursors == [event["cursor"] for event in steps_of(tmp_path / "one")]


@pytest.mark.parametrize(
    ("method", "precision", "tolerance"), [("lora", "fp32", 1e-5), ("qlora", "fp32", 1e-4), ("qdora", "fp32", 1e-4)]
)
def test_peft_alone_loads_the_artefact_and_gives_our_evaluation(tmp_path, method, precision, tolerance):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from ftray.data.tokenizer import local_model_folder

    changes = {"method__name": method, "train__precision": precision, "train__steps": 20, "workers__count": 1}
    run = load_run(write_run(tmp_path, "run", **changes))
    data, _, summary = train_alone(run)
    assert summary["final_loss"] < summary["base_loss"]

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    base = AutoModelForCausalLM.from_pretrained(
        local_model_folder(run.model), dtype=dtype, quantization_config=quantization if method.startswith("q") else None
    )
    model = PeftModel.from_pretrained(base, tmp_path / "run/artefact")
    model.train()  # no dropout; in evaluation mode bitsandbytes repacks NF4 weights and DoRA's norms go wrong
    total = count = 0.0
    with torch.no_grad():
        for i in range(len(data.held_out)):
            row = data.held_out[i]
            tokens = torch.tensor(row.tokens[None], dtype=torch.long)
            logits = model(tokens).logits[0].float()
            at = row.targets.nonzero()[0]
            total += torch.nn.functional.cross_entropy(logits[at - 1], tokens[0, at], reduction="sum").item()
            count += len(at)
    assert total / count == pytest.approx(summary["final_loss"], rel=tolerance)


def test_an_error_in_the_loop_is_told_once_with_its_cause_and_not_tried_again(tmp_path):
    file = write_run(tmp_path, "run", method__targets=["no_such_layer"])
    with pytest.raises(Exception, match=r"'no_such_layer' matches no linear layer") as caught:
        fit(file)
    assert str(caught.value).count("matches no linear layer") == 1
    assert "Traceback" not in str(caught.value)


def _rank_1_fails_for_good(config):
    import ray.train

    from ftray.errors import ModelError
    from ftray.train import launch, loop

    def broken(*_arguments, **_options):
        raise ModelError("the base's folder is empty on this host")

    if ray.train.get_context().get_world_rank() == 1:
        loop.train_worker = broken
    launch._worker_main(config)


def test_one_worker_that_fails_for_good_ends_the_run(tmp_path, monkeypatch):
    """The other waits for it in a collective; the run ends all the same, with the one real cause."""
    from ray import cloudpickle

    from ftray.errors import ModelError
    from ftray.train import launch

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(launch, "_worker_main", _rank_1_fails_for_good)
    with pytest.raises(ModelError, match="empty on this host"):
        fit(write_run(tmp_path, "uneven"))


def test_a_stop_while_rows_are_prepared(tmp_path):
    stop, kinds = threading.Event(), []

    def on_event(event):
        kinds.append(event["kind"])
        if event["kind"] == "progress":
            stop.set()

    file = write_run(tmp_path, "early", train__steps=4, workers__count=1)
    with pytest.raises(RunStopped, match="before the first step"):
        fit(file, on_event, stop)
    assert kinds[-1] == "progress"
    assert not list((tmp_path / "prepared").glob("*/manifest.json"))
    stop = threading.Event()
    assert fit(file, stop=stop)["reason"] == "finished"


def test_too_many_bad_rows_stop_before_any_worker_starts(tmp_path):
    file = write_run(tmp_path, "run")
    with (tmp_path / "train.jsonl").open("a") as rows:
        rows.write("not json\n" * 30)
    events = []
    with pytest.raises(DataError, match="30"):
        fit(file, events.append)
    assert not [event for event in events if event["kind"] == "start"]


def test_more_workers_than_the_cluster_has_places_for(tmp_path):
    file = write_run(tmp_path, "run", workers__count=3, workers__cpus=8, train__batch_rows=9)
    with pytest.raises(ConfigError, match=r"3 workers × 8 CPU = 24, the cluster has 4"):
        fit(file)
    assert not (tmp_path / "prepared").exists(), "rows are not prepared for a run that cannot start"


@pytest.fixture(scope="module")
def finished(local_ray, tmp_path_factory):
    """A folder with the run `run`, finished."""
    folder = tmp_path_factory.mktemp("finished")
    fit(write_run(folder, "run", train__steps=8))
    return folder


def test_what_a_run_leaves(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = {"run.yaml", "metrics.jsonl", "summary.json", "artefact", "commits", "tensorboard", "data.json"}
    assert expected <= {p.name for p in (finished / "run").iterdir()}
    assert not list((finished / "run/commits").glob(".*"))
    assert tensors(finished / "run")
    board = EventAccumulator(str(finished / "run/tensorboard")).Reload()
    shown = [event.value for event in board.Scalars("train/loss")]
    assert shown == pytest.approx(losses(finished / "run"), rel=1e-6)


def test_a_refused_run_changes_nothing_in_the_folder(finished):
    before = {p.name: p.read_bytes() for p in (finished / "run").iterdir() if p.is_file()}
    with pytest.raises(ConfigError, match=r"train.learning_rate: committed with 0.002, now 0.001"):
        fit(write_run(finished, "run", train__steps=8, train__learning_rate=1e-3))
    assert before == {p.name: p.read_bytes() for p in (finished / "run").iterdir() if p.is_file()}


def test_a_worker_that_fails_every_time_ends_the_run(tmp_path):
    """Rank 0 alone meets the error, while the other waits for it in a barrier."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/artefact").write_text("a file where the artefact's folder belongs")
    with pytest.raises((RunError, ArtefactError)):
        fit(write_run(tmp_path, "run", train__steps=4, workers__retries=1))
