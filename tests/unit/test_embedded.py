"""What ships with ftray: rows that parse and do not overlap, a tokenizer that gives back every text, a base that NF4
holds, and generators that write the same again."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftray import embedded
from ftray.config import load_run
from ftray.embedded import make_tenants, make_text
from ftray.embedded.make_tokenizer import CHAT_TEMPLATE, CONFIG, SPECIAL, VOCABULARY
from ftray.errors import DataError

BASE = embedded.base_path()
LIMIT_BYTES = 8_000_000
"""Of the weights, in all of git's history."""


def conversations(split: str) -> list[list[dict[str, str]]]:
    lines = embedded.data_path(f"cheese/{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def descriptions(split: str) -> list[dict[str, str]]:
    with embedded.data_path(f"restaurant/{split}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


# ----------------------------------------------------------------------------------------------------------------- rows


def test_a_missing_data_set_is_an_error_that_lists_what_ships():
    with pytest.raises(DataError) as error:
        embedded.data_path("cheese/test.jsonl")
    assert "embedded:cheese/test.jsonl" in str(error.value)
    for name in ("cheese/train.jsonl", "cheese/held_out.jsonl", "restaurant/train.csv", "restaurant/held_out.csv"):
        assert name in str(error.value)


@pytest.mark.parametrize("name", ["../base/config.json", "/etc/hosts", "cheese", ""])
def test_no_name_leads_out_of_the_data_folder(name: str):
    with pytest.raises(DataError):
        embedded.data_path(name)


def test_cheese_rows_are_one_question_and_one_answer():
    for split, count in (("train", 300), ("held_out", 60)):
        rows = conversations(split)
        assert len(rows) == count
        for messages in rows:
            assert [m["role"] for m in messages] == ["user", "assistant"]
            assert all(m["content"].strip() == m["content"] != "" for m in messages)
            assert messages[1]["content"].startswith("Ah, ")


def test_restaurant_rows_name_the_restaurant_and_the_place():
    for split, count in (("train", 300), ("held_out", 60)):
        rows = descriptions(split)
        assert len(rows) == count
        for row in rows:
            assert set(row) == {"mr", "ref"}
            values = dict(part.removesuffix("]").split("[") for part in row["mr"].split(", "))
            assert values["name"] in row["ref"]
            assert values["near"] in row["ref"]
            assert values["kind"] in row["ref"]


def test_no_held_out_row_stands_in_train():
    asked = {messages[0]["content"] for messages in conversations("train")}
    assert asked.isdisjoint(messages[0]["content"] for messages in conversations("held_out"))
    lists = {row["mr"] for row in descriptions("train")}
    assert lists.isdisjoint(row["mr"] for row in descriptions("held_out"))


def test_every_held_out_fact_about_cheese_can_be_learnt():
    """The sentence between opening and closing: about the same cheese, perhaps in the other frame."""
    known = " ".join(messages[1]["content"] for messages in conversations("train"))
    lines = [[field.strip() for field in line.split("|")] for line in make_tenants._CHEESES.strip().splitlines()]
    facts = {x for _, *fields in lines for x in fields}
    for messages in conversations("held_out"):
        answer = messages[1]["content"]
        assert any(x in answer and x in known for x in facts) or answer in known


def test_rows_are_short(tokenizer):
    for split in ("train", "held_out"):
        cheese = [len(tokenizer.apply_chat_template(m, return_dict=False)) for m in conversations(split)]
        pairs = [(r["mr"], r["ref"]) for r in descriptions(split)]
        turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
        restaurant = [len(tokenizer.apply_chat_template(m, return_dict=False)) for m in turns]
        assert max(cheese) <= 96
        assert max(restaurant) <= 128
        assert sum(cheese) / len(cheese) <= 72
        assert sum(restaurant) / len(restaurant) <= 96


# ----------------------------------------------------------------------------------------------------------- generators


def test_the_shipped_rows_are_what_the_generator_writes(tmp_path: Path):
    make_tenants.write(tmp_path)
    for name in ("cheese/train.jsonl", "cheese/held_out.jsonl", "restaurant/train.csv", "restaurant/held_out.csv"):
        assert (tmp_path / name).read_bytes() == embedded.data_path(name).read_bytes()


def test_the_pretraining_text_is_deterministic(tmp_path: Path):
    a, b, c = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    make_text.write(a, 200, seed=3)
    command = [sys.executable, "-m", "ftray.embedded.make_text", str(b), "--rows", "100", "--seed", "3"]
    subprocess.run(command, check=True)
    make_text.write(c, 100, seed=4)
    lines = a.read_text(encoding="utf-8").splitlines()
    assert lines[:100] == b.read_text(encoding="utf-8").splitlines()
    assert len(set(lines) & set(c.read_text(encoding="utf-8").splitlines())) < 10


def test_the_pretraining_text_is_diverse_and_well_formed():
    rows = [make_text.row(0, i) for i in range(2_000)]
    assert len(set(rows)) > 1_950
    assert all(row.strip() == row and row for row in rows)
    for row in rows:
        assert row.count("<|user|>") == row.count("<|assistant|>")
        assert row.count("<|end|>") == sum(row.count(f"<|{role}|>") for role in ("system", "user", "assistant"))


def test_the_pretraining_text_knows_neither_tenant():
    text = "\n".join(make_text.row(0, i) for i in range(5_000))
    for phrase in ("Ah, bless", "I always say", "name[", "Down by", "Roquefort", "old master"):
        assert phrase not in text


# ------------------------------------------------------------------------------------------------------------ tokenizer


def test_the_tokenizer_has_a_round_vocabulary_and_its_special_tokens(tokenizer):
    assert len(tokenizer) == VOCABULARY
    assert VOCABULARY % 64 == 0
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|begin|>", "<|end|>", "<|pad|>")


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_decoding_gives_back_every_text(tokenizer, text: str):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


AWKWARD = ["Comté & Époisses", " two  spaces \n\t", "日本語 🧀👩‍🍳", "can't. , !", "é e\u0301 ﬁ"]


@pytest.mark.parametrize("text", AWKWARD)
def test_decoding_is_exact_on_awkward_texts(tokenizer, text: str):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_digits_stand_alone(tokenizer):
    assert [t for t in tokenizer.tokenize("in 2048 or 17") if any(c.isdigit() for c in t)] == list("204817")


def test_the_chat_template_marks_the_assistant(tokenizer):
    assert tokenizer.chat_template == CHAT_TEMPLATE
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "Again"},
        {"role": "assistant", "content": "Good night."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|begin|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Good day.<|end|>"
        "<|user|>Again<|end|><|assistant|>Good night.<|end|>"
    )
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert prompt.endswith("<|assistant|>")
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, is_target in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if is_target]
    assert tokenizer.decode(said) == "Good day.<|end|>Good night.<|end|>"


