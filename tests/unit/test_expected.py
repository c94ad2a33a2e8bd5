"""What `adapter_config.json` may say, and the tensors that it implies, from shapes alone."""

from __future__ import annotations

import re
import time

import pytest

from ftray.errors import ArtefactError
from ftray.model.adapter_config import SETTINGS, read_settings, refuse_slow_patterns
from ftray.model.expected import bottleneck_places, expected_tensors
from ftray.model.shapes import shapes_of
from tests.adapters import SHAPES, lora_config

PATHS = [layer.path for layer in SHAPES.linears]
GPT2 = shapes_of({"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 32})
COMMON = {"task_type": "CAUSAL_LM"}
VIRTUAL = COMMON | {"num_virtual_tokens": 3, "num_layers": 2, "num_attention_heads": 2, "token_dim": 16}


# ---------------------------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r"layers\.0\.self_attn\.q_proj",
        r"model.layers.\d+.mlp.(gate|up)_proj",
        r"layers\.(0|1|2|3)\..*",
        r"layers\.[0-3]\..*_proj",
        r".*(q|v)_proj",
        r"^model\.layers\.\d{1,2}\.mlp\.down_proj$",
        r"[^.]+\.down_proj",
        "(?:self_attn|mlp)",
        "(self_attn.)?q_proj",
    ],
)
def test_patterns_that_people_write(pattern):
    refuse_slow_patterns([pattern])


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$",
        r"(\w+\.)*\w+!",
        r"(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)!",
        r".*.*.*x",
        r"((((.*)*)*)*)*",
        r"a{1,99}{1,99}",
        r".{0,99}.{0,99}.{0,99}x",
        r"(?=.*).*",
        r"(?P<n>a)(?P=n)",
        r"(.)\1",
        r"(?i)Q_PROJ",
        r"(?#comment)",
        r"q_proj(",
        r"q_proj)",
        r"[a",
        r"[9-1]",
        "*",
        "a**",
        "\\",
        "a b",
        "q_proj\n",
        "ä",
        "x" * 257,
        "(" * 300,
    ],
)
def test_patterns_that_could_take_for_ever_or_are_none(pattern):
    started = time.thread_time()
    with pytest.raises(ValueError, match=re.escape(repr(pattern)[:20])):
        refuse_slow_patterns([pattern])
    with pytest.raises(ArtefactError, match="rank_pattern"):
        read_settings(lora_config() | {"rank_pattern": {pattern: 2}})
    with pytest.raises(ArtefactError, match="alpha_pattern"):
        read_settings(lora_config() | {"alpha_pattern": {pattern: 2.0}})
    assert time.thread_time() - started < 1.5


def test_the_worst_that_is_allowed_is_quick():
    """Patterns at the limit, on the longest paths, none of which they match."""
    worst = [f"x.*{i}.*y" for i in range(4)]
    refuse_slow_patterns(worst)
    with pytest.raises(ValueError, match="together"):
        refuse_slow_patterns([*worst, "x.*5.*y"])
    wide = shapes_of({
        "model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 80,
        "intermediate_size": 24, "vocab_size": 32,
    })  # fmt: skip
    started = time.thread_time()
    expected_tensors(lora_config() | {"rank_pattern": dict.fromkeys(worst, 3)}, wide)
    assert time.thread_time() - started < 6
    literal = {f"layers.{i}.nothing": 3 for i in range(1024)}
    started = time.thread_time()
    expected_tensors(lora_config() | {"rank_pattern": literal}, wide)
    assert time.thread_time() - started < 9
    with pytest.raises(ArtefactError, match="1,024"):
        expected_tensors(lora_config() | {"rank_pattern": literal | {"more": 3}}, SHAPES)


def test_patterns_set_ranks_as_pefts_do():
    patterns = {r"layers\.0\..*_proj": 3, "q_proj": 5}
    found = expected_tensors(lora_config() | {"rank_pattern": patterns}, SHAPES)
    ranks = {key.split("base_model.model.")[1].split(".lora_A")[0]: s[0] for key, s in found.items() if "lora_A" in key}
    assert ranks == {
        "model.layers.0.self_attn.q_proj": 3,
        "model.layers.0.mlp.down_proj": 3,
        "model.layers.1.self_attn.q_proj": 5,
        "model.layers.1.mlp.down_proj": 2,
    }


