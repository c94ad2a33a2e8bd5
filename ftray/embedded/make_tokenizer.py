"""Train the embedded base's tokenizer and write it, with the base's configuration, as a folder in Hugging Face format.

    python -m ftray.embedded.make_tokenizer TEXT.jsonl OUT

Byte-level BPE (Sennrich et al. 2016; bytes as in Radford et al. 2019): 6 special tokens, 256 bytes and merges up to
2,048 entries, a multiple of 64. Digits stand alone. No normalization, so decoding gives back every text exactly.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

VOCABULARY = 2048
MAX_POSITIONS = 1024
ROWS = 50_000
"""Rows of the text that the merges are counted on."""
COMMON_REPEATS = 200
"""Copies of each frequent English word beside them: measured, a good trade between this text and others'."""
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIAL = (PAD, BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>")
"""Their ids are their places in this list."""

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- generation %}
            {{- message['content'] + eos_token }}
        {%- endgeneration %}
    {%- elif message['role'] in ['system', 'user'] %}
        {{- '<|' + message['role'] + '|>' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('roles are system, user and assistant; here: ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_POSITIONS,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
"""Every linear layer's shape is a multiple of 64, so that NF4 holds all of them."""


def train_tokenizer(texts: Iterable[str]):
    """A `tokenizers.Tokenizer` of VOCABULARY entries; plain text gets BEGIN in front, as with Llama."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([  # type: ignore[assignment]
        pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, SPECIAL.index(BEGIN))]
    )
    return tokenizer


def training_texts(path: Path) -> Iterator[str]:
    """The rows without their special tokens, then frequent English words, so that the merges cover what users write."""
    from ftray.embedded.text.words import COMMON

    with path.open(encoding="utf-8") as file:
        for line in islice(file, ROWS):
            text = json.loads(line)["text"]
            for token in SPECIAL:
                text = text.replace(token, "\n")
            yield text
    for _ in range(COMMON_REPEATS):
        yield " " + " ".join(COMMON)


def save(tokenizer, out: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        padding_side="right",
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out, save_jinja_files=False)
    settings = out / "tokenizer_config.json"  # the name that transformers 4 knows too
    text = settings.read_text(encoding="utf-8").replace("TokenizersBackend", "PreTrainedTokenizerFast")
    settings.write_text(text, encoding="utf-8")
    for name, value in (("config.json", CONFIG), ("generation_config.json", GENERATION)):
        (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_new_tokens": 128, "do_sample": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="rows of ftray.embedded.make_text")
    parser.add_argument("out", type=Path, help="the folder to write")
    arguments = parser.parse_args()
    save(train_tokenizer(training_texts(arguments.text)), arguments.out)


if __name__ == "__main__":
    main()
