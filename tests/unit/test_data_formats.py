"""Formats: the exact tokens and targets of each, and a reason for each row that cannot be one."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftray import config
from ftray.cli.data import marked
from ftray.data.encode import Encoder, Vocabulary
from ftray.data.formats import Template, columns_of, renderer, renderers
from ftray.data.rows import MAX_ROW_BYTES, BadRow
from ftray.data.tokenizer import load_tokenizer, tokenizer_digest
from ftray.errors import ConfigError, DataError, ModelError

PAIR = config.PromptCompletionFormat(name="prompt_completion", prompt="{q}\n", completion="{a}")
PREFERENCE = config.PreferenceFormat(name="preference", prompt="q", chosen="good", rejected="bad")
ALPACA = config.InstructionFormat(name="instruction")
TEXT = config.TextFormat(name="text", column="body")


@cache
def shipped():
    tokenizer = load_tokenizer(config.Model(path="embedded"))
    return tokenizer, Encoder(Vocabulary.of(tokenizer))


@pytest.fixture(scope="module")
def tokenizer():
    return shipped()[0]


@pytest.fixture(scope="module")
def encoder():
    return shipped()[1]


def one(encoder, format, row):
    [(tokens, targets)] = encoder.encode([renderer(format, None)(row)])
    return tokens, targets


def test_text_is_all_target_but_its_first_token(tokenizer, encoder):
    tokens, targets = one(encoder, TEXT, {"body": "Brie is soft."})
    assert tokens.tolist() == [*tokenizer("Brie is soft.")["input_ids"], tokenizer.eos_token_id]
    assert targets.tolist() == [False] + [True] * (len(tokens) - 1)
    assert tokens.dtype == np.int32
    assert targets.dtype == np.bool_


@pytest.mark.parametrize(("q", "a"), [("What is Brie?", "A cheese."), ("x", " y"), ("é日🧀", "🧀🧀 é"), ("", "all")])
def test_completion_tokens_are_the_targets(tokenizer, encoder, q, a):
    tokens, targets = one(encoder, PAIR, {"q": q, "a": a})
    assert tokens.tolist() == [*tokenizer(f"{q}\n{a}")["input_ids"], tokenizer.eos_token_id]
    assert targets[-1]
    said = tokenizer.decode(tokens[targets][:-1])
    assert said.strip() == a.strip()
    parts = marked(tokenizer, tokens.tolist(), targets.tolist())
    assert "".join(text for text, _ in parts) == tokenizer.decode(tokens)
    assert [target for _, target in parts] == [False, True]


@given(st.text(st.sampled_from("ab é🧀\n.,"), max_size=12), st.text(st.sampled_from("ab é🧀\n.,"), max_size=12))
def test_the_border_is_where_the_completion_begins(q, a):
    """Read from the offsets: a token is a target when it holds a character of the completion."""
    tokenizer, encoder = shipped()
    if not a.strip():
        with pytest.raises(BadRow, match="empty completion"):
            one(encoder, PAIR, {"q": q, "a": a})
        return
    tokens, targets = one(encoder, PAIR, {"q": q, "a": a})
    encoding = tokenizer(f"{q}\n{a}", return_offsets_mapping=True)
    border = len(q) + 1
    expected = [end > border for _, end in encoding["offset_mapping"]] + [True]
    assert tokens.tolist()[:-1] == encoding["input_ids"]
    assert targets.tolist() == expected


def test_alpaca_words(encoder):
    without = renderer(ALPACA, None)({"instruction": "Name a cheese.", "input": "", "output": "Brie"})
    assert without.text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a cheese.\n\n### Response:\nBrie"
    )
    assert without.text[slice(*without.spans[0])] == "Brie"
    given_ = renderer(ALPACA, None)({"instruction": "Name {it}.", "input": "a {cheese}", "output": "Brie"})
    assert given_.text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName {it}.\n\n### Input:\na {cheese}\n\n### Response:\nBrie"
    )
    for row in ({"instruction": "i", "input": None, "output": "o"}, {"instruction": "i", "output": "o"}):
        assert "### Input" not in renderer(ALPACA, None)(row).text
    turned = config.InstructionFormat(name="instruction", instruction="response", input=None, output="instruction")
    assert renderer(turned, None)({"response": "R", "instruction": "I", "input": "x"}).text.endswith(
        "R\n\n### Response:\nI"
    )


def test_templates_name_columns_and_nothing_else():
    template = Template("{{{a}}} {customer rating}/{n}", "prompt")
    assert template({"a": "x", "customer rating": "5", "n": 7}) == "{x} 5/7"
    assert template.columns == ["a", "customer rating", "n"]
    with pytest.raises(BadRow, match="missing column 'a'") as caught:
        template({"b": 1, "c": 2})
    assert caught.value.detail == "the row has b, c"
    assert Template("{a.__class__}", "prompt").columns == ["a.__class__"]  # a column of that name, no attribute
    for wrong in ("{", "}", "{}", "{a!r}", "{a:>10}"):
        with pytest.raises(ConfigError, match=r"format\.prompt"):
            Template(wrong, "prompt")


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        (TEXT, {"body": None}, "column 'body' is null"),
        (TEXT, {"text": "x"}, "missing column 'body'"),
        (TEXT, {"body": 3}, "column 'body' is a number, not text"),
        (TEXT, {"body": ["x"]}, "column 'body' is a list, not text"),
        (TEXT, {"body": " \n"}, "empty text"),
        (TEXT, {"body": "a\ud800"}, "lone surrogate"),
        (TEXT, {"body": "z" * (MAX_ROW_BYTES + 1)}, "longer than 4 MiB of text"),
        (TEXT, {"body": "é" * (MAX_ROW_BYTES // 2 + 1)}, "longer than 4 MiB of text"),
        (PAIR, {"q": "x", "a": ""}, "empty completion"),
        (PAIR, {"q": "x", "a": None}, "column 'a' is null"),
        (PAIR, {"q": "x", "a": True}, "column 'a' is a truth value, not text"),
        (PAIR, {"q": "x", "a": {"b": 1}}, "column 'a' is a mapping, not text"),
        (PAIR, {"q": "\udfff", "a": "x"}, "lone surrogate"),
        (ALPACA, {"instruction": "i", "input": 3, "output": "o"}, "column 'input' is a number, not text"),
        (ALPACA, {"instruction": "i", "output": "\n"}, "empty completion"),
    ],
)
def test_rows_that_cannot_be_used(format, row, reason):
    with pytest.raises(BadRow) as caught:
        renderer(format, None)(row)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"q": "x", "good": "y", "bad": "y"}, "chosen and rejected are the same"),
        ({"q": "x", "good": " ", "bad": "y"}, "empty completion"),
        ({"q": "x", "good": "y", "bad": ""}, "empty completion"),
        ({"q": "x", "good": "y"}, "missing column 'bad'"),
        ({"good": "y", "bad": "z"}, "missing column 'q'"),
        ({"q": "x", "good": "y", "bad": None}, "column 'bad' is null"),
        ({"q": "x", "good": "y", "bad": [1]}, "column 'bad' is a list, not text"),
        ({"q": "x", "good": "\ud800", "bad": "z"}, "lone surrogate"),
    ],
)
def test_preferences_that_cannot_be_used(row, reason):
    with pytest.raises(BadRow) as caught:
        [render(row) for render in renderers(PREFERENCE, None)]
    assert caught.value.reason == reason


def test_a_preference_is_the_prompt_with_each_completion(encoder):
    row = {"q": "ask: ", "good": "yes", "bad": "no"}
    sides = encoder.encode([render(row) for render in renderers(PREFERENCE, None)])
    plain = config.PromptCompletionFormat(name="prompt_completion", prompt="{q}", completion="{a}")
    for (tokens, targets), answer in zip(sides, ("yes", "no"), strict=True):
        expected = one(encoder, plain, {"q": "ask: ", "a": answer})
        assert tokens.tolist() == expected[0].tolist()
        assert targets.tolist() == expected[1].tolist()
    chat = PREFERENCE.model_copy(update={"chat": True})
    with pytest.raises(DataError, match="needs a chat template"):
        renderers(chat, None)


def test_columns_that_a_format_reads():
    assert columns_of(PREFERENCE) == ["q", "good", "bad"]
    assert columns_of(PAIR) == ["q", "a"]
    assert columns_of(ALPACA) == ["instruction", "input", "output"]
    assert columns_of(TEXT) == ["body"]
    assert columns_of(config.MessagesFormat(name="messages")) == ["messages"]


def test_digest_is_of_the_tokenizer_not_of_its_last_call(tokenizer):
    before = tokenizer_digest(tokenizer)
    tokenizer("a b c d", truncation=True, max_length=2, padding="max_length")
    assert tokenizer_digest(tokenizer) == before
    encoder = Encoder(Vocabulary.of(tokenizer))
    assert len(one(encoder, TEXT, {"body": "word " * 50})[0]) > 50


def test_wrong_models_are_named(tmp_path):
    with pytest.raises(ModelError, match="no such folder") as caught:
        load_tokenizer(config.Model(path=str(tmp_path / "a" / "b")))
    assert str(tmp_path) in caught.value.hint
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        load_tokenizer(config.Model(path=str(tmp_path)))


def test_a_remote_model_is_copied_once(tmp_path, monkeypatch):
    import fsspec

    from ftray.data.tokenizer import local_model_folder
    from ftray.embedded import base_path

    monkeypatch.setenv("FTRAY_CACHE", str(tmp_path))
    fs = fsspec.filesystem("memory")
    for file in base_path().iterdir():
        if file.is_file():
            fs.pipe(f"/models/base/{file.name}", file.read_bytes())
    model = config.Model(path="memory://models/base")
    folder = local_model_folder(model, weights=False)
    assert "model.safetensors" not in [p.name for p in (tmp_path / "copies").glob("*/*")]
    assert local_model_folder(model, weights=False) == folder
    digest = tokenizer_digest(load_tokenizer(config.Model(path="embedded")))
    assert tokenizer_digest(load_tokenizer(model)) == digest
    with pytest.raises(ModelError, match="cannot be read"):
        local_model_folder(config.Model(path="memory://models/none"))