# ----------------------------------------------------------------------------------------------------- other methods


def test_every_type_refuses_what_it_does_not_know():
    for kind in SETTINGS:
        with pytest.raises(ArtefactError, match="surprise: unknown key"):
            read_settings(COMMON | {"peft_type": kind, "surprise": 1})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"token_dim": 8}, "8 here, 16 in this base"),
        ({"num_layers": 3}, "3 here, 2 in this base"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules: 2 would change"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs"),
    ],
)
def test_prompts(fields, says):
    good = VIRTUAL | {"peft_type": "PROMPT_TUNING"}
    assert expected_tensors(good, SHAPES) == {"prompt_embeddings": (3, 16)}
    with pytest.raises(ArtefactError, match=says):
        expected_tensors(good | fields, SHAPES)


@pytest.mark.parametrize("fields", [{"token_dim": 16}, {"num_attention_heads": 2}])
def test_prefixes_have_the_width_of_the_key_heads(fields):
    good = VIRTUAL | {"peft_type": "PREFIX_TUNING", "token_dim": 8, "num_attention_heads": 1}
    assert expected_tensors(good, SHAPES) == {"prompt_embeddings": (3, 2 * 2 * 8)}
    with pytest.raises(ArtefactError, match="in this base"):
        expected_tensors(good | fields, SHAPES)


def adalora(left: dict[str, list[bool]] | None) -> dict[str, object]:
    return COMMON | {
        "peft_type": "ADALORA",
        "init_r": 3,
        "lora_alpha": 4.0,
        "target_modules": ["q_proj"],
        "rank_pattern": left,
    }


def test_adaloras_ranks_are_those_that_are_left():
    first, second = (f"model.layers.{i}.self_attn.q_proj.lora_E" for i in range(2))
    found = expected_tensors(adalora({first: [True, False, True], second: [False] * 3}), SHAPES)
    assert found[f"base_model.model.{first}"] == (2, 1)
    assert found[f"base_model.model.{second}"] == (0, 1)
    assert expected_tensors(adalora(None), SHAPES)[f"base_model.model.{first}"] == (3, 1)
    for wrong in ({first: [True] * 3}, {first: [True] * 3, second: [True] * 3, "other": [True] * 3}):
        with pytest.raises(ArtefactError, match="rank_pattern"):
            expected_tensors(adalora(wrong), SHAPES)
    with pytest.raises(ArtefactError, match="2 values, and init_r is 3"):
        expected_tensors(adalora({first: [True] * 2, second: [True] * 3}), SHAPES)
    with pytest.raises(ArtefactError, match="rank_pattern"):
        expected_tensors(adalora({first: [1, 1, 1], second: [True] * 3}), SHAPES)  # type: ignore[list-item]


def test_ia3_scales_inputs_of_feed_forward_targets_alone():
    good = COMMON | {
        "peft_type": "IA3",
        "target_modules": ["k_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    }
    found = expected_tensors(good, SHAPES)
    assert found["base_model.model.model.layers.0.self_attn.k_proj.ia3_l"] == (8, 1)
    assert found["base_model.model.model.layers.0.mlp.down_proj.ia3_l"] == (1, 24)
    with pytest.raises(ArtefactError, match="not in target_modules"):
        expected_tensors(good | {"feedforward_modules": ["up_proj"]}, SHAPES)


@pytest.mark.parametrize("fields", [{"projection_prng_key": 1}, {"save_projection": False}])
def test_veras_matrices_are_ours_and_in_the_file(fields):
    good = COMMON | {"peft_type": "VERA", "r": 4, "target_modules": ["q_proj", "down_proj"]}
    assert expected_tensors(good, SHAPES)["base_model.vera_A"] == (4, 24)
    assert expected_tensors(good, SHAPES)["base_model.vera_B"] == (16, 4)
    with pytest.raises(ArtefactError, match="would change what the adapter does"):
        expected_tensors(good | fields, SHAPES)


def test_places_of_bottlenecks():
    assert bottleneck_places("pfeiffer", SHAPES) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert bottleneck_places("houlsby", GPT2) == [
        f"transformer.h.{i}.{part}" for i in range(2) for part in ("attn", "mlp")
    ]
