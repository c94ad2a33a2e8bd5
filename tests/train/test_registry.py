"""Real artefacts of every method on three families: the registry expects exactly what they hold, and serves them on."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ftray.cli.main import call
from ftray.config import Model
from ftray.data.tokenizer import chat_template_hash, load_tokenizer, local_model_folder
from ftray.errors import ArtefactError
from ftray.model import bottleneck
from ftray.model.adapter_config import SETTINGS, BottleneckSettings, read_settings
from ftray.model.expected import expected_tensors
from ftray.model.load import base_digest
from ftray.model.source import find_shapes, shapes_of_module
from ftray.registry.base import BaseFacts, facts_of_base, served_base
from ftray.registry.cache import Cache
from ftray.registry.facts import CONFIG, WEIGHTS
from ftray.registry.publish import publish
from ftray.registry.store import Registry
from ftray.train.loop import train_worker
from ftray.train.world import World
from tests.toys import MemoryData, Recorder, random_rows, toy_run

METHODS = {
    "lora": "{name: lora, rank: 4}",
    "rslora": "{name: lora, rank: 4, rslora: true, dropout: 0.1, targets: [A, B], rank_pattern: {A: 2, '1.*B': 3},"
    " alpha_pattern: {B: 3}}",
    "dora": "{name: dora, rank: 4}",
    "dora with patterns": "{name: dora, rank: 3, rank_pattern: {A: 5}}",
    "qlora": "{name: qlora, rank: 4}",
    "qdora": "{name: qdora, rank: 4, targets: [B]}",
    "adalora": "{name: adalora, rank: 6, target_rank: 3, every: 1}",
    "adalora, nothing taken": "{name: adalora, rank: 6, target_rank: 3, start: 0.8, settle: 0.0, every: 100}",
    "vera": "{name: vera, rank: 32}",
    "vera with targets": "{name: vera, rank: 8, targets: [A]}",
    "ia3": "{name: ia3}",
    "ia3 with targets": "{name: ia3, targets: [A, B], feedforward: [B]}",
    "prefix": "{name: prefix, tokens: 3}",
    "projected prefix": "{name: prefix, tokens: 3, projection: true, hidden: 32}",
    "prompt": "{name: prompt, tokens: 3}",
    "prompt of a text": "{name: prompt, tokens: 3, text: bless the cheese}",
    "p_tuning": "{name: p_tuning, tokens: 3}",
    "p_tuning lstm": "{name: p_tuning, tokens: 3, encoder: lstm, hidden: 32}",
    "bottleneck": "{name: bottleneck, size: 8}",
    "houlsby": "{name: bottleneck, size: 8, placement: houlsby}",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256},
    "gpt_neox": {
        "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128,
        "max_position_embeddings": 256,
    },
    "opt": {  # a family without a table of shapes
        "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 128, "word_embed_proj_dim": 64,
        "max_position_embeddings": 256,
    },
}  # fmt: skip
TARGETS = {
    "llama": ("q_proj", "down_proj"),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "opt": ("q_proj", "fc2"),
}
ROWS = random_rows(8, longest=20)
CASES = [(f, m) for f in TARGETS for m in METHODS if not (f == "opt" and m in ("bottleneck", "houlsby"))]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """Path of a small base of each family."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = load_tokenizer(Model(path="embedded"))
    made = {"llama": "embedded"}
    for family, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp("bases") / family
        settings = AutoConfig.for_model(family, **config, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[family] = str(folder)
    return made


def trained(folder: Path, base: str, family: str, method: str) -> Path:
    """The artefact of a short run."""
    first, second = TARGETS[family]
    method = method.replace("A", first).replace("B", second)
    overrides = ["train.steps=5", "train.learning_rate=2e-2", f"model.path={base}"]
    run = toy_run(folder, *overrides, method=method)
    train_worker(run, MemoryData(ROWS), World(), Recorder())  # type: ignore[arg-type]
    (folder / "run.yaml").write_text(run.to_yaml())
    return folder / "artefact"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("family", "method"), CASES)
def test_what_is_expected_is_what_artefacts_hold_and_they_pass(tmp_path, bases, family, method):
    artefact = trained(tmp_path / "run", bases[family], family, METHODS[method])
    config = json.loads((artefact / CONFIG).read_text())
    shapes = find_shapes(Model(path=bases[family]))[0]
    with safe_open(artefact / WEIGHTS, framework="np") as file:
        held = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert expected_tensors(config, shapes) == held

    base = dataclasses.replace(facts_of_base(Model(path=bases[family])), chat_template="")
    registry = Registry(str(tmp_path / "registry"))
    ref = publish(artefact, registry, "anna", "a", base).ref
    with Cache(tmp_path / "cache", 1 << 30, registry, base).get(ref) as folder:
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
            p.name: p.read_bytes() for p in artefact.iterdir()
        }


