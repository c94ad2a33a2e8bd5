"""Bases of other families: each answers as transformers' `generate` does, or is refused when it is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ftray.config import Model
from ftray.data.tokenizer import load_tokenizer
from ftray.engine import probe
from ftray.engine.engine import Engine, load_base
from ftray.engine.options import EngineOptions
from ftray.engine.request import Chunk, Request, Sampling
from ftray.errors import ModelError
from ftray.model.pooled import Delta
from ftray.model.served import Adapter
from ftray.registry.ref import Ref

NEW = 20
LENGTHS = (1, 5, 13, 30, 2)
"""Of prompts; more than there are slots, more than a step takes, and longer than windows."""
COMMON = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48,
    "max_position_embeddings": 128,
}  # fmt: skip
SHARED = COMMON | {"num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128}
BOTH = ["sliding_attention", "full_attention"]
SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SHARED),
    "llama, dynamic rope": (
        "llama",
        SHARED | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2, scaled by layer": ("gpt2", GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("gpt_neox", COMMON),
    "mistral, window of 7": ("mistral", SHARED | {"sliding_window": 7}),
    "qwen2": ("qwen2", SHARED),
    "qwen2, some windows": (
        "qwen2",
        SHARED | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", SHARED | {"head_dim": 16}),
    "qwen3_moe": (
        "qwen3_moe",
        SHARED | {"head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    ),
    "gemma3": (
        "gemma3_text",
        SHARED | {"head_dim": 16, "sliding_window": 6, "layer_types": BOTH, "tie_word_embeddings": False},
    ),
    "phi3": ("phi3", SHARED),
    "opt": (
        "opt",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 128,
        },
    ),
    "granite": ("granite", SHARED | {"attention_multiplier": 0.3}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "capped scores": ("gemma2", SHARED | {"head_dim": 16}, "attn_logit_softcapping"),
    "sinks": (
        "gpt_oss",
        SHARED | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        "of its own attention",
    ),
    "a difference of softmaxes": ("diffllama", SHARED, "of its own attention"),
    "keys wider than values": (
        "deepseek_v3",
        COMMON
        | {
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 16,
        },
        "it fails",
    ),
    "a router that is a linear layer": (
        "llama4_text",
        SHARED | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
        "it fails",
    ),
    "attention of its own": (
        "gptj",
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128, "rotary_dim": 4},
        "attention interface",
    ),
    "alibi": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "attention interface"),
    "no attention": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2}, "attention interface"),
}


@pytest.fixture
def base_of(tmp_path):
    """(family, config) → folder of a base with random weights, so large that what it says follows what it reads."""
    tokenizer = load_tokenizer(Model(path="embedded"))

    def make(family: str, config: dict[str, Any]) -> str:
        tokens = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        settings = AutoConfig.for_model(family, **config, **tokens, initializer_range=0.3)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(settings, dtype=torch.float32).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)

    return make


def load(folder: str) -> Any:
    return load_base(Model(path=folder), quantized=False, dtype=torch.float32)


@pytest.mark.parametrize("name", SAME)
def test_a_family_answers_as_generate_does(base_of, name):
    """With an adapter on all linear layers, whose product is added to a copy's weights for `generate`, and without."""
    folder = base_of(*SAME[name])
    base = load(folder)
    deltas = {}
    for i, (path, layer) in enumerate(base.pooled.linears.items()):
        generator = torch.Generator().manual_seed(i)
        down, up = (torch.randn(3, n, generator=generator) * 0.15 for n in (layer.inputs, layer.outputs))
        deltas[path] = Delta(down, up)
    engine = Engine(
        base, lambda _: Adapter(deltas, {}), EngineOptions(slots=3, step_tokens=8, prompt_tokens=8, context=100)
    )
    prompts = [torch.randint(5, 500, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    tokens: dict[str, list[int]] = {}
    for kind, ref in (("base", None), ("adapter", Ref("t", "a", "a"))):
        for i, prompt in enumerate(prompts):
            tokens[f"{kind}{i}"] = []
            sampling = Sampling(NEW, temperature=0, ignore_end=True)
            engine.add(Request(f"{kind}{i}", tuple(prompt.tolist()), sampling, ref))
    while engine.in_flight():
        engine.wait(1)
        for event in engine.step():
            if isinstance(event, Chunk):
                tokens[event.id] += event.tokens
            else:
                assert event.reason == "length", event.error
    engine.close()
    for kind in ("base", "adapter"):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        if kind == "adapter":
            with torch.no_grad():
                for path, delta in deltas.items():
                    layer, product = theirs.get_submodule(path), delta.up.T @ delta.down
                    layer.weight += product.T if type(layer).__name__ == "Conv1D" else product
        answers = []
        for prompt in prompts:
            ids = prompt[None]
            out = theirs.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            answers.append(out[0, len(prompt) :].tolist())
        assert [tokens[f"{kind}{i}"] for i in range(len(prompts))] == answers
    assert tokens["base3"] != tokens["adapter3"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_when_it_is_loaded(base_of, name):
    family, config, why = REFUSED[name]
    with pytest.raises(ModelError, match=why) as error:
        load(base_of(family, config))
    assert "take a base" in (error.value.hint or "")


def test_longrope_stays_where_one_sequence_does_not_turn_the_others(base_of):
    """Beyond the length of the first training transformers turns the whole batch by other frequencies."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    folder = base_of("phi3", SHARED | {"original_max_position_embeddings": 32, "rope_parameters": rope})
    assert Engine(load(folder), lambda _: Adapter({}, {})).context == 32


@pytest.mark.parametrize("quantized", [True, False])
def test_the_embedded_base_is_near_its_own_attention(monkeypatch, quantized):
    """In 16 bits too, with room to the bound."""
    monkeypatch.setattr(probe, "ROUGHLY", 0.02)
    load_base(Model(path="embedded"), quantized=quantized)
