"""Answers by beam search, with transformers' `generate`: the engine decodes one answer a request.

A search reads and reorders keys and values of all its beams at every token, which slots that are made for sequences
that never meet cannot do; and it is asked for to repeat others' figures, where their implementation is what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ftray.config import Decoding, Model
from ftray.data.tokenizer import load_tokenizer
from ftray.errors import ConfigError
from ftray.evaluate.answers import Answer, Prompt
from ftray.model.load import load_frozen

_ROWS = {"cpu": 8, "cuda": 32}


def searched(
    source: Model,
    folders: Mapping[str, Path],
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    quantized: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    pad_id: int,
    end_id: int,
    done: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """The most probable answer found to each prompt, in order. `folders` are PEFT adapters by key. Raises ConfigError
    for adapters that are not PEFT's."""
    from peft import PeftModel

    for name, folder in folders.items():
        if "bottleneck" in (folder / "adapter_config.json").read_text(encoding="utf-8").lower():
            raise ConfigError("bottleneck layers are not PEFT's, and beams go through PEFT", where=name)
    base, _ = load_frozen(source, quantized=quantized, dtype=dtype, device=device, attention="sdpa")
    base.config.use_cache = True
    tokenizer = load_tokenizer(source)
    answers = [Answer(prompt_tokens=len(prompt.tokens)) for prompt in prompts]
    count = 0
    model: Any = base
    for key in dict.fromkeys(prompt.adapter for prompt in prompts):
        if key is not None:
            model = PeftModel.from_pretrained(base, folders[key])
        model.eval()
        own = sorted((i for i, p in enumerate(prompts) if p.adapter == key), key=lambda i: len(prompts[i].tokens))
        rows = _ROWS[torch.device(device).type]
        for few in (own[start : start + rows] for start in range(0, len(own), rows)):
            _search(model, tokenizer, [prompts[i] for i in few], [answers[i] for i in few], decoding, pad_id, end_id)
            done(count := count + len(few))
        if key is not None:  # virtual tokens leave the base as it is, all else is taken out of its layers again
            model = base = model.unload() if hasattr(model.base_model, "unload") else model.get_base_model()
    return answers


@torch.inference_mode()
def _search(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    decoding: Decoding,
    pad_id: int,
    end_id: int,
) -> None:
    longest = max(len(prompt.tokens) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
        mask[row, longest - len(prompt.tokens) :] = 1
    found = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=decoding.max_tokens,
        num_beams=decoding.beams,
        do_sample=False,
        length_penalty=decoding.length_penalty,
        no_repeat_ngram_size=decoding.no_repeat_ngram,
        pad_token_id=pad_id,
        eos_token_id=end_id,
    )[:, longest:]
    for prompt, answer, tokens in zip(prompts, answers, found.tolist(), strict=True):
        ended = end_id in tokens
        written = tokens[: tokens.index(end_id)] if ended else tokens
        text = tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for stop in (*decoding.stop, *prompt.stop):
            text = text.split(stop, 1)[0]
        answer.text, answer.tokens, answer.reason = text, len(written), "stop" if ended else "length"
