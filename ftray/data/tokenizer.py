"""Tokenizers: found, loaded, named by digest. transformers is imported inside."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from ftray import config
from ftray.data.remote import local_copy
from ftray.errors import ConfigError, ModelError
from ftray.manifest import digest_of, filesystem, is_local, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SMALL = (".json", ".jinja", ".txt", ".model", ".py")
"""Endings of what a tokenizer needs; the rest of a model's folder is weights."""


def local_model_folder(model: config.Model, *, weights: bool = True) -> str:
    """The local folder of a model: its own, a copy of a remote one, or the snapshot of a hub name.

    With `weights=False` a remote folder or hub name is fetched without its weights.
    Raises ModelError where there is none.
    """
    path = model.path
    if path == "embedded":
        from ftray.embedded import base_path

        return str(base_path())
    if not is_local(path):
        try:
            return local_copy(path, (lambda name: True) if weights else _without_weights)
        except (OSError, ImportError, ValueError) as error:
            raise ModelError(f"this model cannot be read: {_short(error)}", where=path) from None
    folder = filesystem(os.path.expanduser(path))[1]
    if os.path.isdir(folder):
        return folder
    if _is_path(path):
        raise ModelError("no such folder", where=path, hint=f"model.path: {nearest_existing(folder)} is there")
    return _from_hub(model, weights)


def _is_path(path: str) -> bool:
    return path.startswith((".", "/", "~", "file://")) or path.count("/") > 1 or not path


def _without_weights(name: str) -> bool:
    return name.endswith(_SMALL) and not name.endswith(".index.json")


def _from_hub(model: config.Model, weights: bool) -> str:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = None if weights else [f"*{ending}" for ending in _SMALL]
    ignored = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "original/*", "*.onnx"]
    try:
        return huggingface_hub.snapshot_download(
            model.path, revision=model.revision, allow_patterns=patterns, ignore_patterns=ignored
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(
            f"neither a folder here nor a model that the hub gives us: {_short(error)}",
            where=model.path,
            hint="check model.path; a gated model needs HF_TOKEN, a machine without network a local folder",
        ) from None


def load_tokenizer(model: config.Model, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token (the end-of-text token if it has none of its own).

    `chat_template` is the path or URI of a Jinja file that replaces the tokenizer's template.
    Raises ModelError when there is none, or when it cannot map tokens to characters.
    """
    from transformers import AutoTokenizer

    folder = local_model_folder(model, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        raise ModelError(
            f"no tokenizer can be loaded: {_short(error)}", where=model.path, hint="the folder needs a tokenizer.json"
        ) from None
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} cannot say which characters a token stands for",
            where=model.path,
            hint="the folder needs a tokenizer.json (a fast tokenizer)",
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-text token", where=model.path, hint="set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    return tokenizer


def _read_template(where: str) -> str:
    try:
        return read_text(where)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the chat template cannot be read: {_short(error)}", where=f"data.chat_template: {where}"
        ) from None


def backend_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer proper as JSON, without the truncation and padding that a call may have left in it, and with
    offsets that include white space (they change no token): a target may be a line break alone."""
    value = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    value["truncation"] = value["padding"] = None
    last = value.get("post_processor") or {}
    for processor in [last, *(last.get("processors") or [])]:
        if "trim_offsets" in processor:
            processor["trim_offsets"] = False
    return json.dumps(value, ensure_ascii=False)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that turns text into tokens, the chat template apart."""
    special: dict[str, Any] = {
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "map": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
    }
    return digest_of([hashlib.sha256(backend_json(tokenizer).encode()).hexdigest(), special])


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the chat template; None without one."""
    template = template_text(tokenizer)
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def template_text(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that `apply_chat_template` uses for a conversation without tools."""
    if not tokenizer.chat_template:
        return None
    return tokenizer.get_chat_template()


def nearest_existing(path: str) -> str:
    """The longest part of a local path that exists."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
