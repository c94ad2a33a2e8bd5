"""Texts become tokens and targets, many at a time, on the Rust tokenizer alone (no torch, no transformers)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ftray.data.chat import ChatTemplate
from ftray.data.formats import Rendered

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Vocabulary:
    """What a worker needs of a tokenizer: plain values, sent to it once."""

    digest: str
    backend: str
    """The tokenizer proper, as JSON."""
    eos_id: int
    pad_id: int
    template: str | None
    special: dict[str, Any]
    """The special tokens that a chat template may name."""
    special_texts: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        from ftray.data.tokenizer import backend_json, template_text, tokenizer_digest

        added = tokenizer.added_tokens_decoder.values()  # type: ignore[attr-defined]
        return cls(
            digest=tokenizer_digest(tokenizer),
            backend=backend_json(tokenizer),
            eos_id=int(tokenizer.eos_token_id),
            pad_id=int(tokenizer.pad_token_id),
            template=template_text(tokenizer),
            special=dict(tokenizer.special_tokens_map),
            special_texts=tuple(sorted({*tokenizer.all_special_tokens, *(t.content for t in added if t.special)})),
        )

    @property
    def chat(self) -> ChatTemplate | None:
        return ChatTemplate(self.template, self.special, self.special_texts) if self.template else None


@lru_cache(maxsize=2)
def _tokenizer(backend: str) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(backend)


class Encoder:
    """Tokenizes for one vocabulary. The tokenizer is loaded once a process."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._eos = vocabulary.eos_id
        self._tokenizer = _tokenizer(vocabulary.backend)

    def encode(self, batch: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens int32[T], targets bool[T]) of each text.

        A token is a target when it holds a character of a span, so one that straddles the border between prompt and
        completion belongs to the completion. The first token never is: there is nothing to predict it from.
        """
        results: list[Any] = [None] * len(batch)
        for whole in (False, True):
            at = [i for i, item in enumerate(batch) if item.whole == whole]
            if not at:
                continue
            texts = [batch[i].text for i in at]
            everything = not whole and all(batch[i].spans[0][0] == 0 for i in at)
            run = self._tokenizer.encode_batch_fast if everything else self._tokenizer.encode_batch
            for i, encoding in zip(at, run(texts, add_special_tokens=not whole), strict=True):
                results[i] = self._targets(batch[i], encoding, everything)
        return results

    def ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        """The tokens of a text alone; `special`: with those that the tokenizer adds to any text."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def _targets(self, item: Rendered, encoding: Encoding, everything: bool) -> tuple[np.ndarray, np.ndarray]:
        ids = encoding.ids
        if item.whole:
            tokens = np.array(ids, np.int32)
            targets = _touching(encoding, item.spans, len(tokens))
        else:
            start = 0 if everything else _token_at(encoding, *item.spans[0], len(ids))
            if not ids or ids[-1] != self._eos:
                ids.append(self._eos)
            tokens = np.array(ids, np.int32)
            targets = np.zeros(len(tokens), np.bool_)
            targets[start:] = True
        targets[:1] = False
        return tokens, targets


def _token_at(encoding: Encoding, start: int, end: int, count: int) -> int:
    """The first token that holds a character of [start, end); `count` if none does. A character may be in no token
    (a normalizer may drop it), so the next ones are tried."""
    for position in range(start, end):
        token = encoding.char_to_token(position)
        if token is not None:
            return token
    return count


def _touching(encoding: Encoding, spans: Sequence[tuple[int, int]], count: int) -> np.ndarray:
    targets = np.zeros(count, np.bool_)
    if not count:
        return targets
    offsets = np.array(encoding.offsets, np.int64)
    for start, end in spans:
        targets |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
    return targets
