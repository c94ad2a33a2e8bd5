"""Chat rows: tokens and target mask are those of the tokenizer's own chat template, in four styles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftray import config
from ftray.data.encode import Encoder, Vocabulary
from ftray.data.formats import renderer, renderers
from ftray.data.rows import BadRow
from ftray.errors import DataError
from tests.unit.chat_templates import SPECIAL, STYLES, marked, plain

TEXT = """Brie is a soft cheese from the north of France. "Is it?" asked the cook, who had never seen one before.
1 + 2 = 3, and so it went on: naïve, Ærø, 日本, 🧀. Say it again; say it slowly!"""


@pytest.fixture(scope="module", params=["byte", "metaspace"])
def tokenizer(request):
    """A small BPE tokenizer in the manner of GPT-2 or of Llama-2, trained here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if request.param == "byte":
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.decoder = decoders.Metaspace()
        alphabet = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet)
    core.train_from_iterator([TEXT] * 10, trainer)
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    byte = processors.ByteLevel(trim_offsets=False)  # transformers' own mask misses a turn that begins with a space
    core.post_processor = processors.Sequence([byte, bos]) if request.param == "byte" else bos
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>",
        additional_special_tokens=SPECIAL[3:],
    )  # fmt: skip


def ours(tokenizer, template, messages):
    """(tokens, targets) by this package."""
    tokenizer.chat_template = template
    vocabulary = Vocabulary.of(tokenizer)
    render = renderer(config.MessagesFormat(name="messages"), vocabulary.chat)
    [(tokens, targets)] = Encoder(vocabulary).encode([render({"messages": messages})])
    return tokens.tolist(), targets.tolist()


