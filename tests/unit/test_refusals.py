"""Combinations that do not work are refused when the run file is read: with the reason, the nearest thing that does
work, and nothing started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from ftray.config import load_run, parse_run
from ftray.config.training import Optimizer
from ftray.data import sources
from ftray.errors import EXIT_USER, ConfigError

RUN = """
name: a
model: {path: embedded}
method: {name: lora}
data: {sources: [{path: rows.jsonl, format: text}], held_out_fraction: 0.1}
train: {steps: 100}
"""
DPO = ("objective=dpo", "data.sources.0.format=preference")
MEZO = "train.optimizer=mezo"

CASES: dict[str, tuple[tuple[str, ...], str, str]] = {
    # name: (overrides, the reason, what works instead)
    "a worker without rows": (("workers.count=17",), "batch_rows 16 leaves some of 17 workers", "raise train.batch"),
    "workers that share a GPU": (
        ("workers={count: 2, gpus: 0.5}",),
        "several of 2 workers on one GPU, and NCCL refuses",
        "workers.count: 1",
    ),
    "elastic workers that share a GPU": (("workers={min: 1, max: 4, gpus: 0.25}",), "of 1 to 4 workers", "gpus: 1"),
    "a warm-up without an end": (
        ("train.schedule.warmup=100",),
        "warmup 100 is not below train.steps 100",
        "a share of the steps, such as 0.03",
    ),
    "a part of a step": (("train.schedule.warmup=1.5",), "1.5 is neither a whole number of steps", "a share below 1"),
    "one step or all": (("train.schedule.warmup=1.0",), "1.0 is neither a whole number of steps", "a share below 1"),
    "one row or all": (("data.max_rejected=1.0",), "1.0 is neither a whole number of rows", "a share below 1"),
    "rows of no evaluation": (
        ("data.held_out_fraction=0", "train.evaluate_rows=5"),
        "train.evaluate_rows needs held-out rows",
        "set data.held_out",
    ),
    "momentum of adam": (("train.momentum=0.8",), "momentum does nothing with optimizer adamw", "use optimizer sgd"),
    "betas of sgd": (
        ("train.optimizer=sgd", "train.betas=[0.9, 0.95]"),
        "betas does nothing with optimizer sgd",
        "leave it out (which is null), or use optimizer adamw",
    ),
    "epsilon of lion": (("train.optimizer=lion", "train.epsilon=1e-6"), "epsilon does nothing", "which is 1e-08"),
    "perturbed gradients": (("train.perturbation=0.01",), "perturbation does nothing", "use optimizer mezo"),
    "clipping mezo": ((MEZO, "train.clip_norm=0.3"), "clip_norm does nothing with optimizer mezo", "(which is 1)"),
    "an end of a constant rate": (
        ("train.schedule={name: constant, final: 0.1}",),
        "final does nothing with schedule constant",
        "use schedule linear or cosine or wsd",
    ),
    "a decay of cosine": (("train.schedule.decay=0.5",), "decay does nothing with schedule cosine", "schedule wsd"),
    "kept of what is whole": (
        ("strategy={zero: 2, keep_elements: 1000}",),
        "weights that ZeRO 3 gathers, here 2",
        "leave it out (which is 100000000), or set strategy.zero: 3",
    ),
    "buckets of nothing": (
        ("strategy={zero: 0, bucket_elements: 1000}",),
        "bucket_elements does nothing with strategy.zero: 0",
        "leave `strategy` out",
    ),
    "pages of nothing": (
        ("strategy={zero: 2, pin_memory: false}",),
        "pin_memory is of what is offloaded, and nothing is",
        "offload_optimizer: cpu",
    ),
    "weight of held-out rows": (
        ("data.held_out_fraction=0", "data.held_out=[{path: x.jsonl, format: text, weight: 2}]"),
        "data.held_out.0.weight mixes what is trained on",
        "leave it out",
    ),
    "weight of questions": (
        ("evaluate={rows: [{path: x.jsonl, format: text, weight: 2}]}",),
        "evaluate.rows.0.weight mixes what is trained on",
        "leave it out",
    ),
    "a split of a file": (
        ("data.sources.0.split=test",),
        "data.sources.0.split is of Hugging Face data sets, and rows.jsonl is read as a file",
        "set reader: datasets",
    ),
    "a subset of files": (
        ("data.sources.0={path: s3://b/rows, reader: parquet, format: text, subset: de}",),
        "subset is of Hugging Face data sets",
        "set reader: datasets",
    ),
    "evaluation of nothing": (
        ("data.held_out_fraction=0", "train.evaluate_every=5"),
        "train.evaluate_every needs held-out rows",
        "set data.held_out",
    ),
    "stopping by nothing": (
        ("data.held_out_fraction=0", "train.evaluate_every=5", "train.early_stopping={}"),
        "needs held-out rows",
        "data.held_out_fraction",
    ),
    "adapting noise": (("model.random_weights=true",), "would adapt noise", "pretrain with method `full`"),
    "padded virtual tokens": (
        ("method={name: prefix}", "data.packing=off"),
        "has no padded layout",
        "data.packing: batch",
    ),
    "padded prompt": (("method={name: prompt}", "data.packing=off"), "has no padded layout", "data.packing: batch"),
    "depth without blocks": (
        ("method={name: p_tuning}", "train.layer_decay=0.9"),
        "p_tuning trains no blocks",
        "set it to 1",
    ),
    "freezing everything": (("method={name: freeze, blocks: 0}",), "nothing would be trained", "set blocks, head"),
    "adalora that grows": (("method={name: adalora, rank: 4, target_rank: 8}",), "not below rank 4", "use method lora"),
    "adalora without a time": (
        ("method={name: adalora, start: 0.6, settle: 0.5}",),
        "no step in which ranks could change",
        "lower one",
    ),
    "adalora by mezo": ((MEZO, "method={name: adalora}"), "mezo has none", "use method lora, or optimizer adamw"),
    "dropout under mezo": (
        (MEZO, "method.dropout=0.1"),
        "compares two losses, which dropout would blur",
        "method.dropout: 0",
    ),
    "noise under mezo": ((MEZO, "train.neftune=5"), "train.neftune would do nothing", "optimizer adamw"),
    "recomputing for mezo": ((MEZO, "train.gradient_checkpointing=true"), "no backward pass", "set it to false"),
    "dividing mezo": ((MEZO, "strategy={zero: 2}"), "neither gradients nor states", "leave `strategy` out"),
    "zero 3 of nf4": (
        ("strategy={zero: 3}", "method={name: qlora}"),
        "cannot divide a base in NF4",
        "strategy.zero: 2",
    ),
    "zero 3 of a prefix": (
        ("strategy={zero: 3}", "method={name: prefix}"),
        "prefix does not work on weights that ZeRO 3 divides",
        "strategy.zero: 2",
    ),
    "zero of adalora": (
        ("strategy={zero: 2}", "method={name: adalora}"),
        "judges every rank by its whole gradient",
        "use method lora, or leave `strategy` out",
    ),
    "weights offloaded below 3": (
        ("strategy={zero: 2, offload_parameters: cpu}",),
        "needs strategy.zero: 3, here 2",
        "offload_optimizer works from zero: 1 on",
    ),
    "states offloaded at 0": (
        ("strategy={zero: 0, offload_optimizer: cpu}",),
        "needs divided optimizer states",
        "set strategy.zero to 1, 2 or 3",
    ),
    "nvme below 3": (
        ("strategy={zero: 2, offload_optimizer: nvme, nvme_path: /tmp}",),
        "NVMe is ZeRO 3's alone, here 2",
        "use offload_optimizer: cpu, or zero: 3",
    ),
    "nvme nowhere": (
        ("strategy={zero: 3, offload_optimizer: nvme}",),
        "offload to nvme needs strategy.nvme_path",
        "a folder on a fast local disk",
    ),
    "a path without nvme": (
        ("strategy={zero: 3, nvme_path: /tmp}",),
        "nothing is offloaded to nvme",
        "set offload_optimizer: nvme or leave it out",
    ),
    "weights on nvme, states on the device": (
        ("strategy={zero: 3, offload_parameters: nvme, nvme_path: /tmp}",),
        "save nothing where it counts",
        "offload_optimizer to nvme or cpu",
    ),
    "zero of 8 bits": (
        ("strategy={zero: 1}", "train.optimizer=adamw_8bit"),
        "ZeRO divides the states that adamw_8bit would hold",
        "train.optimizer: adamw",
    ),
    "zero of pages": (
        ("strategy={zero: 2}", "train.optimizer=paged_adamw_32bit"),
        "ZeRO divides the states",
        "offload_optimizer: cpu",
    ),
    "lion offloaded": (
        ("strategy={zero: 2, offload_optimizer: cpu}", "train.optimizer=lion"),
        "updated by DeepSpeed's CPU Adam, not by lion",
        "train.optimizer: adamw",
    ),
    "zero of adafactor": (
        ("strategy={zero: 1}", "train.optimizer=adafactor"),
        "row and column states need whole matrices",
        "use adamw",
    ),
    "preferences for sft": (
        ("data.sources.0.format=preference",),
        "has the format preference, and objective sft",
        "set objective: dpo",
    ),
    "text for dpo": (("objective=dpo",), "has the format text, and objective dpo", "prompt, chosen, rejected"),
    "held-out text for dpo": (
        (*DPO, "data.held_out_fraction=0", "data.held_out=[{path: x.jsonl, format: text}]"),
        "data.held_out.0 has the format text",
        "prompt, chosen, rejected",
    ),
    "padded pairs": ((*DPO, "data.packing=off"), "keeps a pair's two completions together", "data.packing: batch"),
    "pairs packed for good": ((*DPO, "data.packing=corpus"), "keeps a pair's two", "data.packing: batch, not corpus"),
    "preferring noise": (
        (*DPO, "model.random_weights=true", "method={name: full}"),
        "compares with a model that already speaks",
        "objective: sft first",
    ),
    "smoothed tokens of pairs": (
        (*DPO, "train.label_smoothing=0.1"),
        "smooths tokens, and dpo's loss is of pairs",
        "use objective.label_smoothing",
    ),
    "a divided reference": (
        (*DPO, "method={name: full}", "strategy={zero: 3}"),
        "a second, frozen copy of weights that ZeRO 3 divides",
        "use method lora",
    ),
}


def test_the_run_without_overrides_is_good() -> None:
    assert parse_run(RUN, "run.yaml").method.name == "lora"


@pytest.mark.parametrize("name", CASES)
def test_refused_with_the_reason_and_what_works(name: str) -> None:
    overrides, reason, instead = CASES[name]
    with pytest.raises(ConfigError) as caught:
        parse_run(RUN, "run.yaml", overrides)
    told = " ".join(str(caught.value).split())
    assert caught.value.exit_code == EXIT_USER
    assert reason in told
    assert instead in told
    assert "run.yaml" in told


@pytest.mark.parametrize(
    "overrides",
    [
        ("method={name: prefix}", "data.packing=batch"),
        (MEZO, "method={name: qlora}"),
        (MEZO, "method={name: full}", "workers.count=2"),
        (MEZO, *DPO),
        ("strategy={zero: 2}", "method={name: qlora}"),
        ("strategy={zero: 3, offload_optimizer: nvme, offload_parameters: nvme, nvme_path: /tmp}",),
        ("strategy={zero: 2, offload_optimizer: cpu}",),
        ("strategy={zero: 2}", "train.optimizer=lion"),
        DPO,
        (*DPO, "objective={name: dpo, reference_free: true}", "method={name: full}", "strategy={zero: 3}"),
        (*DPO, "objective={name: dpo, reference_free: true}", "method={name: prefix}"),
        (*DPO, "objective.label_smoothing=0.1", "train.neftune=5"),
        ("workers={count: 1, gpus: 0.5}",),
        ("workers={count: 2, gpus: 0}",),
        ("train.schedule.warmup=99",),
        ("train.schedule={name: wsd, warmup: 50.0, final: 0.1, decay: 0.5}",),
        ("data.max_rejected=1",),
        ("train.optimizer=sgd", "train.momentum=0.8", "train.betas=null"),
        ("train.optimizer=lion", "train.betas=[0.9, 0.95]", "train.clip_norm=0.3"),
        (MEZO, "train.perturbation=0.01", "train.clip_norm=null"),
        ("strategy={zero: 3, keep_elements: 1000, offload_parameters: cpu, pin_memory: false}",),
        ("strategy={zero: 0}",),
        ("data.sources.0={path: org/name, reader: datasets, format: text, split: test, subset: de}",),
        ("data.sources.0={path: saved, format: text, split: test}",),
        ("data.sources.0.weight=2", "train.evaluate_rows=5"),
    ],
)
def test_what_a_refusal_names_instead_is_taken(overrides: tuple[str, ...]) -> None:
    parse_run(RUN, "run.yaml", overrides)


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_a_resolved_run_is_taken_again_with_every_default_in_it(optimizer: str, schedule: str) -> None:
    run = parse_run(RUN, "run.yaml", [f"train.optimizer={optimizer}", f"train.schedule={schedule}"])
    assert parse_run(run.to_yaml(), "run.yaml") == run


@pytest.mark.parametrize("path", [f"a{e}{c}" for e in sources._KINDS for c in ("", *sources._COMPRESSIONS)])
def test_a_file_is_told_by_the_endings_that_can_be_read(path: str) -> None:
    run = parse_run(RUN, "run.yaml", [f"data.sources.0.path=s3://bucket/*/{path}"])
    assert run.data.sources[0].is_file


_ALONE = """
import json, sys
from ftray.config import load_run
from ftray.errors import ConfigError
refused = 0
for overrides in json.load(sys.stdin):
    try:
        load_run(sys.argv[1], overrides=overrides)
    except ConfigError:
        refused += 1
print(json.dumps([refused, sorted({"torch", "ray", "transformers", "peft", "deepspeed"} & sys.modules.keys())]))
"""


def test_a_refusal_comes_before_torch_and_ray(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    load_run(tmp_path / "run.yaml")
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, str(tmp_path / "run.yaml")],
        input=json.dumps([overrides for overrides, _, _ in CASES.values()]),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [len(CASES), []]


def test_a_refused_run_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    command = "from ftray.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "train", "run.yaml", MEZO, "strategy={zero: 2}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == EXIT_USER
    assert "leave `strategy` out" in " ".join(done.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
