"""Sample rows in words: which pieces of text the model reads, and which it learns to say."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ftray.data.prepared import PreparedData, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pieces = list[tuple[str, bool]]
"""(text, whether its tokens are targets), in order; special tokens are written out."""


def sample_rows(prepared: PreparedData, tokenizer: PreTrainedTokenizerBase, n: int) -> list[tuple[str, Pieces]]:
    """(provenance, pieces) of up to `n` train rows, evenly spread so that every source has its chance."""
    rows = prepared.train
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(n, len(rows))).round().astype(int))
    return [(rows.provenance(int(i)), pieces(rows[int(i)], tokenizer)) for i in chosen]


def pieces(row: Row, tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """The row's text, cut where targets begin or end. Together the pieces are the text of the whole row."""
    tokens, targets = row.tokens.tolist(), row.targets
    cuts = [0, *(np.flatnonzero(np.diff(targets.astype(np.int8))) + 1).tolist(), len(tokens)]
    found, done = [], ""
    for start, stop in pairwise(cuts):
        # Decoded from the row's beginning: a token alone may lose its space, or be half a character.
        text = str(tokenizer.decode(tokens[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        found.append((text[len(done) :], bool(targets[start])))
        done = text
    return found