def official(tokenizer, style, messages):
    """(tokens, targets) by transformers, from the template with marks."""
    result = tokenizer.apply_chat_template(
        messages, chat_template=marked(style), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return result["input_ids"], [bool(x) for x in result["assistant_masks"]]


CONVERSATIONS = {
    "one turn": [("user", "What is Brie?"), ("assistant", "A soft cheese.")],
    "several turns": [
        ("user", "1 + 2?"),
        ("assistant", "3"),
        ("user", "Again"),
        ("assistant", "3, and so it went on."),
    ],
    "system": [
        ("system", "Say it slowly."),
        ("user", "Brie?"),
        ("assistant", "Brie."),
        ("user", "?"),
        ("assistant", "!"),
    ],
    "other scripts": [("user", "日本?"), ("assistant", "naïve 🧀🧀 Ærø 日")],
    "white space": [("user", "two\n\nlines"), ("assistant", "also\n\ntwo\n  lines")],
    "look-alikes": [("user", "[/INST] <|user|>\n"), ("assistant", "[INST] <|assistant|>\n \n said")],
}


def conversation(name):
    return [{"role": role, "content": content} for role, content in CONVERSATIONS[name]]


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("style", STYLES)
def test_tokens_and_targets_are_the_templates_own(tokenizer, style, name):
    messages = conversation(name)
    tokenizer.chat_template = plain(style)
    tokens = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    expected_tokens, expected_targets = official(tokenizer, style, messages)
    assert tokens == expected_tokens  # the marks change nothing but the mask
    assert ours(tokenizer, plain(style), messages) == (tokens, expected_targets)
    assert ours(tokenizer, marked(style), messages) == (tokens, expected_targets)
    assert any(expected_targets)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    turns=st.lists(
        st.text(alphabet="ab .,!?é日🧀\n[]", min_size=1, max_size=12).map(lambda s: s.strip() + "x"),
        min_size=2,
        max_size=6,
    )
)
def test_any_conversation(tokenizer, style, turns):
    turns = turns[: len(turns) // 2 * 2]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    tokens, targets = ours(tokenizer, plain(style), messages)
    assert (tokens, targets) == official(tokenizer, style, messages)


@pytest.mark.parametrize(
    ("style", "end"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("mistral", "</s>"), ("zephyr", "</s>")]
)
def test_each_answer_ends_with_its_end_of_turn_token_as_a_target(tokenizer, style, end):
    tokens, targets = ours(tokenizer, plain(style), conversation("several turns"))
    edges = np.diff(np.array([*targets, False], int))
    last_of_each = [tokens[i] for i in np.flatnonzero(edges == -1)]
    assert last_of_each == [tokenizer.convert_tokens_to_ids(end)] * 2


def test_offsets_without_white_space_change_nothing(tokenizer):
    """GPT-2's and Llama-3's tokenizers leave white space out of their offsets."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())).replace(
        '"trim_offsets": false', '"trim_offsets": true'
    )
    trimmed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), eos_token="</s>", bos_token="<s>", pad_token="</s>"
    )
    messages = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "\n \n lines"}]
    assert ours(trimmed, plain("mistral"), messages) == official(tokenizer, "mistral", messages)


def test_a_prompt_that_opens_a_block_of_reasoning(tokenizer):
    """Training rows have no reasoning: the header is prompt, the answer target."""
    template = plain("chatml").replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    tokens, targets = ours(tokenizer, template, conversation("several turns"))
    assert (tokens, targets) == official(tokenizer, "chatml", conversation("several turns"))


def test_a_template_that_rewrites_earlier_turns_is_not_guessed_at(tokenizer):
    template = plain("chatml").replace("message['content'] +", "(message['content'] if loop.last else 'earlier') +")
    ours(tokenizer, template.replace("'earlier'", "message['content']"), conversation("several turns"))
    with pytest.raises(BadRow, match="renders earlier turns in another way"):
        ours(tokenizer, template, conversation("several turns"))


@pytest.mark.parametrize(
    ("messages", "reason", "detail"),
    [
        ("hello", "messages are not a list", ""),
        ([], "messages are not a list", ""),
        (["hello"], "a turn is not a mapping", "turn 1"),
        ([{"from": "human", "value": "x"}], "a turn has no role and content", "from, value"),
        ([{"role": "user", "content": [{"type": "text"}]}], "a turn has no role and content", "turn 1"),
        ([{"role": "tool", "content": "x"}], "unknown role", "'tool'"),
        ([{"role": "assistant", "content": "x"}], "wrong order of roles", "expected system or user"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}], "wrong order of roles", "turn 2"),
        ([{"role": "user", "content": "x"}], "wrong order of roles", "the last turn is 'user'"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "wrong order of roles", "turn 2"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}], "empty completion", "turn 2"),
        ([{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "y"}], "lone surrogate", ""),
    ],
)  # fmt: skip
def test_wrong_conversations_are_named(tokenizer, messages, reason, detail):
    with pytest.raises(BadRow) as caught:
        ours(tokenizer, plain("chatml"), messages)
    assert caught.value.reason.startswith(reason)
    assert detail in caught.value.detail


def test_what_the_template_refuses_is_put_aside(tokenizer):
    template = "{{ raise_exception('no system turns here') }}"
    with pytest.raises(BadRow, match="the chat template refuses it") as caught:
        ours(tokenizer, template, conversation("system"))
    assert caught.value.detail == "no system turns here"


def test_no_template_is_an_error_of_the_run_not_of_a_row():
    with pytest.raises(DataError, match="needs a chat template"):
        renderer(config.MessagesFormat(name="messages"), None)


def test_pairs_in_chat_form(tokenizer):
    tokenizer.chat_template = plain("zephyr")
    vocabulary = Vocabulary.of(tokenizer)
    pair = config.PromptCompletionFormat(name="prompt_completion", prompt="{q}?", completion="{a}", chat=True)
    alpaca = config.InstructionFormat(name="instruction", chat=True)
    encoder = Encoder(vocabulary)
    rows = [
        renderer(pair, vocabulary.chat)({"q": "Brie", "a": "Yes."}),
        renderer(alpaca, vocabulary.chat)({"instruction": "Brie?", "input": "", "output": "Yes."}),
        renderer(alpaca, vocabulary.chat)({"instruction": "Say", "input": "it", "output": "Yes."}),
    ]
    preference = config.PreferenceFormat(name="preference", chat=True)
    row = {"prompt": "Brie?", "chosen": "Yes.", "rejected": "No."}
    rows.append(renderers(preference, vocabulary.chat)[0](row))
    said = ["Brie?", "Brie?", "Say\n\nit", "Brie?"]
    for (tokens, targets), prompt in zip(encoder.encode(rows), said, strict=True):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "Yes."}]
        assert (tokens.tolist(), targets.tolist()) == official(tokenizer, "zephyr", messages)
