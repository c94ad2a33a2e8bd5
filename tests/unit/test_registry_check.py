"""The full check of an adapter: what passes, and every way in which one may be wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ftray.errors import ArtefactError
from ftray.registry.base import BaseFacts
from ftray.registry.check import Limits, check
from ftray.registry.facts import CARD, CONFIG, FACTS, WEIGHTS
from tests.adapters import (
    BASE,
    change_config,
    change_facts,
    change_tensors,
    facts_of,
    lora_config,
    seal,
    tensors_of,
    write_adapter,
)

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(folder: Path, says: str, base: BaseFacts = BASE, limits: Limits | None = None) -> str:
    with pytest.raises(ArtefactError) as error:
        check(folder, base, limits)
    assert says in str(error.value), str(error.value)
    assert error.value.where is not None
    return str(error.value)


def test_a_good_adapter_passes(adapter):
    digest = seal(adapter)
    found = check(adapter, BASE, digest=digest)
    assert found.digest == digest
    assert found.size == sum(p.stat().st_size for p in adapter.iterdir())
    assert found.facts.method.name == "lora"


def test_a_card_is_not_needed(adapter):
    (adapter / CARD).unlink()
    seal(adapter)
    check(adapter, BASE)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_floating_types(adapter, dtype):
    change_tensors(adapter, {key: t.astype(dtype) for key, t in tensors_of(adapter).items()})
    check(adapter, BASE)


# ---------------------------------------------------------------------------------------------------- files and links


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "model.pt", "optimizer.pkl", "x.py", "tokenizer.json", ".hidden", "training_args.bin"]
)
def test_files_that_no_adapter_has(adapter, name):
    (adapter / name).write_bytes(pickle.dumps({"a": 1}))
    refused(adapter, f"{name!r} is no file of an adapter")
    seal(adapter)  # listing it does not help
    refused(adapter, f"{name!r} is no file of an adapter")


def test_a_pickle_under_the_name_of_the_weights(adapter):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(adapter / "exploded"),)

    (adapter / WEIGHTS).write_bytes(pickle.dumps(Bomb()) + bytes(100))
    seal(adapter)
    refused(adapter, WEIGHTS)
    assert not (adapter / "exploded").exists()


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, CARD, FACTS])
def test_links(adapter, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    (adapter / name).rename(elsewhere)
    (adapter / name).symlink_to(elsewhere)
    refused(adapter, f"{name!r} is a link")


def test_a_link_of_another_name(adapter):
    (adapter / "passwords").symlink_to("/etc/passwd")
    refused(adapter, "'passwords' is a link")


def test_folders_and_devices(adapter):
    (adapter / "inner").mkdir()
    refused(adapter, "'inner' is a folder")
    (adapter / "inner").rmdir()
    (adapter / CARD).unlink()
    os.mkfifo(adapter / CARD)  # reading it would wait for ever
    refused(adapter, f"{CARD!r} is a device")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "inner/file", "..", CONFIG + "/../x", "a\nb"])
def test_paths_that_climb(adapter, name):
    facts = facts_of(adapter)
    change_facts(adapter, files=facts["files"] | {name: facts["files"][CONFIG]})
    refused(adapter, "is no file of an adapter")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, FACTS])
def test_missing_files(adapter, name):
    (adapter / name).unlink()
    refused(adapter, f"{name} is missing")


def test_no_folder_at_all(tmp_path):
    refused(tmp_path / "nowhere", "no such folder")


# ---------------------------------------------------------------------------------------------------------- ftray.json


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"format": 2}, "format"),
        ({"kind": "model"}, "whole model"),
        ({"surprise": 1}, "surprise: unknown key"),
        ({"base": {"path": "x", "revision": None, "sha256": None}}, "base.sha256"),
        ({"base": {"path": "x", "revision": None, "sha256": "BA5E" * 16}}, "base.sha256"),
        ({"method": {"name": "magic"}}, "'magic' is not known"),
        ({"method": {"name": "lora", "ranks": 3}}, "did you mean 'rank'?"),
        ({"step": "many"}, "step"),
        ({"metrics": {"loss": "low"}}, "metrics"),
        ({"chat_template_sha256": ...}, "chat_template_sha256: this key is needed"),
        ({"files": {}}, "is not listed"),
        ({"files": {CONFIG: {"size": -1, "sha256": "0" * 64}}}, "files"),
    ],
)
def test_facts_are_strict(adapter, fields, says):
    change_facts(adapter, **fields)
    refused(adapter, says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "one JSON object"),
        (b'{"format": 1, "format": 1}', "a key stands twice"),
        (b'{"metrics": {"loss": NaN}}', "NaN"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "not valid JSON"),
    ],
)
@pytest.mark.parametrize("name", [FACTS, CONFIG])
def test_json_that_is_none(adapter, text, says, name):
    (adapter / name).write_bytes(text)
    if name == CONFIG:
        seal(adapter)
    assert name in refused(adapter, says)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, CARD])
def test_a_flipped_bit(adapter, name):
    content = bytearray((adapter / name).read_bytes())
    content[-2] ^= 1
    (adapter / name).write_bytes(content)
    refused(adapter, f"{name} has other content than {FACTS} says")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, CARD])
def test_truncated_files(adapter, name):
    content = (adapter / name).read_bytes()
    (adapter / name).write_bytes(content[: len(content) // 2])
    refused(adapter, f"{FACTS} says {len(content):,}")


def test_a_file_that_is_not_listed(adapter):
    facts = facts_of(adapter)
    change_facts(adapter, files={name: file for name, file in facts["files"].items() if name != CARD})
    refused(adapter, f"{CARD} is not listed")


def test_another_digest_than_its_name_says(adapter):
    with pytest.raises(ArtefactError, match="its digest is"):
        check(adapter, BASE, digest="0" * 64)


# --------------------------------------------------------------------------------------------------- base and template


def test_a_foreign_base_is_named_with_ours(adapter):
    foreign = dataclasses.replace(BASE, path="another/base", digest="f0e1" * 16)
    told = refused(adapter, "trained on another base: a/tiny-llama", base=foreign)
    assert "ba5eba5eba5e" in told
    assert "another/base (f0e1f0e1f0e1" in told


def test_another_chat_template_names_both(adapter):
    told = refused(adapter, "trained with the chat template", base=dataclasses.replace(BASE, chat_template="0dd0" * 16))
    assert "7e3a7e3a7e3a" in told
    assert "0dd00dd00dd0" in told
    refused(adapter, "rendered with no chat template", base=dataclasses.replace(BASE, chat_template=""))
    change_facts(adapter, chat_template_sha256=None)
    refused(adapter, "trained with no chat template")
    check(adapter, dataclasses.replace(BASE, chat_template=""))


def test_what_a_base_does_not_say_is_not_compared(adapter):
    change_facts(adapter, chat_template_sha256="0" * 64, base={"path": "x", "revision": None, "sha256": "0" * 64})
    check(adapter, dataclasses.replace(BASE, digest=None, chat_template=None))


def test_a_method_that_is_not_that_of_the_configuration(adapter):
    change_facts(adapter, method={"name": "ia3"})
    refused(adapter, "says method ia3, adapter_config.json says LORA")
    change_facts(adapter, method={"name": "dora"})
    refused(adapter, "says method dora")


# -------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"surprise": 1}, "surprise: unknown key"),
        ({"peft_type": "OFT"}, "no adapter of ftray's"),
        ({"peft_type": ["LORA"]}, "no adapter of ftray's"),
        ({"peft_type": ...}, "no adapter of ftray's"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"r": 0}, "r: "),
        ({"r": True}, "r: "),
        ({"r": "2"}, "r: "),
        ({"r": ...}, "r: this key is needed"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"use_dora": 1}, "use_dora"),
        ({"bias": "all"}, "bias: 'all' would change what the adapter does"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: ['lm_head'] would change"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "use_qalora"),
        ({"auto_mapping": {"base_model_class": "os.system"}}, "auto_mapping"),
        ({"megatron_core": "os"}, "megatron_core"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": "all-linear"}, "target_modules"),
        ({"target_modules": ["(.*)+$"]}, "target_modules"),
        ({"target_modules": ["q_proj", "nothing"]}, "'nothing' matches no linear layer"),
        ({"target_modules": ["lm_head"]}, "'lm_head' matches no linear layer"),
        ({"target_modules": ["embed_tokens"]}, "'embed_tokens' matches no linear layer"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    ],
)  # fmt: skip
def test_fields_and_values_of_the_configuration(adapter, fields, says):
    change_config(adapter, **fields)
    assert CONFIG in refused(adapter, says)


def test_python_takes_zero_for_false_and_the_check_does_not(adapter):
    change_config(adapter, lora_bias=0)
    refused(adapter, "lora_bias: 0 would change")


# --------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"rank": 1}, "2; the limit rank is 1"),
        ({"adapter_bytes": 1000}, "the limit adapter_bytes is 1,000"),
        ({"text_bytes": 100}, "the limit text_bytes is 100"),
        ({"header_bytes": 100}, "the limit is 100"),
    ],
)
def test_limits(adapter, limits, says):
    refused(adapter, says, limits=Limits(**limits))


def test_the_rank_limit_sees_patterns(adapter):
    change_config(adapter, rank_pattern={"q_proj": 4})
    refused(adapter, "4; the limit rank is 3", limits=Limits(rank=3))


def test_oversized_files_are_refused_by_their_size_alone(adapter):
    with open(adapter / WEIGHTS, "r+b") as file:
        file.truncate(1 << 40)  # a hole: a tebibyte that takes no room
    started = time.thread_time()
    refused(adapter, "the limit adapter_bytes")
    assert time.thread_time() - started < 3


# -------------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("place", [0, -1])
def test_values_that_are_not_finite(adapter, value, dtype, place):
    tensors = {key: t.astype(dtype) for key, t in tensors_of(adapter).items()}
    tensors[KEY].flat[place] = value
    change_tensors(adapter, tensors)
    refused(adapter, f"{KEY} holds values that are not finite")


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x7F81])
def test_values_of_bf16_that_are_not_finite(adapter, bits):
    tensors = {key: (t.view(np.uint32) >> 16).astype(np.uint16) for key, t in tensors_of(adapter).items()}
    write_raw(adapter, {key: ("BF16", t) for key, t in tensors.items()})
    check(adapter, BASE)
    tensors[KEY].flat[3] = bits
    write_raw(adapter, {key: ("BF16", t) for key, t in tensors.items()})
    refused(adapter, f"{KEY} holds values that are not finite")


def write_raw(folder: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """A safetensors file by hand: numpy has no bfloat16."""
    header, body = {}, b""
    for key, (dtype, tensor) in tensors.items():
        header[key] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [len(body), len(body) + tensor.nbytes]}
        body += tensor.tobytes()
    write_header(folder, json.dumps(header).encode(), body)


def write_header(folder: Path, header: bytes, body: bytes = b"") -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + body)
    seal(folder)


def test_extra_and_missing_tensors(adapter):
    tensors = tensors_of(adapter)
    change_tensors(adapter, tensors | {"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)})
    refused(adapter, "1 tensors that base and configuration do not imply: base_model.model.lm_head.weight")
    del tensors[KEY]
    change_tensors(adapter, tensors)
    refused(adapter, f"1 tensors are missing: {KEY}")
    change_tensors(adapter, {})
    refused(adapter, "8 tensors are missing")


def test_another_models_keys(adapter):
    renamed = {key.replace("model.layers", "transformer.h"): t for key, t in tensors_of(adapter).items()}
    change_tensors(adapter, renamed)
    refused(adapter, "8 tensors that base and configuration do not imply")


@pytest.mark.parametrize("shape", [(16, 2), (3, 16), (2, 16, 1), (32,), ()])
def test_wrong_shapes(adapter, shape):
    change_tensors(adapter, tensors_of(adapter) | {KEY: np.zeros(shape, np.float32)})
    refused(adapter, f"{KEY} has the shape {list(shape)}, and base and configuration imply [2, 16]")


@pytest.mark.parametrize("dtype", ["int8", "int64", "float64", "bool"])
def test_types_that_are_not_floating(adapter, dtype):
    change_tensors(adapter, tensors_of(adapter) | {KEY: np.zeros((2, 16), dtype)})
    refused(adapter, f"{KEY} is of type")


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, 100_000])
def test_a_lying_header_allocates_nothing(adapter, length):
    (adapter / WEIGHTS).write_bytes(struct.pack("<Q", length) + bytes(1000))
    seal(adapter)
    tracemalloc.start()
    refused(adapter, f"truncated: a header of {length:,} bytes in a file of 1,008")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_an_oversized_header_is_never_read(adapter):
    length = 500 << 20
    with open(adapter / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(length + 100)
    facts = facts_of(adapter)
    seal(adapter, facts)
    tracemalloc.start()
    refused(adapter, f"a header of {length:,} bytes; the limit is")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        {KEY: entry([2, 16], 0, 1 << 50)},  # beyond the end
        {KEY: entry([1 << 32, 1 << 32], 0, 128)},  # a product that overflows
        {KEY: entry([2, 16], 0, 64)},  # fewer bytes than the shape needs
        {KEY: entry([2, 16], 128, 0)},
        {KEY: entry([2, 16], -128, 0)},
        {"a": entry([16], 0, 64), "b": entry([16], 32, 96)},  # one over the other
        {"a": entry([8], 0, 32)},  # a hole behind it
        {KEY: entry([2, -16], 0, 128)},
        {KEY: entry([2, 16], 0, 128, "F99")},
        {KEY: {"shape": [2, 16]}},
        [],
        {"__metadata__": {"a": 3}},
    ],
    ids=str,
)
def test_headers_that_are_wrong(adapter, header):
    write_header(adapter, json.dumps(header).encode(), bytes(128))
    refused(adapter, WEIGHTS)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 0), struct.pack("<Q", 2) + b"{}"])
def test_files_too_short_for_anything(adapter, content):
    (adapter / WEIGHTS).write_bytes(content)
    seal(adapter)
    refused(adapter, WEIGHTS)


def test_the_toy_configuration_is_like_pefts(tmp_path):
    """The fields that tests of this file change are fields that PEFT writes."""
    from peft import LoraConfig

    theirs = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).to_dict()
    assert lora_config().keys() - {"peft_version"} <= theirs.keys()
