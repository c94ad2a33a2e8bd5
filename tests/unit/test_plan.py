"""Shapes and the memory plan: exact counts, by hand and against transformers; activations against autograd."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ftray.config import Model, Run, parse_run
from ftray.errors import ModelError
from ftray.model.activations import layer_bytes, micro_batch_tokens, saved_bytes
from ftray.model.advice import cheapest_fit
from ftray.model.counts import targeted, trained_tensors
from ftray.model.plan import LOGIT_BYTES, LOSS_CHUNK_TOKENS, make_plan
from ftray.model.shapes import KNOWN_FAMILIES, Linear, Shapes, shapes_of
from ftray.model.source import find_config, find_shapes
from ftray.model.states import GIB, nf4_bytes, optimizer_bytes

LLAMA_8B = "meta-llama/Llama-3.1-8B"


def a_run(method: str = "{name: lora, rank: 16}", path: str = LLAMA_8B, train: str = "", workers: str = "") -> Run:
    return parse_run(
        f"""
        name: a
        model: {{path: "{path}"}}
        method: {method}
        data: {{sources: [{{path: rows.jsonl, format: text}}], max_length: 1024}}
        train: {{steps: 10, batch_rows: 16, micro_batch_rows: 4{train}}}
        workers: {{count: 1{workers}}}
        """,
        "test",
    )


def shapes_in_table(name: str) -> Shapes:
    return find_shapes(Model(path=name))[0]


# ---------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as the models' own cards or safetensors headers say
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
        ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("google/gemma-2b", 2_506_172_416),
        ("google/gemma-2-9b", 9_241_705_984),
        ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("EleutherAI/pythia-1b", 1_011_781_632),
    ],
)
def test_parameters_of_well_known_bases(name: str, parameters: int) -> None:
    assert shapes_in_table(name).parameters == parameters


def test_parameters_of_a_local_folder(ftray_data: Path) -> None:
    shapes, origin = find_shapes(Model(path=str(ftray_data / "weights" / "stories260K-llama")))
    assert shapes.parameters == 260_032
    assert origin.endswith("stories260K-llama/config.json")
    by_name = {layer.path: layer for layer in shapes.linears}
    assert by_name["model.layers.0.self_attn.k_proj"] == Linear("model.layers.0.self_attn.k_proj", 64, 32)
    # 172 is no multiple of 32 (gate and up give it) nor of 64 (down takes it)
    assert len(shapes.unquantized()) == 3 * 5
    assert "model.layers.0.self_attn.k_proj" not in shapes.unquantized()


TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", **TINY},
        {"model_type": "llama", **TINY, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"model_type": "llama", **TINY, "head_dim": 32},
        {"model_type": "mistral", **TINY},
        {"model_type": "qwen2", **TINY},
        {"model_type": "qwen3", **TINY},
        {"model_type": "qwen3", **TINY, "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
        {"model_type": "gemma", **TINY, "head_dim": 16},
        {"model_type": "gemma2", **TINY},
        {"model_type": "phi3", **TINY},
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 128},
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 4, "n_inner": 100, "vocab_size": 128},
        {"model_type": "gpt_neox", **TINY},
    ],
    ids=lambda c: c["model_type"],
)
def test_shapes_equal_those_of_transformers(config: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftray.model.source import shapes_of_module

    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    mine, theirs = shapes_of(config), shapes_of_module(net, config)
    assert mine.parameters == sum(p.numel() for p in net.parameters()) == theirs.parameters
    assert set(mine.linears) == set(theirs.linears)
    assert set(mine.parts) == set(theirs.parts)
    assert (mine.embeddings, mine.norms, mine.tied) == (theirs.embeddings, theirs.norms, theirs.tied)
    assert mine.head.weights == theirs.head.weights
    assert mine.learned_positions == theirs.learned_positions


def test_what_nf4_cannot_hold_is_what_the_loader_leaves_out() -> None:
    pytest.importorskip("torch")
    from transformers import AutoConfig

    from ftray.model.load import misfits

    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 100, "vocab_size": 128}
    shapes = shapes_of(config)
    assert shapes.unquantized() == [f"transformer.h.{i}.mlp.{name}" for i in range(2) for name in ("c_fc", "c_proj")]
    assert misfits(AutoConfig.for_model(**config)) == ("lm_head", shapes.unquantized())


def test_the_parametrization_above_has_every_family() -> None:
    marks = test_shapes_equal_those_of_transformers.pytestmark  # type: ignore[attr-defined]
    assert {config["model_type"] for config in marks[0].args[1]} == set(KNOWN_FAMILIES)


def test_a_family_without_a_table_is_measured_on_the_meta_device(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmo2", **TINY}))
    shapes, origin = find_shapes(Model(path=str(tmp_path)))
    assert "meta device" in origin
    assert len(shapes.linears) == 2 * 7
    assert not shapes.tied
    # OLMo 2 norms queries and keys over their whole width, and each block's two outputs
    assert shapes.norms == 2 * (64 + 32 + 2 * 64) + 64


# ---------------------------------------------------------------------------------------------------- where from


def test_config_from_the_local_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub" / "models--some--base"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text(json.dumps({"model_type": "llama", **TINY}))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    config, origin = find_config(Model(path="some/base"))
    assert config["hidden_size"] == 64
    assert "cache" in origin


def test_a_base_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ModelError, match="some/base") as caught:
        find_config(Model(path="some/base"))
    assert "HF_TOKEN" in str(caught.value)
    with pytest.raises(ModelError, match="no such folder"):
        find_config(Model(path="./some/base"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        find_config(Model(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        find_config(Model(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    with pytest.raises(ModelError, match="num_attention_heads"):
        find_shapes(Model(path=str(tmp_path)))


# ------------------------------------------------------------------------------------------------------- methods


def test_lora_on_every_linear_of_llama_8b() -> None:
    # rank × (in + out) of q, k, v, o, gate, up, down, in 32 layers
    a_layer = (4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096) + 3 * (4096 + 14336)
    plan = make_plan(a_run(), shapes_in_table(LLAMA_8B))
    assert plan.trained == 32 * 16 * a_layer == 41_943_040
    assert plan.all_parameters == 8_072_204_288
    assert plan.share == pytest.approx(0.005196, rel=1e-3)  # PEFT says 0.5196 %


def test_dora_adds_a_magnitude_for_each_output() -> None:
    shapes = shapes_in_table(LLAMA_8B)
    outputs = 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096)
    assert make_plan(a_run("{name: dora, rank: 16}"), shapes).trained == 41_943_040 + outputs
    assert make_plan(a_run("{name: qdora, rank: 16}"), shapes).trained == 41_943_040 + outputs


def test_the_papers_gpt2_medium() -> None:
    run = a_run("{name: lora, rank: 4, targets: [c_attn]}", path="gpt2-medium")
    assert make_plan(run, shapes_in_table("gpt2-medium")).trained == 24 * 4 * (1024 + 3072)


def test_full_tuning_trains_everything() -> None:
    shapes = shapes_in_table("gpt2")
    assert sum(trained_tensors(a_run("{name: full}"), shapes)) == shapes.parameters == 124_439_808
    assert make_plan(a_run("{name: full}"), shapes).share == 1


def test_targets_by_name_and_rank_patterns() -> None:
    shapes = shapes_in_table(LLAMA_8B)
    run = a_run("{name: lora, rank: 8, targets: [q_proj, self_attn.v_proj], rank_pattern: {'layers.0.*q_proj': 32}}")
    assert len(targeted(run, shapes)) == 64
    q, v = 4096 + 4096, 4096 + 1024
    assert make_plan(run, shapes).trained == 31 * 8 * q + 32 * 8 * v + 32 * q


def test_targets_that_match_nothing() -> None:
    shapes = shapes_in_table(LLAMA_8B)
    with pytest.raises(ModelError, match="did you mean 'q_proj'") as caught:
        make_plan(a_run("{name: lora, targets: [q_porj]}"), shapes)
    assert "down_proj" in str(caught.value)
    with pytest.raises(ModelError, match="matches no linear layer"):
        make_plan(a_run("{name: lora, targets: [proj]}"), shapes)
    with pytest.raises(ModelError, match=r"rank_pattern\.x"):
        make_plan(a_run("{name: lora, rank_pattern: {x: 4}}"), shapes)
    with pytest.raises(ModelError, match="regular expression"):
        make_plan(a_run("{name: lora, alpha_pattern: {'(': 4}}"), shapes)


# ----------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("method", ["{name: lora}", "{name: full}", "{name: bottleneck}"])
def test_rows_longer_than_learned_positions(method: str) -> None:
    run = a_run(method, path="gpt2", train=", precision: fp32")
    assert make_plan(run, shapes_in_table("gpt2"))
    long = parse_run(run.to_yaml(), "test", ["data.max_length=1025"])
    with pytest.raises(ModelError, match="rows of up to 1025 tokens are more than the base's 1024 positions") as caught:
        make_plan(long, shapes_in_table("gpt2"))
    assert "data.max_length" in str(caught.value)
    rope = shapes_of({"model_type": "llama", **TINY, "max_position_embeddings": 1024})
    assert make_plan(parse_run(a_run("{name: full}").to_yaml(), "test", ["data.max_length=4096"]), rope)


@pytest.mark.parametrize(("family", "learned"), [("gpt2", True), ("opt", True), ("gpt_neox", False), ("llama", False)])
def test_who_learns_positions(family: str, learned: bool) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftray.model.source import learns_positions, shapes_of_module

    size = {"n_embd": 64, "n_layer": 1, "n_head": 4} if family == "gpt2" else TINY | {"word_embed_proj_dim": 64}
    settings = AutoConfig.for_model(family, **size)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(settings)
    assert learns_positions(net) is learned
    assert shapes_of_module(net, settings.to_dict()).learned_positions is learned


# -------------------------------------------------------------------------------------------------------- memory


def test_nf4_bytes() -> None:
    n = 4096 * 4096
    assert nf4_bytes(n, double_quantization=False) == n // 2 + n // 64 * 4  # 4.5 bits a weight
    assert nf4_bytes(n, double_quantization=True) == n // 2 + n // 64 + n // 64 // 256 * 4
    assert 8 * nf4_bytes(n, double_quantization=True) / n == pytest.approx(4 + 0.127, abs=1e-3)


def test_optimizer_bytes() -> None:
    assert optimizer_bytes([1000, 8192], "adamw") == 8 * 9192
    assert optimizer_bytes([1000, 8192], "paged_adamw_32bit") == 8 * 9192
    # the small tensor stays in fp32; the other has two states of a byte each, and two scales for every 256
    assert optimizer_bytes([1000, 8192], "adamw_8bit") == 8 * 1000 + 2 * 8192 + 2 * 4 * 32


def with_strategy(run: Run, strategy: str) -> Run:
    """On two workers."""
    return parse_run(run.to_yaml(), "test", ["workers.count=2", f"strategy={strategy}"])


def items(run: Run) -> dict[str, int]:
    return {item.name: item.bytes for item in make_plan(run, shapes_in_table(run.model.path)).items}


def test_weights_of_an_8b_qlora() -> None:
    found = items(a_run("{name: qlora}"))
    assert found["weights in NF4"] == pytest.approx(6_979_321_856 * 4.127 / 8, rel=1e-4)
    assert found["weights not quantized"] == 2 * (2 * 128_256 * 4096 + 65 * 4096)
    assert found["adapter weights"] == found["gradients"] == 4 * 41_943_040
    assert found["optimizer states"] == 8 * 41_943_040
    assert found["logits, one chunk"] == LOSS_CHUNK_TOKENS * 128_256 * LOGIT_BYTES
    single = items(a_run("{name: qlora, double_quantization: false}"))
    assert single["weights in NF4"] == 6_979_321_856 * 9 // 16


def test_weights_of_other_methods() -> None:
    assert items(a_run())["weights"] == 2 * 8_030_261_248
    assert items(a_run(train=", precision: fp32"))["weights"] == 4 * 8_030_261_248
    full = items(a_run("{name: full}"))
    assert full["weights"] == full["gradients"] == 4 * 8_030_261_248
    assert full["optimizer states"] == 8 * 8_030_261_248
    assert "adapter weights" not in full
    assert "bf16 copies of trained weights" not in items(a_run(train=", precision: fp32"))


def test_zero_3_moves_a_frozen_base_and_its_adapter_to_the_host() -> None:
    shapes = shapes_in_table(LLAMA_8B)
    run = with_strategy(a_run(workers=", gpu_memory_gib: 12"), "{zero: 3, offload_parameters: cpu}")
    found = {item.name: item for item in make_plan(run, shapes).items}
    assert found["weights"].bytes == 2 * 8_030_261_248 // 2
    assert found["adapter weights"].bytes == 4 * 41_943_040 // 2
    assert {found["weights"].place, found["adapter weights"].place} == {"host"}
    on_gpu = make_plan(with_strategy(run, "{zero: 3}"), shapes)
    assert {item.place for item in on_gpu.items if "weights" in item.name} == {"GPU"}


def test_checkpointing_keeps_one_block() -> None:
    shapes = shapes_in_table(LLAMA_8B)
    run, saving = a_run(), a_run(train=", gradient_checkpointing: true")
    tokens = 4 * 1024
    assert micro_batch_tokens(run) == tokens
    a_layer = layer_bytes(run, shapes, targeted(run, shapes))
    ends = 2 * 6 * 4096
    assert saved_bytes(run, shapes, targeted(run, shapes))[0] == int(tokens * (32 * a_layer + ends))
    assert saved_bytes(saving, shapes, targeted(saving, shapes))[0] == int(tokens * (32 * 8192 + a_layer + ends))


def test_activations_are_told_both_ways() -> None:
    def told(run: Run) -> tuple[int, str]:
        item = next(item for item in make_plan(run, shapes_in_table(LLAMA_8B)).items if item.name == "activations")
        return item.bytes, item.how

    (whole, how), (saved, other) = told(a_run()), told(a_run(train=", gradient_checkpointing: true"))
    assert how.endswith(f"; {saved / GIB:,.2f} GiB with gradient_checkpointing")
    assert other.endswith(f"; {whole / GIB:,.2f} GiB without gradient_checkpointing")
    mezo = make_plan(a_run("{name: full}", train=", optimizer: mezo"), shapes_in_table(LLAMA_8B))
    assert "activations" not in {item.name for item in mezo.items}


def test_a_micro_batch_is_no_larger_than_a_workers_share() -> None:
    assert micro_batch_tokens(a_run(workers=", gpus: 0")) == 4 * 1024
    assert micro_batch_tokens(a_run(train=", gradient_checkpointing: false", workers=", gpus: 1")) == 4 * 1024
    many = parse_run(a_run().to_yaml(), "test", ["workers.count=8"])
    assert micro_batch_tokens(many) == 2 * 1024


LENGTH = 320
"""Tokens a row: more than attention.PLAIN_LENGTH, so that a CPU takes the way of a GPU."""


@pytest.mark.parametrize(
    ("family", "method", "precision"),
    [("llama", "lora", "bf16"), ("llama", "lora", "fp32"), ("llama", "full", "fp32"), ("gpt2", "lora", "bf16")],
)
def test_activations_are_what_autograd_saves(family: str, method: str, precision: str) -> None:
    torch = pytest.importorskip("torch")
    config: dict[str, Any] = {"model_type": family, **TINY, "hidden_size": 128, "intermediate_size": 352}
    if family == "gpt2":
        config = {"model_type": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 128}
        config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    run = parse_run(
        f"""
        name: a
        model: {{path: x}}
        method: {{name: {method}{", rank: 4" if method == "lora" else ""}}}
        data: {{sources: [{{path: rows.jsonl, format: text}}], max_length: {LENGTH}}}
        train: {{steps: 1, batch_rows: 2, micro_batch_rows: 2, precision: {precision}}}
        """,
        "test",
    )
    shapes = shapes_of(config)
    formula, _ = saved_bytes(run, shapes, targeted(run, shapes))
    # the formula counts the hidden states of targets and their gradient, which the loss holds, not this forward pass
    formula -= 2 * LENGTH * (4 + 2 * {"bf16": 2, "fp32": 4}[precision]) * 128
    assert formula == pytest.approx(_saved_by_autograd(torch, config, run), rel=0.06)


def _saved_by_autograd(torch: Any, config: dict[str, Any], run: Run) -> int:
    """Bytes of all distinct tensors that a forward pass saves, weights and their copies aside."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftray.model import attention
    from ftray.model.methods import attach

    attention.register()
    dtype = torch.float32 if run.method.name == "full" or run.train.precision == "fp32" else torch.bfloat16
    options = {"attn_implementation": attention.IMPLEMENTATION, "dtype": dtype}
    net = attach(AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), **options), run).train()
    kept: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in [*net.parameters(), *net.buffers()]}
    alive = []

    def keep(tensor: Any) -> Any:
        alive.append(tensor)  # so that no storage is used again
        storage = tensor.untyped_storage()
        is_weight = tensor.ndim == 2 and tensor.shape[0] != 2 * LENGTH
        kept.setdefault(storage.data_ptr(), 0 if is_weight else storage.nbytes())
        return tensor

    lengths = torch.full((2,), LENGTH)
    causal = net.get_base_model() if hasattr(net, "get_base_model") else net
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=run.train.precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        causal.base_model(
            input_ids=torch.zeros(1, 2 * LENGTH, dtype=torch.int64),
            position_ids=torch.arange(LENGTH).repeat(2)[None],
            packed=attention.Packed.of(lengths),
            use_cache=False,
        )
    return sum(kept.values())


