"""OpenAI's requests, checked and translated into the engine's, and answers in OpenAI's shape.

What changes an answer and is not there yet is refused by name; what changes nothing (`user`, `metadata`) is taken and
passed over; what nobody knows is refused with the nearest name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    Tag,
    model_validator,
)

from ftray.engine.request import Chunk, Grammar, Logprob, Sampling, Usage

from .errors import bad_request
from .prompts import Prompts

Number = StrictFloat | StrictInt
MOST_STOPS = 16
COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` for completions; a chat answer ends where the base ends it."""


class Body(BaseModel):
    """A part of a request body: unknown keys are refused, null means the default. The first thing that is wrong is
    enough: pydantic notes everything, and a body of a mebibyte may be wrong in 300,000 places."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, value: Any) -> Any:
        if not isinstance(value, dict) or len(value) <= len(cls.model_fields):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        first = next(key for key in value if key not in known)
        return {key: part for key, part in value.items() if key in known or key == first}


class StreamOptions(Body):
    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None
    """Beyond OpenAI: every message says how many tokens there are by now."""


class JsonSchema(Body):
    name: StrictStr = Field(min_length=1, max_length=64)
    schema_: dict[str, Any] = Field(alias="schema")
    description: StrictStr | None = None
    strict: StrictBool | None = None


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


MOST_BIASES = 1024


def _few(biases: Any) -> Any:
    if isinstance(biases, dict) and len(biases) > MOST_BIASES:  # pydantic would look at each of them first
        raise ValueError(f"at most {MOST_BIASES:,} tokens can have a bias, not {len(biases):,}")
    return biases


LogitBias = Annotated[
    dict[str, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES), BeforeValidator(_few)
]


class Common(Body):
    """What both kinds of requests have."""

    model: StrictStr = Field(min_length=1, max_length=256)
    """`base`, the base's name, NAME, TENANT/NAME, or either with @DIGEST."""
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: StrictInt | None = Field(None, ge=1, le=1024)
    max_tokens: StrictInt | None = Field(None, ge=1)
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=MOST_STOPS)] | None = None
    seed: StrictInt | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias | None = None
    response_format: ResponseFormat | None = None
    top_k: StrictInt | None = Field(None, ge=0)
    """Beyond OpenAI: of the most probable tokens; 0 is off."""
    min_p: Number | None = Field(None, ge=0, le=1)
    """Beyond OpenAI: probability relative to the most probable token's; 0 is off."""
    repetition_penalty: Number | None = Field(None, gt=0, le=10)
    """Beyond OpenAI: CTRL's, over prompt and answer; 1 is off."""
    ignore_eos: StrictBool | None = None
    """Beyond OpenAI: go on after the base's end token, for load tests."""
    user: StrictStr | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None

    @model_validator(mode="after")
    def _streams(self) -> Common:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @staticmethod
    def prompts_in(body: dict[str, Any]) -> int:
        """How many prompts a body has that nobody has looked at yet."""
        return 1

    @property
    def count(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def counts_as_it_goes(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class TextPart(Body):
    type: Literal["text"]
    text: StrictStr


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    name: StrictStr | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def turn(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Common):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: StrictInt | None = Field(None, ge=1)
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens say different things; the second is the new name")
        return self

    def turns(self) -> list[dict[str, str]]:
        return [message.turn() for message in self.messages]

    @property
    def size(self) -> int:
        """Characters of all messages."""
        return sum(len(text) for turn in self.turns() for text in turn.values())

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def _kind_of_prompt(prompt: Any) -> str:
    """By its first element, so that it is looked through once."""
    if not isinstance(prompt, list):
        return "text"
    first = prompt[0] if prompt else ""
    return "tokens" if isinstance(first, int) else "lists" if isinstance(first, list) else "texts"


Tokens = Annotated[list[StrictInt], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    Annotated[StrictStr, Tag("text")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[list[StrictStr], Field(min_length=1, fail_fast=True), Tag("texts")]
    | Annotated[list[Tokens], Field(min_length=1, fail_fast=True), Tag("lists")],
    Discriminator(_kind_of_prompt),
]


class CompletionRequest(Common):
    """`POST /v1/completions`."""

    prompt: Prompt
    logprobs: StrictInt | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    """Refused: the engine keeps no probabilities of a prompt."""
    best_of: StrictInt | None = Field(None, ge=1)
    suffix: None = None

    @model_validator(mode="after")
    def _fits(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.count:
            raise ValueError(f"best_of {self.best_of} is not supported; ask for n answers and choose")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens or COMPLETION_TOKENS

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @staticmethod
    def prompts_in(body: dict[str, Any]) -> int:
        prompt = body.get("prompt")
        return len(prompt) if isinstance(prompt, list) and _kind_of_prompt(prompt) != "tokens" else 1

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or tokens."""
        whole: Any = self.prompt
        return [whole] if isinstance(whole, str) or isinstance(whole[0], int) else list(whole)

    @property
    def size(self) -> int:
        """Characters, or tokens, of all prompts."""
        return sum(map(len, self.prompts()))


NOT_THERE = {
    "audio": "audio",
    "echo": "echo",
    "function_call": "tools",
    "functions": "tools",
    "modalities": "answers that are not text",
    "parallel_tool_calls": "tools",
    "prediction": "predicted outputs",
    "reasoning_effort": "reasoning_effort",
    "suffix": "suffix",
    "tool_choice": "tools",
    "tools": "tools",
    "verbosity": "verbosity",
    "web_search_options": "web search",
}
"""Keys of OpenAI's that would change an answer, and what they ask for."""
_MEANS_NOTHING = {"modalities": ["text"], "tool_choice": "none", "tools": [], "functions": [], "echo": False}


def without_defaults(body: dict[str, Any]) -> dict[str, Any]:
    """The body without keys that are there only to say that something is off. Raises ApiError 400 for those of what is
    not there."""
    kept = {}
    for key, value in body.items():
        if key in NOT_THERE:
            if value is not None and value != _MEANS_NOTHING.get(key, ...):
                raise bad_request(f"This endpoint does not support {NOT_THERE[key]}.", key, "unsupported_parameter")
            continue
        kept[key] = value
    return kept


def check_choices(body: dict[str, Any], kind: type[Common], most: int) -> None:
    """Before prompts are looked at, since 200,000 of them fit into a body. Raises ApiError 400."""
    n = body.get("n")
    count = kind.prompts_in(body) * (n if isinstance(n, int) and n > 1 else 1)
    if count > most:
        raise bad_request(f"{count:,} answers to one request; the limit is {most:,}.", "n")


def sampling_of(body: ChatRequest | CompletionRequest, *, prompt_tokens: int, context: int, index: int) -> Sampling:
    """How answer number `index` to one prompt is chosen. Raises ApiError 400."""
    room = context - prompt_tokens
    if room < 1:
        raise bad_request(
            f"This base's context is {context:,} tokens, and the prompt has {prompt_tokens:,}.",
            "messages" if isinstance(body, ChatRequest) else "prompt",
            "context_length_exceeded",
        )
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if "" in stops:
        raise bad_request("An empty stop string would stop at once.", "stop")
    return Sampling(
        max_tokens=min(body.most_tokens or room, room),
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=body.top_k or 0,
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        seed=None if body.seed is None else (body.seed + index) % 2**63,
        stop=tuple(stops),
        ignore_end=bool(body.ignore_eos),
        logprobs=body.alternatives,
        logit_bias={_token(key): float(value) for key, value in (body.logit_bias or {}).items()},
        grammar=_grammar(body.response_format),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _token(key: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 9:
        raise bad_request(f"{key[:40]!r} in logit_bias is no token; keys are token numbers.", "logit_bias")
    return int(key)


def _grammar(wanted: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> Grammar | None:
    if isinstance(wanted, JsonObjectFormat):
        return Grammar("json")
    if isinstance(wanted, JsonSchemaFormat):
        try:
            return Grammar("json_schema", orjson.dumps(wanted.json_schema.schema_).decode())
        except orjson.JSONEncodeError as error:  # nested 254 levels deep or more
            raise bad_request(f"The schema cannot be read: {error}.", "response_format") from None
    return None


# ---------------------------------------------------------------------------------------------------------- answers


class Shape:
    """What one answer's parts look like: `chat` or text, `id`, `created`, `model` and fingerprint said in each."""

    def __init__(self, *, chat: bool, id: str, created: int, model: str, fingerprint: str) -> None:
        self.chat = chat
        self._whole = "chat.completion" if chat else "text_completion"
        self._part = "chat.completion.chunk" if chat else "text_completion"
        self._head = {"id": id, "created": created, "model": model, "system_fingerprint": fingerprint}

    def answer(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self._whole, "choices": choices, "usage": usage}

    def choice(self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def part(
        self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None, *, first: bool = False
    ) -> dict[str, Any]:
        """One streamed message. A chat answer's first names the role."""
        said: dict[str, Any]
        if self.chat:
            said = {"delta": ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})}
        else:
            said = {"text": text}
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": self._part, "choices": [choice]}

    def usage_part(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self._part, "choices": [], "usage": usage}


def usage_of(usages: Sequence[Usage], n: int) -> dict[str, Any]:
    """Of all answers to one request, `n` to each prompt; what several answers read counts once."""
    prompts = sum(u.prompt_tokens for u in usages[::n])
    completions = sum(u.completion_tokens for u in usages)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": completions,
        "total_tokens": prompts + completions,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in usages[::n])},
    }


class Probabilities:
    """`logprobs` of one answer, in either shape; text offsets of completions go on from part to part."""

    def __init__(self, prompts: Prompts, *, chat: bool, wanted: int | None) -> None:
        self._prompts, self._chat, self._wanted, self._offset = prompts, chat, wanted, 0

    def of(self, chunks: Iterable[Chunk]) -> dict[str, Any] | None:
        if self._wanted is None:
            return None
        found = [logprob for chunk in chunks for logprob in chunk.logprobs]
        return {"content": [self._chat_entry(p) for p in found], "refusal": None} if self._chat else self._texts(found)

    def _chat_entry(self, found: Logprob) -> dict[str, Any]:
        top = [self._one(token, value) for token, value in found.top[: self._wanted]]
        return {**self._one(found.token, found.logprob), "top_logprobs": top}

    def _one(self, token: int, value: float) -> dict[str, Any]:
        text, content = self._prompts.piece(token)
        return {"token": text, "logprob": _finite(value), "bytes": content}

    def _texts(self, found: Sequence[Logprob]) -> dict[str, Any]:
        texts = [self._prompts.piece(p.token)[0] for p in found]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        tops = [{self._prompts.piece(t)[0]: _finite(v) for t, v in p.top[: self._wanted]} for p in found]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(p.logprob) for p in found],
            "top_logprobs": tops if self._wanted else None,
            "text_offset": offsets,
        }


def _finite(value: float) -> float:
    """JSON has no -inf: OpenAI writes -9999 for what cannot be."""
    return max(value, -9999.0)
