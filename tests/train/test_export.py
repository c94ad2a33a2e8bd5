"""Export: a merge equals base plus adapter and is a plain model; combinations load with PEFT; mistakes are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ftray.cli.main import call
from ftray.data.tokenizer import local_model_folder
from ftray.manifest import describe_files
from ftray.train.loop import train_worker
from ftray.train.world import World
from tests.toys import MemoryData, Recorder, random_rows, toy_run

ROWS = random_rows(16)
IDS = torch.from_numpy(ROWS[3].tokens.astype(np.int64))[None]
METHODS = {
    "lora": "{name: lora, rank: 4, alpha: 16, rslora: true, dropout: 0.1}",
    "other": "{name: lora, rank: 4, alpha: 8, targets: [q_proj, up_proj, down_proj]}",
    "wide": "{name: lora, rank: 6, alpha: 8, rank_pattern: {q_proj: 3}}",
    "dora": "{name: dora, rank: 4}",
    "qlora": "{name: qlora, rank: 4}",
    "adalora": "{name: adalora, rank: 4, target_rank: 2, every: 1}",
    "vera": "{name: vera, rank: 32}",
    "ia3": "{name: ia3}",
    "prefix": "{name: prefix, tokens: 3}",
    "prompt": "{name: prompt, tokens: 3}",
    "p_tuning": "{name: p_tuning, tokens: 3}",
    "bottleneck": "{name: bottleneck, size: 8}",
    "freeze": "{name: freeze, blocks: 1}",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of a finished run of each method, made when first asked for."""
    made: dict[str, str] = {}

    def run_of(name: str, *overrides: str) -> str:
        if name not in made:
            folder = tmp_path_factory.mktemp("runs") / name
            steps = ("train.steps=4", "train.learning_rate=2e-2", f"name={name}", *overrides)
            run = toy_run(folder, *steps, method=METHODS[name])
            train_worker(run, MemoryData(ROWS), World(), Recorder())  # type: ignore[arg-type]
            (folder / "run.yaml").write_text(run.to_yaml())
            made[name] = str(folder)
        return made[name]

    return run_of


def base() -> Any:
    from transformers import AutoModelForCausalLM

    from ftray.config import Model

    return AutoModelForCausalLM.from_pretrained(local_model_folder(Model(path="embedded")), dtype=torch.float32).eval()


def tuned(folder: str) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base(), folder).eval()


