"""Text that grows token by token: its pieces joined are what the tokenizer says of the whole."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ftray import embedded
from ftray.engine.text import Detokenizer, TextStream

SENTENCES = [
    "The cheese is ripe, and the Käse is reif; 奶酪熟了。 🧀🧀👩‍🍳 naïve façade — don't!",
    "Numbers 0 1 22 333, tabs\tand\nlines\n\n  and   spaces. ",
    "Ünïcödé: שלום עולם, мир, 世界, สวัสดี.",
]


def _trained(model, trainer, pre_tokenizer, decoder, normalizer=None) -> PreTrainedTokenizerBase:
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.train_from_iterator(SENTENCES * 3, trainer)
    backend.add_tokens(["<plain added>", AddedToken("née", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", clean_up_tokenization_spaces=False)


@functools.cache
def tokenizer(name: str) -> PreTrainedTokenizerBase:
    if name == "embedded":
        return AutoTokenizer.from_pretrained(embedded.base_path())
    if name == "byte level":
        return _trained(
            models.BPE(),
            trainers.BpeTrainer(
                vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>"]
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=True),
            decoders.ByteLevel(),
        )
    if name == "byte fallback":  # as Gemma's: without the strip of Llama 2
        bytes_and_end = ["<end>", *(f"<0x{byte:02X}>" for byte in range(256))]
        made = _trained(
            models.BPE(byte_fallback=True),
            trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"]),
            pre_tokenizers.Metaspace(),
            decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        )
        made.add_tokens(bytes_and_end[1:])
        return made
    if name == "metaspace":
        return _trained(
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=200, special_tokens=["<end>"], unk_token="<end>"),
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
            normalizers.NFKC(),
        )
    assert name == "word piece"
    return _trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<end>", "[UNK]"]),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(cleanup=False),
    )


MADE = ["embedded", "byte level", "byte fallback", "metaspace", "word piece"]


@functools.cache
def detokenizer(name: str) -> Detokenizer:
    return Detokenizer(tokenizer(name))


def streamed(name: str, tokens: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(detokenizer(name), stop)
    return [*(stream.add(token) for token in tokens), stream.finish()]


def whole(name: str, tokens: list[int]) -> str:
    return tokenizer(name).decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=300)
@given(data=st.data())
def test_pieces_joined_are_the_decoded_whole(name, data):
    known = len(tokenizer(name))
    tokens = data.draw(st.lists(st.integers(0, known + 3), max_size=40))  # a base's output may be wider than it knows
    assert "".join(streamed(name, tokens)) == whole(name, tokens)


@given(st.lists(st.integers(0, 255), max_size=24))
def test_broken_bytes_are_marked_as_the_tokenizer_marks_them(values):
    for name, words in (("byte level", None), ("byte fallback", "<0x{:02X}>")):
        if words is None:
            alphabet = {byte: character for character, byte in detokenizer(name)._decoder._byte_of.items()}
            ids = tokenizer(name).convert_tokens_to_ids([alphabet[value] for value in values])
        else:
            ids = tokenizer(name).convert_tokens_to_ids([words.format(value) for value in values])
        assert None not in ids
        assert "".join(streamed(name, ids)) == whole(name, ids)


@pytest.mark.parametrize("name", MADE)
@given(st.text(max_size=30))
def test_text_survives_the_way_there_and_back(name, text):
    ids = tokenizer(name)(text, add_special_tokens=False).input_ids
    assert "".join(streamed(name, ids)) == whole(name, ids)


def test_llamas_leading_space_and_broken_runs(ftray_data: Path):
    llama = AutoTokenizer.from_pretrained(ftray_data / "weights" / "stories260K-llama")
    shared = Detokenizer(llama)

    @settings(max_examples=300)
    @given(st.lists(st.integers(0, len(llama) + 2), max_size=40))
    def same(tokens):
        stream = TextStream(shared)
        pieces = [*(stream.add(token) for token in tokens), stream.finish()]
        assert "".join(pieces) == llama.decode(tokens, skip_special_tokens=True)

    same()
    once = llama("Once upon a time", add_special_tokens=False).input_ids
    stream = TextStream(shared)
    assert stream.add(once[0]) == llama.decode(once[:1])
    assert not stream.add(once[1]).startswith("\ufffd")


@pytest.mark.parametrize("name", ["embedded", "byte level", "byte fallback"])
def test_a_character_never_shows_before_it_is_whole(name):
    for sentence in SENTENCES:
        ids = tokenizer(name)(sentence, add_special_tokens=False).input_ids
        pieces = streamed(name, ids)
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces).strip() == sentence.strip()
        assert sum(map(bool, pieces)) > len(sentence) / 20, "it is a stream, not one piece at the end"


@given(
    st.text("abx", max_size=30),
    st.lists(st.text("abx", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(1, 5), min_size=1),
)
def test_stop_strings_are_found_however_the_text_is_cut(text, stops, sizes):
    from ftray.engine.text import _Stop

    ends = [(at + len(stop), at) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
    first_end = min((end for end, _ in ends), default=None)
    expected = text if first_end is None else text[: min(at for end, at in ends if end == first_end)]

    stop, shown, at, found = _Stop(stops), "", 0, False
    while at < len(text) and not found:
        size = sizes[at % len(sizes)]
        piece, found = stop.add(text[at : at + size])
        shown, at = shown + piece, at + size
        held = text[len(shown) : at]
        if not found:  # nothing is held that could be shown
            assert held == "" or any(s.startswith(held) for s in stops)
    assert found == (first_end is not None)
    assert shown + ("" if found else stop.rest()) == expected


def test_a_stop_string_over_token_borders_ends_the_answer():
    ids = tokenizer("embedded")("One cheese. Two cheeses.\nThree", add_special_tokens=False).input_ids
    stream = TextStream(detokenizer("embedded"), ["cheeses.\n", "nowhere"])
    pieces = []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    assert "".join(pieces) == "One cheese. Two "
    assert stream.stopped
    assert stream.add(ids[0]) == stream.finish() == ""


def test_what_only_looked_like_a_stop_string_is_given_back_at_the_end():
    ids = tokenizer("embedded")("The end", add_special_tokens=False).input_ids
    pieces = streamed("embedded", ids, stop=("end of it",))
    assert "".join(pieces) == "The end"
    assert pieces[-1] == "end"


def test_a_stop_string_may_be_complete_at_the_very_end():
    """A run of byte tokens is decoded by `finish` alone: a stop string in it counts."""
    ids = tokenizer("byte fallback").convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "a🧀b".encode()])
    stream = TextStream(detokenizer("byte fallback"), ["🧀"])
    assert [stream.add(token) for token in ids] == [""] * len(ids)
    assert stream.finish() == "a"
    assert stream.stopped


@pytest.mark.parametrize("name", ["embedded", "byte level", "byte fallback"])
def test_the_bytes_of_tokens_joined_are_the_text(name):
    ids = tokenizer(name)(SENTENCES[0], add_special_tokens=False).input_ids
    joined = b"".join(detokenizer(name).bytes_of(token) for token in ids)
    assert joined.decode() == whole(name, ids)
