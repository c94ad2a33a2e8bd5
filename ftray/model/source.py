"""Where a base's config.json comes from, without loading the base: a folder, the local Hugging Face cache, the table
that ships with ftray, the Hub. No torch, unless the family is one that `shapes.py` does not know.
"""

from __future__ import annotations

import json
import os
import re
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from ftray import manifest
from ftray.config import Model
from ftray.errors import ModelError
from ftray.model.shapes import KNOWN_FAMILIES, Linear, Part, Shapes, shapes_of

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_HUB_SECONDS = 5


def find_shapes(model: Model) -> tuple[Shapes, str]:
    """(shapes of the base, where its config.json came from). Raises ModelError."""
    config, origin = find_config(model)
    if config.get("model_type") in KNOWN_FAMILIES:
        return shapes_of(config, origin), origin
    return _measure(config, origin), f"{origin}, built on torch's meta device"


def find_config(model: Model) -> tuple[dict[str, Any], str]:
    """(config.json of the base, where it came from). Raises ModelError."""
    if model.path == "embedded":
        from ftray.embedded import base_path

        return _read(base_path()), "the embedded base"
    if "://" in model.path or Path(model.path).is_dir():
        return _read(model.path), manifest.join(model.path, "config.json")
    if not _HUB_NAME.match(model.path):
        raise ModelError("no such folder", where=f"model.path {model.path}", hint="give a folder with a config.json")
    if cached := _in_cache(model.path, model.revision):
        return _read(cached), "the local Hugging Face cache"
    if model.path in (table := _table()):
        return table[model.path], "ftray's table of well-known bases"
    return _from_hub(model)


def _read(folder: str | Path) -> dict[str, Any]:
    where = manifest.join(os.fspath(folder), "config.json")
    try:
        config = json.loads(manifest.read_text(where))
    except FileNotFoundError:
        raise ModelError(
            "no config.json, so this is no model in Hugging Face format", where=str(folder), hint="check model.path"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"not valid JSON: {error}", where=where) from None
    if not isinstance(config, dict):
        raise ModelError("a config.json is one JSON object", where=where)
    return config


def _table() -> dict[str, dict[str, Any]]:
    return json.loads((resources.files("ftray") / "model" / "architectures.json").read_text(encoding="utf-8"))


def _in_cache(name: str, revision: str | None) -> Path | None:
    """Folder of the snapshot in the local Hugging Face cache that has a config.json (huggingface_hub's layout: `refs/`
    holds a branch's commit, `snapshots/COMMIT/` its files)."""
    root = hub_cache() / f"models--{name.replace('/', '--')}"
    wanted = revision or "main"
    ref = root / "refs" / wanted
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else wanted
    folder = root / "snapshots" / commit
    return folder if (folder / "config.json").is_file() else None


def hub_cache() -> Path:
    """Folder of the local Hugging Face cache, as huggingface_hub finds it."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(home).expanduser() / "hub"


def _from_hub(model: Model) -> tuple[dict[str, Any], str]:
    """Downloads config.json alone, a few kB, and waits no longer than a user at a prompt would."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{endpoint}/{model.path}/resolve/{model.revision or 'main'}/config.json")
    if token := _hub_token():
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            raise OSError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(request, timeout=_HUB_SECONDS) as answer:
            config = json.load(answer)
    except (OSError, ValueError) as error:  # HTTP statuses, no network and no JSON are all one of these
        raise ModelError(
            f"neither a folder here nor in the local cache, and the Hub gives no config.json: {error}",
            where=f"model.path {model.path}",
            hint="correct the name; or give a local folder; a gated model needs its licence accepted and HF_TOKEN set",
        ) from None
    return config, "the Hugging Face Hub"


def _hub_token() -> str | None:
    if token := os.environ.get("HF_TOKEN"):
        return token
    file = Path(os.environ.get("HF_TOKEN_PATH") or hub_cache().parent / "token").expanduser()
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


# ------------------------------------------------------------------------------------------------ families not in table


def _measure(config: dict[str, Any], origin: str) -> Shapes:
    """Shapes of any family that transformers knows, from an empty model on the meta device. Imports torch: seconds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family = config.get("model_type")
    try:
        settings = AutoConfig.for_model(**config)
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(settings)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"transformers knows no causal language model of model_type {family!r} ({str(error)[:120]})", where=origin
        ) from None
    return shapes_of_module(net, config)


def shapes_of_module(net: Any, config: dict[str, Any]) -> Shapes:
    """Shapes of a transformers model that exists, on whatever device; `config` is its config.json."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head_module = net.get_output_embeddings()
    linears, head = [], None
    for path, module in net.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            rows, columns = module.weight.shape
            if isinstance(module, Conv1D):
                rows, columns = columns, rows
            layer = Linear(path, columns, rows, module.bias is not None)
            if module is head_module:
                head = layer
            else:
                linears.append(layer)
    settings = net.config.get_text_config()
    if head is None:
        head = Linear("lm_head", settings.hidden_size, settings.vocab_size)
    tied = bool(getattr(net.config, "tie_word_embeddings", False))
    heads = settings.num_attention_heads
    return Shapes(
        family=str(config.get("model_type")),
        layers=settings.num_hidden_layers,
        hidden=settings.hidden_size,
        heads=heads,
        kv_heads=getattr(settings, "num_key_value_heads", None) or heads,
        head_dim=getattr(settings, "head_dim", None) or settings.hidden_size // heads,
        intermediate=getattr(settings, "intermediate_size", None) or 4 * settings.hidden_size,
        gated=any("gate" in layer.path for layer in linears),
        vocabulary=settings.vocab_size,
        linears=tuple(linears),
        head=head,
        tied=tied,
        parts=tuple(
            Part(path, parameter.numel(), kind)
            for path, parameter, kind in parameter_kinds(net)
            if kind not in ("linear", "head")
        ),
        positions=getattr(settings, "max_position_embeddings", None),
        learned_positions=learns_positions(net),
    )


def learns_positions(net: Any) -> bool:
    """Whether a transformers model has an embedding for each position (`wpe`, `embed_positions`, …)."""
    import torch

    modules = ((path.rsplit(".", 1)[-1], module) for path, module in net.named_modules())
    return any(isinstance(module, torch.nn.Embedding) and (name == "wpe" or "pos" in name) for name, module in modules)


def parameter_kinds(net: Any) -> Iterator[tuple[str, Any, str]]:
    """(name, parameter, `linear`, `head`, `embedding`, `norm` or `other`) of each parameter of a transformers model,
    each once: a tied head is an embedding."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = net.get_output_embeddings()
    for name, parameter in net.named_parameters():
        owner = net.get_submodule(name.rpartition(".")[0])
        if owner is head:
            kind = "head"
        elif isinstance(owner, torch.nn.Linear | Conv1D):
            kind = "linear"
        elif isinstance(owner, torch.nn.Embedding):
            kind = "embedding"
        else:
            kind = "norm" if "norm" in type(owner).__name__.lower() else "other"
        yield name, parameter, kind
