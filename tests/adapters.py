"""Small adapters for tests of the registry, written in milliseconds: a tiny base's shapes, artefacts that fit it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ftray.config import LoRA
from ftray.manifest import describe_files
from ftray.model.expected import expected_tensors
from ftray.model.shapes import shapes_of
from ftray.registry.base import BaseFacts
from ftray.registry.facts import CARD, CONFIG, FACTS, WEIGHTS, digest_of_facts

LLAMA = {
    "model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 2, "intermediate_size": 24, "vocab_size": 32,
}  # fmt: skip
SHAPES = shapes_of(LLAMA)
BASE = BaseFacts("a/tiny-llama", SHAPES, digest="ba5e" * 16, chat_template="7e3a" * 16)


def lora_config(rank: int = 2) -> dict[str, Any]:
    """As PEFT writes it, without the fields that it leaves at their defaults."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE.path,
        "peft_version": "0.21.2",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": 8.0,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "trainable_token_indices": None,
    }


def write_adapter(folder: Path, seed: int = 0, rank: int = 2, base: BaseFacts = BASE, scale: float = 1.0) -> str:
    """A LoRA adapter that passes the check against `base`; returns its digest. `scale`: of its random values."""
    folder.mkdir(parents=True, exist_ok=True)
    config = lora_config(rank) | {"base_model_name_or_path": base.path}
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / CARD).write_text(f"# Adapter {seed}\n")
    random = np.random.default_rng(seed)
    shapes = expected_tensors(config, base.shapes)
    values = {key: (scale * random.normal(size=shape)).astype(np.float32) for key, shape in shapes.items()}
    save_file(values, folder / WEIGHTS)
    facts = {
        "format": 1,
        "ftray": "0.1.0",
        "kind": "adapter",
        "base": {"path": base.path, "revision": None, "sha256": base.digest},
        "method": LoRA(name="lora", rank=rank).model_dump(mode="json"),
        "chat_template_sha256": base.chat_template,
        "tokenizer_sha256": None,
        "data_sha256": "da7a" * 16,
        "run": {"name": f"run-{seed}"},
        "step": 20,
        "metrics": {"base_loss": 2.5, "final_loss": 1.25},
    }
    return seal(folder, facts)


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FACTS).read_text())


def seal(folder: Path, facts: dict[str, Any] | None = None) -> str:
    """Write `ftray.json` for the files as they are, so that no attack ends at a checksum; returns the digest."""
    facts = facts or facts_of(folder)
    (folder / FACTS).unlink(missing_ok=True)
    (folder / FACTS).write_text(json.dumps(facts | {"files": describe_files(folder)}))
    return digest_of_facts((folder / FACTS).read_bytes())


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    seal(folder)


def change_facts(folder: Path, **fields: Any) -> None:
    facts = facts_of(folder) | fields
    (folder / FACTS).write_text(json.dumps({key: value for key, value in facts.items() if value is not ...}))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / WEIGHTS)


def change_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, folder / WEIGHTS)
    seal(folder)