# -------------------------------------------------------------------------------------------------------- advice


def test_no_advice_without_a_need() -> None:
    shapes = shapes_in_table(LLAMA_8B)
    assert make_plan(a_run(), shapes).fits is None
    assert cheapest_fit(a_run(), shapes) is None
    assert cheapest_fit(a_run(workers=", gpu_memory_gib: 80"), shapes) is None


STATES_TO_HOST = "{zero: 2, offload_optimizer: cpu}"
ALL_TO_HOST = "{zero: 3, offload_optimizer: cpu, offload_parameters: cpu}"


@pytest.mark.parametrize(
    ("method", "gib", "overrides"),
    [
        ("{name: qlora}", 30, ("train.micro_batch_rows=2",)),
        ("{name: qlora}", 12, ("train.gradient_checkpointing=true",)),
        ("{name: lora}", 12, ("train.gradient_checkpointing=true", "method.name=qlora")),
        ("{name: dora}", 14, ("train.gradient_checkpointing=true", "method.name=qdora")),
        ("{name: full}", 60, ("train.gradient_checkpointing=true", f"strategy='{STATES_TO_HOST}'")),
        ("{name: full}", 16, ("train.gradient_checkpointing=true", f"strategy='{ALL_TO_HOST}'")),
    ],
)
def test_the_cheapest_change_that_fits(method: str, gib: int, overrides: tuple[str, ...]) -> None:
    shapes = shapes_in_table(LLAMA_8B)
    run = a_run(method, workers=f", gpu_memory_gib: {gib}")
    assert make_plan(run, shapes).fits is False
    advice = cheapest_fit(run, shapes)
    assert advice is not None
    assert advice.overrides == overrides
    assert advice.plan.fits
    # and the advice may be typed as it is printed
    typed = parse_run(run.to_yaml(), "test", [text.replace("'", "") for text in advice.overrides])
    assert make_plan(typed, shapes).total_gib == advice.plan.total_gib


