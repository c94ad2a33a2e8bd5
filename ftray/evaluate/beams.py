"""Answers by beam search, with transformers' `generate`: the engine decodes one answer a request.

A search reads and reorders keys and values of all its beams at every token, which slots that are made for sequences
that never meet cannot do; and it is asked for to repeat others' figures, where their implementation is what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ftray.config import Decoding
from ftray.data.tokenizer import load_tokenizer
from ftray.errors import ConfigError
from ftray.evaluate.answers import Answer, Prompt
from ftray.evaluate.systems import BaseKey
from ftray.model.load import DTYPES, load_frozen

_ROWS = {"cpu": 8, "cuda": 32}


class Searcher:
    """A base of its own, loaded once, under PEFT's adapters one after another. `folders` are theirs by key. Raises
    ModelError, and ConfigError for adapters that are not PEFT's."""

    def __init__(self, key: BaseKey, folders: Mapping[str, Path], device: torch.device | str) -> None:
        for name, folder in folders.items():
            if "bottleneck" in (folder / "adapter_config.json").read_text(encoding="utf-8").lower():
                raise ConfigError("bottleneck layers are not PEFT's, and beams go through PEFT", where=name)
        self._folders = folders
        self._base, _ = load_frozen(
            key.model,
            quantized=key.quantized,
            dtype=DTYPES[key.precision],
            device=device,
            attention="sdpa",
            double_quantization=key.double_quantization,
        )
        self._base.config.use_cache = True
        self._tokenizer = load_tokenizer(key.model)
        self._rows = _ROWS[torch.device(device).type]

    def answers(
        self, prompts: Sequence[Prompt], decoding: Decoding, done: Callable[[int], None] = lambda count: None
    ) -> list[Answer]:
        """The most probable answer found to each prompt, in order."""
        answers = [Answer(prompt_tokens=len(prompt.tokens)) for prompt in prompts]
        count = 0
        for key in dict.fromkeys(prompt.adapter for prompt in prompts):
            own = sorted((i for i, p in enumerate(prompts) if p.adapter == key), key=lambda i: len(prompts[i].tokens))
            with self._under(key) as model:
                for few in (own[start : start + self._rows] for start in range(0, len(own), self._rows)):
                    _search(model, self._tokenizer, [prompts[i] for i in few], [answers[i] for i in few], decoding)
                    done(count := count + len(few))
        return answers

    @contextmanager
    def _under(self, key: str | None) -> Iterator[Any]:
        """The base with this adapter alone."""
        from peft import PeftModel

        if key is None:
            yield self._base.eval()
            return
        model: Any = PeftModel.from_pretrained(self._base, self._folders[key])
        try:
            yield model.eval()
        finally:  # virtual tokens leave the base as it is, all else is taken out of its layers again
            self._base = model.unload() if hasattr(model.base_model, "unload") else model.get_base_model()


@torch.inference_mode()
def _search(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    decoding: Decoding,
) -> None:
    pad_id, end_id = tokenizer.pad_token_id, tokenizer.eos_token_id
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