def test_every_type_of_adapter_was_among_them():
    kinds = {"LORA", "ADALORA", "VERA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "FTRAY_BOTTLENECK"}
    assert kinds == set(SETTINGS)


def test_every_field_that_peft_writes_is_known():
    """So that an artefact of another run, with other knobs, is not refused for a field that is always there."""
    from peft import (
        AdaLoraConfig,
        IA3Config,
        LoraConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        VeraConfig,
    )

    kinds = [AdaLoraConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig]
    for kind in [*kinds, VeraConfig]:
        written = kind(task_type="CAUSAL_LM", **({"total_step": 10} if kind is AdaLoraConfig else {})).to_dict()
        known = SETTINGS[written["peft_type"]]
        assert written.keys() <= known.inert.keys() | known.model_fields.keys()
        assert not known.inert.keys() & known.model_fields.keys()


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_bottlenecks_stand_where_the_models_code_puts_them(family, placement):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **CONFIGS[family], vocab_size=64, bos_token_id=0, eos_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    settings = BottleneckSettings(size=8, placement=placement, activation="relu", dropout=0.0, scale=1.0)
    shapes = shapes_of_module(model, config.to_dict())
    assert expected_tensors(settings.model_dump(), shapes) == bottleneck._expected(model, settings)


def test_a_combined_adapter_is_published_as_any_other(tmp_path, bases):
    for name in ("lora", "qlora"):
        trained(tmp_path / name, "embedded", "llama", METHODS[name])
    runs = [str(tmp_path / name) for name in ("lora", "qlora")]
    assert call(["export", *runs, "--to", str(tmp_path / "both"), "--combine", "svd", "--rank", "6"]) == 0
    assert call(["publish", str(tmp_path / "both"), "--as", "both", "--registry", str(tmp_path / "registry")]) == 0
    ref = Registry(str(tmp_path / "registry")).resolve("default", "both")
    assert Registry(str(tmp_path / "registry")).facts(ref)[0].method.rank == 6


def test_a_run_is_published_by_its_folder_and_its_file(tmp_path, capsys):
    artefact = trained(tmp_path / "run", "embedded", "llama", METHODS["lora"])
    digests = set()
    for number, name in enumerate([tmp_path / "run", tmp_path / "run" / "run.yaml", artefact]):
        to = ["--registry", str(tmp_path / "registry")]
        assert call(["publish", str(name), "--as", f"anna/a{number}", "--base", "embedded", *to, "--json"]) == 0
        digests.add(json.loads(capsys.readouterr().out)["digest"])
    assert len(digests) == 1


@pytest.mark.parametrize("method", ["{name: full}", "{name: freeze, blocks: 1}"])
def test_whole_models_are_no_adapters(tmp_path, method):
    artefact = trained(tmp_path / "run", "embedded", "llama", method)
    with pytest.raises(ArtefactError, match=r"config\.json|whole model"):
        publish(artefact, str(tmp_path / "registry"), "anna", "a")


def test_the_base_of_another_training_is_another_base(tmp_path, bases):
    """Same shapes, other weights: the digest tells."""
    artefact = trained(tmp_path / "run", bases["gpt2"], "gpt2", METHODS["lora"])
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bases["gpt2"])
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    other = facts_of_base(Model(path=str(tmp_path / "other")))
    assert other.digest == base_digest(tmp_path / "other")
    with pytest.raises(ArtefactError, match="trained on another base"):
        publish(artefact, str(tmp_path / "registry"), "anna", "a", other)
    assert not os.path.exists(tmp_path / "registry")
    assert publish(artefact, str(tmp_path / "registry"), "anna", "a").moved  # shapes alone fit


def test_a_server_takes_adapters_of_its_base_and_template_alone(tmp_path):
    model = Model(path="embedded")
    tokenizer = load_tokenizer(model)
    data = MemoryData(ROWS)
    data.facts["chat_template_hash"] = chat_template_hash(tokenizer)
    run = toy_run(tmp_path / "run", "train.steps=2")
    train_worker(run, data, World(), Recorder())  # type: ignore[arg-type]
    base = served_base(model, base_digest(local_model_folder(model)), tokenizer)
    assert base.digest == facts_of_base(model).digest
    ref = publish(tmp_path / "run" / "artefact", str(tmp_path / "registry"), "anna", "a", base).ref
    tokenizer.chat_template = "{{ messages }}"
    other = served_base(model, base.digest, tokenizer)
    with pytest.raises(ArtefactError, match="trained with the chat template"):
        Cache(tmp_path / "cache", 1 << 30, str(tmp_path / "registry"), other).get(ref).__enter__()


def test_an_adapter_of_one_family_does_not_fit_another(tmp_path, bases):
    artefact = trained(tmp_path / "run", "embedded", "llama", METHODS["lora"])
    foreign = BaseFacts("gpt2", find_shapes(Model(path=bases["gpt2"]))[0])
    with pytest.raises(ArtefactError, match="matches no linear layer"):
        publish(artefact, str(tmp_path / "registry"), "anna", "a", foreign)


def test_settings_say_what_the_run_said(tmp_path):
    artefact = trained(tmp_path / "run", "embedded", "llama", METHODS["rslora"])
    settings: Any = read_settings(json.loads((artefact / CONFIG).read_text()))
    assert (settings.r, settings.lora_alpha, settings.use_rslora) == (4, 32.0, True)
    assert settings.rank_pattern == {"q_proj": 2, "1.*down_proj": 3}
    assert settings.alpha_pattern == {"down_proj": 3.0}