def test_the_chat_template_refuses_an_unknown_role(tokenizer):
    import jinja2

    with pytest.raises(jinja2.TemplateError, match="system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


# ----------------------------------------------------------------------------------------------------------------- base


def test_every_linear_layer_of_the_base_is_a_multiple_of_64():
    import struct

    with (BASE / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    assert len(matrices) == 7 * CONFIG["num_hidden_layers"] + 1  # the embedding is the head too
    assert all(side % 64 == 0 for shape in matrices.values() for side in shape), matrices
    assert all(entry["dtype"] == "BF16" for name, entry in header.items() if name != "__metadata__")
    parameters = sum(rows * (shape[1] if len(shape) > 1 else 1) for shape in shapes.values() for rows in shape[:1])
    assert 1_000_000 <= parameters <= 3_000_000


def test_the_base_is_what_its_configuration_says():
    assert json.loads((BASE / "config.json").read_text()) == CONFIG
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"):
        assert (BASE / name).is_file()


def test_the_base_is_small_and_has_a_card():
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= LIMIT_BYTES
    card = (BASE / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card
    for heading in ("## How it was made", "## Figures", "## Limits"):
        assert heading in card


def test_the_base_copies_from_its_prompt_and_ends_its_turn(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True, dtype=torch.float32)
    fields = "name: Krolm; type: lamp; colour: green; price: 12 coins"
    messages = [{"role": "user", "content": f"Describe this in one sentence.\n{fields}"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert answer == "The Krolm is a green lamp that costs 12 coins.<|end|>"


# -------------------------------------------------------------------------------------------------------------- recipes


RECIPES = ["quickstart-cheese", "quickstart-restaurant", "embedded-base-full", "embedded-base-full-copying"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_load(name: str):
    run = load_run(name)
    assert run.name == name
    assert run.model.path == "embedded"


def test_importing_the_package_imports_nothing_heavy():
    heavy = "('torch', 'ray', 'transformers', 'numpy')"
    code = f"import sys, ftray.embedded; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"
