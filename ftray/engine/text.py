"""Tokens into text, one at a time: what a reader has seen is never taken back.

The pieces of a `TextStream` joined are what the tokenizer's `decode` gives for the whole answer without its special
tokens (and without transformers' `clean_up_tokenization_spaces`, which rewrites text that was read already). So a piece
waits for as long as later tokens can change it:

- A byte-level tokenizer (GPT-2, Llama 3, Qwen) may divide a character among tokens: its bytes wait for each other.
- A tokenizer with byte fallback (Llama 2, Mistral, Gemma) decodes a run of byte tokens as one: as characters if all of
  it is UTF-8, else every byte as U+FFFD. So a run waits for its end.
- Any other decoder is asked for what new tokens say behind the last ones that were read.

Text that may be the beginning of a stop string waits too. A token costs the same however long the answer is.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NO_CHARACTER = "\ufffd"
"""What a decoder writes for bytes that are no character."""


class TextStream:
    """The text of one answer, until the first of its stop strings is complete."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = ()) -> None:
        self._pieces = detokenizer.pieces()
        self._stop = _Stop(stop) if stop else None
        self.stopped = False
        """A stop string was found: the text has ended before it."""

    def add(self, token: int) -> str:
        """What may be shown now; often "". Special tokens, and ids that the tokenizer does not know, say nothing."""
        return "" if self.stopped else self._through_stop(self._pieces.add(token))

    def finish(self) -> str:
        """The rest, once no token follows."""
        if self.stopped:
            return ""
        text = self._through_stop(self._pieces.finish())
        return text if self.stopped or self._stop is None else text + self._stop.rest()

    def _through_stop(self, text: str) -> str:
        if self._stop is None or not text:
            return text
        text, self.stopped = self._stop.add(text)
        return text


class Detokenizer:
    """What the streams of one tokenizer share."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        added = self._backend.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}
        self._decoder = _known_decoder(json.loads(self._backend.to_str())["decoder"])

    def pieces(self) -> _Pieces:
        """A decoder of one answer."""
        if self._decoder is None:
            return _WindowPieces(self._backend, self.word)
        return self._decoder.pieces(self.word)

    def word(self, token: int) -> str | None:
        """The token as the vocabulary writes it; None for what never shows in a text."""
        word = self._backend.id_to_token(token)
        return None if word is None or word in self._special else word

    def bytes_of(self, token: int) -> bytes:
        """What the token alone stands for, as for a list of log probabilities: bytes, perhaps a part of a character."""
        word = self._backend.id_to_token(token) or ""
        return word.encode() if self._decoder is None or word in self._special else self._decoder.bytes_of(word)


_Word = Callable[[int], str | None]


class _Pieces(Protocol):
    def add(self, token: int) -> str: ...

    def finish(self) -> str: ...


# ------------------------------------------------------------------------------------------------------------ decoders


def _known_decoder(spec: dict[str, Any] | None) -> _ByteLevel | _ByteFallback | None:
    """How the tokenizer's decoder works, by its part `decoder` of tokenizer.json; None: it has to be asked."""
    chain = [] if spec is None else spec["decoders"] if spec["type"] == "Sequence" else [spec]
    kinds = [link["type"] for link in chain]
    if kinds == ["ByteLevel"]:
        return _ByteLevel()
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        old, space = chain[0]["pattern"].get("String"), chain[0]["content"]
        strip: dict[str, Any] = chain[3] if kinds[3:] else {"content": " ", "start": 0, "stop": 0}
        if old is not None and not strip["stop"]:
            return _ByteFallback(old, space, strip["content"], strip["start"])
    return None


class _ByteLevel:
    """Each character of a word stands for a byte."""

    def __init__(self) -> None:
        self._byte_of = _byte_of_character()

    def bytes_of(self, word: str) -> bytes:
        try:
            return bytes([self._byte_of[c] for c in word])
        except KeyError:  # an added token, which is written as it is
            return word.encode()

    def pieces(self, word: _Word) -> _Pieces:
        return _ByteLevelPieces(self, word)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: itself where a byte is a printable character, else one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class _ByteLevelPieces:
    def __init__(self, decoder: _ByteLevel, word: _Word) -> None:
        self._decoder, self._word = decoder, word
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        word = self._word(token)
        return "" if word is None else self._utf8.decode(self._decoder.bytes_of(word))

    def finish(self) -> str:
        return self._utf8.decode(b"", True)


