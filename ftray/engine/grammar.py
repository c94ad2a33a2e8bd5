"""Text that has to be JSON: which tokens may come next, by llguidance's parser (Earley over regular lexemes).

It knows tokens as bytes, of byte-level and of byte-fallback tokenizers alike, so a character may be divided among
tokens. Special tokens are never allowed, but the end tokens, and these once the value is complete.
"""

from __future__ import annotations

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par

from ftray.engine.request import Grammar
from ftray.errors import FtrayError, RequestError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SCHEMA_BYTES = 64 * 1024
"""A longer schema is refused. Measured: one of this size takes half a second at most."""

COMPILED = 64
"""Grammars that are kept."""

_WHERE = "json_schema"

_WHITE = r"[\x20\x0A\x0D\x09]{1,64}"
"""White space between parts of a value. Without a bound a model may go on with it for ever."""

_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,  # some 20 ms
    step_lexer_fuel=100_000,  # some 7 ms a token
    step_max_items=25_000,  # a millisecond a token
    max_lexer_states=50_000,  # 100 MB
    max_grammar_size=250_000,
    verbose_errors=False,
)
"""What a grammar may take. One that takes more fails, when it is compiled or at the token where it does."""


class Grammars:
    """Compiles grammars for one tokenizer. Any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Collection[int]) -> None:
        """`vocabulary` is the number of logits, `ends` the base's end tokens."""
        self._tokenizer: LLTokenizer | None = None
        self._unusable = ""
        try:
            backend = _for_any_place(json.loads(tokenizer.backend_tokenizer.to_str()))  # type: ignore[attr-defined]
            width = max(vocabulary, len(tokenizer))
            self._tokenizer = LLTokenizer(json.dumps(backend), n_vocab=width, eos_token=sorted(ends))
        except ValueError as error:  # tokens that are no bytes: the base serves, but without grammars
            self._unusable = _first_line(str(error))
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        if self._tokenizer is not None:
            fill_masks([self.matcher(Grammar("json"))])  # the first mask of a tokenizer takes some 0.2 s

    def matcher(self, grammar: Grammar) -> Matcher:
        """The state of one answer under `grammar`, from its beginning. Compiles it, unless that was done before.

        Raises RequestError for a schema that is none, or that has what cannot be held to, and where the tokenizer is of
        a kind that has no grammars.
        """
        if self._tokenizer is None:
            raise RequestError(f"this base's tokenizer has no grammars: {self._unusable}", where=grammar.kind)
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
        if compiled is None:
            compiled = _compile(self._tokenizer, grammar)
            with self._lock:
                self._compiled[grammar] = compiled
                while len(self._compiled) > COMPILED:
                    self._compiled.popitem(last=False)
        return Matcher(compiled.deep_copy(), -(-self._tokenizer.vocab_size // 32))


def _compile(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    schema = '{"type": "object"}' if grammar.kind == "json" else _checked(grammar.schema)
    source = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITE})
    compiled = LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS)
    if compiled.is_error():
        raise RequestError(f"it cannot be held to: {_first_line(compiled.get_error())}", where=_WHERE)
    return compiled


class Matcher:
    """Where one answer stands in its grammar. One thread alone."""

    def __init__(self, state: LLMatcher, words: int) -> None:
        self.state = state
        self.words = words
        """32-bit words of a mask."""

    @property
    def complete(self) -> bool:
        """The value is complete and nothing can follow it."""
        return self.state.is_stopped() and not self.state.is_error()

    def accept(self, token: int) -> FtrayError | None:
        """Go on by a token. Returns an error where it is not allowed."""
        self.state.consume_token(token)
        return self.error()

    def error(self) -> FtrayError | None:
        """What broke; it stays."""
        if not self.state.is_error():
            return None
        return RunError(f"the grammar cannot be followed any further: {_first_line(self.state.get_error())}")


def fill_masks(matchers: Sequence[Matcher]) -> tuple[np.ndarray, list[FtrayError | None]]:
    """(uint8 [M, W]: a bit for each token, a byte's lowest first; errors [M], whose masks say nothing).

    All matchers are of one tokenizer. Lets go of the interpreter while it works, on several cores if there are any.
    """
    masks = np.zeros((len(matchers), matchers[0].words), np.int32)
    fill_next_token_bitmask_par(_executor(), [(m.state, i) for i, m in enumerate(matchers)], masks)
    errors = [matcher.error() for matcher in matchers]
    for i in np.flatnonzero(~masks.any(1)):
        errors[i] = errors[i] or RunError("the grammar allows no token of this tokenizer here")
    return masks.view(np.uint8), errors


def _for_any_place(backend: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json without what cuts or pads a text, or puts a space in front of it: llguidance asks it for tokens in
    the middle of an answer."""
    changed = {part: _without_prefix(backend.get(part)) for part in ("normalizer", "pre_tokenizer")}
    return backend | changed | {"truncation": None, "padding": None}


def _without_prefix(part: Any) -> Any:
    if isinstance(part, list):
        return [changed for item in part if (changed := _without_prefix(item)) is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    fixed = {"add_prefix_space": False, "prepend_scheme": "never"}
    return {key: fixed[key] if key in fixed else _without_prefix(value) for key, value in part.items()}


@functools.cache
def _executor() -> LLExecutor:
    return LLExecutor()


def _checked(schema: str) -> str:
    if len(schema.encode()) > MAX_SCHEMA_BYTES:
        raise RequestError(
            f"it has {len(schema.encode()):,} bytes; {MAX_SCHEMA_BYTES:,} are allowed",
            where=_WHERE,
            hint="leave out descriptions, and name what is repeated under $defs",
        )
    try:
        value = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"it is not JSON: {error}", where=_WHERE) from None
    if value is True:
        return "{}"
    if not isinstance(value, dict):
        raise RequestError("it is no object, and not true: no value holds to it", where=_WHERE)
    value.pop("x-guidance", None)  # llguidance's own options
    return json.dumps(value)


def _first_line(message: str) -> str:
    """llguidance's messages go on with the parser's state."""
    return " ".join(message.split("<non-verbose/>")[0].split("<backtrace>")[0].split())[:300]