def test_another_optimizer_comes_without_the_keys_of_the_one_before() -> None:
    shapes = shapes_in_table("gpt2-medium")
    run = a_run(
        "{name: full}", "gpt2-medium", ", optimizer: sgd, momentum: 0.8, betas: null", workers=", gpu_memory_gib: 5"
    )
    advice = cheapest_fit(run, shapes)
    assert advice is not None
    assert {"train.optimizer=adamw", "train.momentum=0.9"} < set(advice.overrides)
    assert parse_run(run.to_yaml(), "test", [text.replace("'", "") for text in advice.overrides]).strategy


def test_adapters_are_told_beside_offload() -> None:
    advice = cheapest_fit(a_run("{name: full}", workers=", gpu_memory_gib: 12"), shapes_in_table(LLAMA_8B))
    assert advice
    assert advice.plan.gib_on("host") > 100
    assert advice.instead
    assert advice.instead.overrides == ("train.gradient_checkpointing=true", "method='{name: qlora}'")
    assert advice.instead.plan.fits


@pytest.mark.parametrize(
    ("strategy", "overrides"),
    [
        ("{zero: 3}", ("strategy.zero=2",)),
        ("{zero: 3, offload_parameters: cpu, keep_elements: 8_000_000_000}", ("strategy.zero=2",)),
        (
            "{zero: 3, offload_optimizer: nvme, offload_parameters: nvme, nvme_path: /x, keep_elements: 8_000_000_000}",
            ("strategy.zero=2", "strategy.offload_optimizer=cpu", "strategy.nvme_path=null"),
        ),
    ],
)
def test_nf4_comes_with_zero_2(strategy: str, overrides: tuple[str, ...]) -> None:
    shapes = shapes_in_table(LLAMA_8B)
    run = with_strategy(a_run("{name: lora}", workers=", gpu_memory_gib: 11.5"), strategy)
    advice = cheapest_fit(run, shapes)
    assert advice is not None
    assert {"method.name=qlora", *overrides} <= set(advice.overrides)
    assert make_plan(parse_run(run.to_yaml(), "test", advice.overrides), shapes).fits
    full = with_strategy(a_run("{name: full}", workers=", gpu_memory_gib: 12"), "{zero: 3}")
    advice = cheapest_fit(full, shapes)
    assert advice
    assert advice.instead
    assert "strategy.zero=2" in advice.instead.overrides


def test_no_change_makes_a_70b_fit_a_small_gpu() -> None:
    shapes = shapes_in_table("meta-llama/Llama-3.1-70B")
    run = a_run("{name: lora}", path="meta-llama/Llama-3.1-70B", workers=", gpu_memory_gib: 16")
    assert cheapest_fit(run, shapes) is None


def test_paged_states_need_not_fit() -> None:
    shapes = shapes_in_table("gpt2-medium")
    run = a_run("{name: full}", path="gpt2-medium", train=", optimizer: paged_adamw_32bit")
    plan = make_plan(run, shapes)
    assert plan.pageable_gib == pytest.approx(8 * 354_823_168 / GIB)
    between = plan.total_gib - plan.pageable_gib / 2
    limited = parse_run(run.to_yaml(), "test", [f"workers.gpu_memory_gib={between}"])
    assert make_plan(limited, shapes).fits is True
    assert math.isclose(plan.total_gib, sum(item.bytes for item in plan.items if item.place == "GPU") / GIB)
