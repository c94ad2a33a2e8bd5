"""Every method on the embedded base: it learns, its count is the formula's, others load what it leaves, it resumes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ftray.config import Run
from ftray.config.methods import VIRTUAL_TOKENS
from ftray.data.tokenizer import local_model_folder
from ftray.errors import ArtefactError, ConfigError, ModelError
from ftray.model import bottleneck
from ftray.model.counts import trained_tensors
from ftray.model.load import evaluating, load_base
from ftray.model.methods import attach
from ftray.model.shapes import shapes_of
from ftray.model.source import find_shapes
from ftray.model.targets import IA3_DEFAULTS
from ftray.model.virtual import with_virtual_tokens
from ftray.train import loop
from ftray.train.batch import collate
from ftray.train.loop import train_worker
from ftray.train.loss import TargetLoss
from ftray.train.strategy import DataParallel
from ftray.train.world import World
from tests.toys import MemoryData, Recorder, cheese_rows, toy_run

METHODS = {
    "freeze": ("{name: freeze, blocks: 1, norms: true}", 2e-3, 0.6),
    "adalora": ("{name: adalora, rank: 6, target_rank: 3, every: 3}", 2e-2, 0.65),
    "vera": ("{name: vera, rank: 64}", 5e-2, 0.85),
    "ia3": ("{name: ia3}", 5e-2, 0.85),
    "prefix": ("{name: prefix, tokens: 8}", 3e-2, 0.97),
    "projected prefix": ("{name: prefix, tokens: 8, projection: true, hidden: 32}", 3e-3, 0.97),
    "prompt": ("{name: prompt, tokens: 8, text: 'Bless the cheese, my friend.'}", 3e-2, 0.88),
    "p_tuning": ("{name: p_tuning, tokens: 8, hidden: 64}", 3e-3, 0.93),
    "p_tuning lstm": ("{name: p_tuning, tokens: 8, hidden: 32, encoder: lstm}", 3e-3, 0.97),
    "bottleneck": ("{name: bottleneck, size: 16}", 5e-3, 0.75),
    "houlsby": ("{name: bottleneck, size: 16, placement: houlsby, activation: silu}", 5e-3, 0.7),
}
"""By name: the method, its rate, and the share of the base's held-out loss below which STEPS bring it."""
STEPS = 20
MORE = {
    "lora": "{name: lora, rank: 4, rank_pattern: {q_proj: 2}}",
    "dora": "{name: dora, rank: 4, targets: [q_proj, down_proj]}",
    "full": "{name: full}",
    "freeze all": "{name: freeze, blocks: 0, norms: true, embeddings: true, also: ['layers.0.mlp.*weight']}",
}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 128, "n_positions": 64}
NEOX = {
    "model_type": "gpt_neox", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 128,
    "intermediate_size": 96, "max_position_embeddings": 64,
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 128,
    "intermediate_size": 96, "num_key_value_heads": 2, "sliding_window": None,
}  # fmt: skip
ROWS, HELD_OUT = cheese_rows(64), cheese_rows(12, "held_out")


def run_of(folder: Path, method: str, *overrides: str, rate: float = 1e-3, steps: int = 6) -> Run:
    return toy_run(folder, f"train.steps={steps}", f"train.learning_rate={rate}", *overrides, method=method)


def trained(run: Run, channel: Recorder | None = None, held_out=None) -> tuple[Recorder, dict[str, Any]]:
    channel = channel or Recorder()
    return channel, train_worker(run, MemoryData(ROWS, held_out), World(), channel)  # type: ignore[arg-type]


def plain_base(run: Run) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(local_model_folder(run.model), dtype=torch.float32).eval()


def loaded_by_others(run: Run) -> Any:
    """What the code in the artefact's card makes of it: PEFT or transformers alone, our loader for a bottleneck."""
    artefact = f"{run.folder}/artefact"
    [code] = re.findall(r"^```python\n(.*?)^```$", Path(artefact, "README.md").read_text(), re.S | re.M)
    assert ("ftray.model" in code) == (run.method.name == "bottleneck")
    names: dict[str, Any] = {}
    exec(code.replace('folder = "."', f"folder = {artefact!r}"), names)
    return names["model"].eval()


