"""Choosing tokens: the distributions are transformers' and OpenAI's, the draws follow them, a row stands alone."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ftray.engine.choice import Choice, uniform
from ftray.engine.request import Sampling
from ftray.engine.sampling import Sampler, _apply_bias, _apply_penalties, border, borders_by_sorting, inverse
from ftray.errors import RequestError, RunError

END = 2
LARGEST_UNIFORM = 1 - 2.0**-52


def choice(vocabulary: int, prompt=(1,), **sampling) -> Choice:
    return Choice(Sampling(**({"max_tokens": 10**6, "seed": 0} | sampling)), prompt, vocabulary, [END])


def choose(logits: torch.Tensor, choices):
    return Sampler().choose(logits.clone(), choices)


def random_logits(seed: int, *shape: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# ------------------------------------------------------------------------------------------------------- distributions


@given(
    seed=st.integers(0, 9999),
    width=st.sampled_from([3, 64, 100, 700, 6000]),
    scale=st.sampled_from([0.05, 1.0, 6.0]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 50, 5000, 10**6]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
@settings(max_examples=300)
def test_what_stays_is_what_transformers_leaves(seed, width, scale, temperature, top_k, top_p, min_p):
    logits = random_logits(seed, 1, width, scale=scale)
    expected = TemperatureLogitsWarper(temperature)(None, logits.clone())
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    expected = expected.softmax(-1)[0]

    probabilities = torch.softmax(logits / temperature, -1)
    for smallest in (
        border(probabilities[0].numpy(), top_k, top_p, min_p),
        borders_by_sorting(probabilities, [top_k], [top_p], [min_p])[0],
    ):
        kept = torch.where(probabilities[0] >= float(smallest), probabilities[0], 0)
        # transformers adds up in 32 bits, so at the border one token more or less may stay
        assert abs(int((kept > 0).sum()) - int((expected > 0).sum())) <= 1
        torch.testing.assert_close(kept / kept.sum(), expected, atol=2 * float(smallest) + 1e-6, rtol=1e-4)


@given(st.integers(0, 9999), st.sampled_from([0, 40]), st.sampled_from([0.999, 0.9, 0.2]), st.sampled_from([0.0, 3.0]))
@settings(max_examples=40)
def test_a_border_without_sorting_is_that_of_sorting_in_a_large_vocabulary(seed, top_k, top_p, scale):
    """Flat rows go through the histogram, also one in which all are equal."""
    probabilities = torch.softmax(random_logits(seed, 1, 20_011, scale=scale), -1)
    [by_sorting] = borders_by_sorting(probabilities, [top_k], [top_p], [0.0])
    row = probabilities[0].numpy()
    found = border(row, top_k, top_p, 0.0)
    assert abs(int((row >= found).sum()) - int((row >= by_sorting.numpy()).sum())) <= 1


def test_equals_at_the_border_all_stay():
    row = torch.tensor([[0.4, 0.2, 0.2, 0.2]])
    for top_k, top_p in ((2, 1.0), (0, 0.5)):
        assert border(row[0].numpy(), top_k, top_p, 0.0) == np.float32(0.2)
        assert borders_by_sorting(row, [top_k], [top_p], [0.0]).item() == pytest.approx(0.2)


@given(st.lists(st.integers(0, 49), max_size=30), st.lists(st.integers(0, 49), max_size=30), st.integers(0, 99))
def test_penalties_are_transformers_and_openais(prompt, answer, seed):
    logits = random_logits(seed, 1, 50)
    asked = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.7, "logit_bias": {7: 2.5}}
    one = choice(50, prompt or [0], **asked)
    for token in answer:
        one.accept(token, None)
    scores = logits.clone()
    _apply_bias(scores, [one])
    _apply_penalties(scores, [one])

    expected = logits.clone()
    expected[0, 7] += 2.5
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([(prompt or [0]) + answer]), expected)
    for token, count in Counter(answer).items():
        expected[0, token] -= count * 0.4 - 0.7
    torch.testing.assert_close(scores, expected)


def test_penalties_are_for_their_own_row_alone():
    logits = random_logits(0, 3, 300)
    choices = [choice(300), choice(300, frequency_penalty=1.0, temperature=0), choice(300, [5, 6], logit_bias={9: -50})]
    for token in range(200):  # more than there is room for at first
        choices[1].accept(token, None)
    scores = logits.clone()
    _apply_bias(scores, choices)
    _apply_penalties(scores, choices)
    changed = scores != logits
    assert changed.sum(1).tolist() == [0, 200, 1]
    assert changed[1, :200].all()
    assert changed[2, 9]


def test_bias_forces_and_forbids():
    logits = random_logits(1, 2, 40)
    best = int(logits[0].argmax())
    forced, forbidden = choose(
        logits, [choice(40, logit_bias={17: 100}), choice(40, temperature=0, logit_bias={best: -100})]
    )
    assert forced.token == 17
    assert forbidden.token != best or best != int(logits[1].argmax())


# --------------------------------------------------------------------------------------------------------------- draws


def _drawn(masses: np.ndarray, u: float) -> int:
    """The definition: the first place in the vocabulary behind which lies more than that share of the mass."""
    behind = np.cumsum(masses.astype(np.float64))
    return int(np.searchsorted(behind, u * behind[-1], side="right"))


@given(
    width=st.sampled_from([1, 5, 64, 65, 130, 1000]),
    seed=st.integers(0, 999),
    zeros=st.sampled_from([0.0, 0.5, 0.99]),
    u=st.one_of(st.integers(0, 2**52 - 1).map(lambda i: i * 2.0**-52), st.sampled_from([0.0, LARGEST_UNIFORM])),
)
@settings(max_examples=300)
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(width, seed, zeros, u):
    random = np.random.default_rng(seed)
    masses = random.random(width, np.float32) ** 8 * (random.random(width) >= zeros)
    masses[random.integers(width)] += np.float32(1e-3)
    [place], [sane] = inverse(torch.from_numpy(masses)[None], torch.tensor([u], dtype=torch.float64))
    assert sane
    assert masses[place] > 0
    expected = _drawn(masses, u)
    between = masses[min(expected, int(place)) + 1 : max(expected, int(place))].sum()
    assert place == expected or between < 1e-5 * masses.sum(), "32-bit sums move a border by this much at most"


def _chi_squared(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def _critical(freedom: int) -> float:
    """What chi-squared stays below in 999,999 of a million cases (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.753 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    "asked", [{}, {"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.8, "temperature": 1.5}, {"min_p": 0.1}]
)
def test_draws_follow_the_distribution(asked):
    """Many seeds with one token each, and one seed with many."""
    logits = random_logits(5, 1, 90, scale=1.5)
    sampling = Sampling(**asked)
    p = torch.softmax(logits / sampling.temperature, -1)[0].numpy()
    p = np.where(p >= border(p, sampling.top_k, sampling.top_p, sampling.min_p), p, 0).astype(np.float64)
    p /= p.sum()
    many = [choice(90, seed=seed, **asked) for seed in range(500)]
    one = choice(90, seed=17, **asked)
    for tokens in (
        [c.token for _ in range(12) for c in choose(logits.expand(500, -1), many)],
        [choose(logits, [one])[0].token for _ in range(6000)],
    ):
        counts, expected = np.bincount(tokens, minlength=90), p * 6000
        assert not counts[p == 0].any()
        likely = expected >= 5
        statistic = _chi_squared(counts[likely], expected[likely])
        rest = counts[~likely].sum() - expected[~likely].sum()
        assert statistic + rest**2 / max(expected[~likely].sum(), 5) < _critical(int(likely.sum()))


def test_numbers_look_random_in_seed_and_place():
    table = np.array([[uniform(seed, index) for index in range(64)] for seed in range(64)])
    assert len(np.unique(table)) == table.size
    assert 0 <= table.min() <= table.max() <= LARGEST_UNIFORM
    for numbers in (table[:, 0], table[0], table.ravel(), np.diff(table, axis=0).ravel() % 1):
        counts = np.bincount((numbers * 16).astype(int), minlength=16)
        assert _chi_squared(counts, np.full(16, numbers.size / 16)) < _critical(15)
    assert abs(np.corrcoef(table.ravel()[:-1], table.ravel()[1:])[0, 1]) < 0.07
    assert uniform(-1, 0) == uniform(2**64 - 1, 0) != uniform(1, 0)


def test_a_seed_says_the_same_whatever_else_is_in_the_batch():
    width, steps = 500, 20
    kinds = [
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 20, "seed": 3},
        {"min_p": 0.02, "frequency_penalty": 0.3},
    ]
    logits = random_logits(8, steps, len(kinds), width)

    def alone(kind: int) -> list[int]:
        one = choice(width, **kinds[kind])
        return [choose(logits[step, kind : kind + 1], [one])[0].token for step in range(steps)]

    def together() -> list[list[int]]:
        random = np.random.default_rng(0)
        mine = [choice(width, **kind) for kind in kinds]
        said: list[list[int]] = [[] for _ in kinds]
        for step in range(steps):
            order = random.permutation(len(kinds) + 3)
            rows = [logits[step, k] if k < len(kinds) else random_logits(int(k), width) for k in order]
            choices = [mine[k] if k < len(kinds) else choice(width, temperature=k % 2, logprobs=3) for k in order]
            for k, chosen in zip(order, choose(torch.stack(rows), choices), strict=True):
                if k < len(kinds):
                    said[k].append(chosen.token)
        return said

    assert together() == [alone(kind) for kind in range(len(kinds))]


def test_noise_as_small_as_that_of_another_batch_size_changes_no_draw():
    """Sorted candidates would swap places; the order of the vocabulary does not."""
    logits = random_logits(2, 2000, 300)
    noise = random_logits(3, 2000, 300, scale=1e-6)
    asked = {"temperature": 0.9, "top_p": 0.95}
    tokens = [
        [c.token for c in choose(values, [choice(300, seed=i, **asked) for i in range(2000)])]
        for values in (logits, logits + noise)
    ]
    assert sum(a != b for a, b in zip(*tokens, strict=True)) <= 2


def test_without_a_seed_answers_differ():
    choices = [choice(10_000, seed=None) for _ in range(8)]
    assert len({c.token for c in choose(torch.zeros(8, 10_000), choices)}) > 4


# ---------------------------------------------------------------------------------------------------------------- rows


def test_greedy_takes_the_largest_in_any_type():
    logits = random_logits(4, 6, 1000)
    choices = [choice(1000, temperature=t) for t in (0, 0, 0, 1, 0, 1e-7)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = logits.to(dtype).argmax(-1).tolist()
        tokens = [c.token for c in choose(logits.to(dtype), choices)]
        assert [tokens[i] for i in (0, 1, 2, 4, 5)] == [expected[i] for i in (0, 1, 2, 4, 5)]


def test_logits_may_be_a_part_of_something_larger():
    whole = random_logits(4, 3, 5, 50)
    expected = whole[:, -1].argmax(-1).tolist()
    choices = [choice(50, temperature=0, frequency_penalty=0.1) for _ in range(3)]
    assert [c.token for c in Sampler().choose(whole[:, -1], choices)] == expected


@pytest.mark.parametrize("asked", [{"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1, "logprobs": 2}])
@pytest.mark.parametrize("damage", ["one nan", "one inf", "all nan", "all -inf"])
def test_a_row_that_is_no_number_fails_alone(asked, damage):
    logits = random_logits(6, 4, 200)
    choices = [choice(200, seed=seed, **asked) for seed in range(4)]
    expected = [c.token for c in choose(logits, choices)]
    broken = logits.clone()
    broken[2, 7 if "one" in damage else slice(None)] = float(damage.split()[1])
    choices = [choice(200, seed=seed, **asked) for seed in range(4)]
    chosen = choose(broken, choices)
    assert isinstance(chosen[2].error, RunError)
    assert chosen[2].token == -1
    assert choices[2].count == 0
    assert [c.token for i, c in enumerate(chosen) if i != 2] == [t for i, t in enumerate(expected) if i != 2]
    assert all(c.error is None for i, c in enumerate(chosen) if i != 2)


def test_what_the_model_itself_forbids_is_no_damage():
    logits = random_logits(6, 2, 100)
    logits[:, 50:] = -torch.inf  # a padded vocabulary
    for chosen in choose(logits, [choice(100), choice(100, temperature=0)]):
        assert 0 <= chosen.token < 50


def test_logprobs_are_those_before_temperature_and_filters():
    logits = random_logits(7, 3, 400)
    filtered = choice(400, temperature=0.2, top_k=2, logprobs=5, logit_bias={3: 50})
    first, second, third = choose(logits, [filtered, choice(400), choice(400, logprobs=0)])
    table = logits.log_softmax(-1)
    assert first.token == 3
    assert first.logprob is not None
    assert first.logprob.logprob == pytest.approx(table[0, 3].item(), abs=1e-5)
    best = table[0].topk(5)
    assert [token for token, _ in first.logprob.top] == best.indices.tolist()
    assert [value for _, value in first.logprob.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert second.logprob is None
    assert third.logprob is not None
    assert third.logprob.top == ()
    assert third.logprob.logprob == pytest.approx(table[2, third.token].item(), abs=1e-5)


def test_an_answer_ends_with_the_end_token_or_its_length():
    logits = torch.zeros(3, 10)
    logits[:, END] = 9
    choices = [
        choice(10, temperature=0, max_tokens=5),
        choice(10, temperature=0, max_tokens=2, ignore_end=True),
        choice(10, temperature=0, max_tokens=1, logit_bias={END: -100}),
    ]
    ended, ignored, long = choose(logits, choices)
    assert (ended.finish, ended.is_end) == ("stop", True)
    assert (ignored.finish, ignored.is_end, ignored.token) == (None, False, END)
    assert (long.finish, long.is_end) == ("length", False)
    assert choose(logits[:1], [choices[1]])[0].finish == "length"


def test_no_rows_no_tokens():
    assert Sampler().choose(torch.zeros(0, 10), []) == []


@pytest.mark.parametrize(
    ("asked", "where"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"frequency_penalty": math.inf}, "frequency_penalty"),
        ({"logprobs": 51}, "logprobs"),
        ({"stop": ("",)}, "stop"),
        ({"logit_bias": {50: 1.0}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
    ],
)
def test_values_without_a_meaning_are_refused(asked, where):
    with pytest.raises(RequestError) as refusal:
        choice(50, **asked)
    assert refusal.value.where == where
