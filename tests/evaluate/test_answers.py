"""Answers come from a question and its system, not from what is asked beside it, nor from how the work is cut up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ftray.config import Decoding, Model
from ftray.engine.engine import load_base
from ftray.evaluate import beams
from ftray.evaluate.answers import Prompt, answers_of
from ftray.evaluate.systems import BaseKey, resolved
from ftray.evaluate.worker import Worker
from tests.evaluate.runs import cheese_run

TEXTS = ["Tell me about brie.", "Which milk is feta made from?", "What goes with cheddar?", "Name a cheese."]


def test_sampled_answers_do_not_depend_on_what_is_asked_beside():
    base = load_base(Model(path="embedded"), quantized=False, dtype=torch.float32)
    decoding = Decoding(max_tokens=8, temperature=1.5, seed=3)
    prompts = [Prompt(None, tuple(base.tokenizer(text).input_ids), number) for number, text in enumerate(TEXTS)]

    def asked(some: list[Prompt], wanted: Decoding = decoding) -> list[str]:
        return [answer.text for answer in answers_of(base, {}, some, wanted, longest=32)]

    whole = asked(prompts)
    assert len(set(whole)) == len(whole)
    assert [*asked(prompts[:1]), *asked(prompts[1:])] == whole  # in two pieces
    assert asked([*prompts[::-1], *prompts])[4:] == whole  # beside another system
    other = decoding.model_copy(update={"seed": 4})
    assert not set(asked(prompts, other)) & set(whole)  # no question has another's draws under the next seed


def test_a_search_loads_its_base_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Though it is asked a few prompts at a time, of the base and of an adapter."""
    cheese_run(tmp_path / "lora", steps=2)
    loads = []
    load = beams.load_frozen
    monkeypatch.setattr(beams, "load_frozen", lambda *args, **options: loads.append(args) or load(*args, **options))
    decoding = Decoding(max_tokens=6, beams=2)
    with resolved([str(tmp_path / "lora")]) as systems:
        worker = Worker(BaseKey(Model(path="embedded"), False, "fp32"), systems)
        prompts = [
            Prompt(key, tuple(worker.base.tokenizer(text).input_ids))
            for text in TEXTS[:2]
            for key in (None, systems[0].key)
        ]
        whole = worker.answers(prompts, decoding, 32)
        pieces = [worker.answers([prompt], decoding, 32)[0] for prompt in prompts]
        worker.close()
    assert [answer.text for answer in pieces] == [answer.text for answer in whole]
    assert len({answer.text for answer in whole}) > 1
    assert len(loads) == 1