def our_logits(model: Any, run: Run, rows) -> list[torch.Tensor]:
    """Of each row [T, vocabulary], all rows in one packed row."""
    layout = {"virtual_tokens": run.method.virtual_tokens, "prefix_tokens": run.method.prefix_tokens}
    batch = collate(rows, 0, packed=True, **layout)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with evaluating(model):
        logits = base(**with_virtual_tokens(model, batch), use_cache=False).logits[0]
    if batch.virtual is not None:
        own = np.setdiff1d(np.arange(len(logits)), batch.virtual.numpy())
        logits = logits[torch.from_numpy(own)]
    return list(logits.split([len(row.tokens) for row in rows]))


def their_logits(model: Any, row, virtual_tokens: int) -> torch.Tensor:
    ids = torch.from_numpy(row.tokens.astype(np.int64))[None]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, virtual_tokens:]


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


def same_artefacts(a: Run, b: Run) -> bool:
    name = "adapter_model.safetensors" if a.method.frozen_base else "model.safetensors"
    x, y = (load_file(f"{run.folder}/artefact/{name}") for run in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # of AdaLoRA, when PEFT loads it
@pytest.mark.parametrize("name", METHODS)
def test_it_learns_and_others_get_the_same_logits_from_its_artefact(tmp_path, monkeypatch, name):
    method, rate, share = METHODS[name]
    kept = []
    monkeypatch.setattr(loop, "attach", lambda *a: kept.append(attach(*a)) or kept[-1])
    run = run_of(tmp_path, method, "data.held_out_fraction=0.1", rate=rate, steps=STEPS)
    _, summary = trained(run, held_out=HELD_OUT)
    assert summary["final_loss"] < share * summary["base_loss"]
    others = loaded_by_others(run)
    for row, ours in zip(HELD_OUT[:3], our_logits(kept[0], run, HELD_OUT[:3]), strict=True):
        theirs = their_logits(others, row, run.method.virtual_tokens)
        assert far(ours, theirs) < 1e-5
        assert far(theirs, their_logits(plain_base(run), row, 0)) > 1e-2  # the adapter is in it


@pytest.mark.parametrize("name", METHODS)
def test_resume_is_exact(tmp_path, name):
    method, rate, _ = METHODS[name]
    if "adalora" in name or "lstm" in name or "bottleneck" in name:
        method = method.replace("}", ", dropout: 0.1}")
    overrides = ("train.commit_every=3", "train.precision=bf16", "train.batch_rows=4")
    whole = run_of(tmp_path / "whole", method, *overrides, rate=rate, steps=10)
    broken = run_of(tmp_path / "broken", method, *overrides, rate=rate, steps=10)
    trained(whole)
    for fail_at in (5, 8):  # before and after AdaLoRA takes ranks away and settles
        with pytest.raises(InterruptedError):
            trained(broken, Recorder(fail_at=fail_at))
    _, summary = trained(broken)
    assert summary["resumed_from"] == 6
    assert same_artefacts(whole, broken)


@pytest.mark.parametrize("method", [m for m, *_ in METHODS.values()] + list(MORE.values()), ids=[*METHODS, *MORE])
@pytest.mark.parametrize("config", ["embedded", GPT2, NEOX], ids=["llama", "gpt2", "gpt_neox"])
def test_trained_parameters_are_those_of_the_formula(tmp_path, method, config):
    from transformers import AutoConfig, AutoModelForCausalLM

    if config is not GPT2 and config != "embedded":
        method = method.replace("layers.0.mlp.*weight", "layers.0.mlp.*bias")
    elif config is GPT2:
        method = method.replace("layers.0", "h.0")
    if config != "embedded":
        method = method.split(", text:")[0] + "}" if "text:" in method else method  # a text has tokens of its base
        method = method.replace("q_proj, down_proj", "mlp.c_proj" if config is GPT2 else "dense")
        method = method.replace("q_proj", "c_attn" if config is GPT2 else "dense")
    run = run_of(tmp_path, method, "data.max_length=32")
    if config == "embedded":
        base, shapes = load_base(run)[0], find_shapes(run.model)[0]
    else:
        base, shapes = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)), shapes_of(config)
    model = attach(base, run, 20)
    real = [p.numel() for p in model.parameters() if p.requires_grad]
    if run.method.name == "full":
        assert sum(trained_tensors(run, shapes)) == sum(real)
    else:
        assert sorted(trained_tensors(run, shapes)) == sorted(real)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["prefix", "projected prefix", "prompt", "p_tuning lstm", "houlsby", "adalora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_packed_row_gives_the_losses_and_gradients_of_its_rows_one_by_one(tmp_path, name, precision):
    run = run_of(tmp_path, METHODS[name][0], f"train.precision={precision}")
    model = attach(load_base(run)[0], run, 20).train()
    strategy = DataParallel(run, model, TargetLoss(model), World())
    layout = {"virtual_tokens": run.method.virtual_tokens, "prefix_tokens": run.method.prefix_tokens}

    def gradients(groups) -> tuple[float, torch.Tensor]:
        batches = [collate(rows, 0, packed=True, **layout) for rows in groups]
        losses = strategy.gradients(batches, 100.0, [0] * len(batches))
        flat = torch.cat([p.grad.flatten() for p in strategy.trained])
        for p in strategy.trained:
            p.grad = None
        return float(sum(losses)), flat

    together, packed = gradients([ROWS[:6]])
    alone, single = gradients([[row] for row in ROWS[:6]])
    limit = 1e-5 if precision == "fp32" else 2e-2
    assert together == pytest.approx(alone, rel=limit)
    assert float((packed - single).norm() / single.norm()) < (1e-4 if precision == "fp32" else 5e-2)


@pytest.mark.parametrize(
    "config", [GPT2, NEOX, MISTRAL, MISTRAL | {"sliding_window": 5}], ids=lambda c: c["model_type"]
)
def test_prefixes_equal_pefts_in_other_families(tmp_path, config):
    """PEFT's own forward pass, with its cache, against ours; sliding windows count the prefix as it does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftray.model import attention

    attention.register()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    run = run_of(tmp_path, "{name: prefix, tokens: 3}", "data.max_length=32")
    model = attach(base, run).eval()
    row = type(ROWS[0])(np.arange(1, 13, dtype=np.int32), np.ones(12, bool), np.array([12], np.int32))
    theirs = their_logits(model, row, 0)
    base.set_attn_implementation(attention.IMPLEMENTATION)
    ours = our_logits(model, run, [row, row])
    assert max(far(o, theirs) for o in ours) < 1e-5


@pytest.mark.parametrize("name", ["prefix", "prompt", "p_tuning", "ia3", "bottleneck", "vera", "adalora"])
def test_it_learns_over_nf4(tmp_path, monkeypatch, name):
    method, rate, _ = METHODS[name]
    kept = []
    monkeypatch.setattr(loop, "attach", lambda *a: kept.append(attach(*a)) or kept[-1])
    nf4 = method.replace("}", ", quantization: nf4}")
    overrides = ("data.held_out_fraction=0.1", "train.precision=bf16")
    _, summary = trained(run_of(tmp_path, nf4, *overrides, rate=rate, steps=10), held_out=HELD_OUT[:6])
    assert summary["final_loss"] < 0.98 * summary["base_loss"]
    quantized = [m for m in kept[0].modules() if type(m).__name__ == "Linear4bit"]
    assert quantized
    assert not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in quantized)


def _worker_of_two(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name in names:
        run = run_of(Path(folder) / f"two {name}", METHODS[name][0], "workers.count=2", rate=METHODS[name][1])
        channel = Recorder()
        train_worker(run, MemoryData(ROWS), World(rank, 2), channel)  # type: ignore[arg-type]
        if rank == 0:
            Path(folder, f"{name}.json").write_text(json.dumps(channel.losses))
    torch.distributed.destroy_process_group()


def test_two_workers_train_as_one(tmp_path):
    """DDP, and what stands beside it: AdaLoRA's penalty and ranks, virtual tokens, hooks."""
    names = ["adalora", "prefix", "bottleneck"]
    torch.multiprocessing.spawn(_worker_of_two, (str(tmp_path), names), nprocs=2)
    for name in names:
        alone, _ = trained(run_of(tmp_path / f"one {name}", METHODS[name][0], rate=METHODS[name][1]))
        assert json.loads((tmp_path / f"{name}.json").read_text()) == pytest.approx(alone.losses, rel=1e-3)


def test_the_base_is_measured_without_virtual_tokens(tmp_path):
    run = run_of(tmp_path / "a", "{name: prefix, tokens: 8}", "data.held_out_fraction=0.1", steps=1)
    other = run_of(tmp_path / "b", "{name: ia3}", "data.held_out_fraction=0.1", steps=1)
    (_, a), (_, b) = (trained(each, held_out=HELD_OUT) for each in (run, other))
    assert a["base_loss"] == pytest.approx(b["base_loss"], rel=1e-6)


@pytest.mark.parametrize("name", ["prefix", "prompt", "p_tuning", "bottleneck"])
def test_the_base_alone_can_be_had_from_a_tuned_model(tmp_path, monkeypatch, name):
    """What a reference is made of: a batch without virtual tokens, adapters switched off."""
    kept = []
    monkeypatch.setattr(loop, "attach", lambda *a: kept.append(attach(*a)) or kept[-1])
    run = run_of(tmp_path, METHODS[name][0], rate=3e-2, steps=2)
    trained(run)
    loss, base_loss = TargetLoss(kept[0]), TargetLoss(load_base(run)[0])
    layout = {"virtual_tokens": run.method.virtual_tokens, "prefix_tokens": run.method.prefix_tokens}
    batch, plain = collate(ROWS[:4], 0, packed=True, **layout), collate(ROWS[:4], 0, packed=True)
    with evaluating(loss), evaluating(base_loss):
        tuned, base = float(loss(batch)), float(base_loss(plain))
        for module in kept[0].modules():
            if hasattr(module, "_disable_adapters"):
                module._disable_adapters = True
        assert float(loss(batch.bare or batch)) == pytest.approx(base, rel=1e-6)
    assert abs(tuned - base) > 1e-3 * base


@pytest.mark.parametrize("name", ["prefix", "p_tuning", "bottleneck", "adalora", "freeze"])
def test_gradient_checkpointing_changes_no_loss(tmp_path, name):
    method, rate, _ = METHODS[name]
    plain, _ = trained(run_of(tmp_path / "a", method, rate=rate))
    checkpointed, _ = trained(run_of(tmp_path / "b", method, "train.gradient_checkpointing=true", rate=rate))
    assert plain.losses == pytest.approx(checkpointed.losses, rel=1e-6)


def test_a_prompt_starts_from_its_text(tmp_path):
    run = run_of(tmp_path, "{name: prompt, tokens: 9, text: cheese cheese}")
    model = attach(load_base(run)[0], run)
    prompt = model.prompt_encoder["default"].embedding.weight
    table = model.get_base_model().get_input_embeddings().weight
    near = torch.cdist(prompt.detach(), table.detach()).argmin(1)
    assert torch.equal(table[near], prompt)
    period = next(p for p in range(1, 9) if torch.equal(prompt[p:], prompt[:-p]))
    assert period > 1


# ------------------------------------------------------------------------------------------------------------- AdaLoRA


def test_adalora_takes_ranks_away_and_its_artefact_has_those_that_are_left(tmp_path):
    run = run_of(tmp_path, METHODS["adalora"][0], rate=2e-2, steps=12)
    trained(run)
    config = json.loads((tmp_path / "artefact/adapter_config.json").read_text())
    left = [sum(kept) for kept in config["rank_pattern"].values()]
    assert len(left) == 28
    assert sum(left) == 3 * 28
    assert len(set(left)) > 1  # they went where they matter
    tensors = load_file(tmp_path / "artefact/adapter_model.safetensors")
    assert sorted(left) == sorted(t.shape[0] for key, t in tensors.items() if key.endswith("lora_A"))


def test_adaloras_penalty_pulls_its_factors_towards_orthogonality(tmp_path):
    def distance(weight: float) -> float:
        run = run_of(
            tmp_path / str(weight),
            f"{{name: adalora, rank: 6, target_rank: 3, orthogonality: {weight}}}",
            rate=2e-2,
            steps=10,
        )
        channel, _ = trained(run)
        assert channel.losses[0] == pytest.approx(first[-1] if first else channel.losses[0])  # not in the loss
        first.append(channel.losses[0])
        newest = load_file(tmp_path / str(weight) / "commits/step-00000010/model.safetensors")
        rows = [t for key, t in newest.items() if key.endswith("lora_A.default") and "/" not in key]
        return float(torch.stack([torch.linalg.norm(a @ a.T - torch.eye(6)) for a in rows]).mean())

    first: list[float] = []
    assert distance(2.0) < 0.9 * distance(0.0)


@pytest.mark.parametrize(("steps", "shares"), [(1, "settle: 0.9, start: 0.05"), (2, "settle: 0.3"), (1, "settle: 0.0")])
def test_adalora_needs_steps_in_which_ranks_can_change(tmp_path, steps, shares):
    """And one before them that judges the ranks."""
    with pytest.raises(ModelError, match=f"of {steps} steps"):
        trained(run_of(tmp_path, f"{{name: adalora, {shares}}}", steps=steps))


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("{name: adalora, targets: [q_porj]}", "did you mean 'q_proj'"),
        ("{name: vera, targets: [c_attn]}", "'c_attn' matches no linear layer"),
        ("{name: ia3, targets: [k_proj, fc2], feedforward: [fc2]}", "'fc2' matches no linear layer"),
        ("{name: freeze, blocks: 9}", "9 blocks of 4"),
        ("{name: freeze, head: true}", "its embedding"),
        ("{name: freeze, also: ['layers.7.*']}", "matches no parameter"),
        ("{name: freeze, also: ['*']}", "not a regular expression"),
        ("{name: prompt, tokens: 1000}", "more than the base's 1024"),
    ],
)
def test_what_fits_no_layer_is_refused(tmp_path, method, says):
    run = run_of(tmp_path, method)
    with pytest.raises(ModelError) as error:
        attach(load_base(run)[0], run, 20)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("{name: ia3, feedforward: [down_proj]}", "name the targets too"),
        ("{name: ia3, targets: [k_proj], feedforward: [down_proj]}", "not in targets"),
        ("{name: adalora, rank: 4, target_rank: 4}", "not below rank 4"),
        ("{name: prefix, hidden: 8}", "set projection: true"),
        ("{name: prompt, text: ''}", "at least 1 character"),
        ("{name: p_tuning, layers: 3}", "an lstm's"),
    ],
)
def test_knobs_that_would_do_nothing_are_refused(tmp_path, method, says):
    with pytest.raises(ConfigError) as error:
        run_of(tmp_path, method)
    assert says in str(error.value)