def model_at(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits[0]


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def export(*arguments: str) -> int:
    return call(["export", *arguments])


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # of AdaLoRA, when PEFT loads it
@pytest.mark.parametrize("name", ["lora", "dora", "qlora", "adalora", "vera", "ia3", "wide"])
def test_a_merge_equals_base_plus_adapter(tmp_path, runs, name):
    to = tmp_path / "merged"
    assert export(runs(name), "--to", str(to), "--merge", "--precision", "fp32") == 0
    merged, adapter = model_at(to), tuned(f"{runs(name)}/artefact")
    assert far(logits(merged), logits(adapter)) < 1e-5
    assert far(logits(merged), logits(base())) > 1e-2
    facts = json.loads((to / "ftray.json").read_text())
    assert facts["kind"] == "model"
    assert [o["name"] for o in facts["origins"]] == [name]
    assert facts["files"] == {k: v for k, v in describe_files(to).items() if k != "ftray.json"}
    assert "AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)" in (to / "README.md").read_text()


def test_a_merged_model_is_a_plain_one_and_decodes_as_one(tmp_path, runs):
    from transformers import AutoTokenizer

    to = tmp_path / "merged"
    assert export(runs("lora"), "--to", str(to), "--merge", "--precision", "bf16") == 0
    merged, plain = model_at(to), base()
    assert merged.dtype == torch.bfloat16
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert merged.config.to_diff_dict() == plain.config.to_diff_dict() | {"dtype": "bfloat16"}
    assert merged.num_parameters() == plain.num_parameters()
    assert AutoTokenizer.from_pretrained(to).chat_template
    out = merged.generate(IDS, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > IDS.shape[1]


@pytest.mark.parametrize("name", ["lora", "prefix", "bottleneck", "freeze"])
def test_without_merge_an_artefact_is_copied(tmp_path, runs, capsys, name):
    to = tmp_path / "copy"
    assert export(runs(name), "--to", str(to), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["to"] == str(to)
    source = Path(runs(name)) / "artefact"
    ours, theirs = describe_files(to), describe_files(source)
    assert ours.pop("ftray.json") != theirs.pop("ftray.json")  # it names its origin
    assert ours == theirs == said["files"]


COMBINED = [
    (["lora", "other"], "linear", []),
    (["lora", "other"], "svd", ["--rank", "8"]),
    (["lora", "wide"], "svd", []),
    (["lora", "other"], "cat", ["--weights", "0.7,-0.3"]),
    (["lora", "other"], "ties", ["--density", "0.5"]),
    (["lora", "other"], "dare_linear", ["--density", "0.5", "--seed", "3"]),
    (["lora", "other"], "dare_ties", ["--density", "0.5"]),
    (["lora", "qlora"], "ties_svd", ["--density", "0.5"]),
    (["lora", "other"], "magnitude_prune", ["--density", "0.5"]),
]


@pytest.mark.parametrize(("names", "kind", "options"), COMBINED, ids=[kind for _, kind, _ in COMBINED])
def test_combinations_load_with_peft(tmp_path, runs, names, kind, options):
    to, folders = tmp_path / "both", [runs(name) for name in names]
    assert export(*folders, "--to", str(to), "--combine", kind, *options) == 0
    both = logits(tuned(str(to)))
    assert all(far(both, logits(other)) > 1e-3 for other in (base(), *(tuned(f"{f}/artefact") for f in folders)))
    facts = json.loads((to / "ftray.json").read_text())
    assert [o["name"] for o in facts["origins"]] == names
    assert facts["combination"]["kind"] == kind
    assert facts["run"] is None
    assert not any(str(tmp_path) in p.read_text() for p in (to / "adapter_config.json", to / "README.md"))


@pytest.mark.parametrize(("kind", "options"), [("cat", []), ("svd", ["--rank", "10"])])
def test_exact_combinations_are_the_weighted_sum_of_updates(tmp_path, runs, kind, options):
    """Weights of the merged combination against base + 0.7 Δ₁ - 0.2 Δ₂, from each run merged alone."""
    names, shares = ("lora", "other"), (0.7, -0.2)
    for name in names:
        assert export(runs(name), "--to", str(tmp_path / name), "--merge", "--precision", "fp32") == 0
    both = ["--combine", kind, "--weights", "0.7,-0.2", "--merge", "--precision", "fp32", *options]
    assert export(*map(runs, names), "--to", str(tmp_path / "both"), *both) == 0
    plain = base().state_dict()
    alone = [load_file(tmp_path / name / "model.safetensors") for name in names]
    merged = load_file(tmp_path / "both/model.safetensors")
    for key, tensor in merged.items():
        update = sum(share * (one[key] - plain[key]) for share, one in zip(shares, alone, strict=True))
        assert torch.allclose(tensor, plain[key] + update, atol=1e-6)
    assert any(not torch.equal(merged[key], plain[key]) for key in merged)


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        (["prefix"], ["--merge"], "in front of every layer's own"),
        (["prompt"], ["--merge"], "cannot be merged"),
        (["p_tuning"], ["--merge"], "cannot be merged"),
        (["bottleneck"], ["--merge"], "an activation between them"),
        (["lora", "other"], [], "2 runs and no --combine"),
        (["lora", "dora"], ["--combine", "svd"], "is of method dora"),
        (["lora", "freeze"], ["--combine", "svd"], "is of method freeze"),
        (["lora", "wide"], ["--combine", "linear"], "4, 6"),
        (["wide", "other"], ["--combine", "cat"], "from layer to layer"),
        (["lora", "other"], ["--combine", "ties"], "share of values"),
        (["lora", "other"], ["--combine", "svd", "--density", "0.5"], "keeps every value"),
        (["lora", "other"], ["--combine", "linear", "--rank", "4"], "--rank"),
        (["lora", "other"], ["--combine", "sum"], "no such combination"),
        (["lora", "other"], ["--combine", "svd", "--weights", "1"], "1 weights for 2 runs"),
        (["lora", "other"], ["--combine", "svd", "--weights", "a,b"], "no list of numbers"),
        (["lora"], ["--combine", "svd"], "nothing to combine"),
        (["lora"], ["--weights", "1"], "belongs to --combine"),
        (["lora"], ["--precision", "bf16"], "of a merged model"),
        (["lora"], ["--merge", "--precision", "int8"], "bf16 or fp32"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, runs, capsys, names, options, says):
    to = tmp_path / "to"
    assert export(*map(runs, names), "--to", str(to), *options) == 2
    assert says in capsys.readouterr().err
    assert not to.exists()


def test_what_is_there_is_not_overwritten(tmp_path, runs, capsys):
    (tmp_path / "to").mkdir()
    (tmp_path / "to/mine.txt").write_text("mine")
    assert export(runs("lora"), "--to", str(tmp_path / "to")) == 2
    assert "something already" in capsys.readouterr().err
    assert (tmp_path / "to/mine.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", ["flip", "missing", "added", "facts", "method", "none"])
def test_a_damaged_artefact_is_refused(tmp_path, runs, capsys, damage):
    shutil.copytree(runs("lora"), tmp_path / "run")
    artefact = tmp_path / "run/artefact"
    weights = artefact / "adapter_model.safetensors"
    if damage == "flip":
        data = weights.read_bytes()
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        weights.unlink()
    elif damage == "added":
        (artefact / "adapter_model.bin").write_bytes(b"pickle")
    elif damage == "facts":
        (artefact / "ftray.json").write_text("{}")
    elif damage == "method":
        file = tmp_path / "run/run.yaml"
        file.write_text(file.read_text().replace("rank: 4", "rank: 8"))
    else:
        shutil.rmtree(artefact)
    assert export(str(tmp_path / "run"), "--to", str(tmp_path / "to"), "--merge") == 2
    assert "artefact" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_another_base_is_refused(tmp_path, runs, capsys):
    from ftray.config import Model

    changed = tmp_path / "base"
    shutil.copytree(local_model_folder(Model(path="embedded")), changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    for name, text in (("moved", "path: embedded"), ("other", "")):
        shutil.copytree(runs("lora"), tmp_path / name)
        file = tmp_path / name / "run.yaml"
        file.write_text(file.read_text().replace(text, f"path: {changed}", 1) if text else file.read_text())
    assert export(str(tmp_path / "moved"), "--to", str(tmp_path / "to"), "--merge") == 2
    assert "not the base that the adapter was trained on" in capsys.readouterr().err
    facts = tmp_path / "other/artefact/ftray.json"
    value = json.loads(facts.read_text())
    value["base"]["sha256"] = "0" * 64
    facts.write_text(json.dumps(value))
    both = [runs("lora"), str(tmp_path / "other")]
    assert export(*both, "--to", str(tmp_path / "to"), "--combine", "svd") == 2
    assert "another base" in capsys.readouterr().err
