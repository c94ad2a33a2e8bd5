"""What an adapter must fit: a base's shapes, digest and chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftray.config import Model
from ftray.model.shapes import Shapes
from ftray.model.source import find_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class BaseFacts:
    """A base, as the check of an adapter asks for it."""

    path: str
    """What people call it."""
    shapes: Shapes
    digest: str | None = None
    """As of `ftray.model.load.base_digest`; None: the adapter's word is taken."""
    chat_template: str | None = None
    """SHA-256 of the template that prompts are rendered with, empty where there is none; None: not compared."""


def shapes_alone(model: Model) -> BaseFacts:
    """From config.json alone: digest and template are not compared. Raises ModelError."""
    return BaseFacts(model.path, find_shapes(model)[0])


def facts_of_base(model: Model) -> BaseFacts:
    """With the digest of a base whose files are at hand; hashes its weights. Raises ModelError."""
    from ftray.data.tokenizer import local_model_folder
    from ftray.model.load import base_digest

    return BaseFacts(model.path, find_shapes(model)[0], base_digest(local_model_folder(model)))


def served_base(model: Model, digest: str, tokenizer: PreTrainedTokenizerBase) -> BaseFacts:
    """What a server asks of adapters, of a base that it has loaded: its digest, and a tokenizer with the chat template
    that prompts are rendered with. Raises ModelError."""
    from ftray.data.tokenizer import chat_template_hash

    return BaseFacts(model.path, find_shapes(model)[0], digest, chat_template_hash(tokenizer) or "")