def test_ia3s_defaults_are_pefts():
    from peft.utils import constants

    wanted = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    feedforward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    for family, (targets, inner) in IA3_DEFAULTS.items():
        assert (list(targets), list(inner)) == (wanted[family], feedforward[family])


def test_ia3_without_defaults_says_what_to_write(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **shape, vocab_size=64, pad_token_id=0))
    run = run_of(tmp_path, "{name: ia3}")
    with pytest.raises(ModelError, match="no default targets") as error:
        attach(base, run)
    assert "down_proj, gate_up_proj, o_proj, qkv_proj" in str(error.value)


# ---------------------------------------------------------------------------------------------------------- bottleneck


@pytest.fixture(scope="module")
def bottleneck_artefact(tmp_path_factory) -> Run:
    run = run_of(tmp_path_factory.mktemp("bottleneck"), METHODS["bottleneck"][0], steps=1)
    trained(run)
    return run


@pytest.mark.parametrize("damage", ["key", "shape", "nan", "config", "missing"])
def test_a_wrong_bottleneck_adapter_is_refused_and_the_base_stays(tmp_path, bottleneck_artefact, damage):
    folder = tmp_path / "artefact"
    shutil.copytree(Path(bottleneck_artefact.folder) / "artefact", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(iter(tensors))
    if damage == "key":
        tensors["other.weight"] = tensors.pop(first)
    elif damage == "shape":
        tensors[first] = tensors[first][:-1].clone()
    elif damage == "nan":
        tensors[first][0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    if damage == "config":
        config = json.loads((folder / "adapter_config.json").read_text()) | {"surprise": 1}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if damage == "missing":
        (folder / "adapter_model.safetensors").unlink()
    base = plain_base(bottleneck_artefact)
    before = set(dict(base.named_modules()))
    with pytest.raises(ArtefactError):
        bottleneck.load(base, folder)
    assert set(dict(base.named_modules())) == before


def test_bottlenecks_refuse_families_whose_blocks_they_do_not_know(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("opt", hidden_size=32, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2,
                                  vocab_size=64, word_embed_proj_dim=32, max_position_embeddings=64)  # fmt: skip
    run = run_of(tmp_path, "{name: bottleneck}", "data.max_length=64")
    with pytest.raises(ModelError, match="family 'opt'"):
        attach(AutoModelForCausalLM.from_config(config), run)


def test_virtual_token_methods_are_those_with_tokens_in_front(tmp_path):
    for method, *_ in METHODS.values():
        run = run_of(tmp_path, method)
        in_front = run.method.virtual_tokens + run.method.prefix_tokens
        assert (in_front > 0) == isinstance(run.method, VIRTUAL_TOKENS)
