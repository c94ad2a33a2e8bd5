"""What a caller asks of the engine, and what it gets back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ftray.errors import FtrayError
from ftray.registry.ref import Ref


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the text must be: any JSON object, or a value of a JSON schema."""

    kind: Literal["json", "json_schema"]
    schema: str = ""
    """The schema's own JSON text; for `json_schema` alone."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Defaults are OpenAI's; 0 turns off what it is the default of."""

    max_tokens: int = 256
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """CTRL's (Keskar et al. 2019), over prompt and answer, as in transformers."""
    seed: int | None = None
    """None: drawn once for the request."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    ignore_end: bool = False
    """Go on after the base's end token, which is then a token as any other."""
    logprobs: int | None = None
    """Number of alternatives to report at every token, 0 for the chosen one alone, None for nothing."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Request:
    id: str
    """Chosen by the caller, unique among requests in flight."""
    prompt: tuple[int, ...]
    """Tokens; at least one."""
    sampling: Sampling = Sampling()
    adapter: Ref | None = None
    """None: the base alone."""
    tenant: str = ""
    """Who asks: the one whom scheduling is fair to, and who alone may reuse this request's keys and values."""
    expected: tuple[int, ...] = ()
    """An answer that there may be, end token included. It is read with the prompt: the last event tells how probable it
    is, and as far as it is what would be chosen, the answer need not be written token by token (the check of
    speculative decoding, Leviathan et al. 2023, section 2.3, with this as the draft)."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """One generated token's log probability under the distribution before temperature and filters."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token, logprob) of the most probable ones, best first."""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, those whose keys and values were there already."""
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """More of an answer. Chunks' texts joined are the answer; a chunk may hold several tokens, or text alone."""

    id: str
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request, exactly one."""

    id: str
    reason: Literal["stop", "length", "cancelled", "error"]
    usage: Usage
    error: FtrayError | None = None
    """With reason `error`."""
    expected: tuple[float, ...] = ()
    """Log probability of each token of `Request.expected` after those before it; nothing where it was not read."""


Event = Chunk | Finished
