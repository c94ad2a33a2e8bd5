"""Choosing tokens on a CUDA device: the CPU's tokens, and one transfer a step."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from ftray import embedded
from ftray.engine.choice import Choice
from ftray.engine.grammar import Grammars
from ftray.engine.request import Grammar, Sampling
from ftray.engine.sampling import Sampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

VOCABULARY, END = 2048, 2
KINDS = [
    {"temperature": 0},
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 20},
    {"min_p": 0.05, "logprobs": 3},
    {"temperature": 0, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "logprobs": 0},
    {"logit_bias": {7: 5.0, 9: -100.0}},
    {"grammar": Grammar("json")},
]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(AutoTokenizer.from_pretrained(embedded.base_path()), VOCABULARY, [END])


def _choices(grammars: Grammars, copies: int = 8) -> list[Choice]:
    kinds = [Sampling(max_tokens=10**6, seed=i, **kind) for i, kind in enumerate(KINDS * copies)]
    return [
        Choice(s, [1, 5, 6], VOCABULARY, [END], None if s.grammar is None else grammars.matcher(s.grammar))
        for s in kinds
    ]


def test_tokens_are_the_cpus(grammars):
    random = torch.Generator().manual_seed(0)
    here, there = _choices(grammars), _choices(grammars)
    total = different = 0
    for _ in range(20):
        logits = torch.randn(len(here), VOCABULARY, generator=random) * 2
        logits[3] = torch.nan
        on_cpu = Sampler().choose(logits.clone(), here)
        on_gpu = Sampler().choose(logits.cuda(), there)
        for a, b in zip(on_cpu, on_gpu, strict=True):
            total += 1
            different += a.token != b.token
            assert (a.error is None) == (b.error is None)
            if a.token == b.token and a.logprob is not None and b.logprob is not None:
                assert a.logprob.logprob == pytest.approx(b.logprob.logprob, abs=1e-4)
    assert different <= total / 200, "the same numbers, up to the rounding of sums"


def test_one_transfer_a_step(grammars):
    choices = _choices(grammars)
    logits = torch.randn(len(choices), VOCABULARY, device="cuda")
    Sampler().choose(logits.clone(), choices)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        Sampler().choose(logits.clone(), choices)
    copies = [event for event in profile.events() if "DtoH" in event.name]
    assert len(copies) == 1, [event.name for event in copies]
