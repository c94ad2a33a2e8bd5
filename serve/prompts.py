"""From messages or text to the tokens that the engine reads, and from tokens back to what `logprobs` shows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ftray import config
from ftray.data.tokenizer import load_tokenizer

from .errors import bad_request


class Prompts:
    """A base's tokenizer and chat template. Safe to use from any thread."""

    def __init__(self, model: config.Model, chat_template: str | None = None) -> None:
        self._tokenizer: Any = load_tokenizer(model, chat_template)
        self.vocabulary = len(self._tokenizer)
        self._anchor = self._tokenizer("a", add_special_tokens=False).input_ids[-1]
        self._piece = lru_cache(maxsize=65536)(self._piece_of)

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._tokenizer.chat_template)

    def of_chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Tokens of a conversation up to where the assistant is to speak. Raises ApiError 400."""
        from jinja2.exceptions import TemplateError

        if not self.chats:
            raise bad_request("This base has no chat template; use /v1/completions.", "messages")
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise bad_request(f"The chat template refuses these messages: {str(error)[:300]}", "messages") from None
        return self._tokens(text, special=False)

    def of_text(self, text: str) -> tuple[int, ...]:
        """Tokens of a prompt, with those that the tokenizer puts in front."""
        return self._tokens(text, special=True)

    def checked(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Tokens that a client wrote itself. Raises ApiError 400."""
        for token in tokens:
            if not 0 <= token < self.vocabulary:
                raise bad_request(f"Token {token} is not one of 0 … {self.vocabulary - 1}.", "prompt")
        return tuple(tokens)

    def piece(self, token: int) -> tuple[str, list[int] | None]:
        """(text of one token, its bytes). Of a part of a character the text is U+FFFD, and the bytes are not told."""
        return self._piece(token)

    def _piece_of(self, token: int) -> tuple[str, list[int] | None]:
        # after another token, since some tokenizers drop the space in front of the first
        text = self._decode([self._anchor, token])[len(self._decode([self._anchor])) :]
        return text, None if "\ufffd" in text else list(text.encode("utf-8"))

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _tokens(self, text: str, *, special: bool) -> tuple[int, ...]:
        # a lone surrogate is valid in JSON and in no tokenizer
        whole = text.encode("utf-8", "replace").decode("utf-8")
        return tuple(self._tokenizer(whole, add_special_tokens=special).input_ids)