class _ByteFallback:
    """A word is text, with `space` written as `old`, or one byte, `<0x0A>`. Of the whole text, the first `strip`
    characters are left out if they are `stripped`."""

    def __init__(self, old: str, space: str, stripped: str, strip: int) -> None:
        self._old, self._space, self.stripped, self.strip = old, space, stripped, strip

    def bytes_of(self, word: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(word)
        return bytes([int(byte[1], 16)]) if byte else self.text_of(word).encode()

    def text_of(self, word: str) -> str:
        return word.replace(self._old, self._space)

    def pieces(self, word: _Word) -> _Pieces:
        return _ByteFallbackPieces(self, word)


class _ByteFallbackPieces:
    def __init__(self, decoder: _ByteFallback, word: _Word) -> None:
        self._decoder, self._word = decoder, word
        self._run = bytearray()
        self._strip = decoder.strip

    def add(self, token: int) -> str:
        word = self._word(token)
        if word is None:
            return ""
        if byte := _BYTE_TOKEN.fullmatch(word):
            self._run.append(int(byte[1], 16))
            return ""
        return self._stripped(self._end_of_run() + self._decoder.text_of(word))

    def finish(self) -> str:
        return self._stripped(self._end_of_run())

    def _end_of_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _NO_CHARACTER * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if not text.startswith(self._decoder.stripped):
                self._strip = 0
                break
            text = text[len(self._decoder.stripped) :]
            self._strip -= 1
        return text


class _WindowPieces:
    """Asks the tokenizer: new text is what the last tokens and the new ones say together, less what the last said."""

    def __init__(self, backend: Tokenizer, word: _Word) -> None:
        self._backend, self._word = backend, word
        self._read: list[int] = []
        self._new: list[int] = []

    def add(self, token: int) -> str:
        if self._word(token) is None:
            return ""
        self._new.append(token)
        text = self._text_of_new()
        if not text or text.endswith(_NO_CHARACTER):
            return ""
        self._read, self._new = self._new, []
        return text

    def finish(self) -> str:
        return self._text_of_new()

    def _text_of_new(self) -> str:
        read = self._backend.decode(self._read, skip_special_tokens=True)
        return self._backend.decode(self._read + self._new, skip_special_tokens=True)[len(read) :]


# -------------------------------------------------------------------------------------------------------- stop strings


class _Stop:
    """Looks for strings in a text that comes in pieces, however it is cut (Knuth, Morris and Pratt 1977).

    The text ends before the string that is complete first; of two that are complete with the same character, before
    the longer one.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(dict.fromkeys(strings))
        self._fallbacks = [_fallbacks(string) for string in self._strings]
        self._matched = [0] * len(self._strings)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """(what cannot be part of a stop string any more, whether one is complete)."""
        whole = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            found = 0
            for i, string in enumerate(self._strings):
                self._matched[i] = _advance(string, self._fallbacks[i], self._matched[i], character)
                if self._matched[i] == len(string):
                    found = max(found, len(string))
            if found:
                self._held = ""
                return whole[: end - found], True
        free = len(whole) - max(self._matched)
        self._held = whole[free:]
        return whole[:free], False

    def rest(self) -> str:
        """What was held back."""
        return self._held


def _fallbacks(string: str) -> list[int]:
    """For each prefix of `string`, the length of its longest proper prefix that is also its end."""
    lengths = [0]
    for character in string[1:]:
        lengths.append(_advance(string, lengths, lengths[-1], character))
    return lengths


def _advance(string: str, fallbacks: list[int], matched: int, character: str) -> int:
    """Characters of `string` that match, once `character` follows `matched` of them, fewer than all."""
    while matched and string[matched] != character:
        matched = fallbacks[matched - 1]
    return matched + (string[matched] == character)
