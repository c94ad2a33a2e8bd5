"""Conversations: the text that the tokenizer's own chat template gives, and which of it the assistant says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ftray.data.rows import BadRow

Messages = list[dict[str, Any]]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A Jinja chat template with the special tokens it may name.

    A template that marks the assistant's words itself (`{% generation %}`) is taken at its word. Otherwise they are
    found by rendering prefixes: turn i is what stands between the rendering of the turns before it, with the prompt for
    an answer, and the rendering with it. That holds only if both begin the whole text, which is checked. White space
    after an end-of-turn token is no target: nothing is generated after that token.
    """

    def __init__(self, template: str, special: dict[str, Any], special_texts: Sequence[str]) -> None:
        self.template, self._special = template, special
        self._ends = tuple(sorted(set(special_texts), key=len, reverse=True))
        self._marked = bool(_GENERATION.search(template))

    def render(self, messages: Any) -> tuple[str, list[tuple[int, int]]]:
        """(text, [start, end) of each assistant turn in characters). Raises BadRow."""
        turns = checked(messages)
        if self._marked:
            [text], [spans] = self._run([turns], marked=True)
            spans = [(start, end) for start, end in spans if end > start]
            if not spans:
                raise BadRow("the chat template marks nothing as the assistant's")
            return text, spans
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        last = len(turns) - 1
        befores, _ = self._run([turns[:i] for i in answers], prompt=True)
        afters, _ = self._run([turns[: i + 1] for i in answers])
        text = afters[-1] if answers[-1] == last else self._run([turns])[0][0]
        spans = []
        for i, before, after in zip(answers, befores, afters, strict=True):
            if not text.startswith(after):
                raise BadRow("the chat template renders earlier turns in another way once later ones follow")
            spans.append(self._span(turns[:i], before, after))
        return text, spans

    def prompt(self, messages: Messages) -> str:
        """The text up to where the assistant is to speak. Raises BadRow."""
        [text], _ = self._run([list(messages)], prompt=True)
        return text

    def _span(self, turns: Messages, before: str, after: str) -> tuple[int, int]:
        start = len(before)
        if not after.startswith(before):
            # A prompt for an answer may say more than the answer's turn does (an opened block of reasoning, say).
            start = _common_length(before, after)
            if start < len(self._run([turns])[0][0]):
                raise BadRow("the chat template renders earlier turns in another way once later ones follow")
        trimmed = after[start:].rstrip()
        end = start + len(trimmed) if trimmed.endswith(self._ends) else len(after)
        if end <= start:
            raise BadRow("the chat template renders no answer")
        return start, end

    def _run(self, conversations: list[Messages], *, prompt: bool = False, marked: bool = False) -> Any:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            return render_jinja_template(
                conversations=conversations,
                chat_template=self.template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **self._special,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise BadRow("the chat template refuses it", str(error)[:200]) from None


def _common_length(a: str, b: str) -> int:
    """Characters at the beginning that both share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def checked(messages: Any) -> Messages:
    """The turns, if they are a conversation: an optional system turn, then user and assistant in turn, the assistant
    last. Raises BadRow that says what is wrong, and in which turn."""
    if not isinstance(messages, list) or not messages:
        raise BadRow("messages are not a list of turns")
    turns: Messages = []
    expected: tuple[str, ...] = ("system", "user")
    for i, turn in enumerate(messages, 1):
        if not isinstance(turn, dict):
            raise BadRow("a turn is not a mapping of role and content", f"turn {i}")
        role, content = turn.get("role"), turn.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRow("a turn has no role and content as text", f"turn {i} has {', '.join(map(str, turn))[:80]}")
        if role not in ("system", "user", "assistant"):
            raise BadRow("unknown role", f"turn {i} is {role[:40]!r}; known are system, user, assistant")
        if role not in expected:
            raise BadRow("wrong order of roles", f"turn {i} is {role!r}, expected {' or '.join(expected)}")
        if role == "assistant" and not content.strip():
            raise BadRow("empty completion", f"turn {i}")
        expected = ("assistant",) if role == "user" else ("user",)
        turns.append({key: value for key, value in turn.items() if value is not None})
    if turns[-1]["role"] != "assistant":
        raise BadRow("wrong order of roles", f"the last turn is {turns[-1]['role']!r}, expected 'assistant'")
    return turns
