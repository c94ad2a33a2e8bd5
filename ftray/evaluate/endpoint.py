"""An OpenAI-compatible endpoint as a system: ours or anyone's, asked over HTTP."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from ftray.config import Decoding
from ftray.errors import ConfigError, RunError
from ftray.evaluate.answer import Answer
from ftray.evaluate.questions import Asked
from ftray.redact import redact

KEY_VARIABLES = ("FTRAY_API_KEY", "OPENAI_API_KEY")
"""The environment's variables that may hold the key, the first one first."""
AT_ONCE = 8
_TRIES = 6
_TIMEOUT_SECONDS = 300
_LATER = (408, 409, 429, 500, 502, 503, 504)
"""Statuses after which the same request is sent again."""
_NEVER = (301, 302, 303, 307, 308, 401, 403, 404, 405)
"""Statuses after which no request will be answered."""


class EndpointRefused(RunError):
    """It will never take a request like this: the address, the model or the key is wrong."""


class _Straight(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the key would go along with it, wherever it leads."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Straight)


@dataclass(frozen=True)
class Endpoint:
    url: str
    """Up to and with `/v1`."""
    model: str
    timeout_seconds: float = 300
    """Of a request without an answer, before it is sent again."""
    tries: int = 6

    @classmethod
    def of(cls, text: str) -> Endpoint:
        """`https://host/v1#model`. Raises ConfigError."""
        url, _, model = text.partition("#")
        if not model:
            raise ConfigError("which model of this endpoint?", where=redact(text), hint=f"{redact(text)}#MODEL")
        url = url.rstrip("/")
        return cls(url if url.endswith("/v1") else f"{url}/v1", model)

    def post(
        self,
        path: str,
        body: dict[str, Any],
        *,
        before: Callable[[], None] = lambda: None,
        lost: Callable[[str], None] = lambda why: None,
    ) -> dict[str, Any]:
        """The endpoint's answer, asked again where it says later or does not say anything. Raises RunError in the end,
        EndpointRefused for what will never be answered.

        `before` is called before each try, and may wait, or raise to end the tries. `lost` is told of a try that may
        have cost something and brought nothing: a timeout, a connection that broke.
        """
        headers = {"Content-Type": "application/json"}
        key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(body).encode(), headers)
        for attempt in range(self.tries):
            before()
            wait = 0.5 * 2**attempt
            try:
                with _OPENER.open(request, timeout=self.timeout_seconds) as reply:
                    found = json.load(reply)
                if isinstance(found, dict):
                    return found
                raise ValueError("the answer is no JSON object")
            except urllib.error.HTTPError as error:
                told = error.read().decode(errors="replace")[:300]
                if error.code not in _LATER or attempt == self.tries - 1:
                    raise self._failed(f"HTTP {error.code}: {told}", key, error.code in _NEVER) from None
                after = error.headers.get("Retry-After", "")
                wait = min(float(after), 60.0) if after.replace(".", "", 1).isdigit() else wait
            except (OSError, ValueError, HTTPException) as error:  # not reached, cut off, no JSON
                if not isinstance(getattr(error, "reason", error), ConnectionRefusedError):
                    lost(str(error) or type(error).__name__)
                if attempt == self.tries - 1:
                    raise self._failed(str(error) or type(error).__name__, key) from None
            time.sleep(wait)
        raise AssertionError

    def _failed(self, what: str, key: str | None, never: bool = False) -> RunError:
        """Some endpoints repeat the key that they refuse: it goes no further."""
        if key:
            what = what.replace(key, "***")
        return (EndpointRefused if never else RunError)(
            f"the endpoint does not answer: {redact(what)}",
            where=redact(self.url),
            hint=f"check address, model and key ({' or '.join(KEY_VARIABLES)})",
        )

    def chat(self, messages: Sequence[dict[str, Any]], decoding: Decoding) -> Answer:
        found = self.post("chat/completions", _body(self.model, decoding) | {"messages": list(messages)})
        return answer_of(found, self)

    def complete(self, prompt: str, decoding: Decoding) -> Answer:
        found = self.post("completions", _body(self.model, decoding) | {"prompt": prompt})
        return _answer(found, lambda choice: choice["text"], self)


def ask_all(
    endpoint: Endpoint, rows: Sequence[Asked], decoding: Decoding, done: Callable[[int], None] = lambda count: None
) -> list[Answer]:
    """The answer to each row, in order, some at once. Raises RunError, ConfigError."""
    if decoding.beams > 1:
        raise ConfigError("endpoints have no beam search", where="evaluate.decoding.beams")

    def ask(row: Asked) -> Answer:
        if row.messages is None:
            return endpoint.complete(row.prompt, decoding)
        return endpoint.chat(row.messages, decoding)

    answers = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for answer in pool.map(ask, rows):
            answers.append(answer)
            done(len(answers))
    return answers


def _body(model: str, decoding: Decoding) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": decoding.max_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "seed": decoding.seed,
    }
    if decoding.top_k:
        body["top_k"] = decoding.top_k
    return body | ({"stop": decoding.stop} if decoding.stop else {})


def answer_of(found: dict[str, Any], endpoint: Endpoint) -> Answer:
    """What a chat completion says. Raises RunError where it is none."""
    return _answer(found, lambda choice: choice["message"]["content"], endpoint)


def _answer(found: dict[str, Any], text: Callable[[dict[str, Any]], str | None], endpoint: Endpoint) -> Answer:
    try:
        choice, usage = found["choices"][0], found.get("usage") or {}
        return Answer(
            text(choice) or "",
            usage.get("prompt_tokens", 0),
            usage.get("completion_tokens", 0),
            str(choice.get("finish_reason")),
        )
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RunError(
            f"this is no completion: {json.dumps(found)[:200]}", where=redact(endpoint.url), hint="is it OpenAI's API?"
        ) from None
