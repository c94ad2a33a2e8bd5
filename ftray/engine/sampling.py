"""One token for every row of a batch.

The order of what is done to a row's logits:

1. grammar: what it forbids becomes -inf
2. `logit_bias` is added
3. `repetition_penalty`, over prompt and answer: logits above 0 are divided by it, the others multiplied
4. `frequency_penalty` times the token's count in the answer, and `presence_penalty` once for each that is there, are
   subtracted
5. temperature 0 takes the largest; else the logits are divided by the temperature
6. `top_k`: the k largest stay
7. `top_p`: of these, the fewest largest whose share of their mass reaches p
8. `min_p`: those with at least this share of the largest one's probability

That is the order of transformers' processors and warpers. At the border of 6 and 7, all of equal probability stay.
Log probabilities are those of the logits before all of this.

A draw takes one number of [0, 1) and goes through what is left in the order of the vocabulary until that share of the
mass is behind it. So a seed gives the same token however the probabilities sort, whatever the other rows are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ftray.engine.choice import Choice, Chosen
from ftray.engine.grammar import fill_masks
from ftray.engine.request import Logprob
from ftray.errors import FtrayError, RunError

BLOCK = 64
"""Probabilities that are summed up before a place is looked for: first the block is found, then the place in it."""

SORTED = 4096
"""Probabilities that are sorted to find a border; of more, a histogram first finds the part that it lies in."""


class Sampler:
    @torch.inference_mode()
    def choose(self, logits: Tensor, choices: Sequence[Choice]) -> list[Chosen]:
        """A token for each row of `logits` [N, V], which may be overwritten; each choice is moved on by it.

        A row that has NaN or +inf, nothing but -inf, or a grammar that allows nothing, gets an error, and it alone.
        One transfer from the device, whatever the rows ask for.
        """
        assert logits.shape[:-1] == (len(choices),), f"logits {tuple(logits.shape)} for {len(choices)} choices"
        if not choices:
            return []
        scores = logits.float().contiguous()
        logprobs = _Logprobs(scores, choices)
        errors = _apply_grammars(scores, choices)
        _apply_bias(scores, choices)
        _apply_penalties(scores, choices)
        tokens, sane = _choose(scores, choices)
        values = _fetch(tokens, sane, *logprobs.of(tokens))
        chosen = []
        for row, (choice, token, good) in enumerate(zip(choices, values[0].tolist(), values[1].tolist(), strict=True)):
            if row in errors or not good:
                chosen.append(Chosen(-1, error=errors.get(row) or _no_number()))
            else:
                chosen.append(choice.accept(int(token), logprobs.read(row, int(token), values[2:])))
        return chosen


def _no_number() -> FtrayError:
    return RunError(
        "the model's output is not a number (NaN or infinity)",
        hint="the adapter or the base is damaged, or overflows in this precision",
    )


def _fetch(*tensors: Tensor) -> list[np.ndarray]:
    """The tensors on this machine, float64, in one transfer."""
    flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors]).cpu().numpy()
    parts = np.split(flat, np.cumsum([tensor.numel() for tensor in tensors])[:-1])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _select(scores: Tensor, rows: list[int]) -> Tensor:
    """Some rows; not copied where they are all."""
    if len(rows) == len(scores):
        return scores
    return scores.index_select(0, torch.tensor(rows, device=scores.device))


# ------------------------------------------------------------------------------------------------- what changes logits


def _apply_grammars(scores: Tensor, choices: Sequence[Choice]) -> dict[int, FtrayError]:
    """Forbid what grammars forbid, in place. Returns errors by row."""
    matchers = {row: choice.matcher for row, choice in enumerate(choices) if choice.matcher is not None}
    if not matchers:
        return {}
    masks, found = fill_masks(list(matchers.values()))
    change = torch.nn.functional.embedding(torch.from_numpy(masks).to(scores.device).int(), _masked(scores.device))
    scores[torch.tensor(list(matchers), device=scores.device)] += change.flatten(1)[:, : scores.shape[1]]
    return {row: error for row, error in zip(matchers, found, strict=True) if error is not None}


@functools.cache
def _masked(device: torch.device) -> Tensor:
    """What is added to 8 logits under each byte of a mask, [256, 8]: nothing where a bit is set, else -inf."""
    rows = [[0.0 if byte >> bit & 1 else -torch.inf for bit in range(8)] for byte in range(256)]
    return torch.tensor(rows, device=device)


def _apply_bias(scores: Tensor, choices: Sequence[Choice]) -> None:
    given = [(row, *choice.bias) for row, choice in enumerate(choices) if choice.bias is not None]
    if not given:
        return
    where, values = _entries(scores, [(row, ids) for row, ids, _ in given], [[values] for _, _, values in given])
    scores.view(-1)[where] += values[0]


def _apply_penalties(scores: Tensor, choices: Sequence[Choice]) -> None:
    rows = [(row, choice, choice.said) for row, choice in enumerate(choices) if choice.said is not None]
    if not rows:
        return
    numbers = []
    for _, choice, said in rows:
        asked = choice.sampling
        subtracted = asked.frequency_penalty * said.counts + asked.presence_penalty * (said.counts > 0)
        numbers.append([subtracted, np.full(len(said.ids), asked.repetition_penalty)])
    where, (subtracted, repetition) = _entries(scores, [(row, said.ids) for row, _, said in rows], numbers)
    flat = scores.view(-1)
    values = flat[where]
    flat[where] = torch.where(values > 0, values / repetition, values * repetition) - subtracted


def _entries(
    scores: Tensor, ids: list[tuple[int, np.ndarray]], numbers: list[list[np.ndarray]]
) -> tuple[Tensor, Tensor]:
    """(places int64 [M] of `ids` by row in the flat `scores`, float32 [K, M] of K `numbers` each), on its device."""
    where = np.concatenate([row * scores.shape[1] + of_row for row, of_row in ids])
    table = np.concatenate([np.stack(of_row) for of_row in numbers], axis=1).astype(np.float32)
    return torch.from_numpy(where).to(scores.device), torch.from_numpy(table).to(scores.device)


# -------------------------------------------------------------------------------------------------------------- choose


def _choose(scores: Tensor, choices: Sequence[Choice]) -> tuple[Tensor, Tensor]:
    """(tokens int64 [N], whether each row's numbers are sane, bool [N])."""
    drawn = [row for row, choice in enumerate(choices) if not choice.greedy]
    greedy = [row for row, choice in enumerate(choices) if choice.greedy]
    if not drawn:
        return _largest(scores)
    if not greedy:
        return _draw(scores, choices)
    tokens = torch.empty(len(choices), dtype=torch.long, device=scores.device)
    sane = torch.empty(len(choices), dtype=torch.bool, device=scores.device)
    for rows, (some, good) in (
        (greedy, _largest(_select(scores, greedy))),
        (drawn, _draw(_select(scores, drawn), [choices[row] for row in drawn])),
    ):
        index = torch.tensor(rows, device=scores.device)
        tokens[index], sane[index] = some, good
    return tokens, sane


def _largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest; NaN counts as that, so it is found."""
    if scores.device.type == "cpu":  # numpy's is some twenty times faster
        tokens = torch.from_numpy(scores.numpy().argmax(-1))
        values = scores.gather(1, tokens[:, None])[:, 0]
    else:
        values, tokens = scores.max(-1)
    return tokens, values.isfinite()


def _draw(scores: Tensor, choices: Sequence[Choice]) -> tuple[Tensor, Tensor]:
    """Like `_choose`, for rows that are all drawn. Overwrites `scores`."""
    asked = [choice.sampling for choice in choices]
    numbers = [[s.temperature for s in asked], [choice.uniform() for choice in choices]]
    temperature, uniform = torch.tensor(numbers, dtype=torch.float64, device=scores.device)
    if any(s.temperature != 1 for s in asked):
        scores /= temperature[:, None].float()
    probabilities = torch.softmax(scores, -1)
    filtered = [row for row, s in enumerate(asked) if s.top_k or s.top_p < 1 or s.min_p]
    if filtered:
        some = [asked[row] for row in filtered]
        top_k, top_p, min_p = [s.top_k for s in some], [s.top_p for s in some], [s.min_p for s in some]
        if scores.device.type == "cpu":
            found, table = np.zeros(len(asked), np.float32), probabilities.numpy()
            for row, k, p, m in zip(filtered, top_k, top_p, min_p, strict=True):
                found[row] = border(table[row], k, p, m)
            borders = torch.from_numpy(found)
        else:
            borders = torch.zeros(len(asked), device=scores.device)
            index = torch.tensor(filtered, device=scores.device)
            borders[index] = borders_by_sorting(_select(probabilities, filtered), top_k, top_p, min_p)
        probabilities *= torch.ge(probabilities, borders[:, None], out=scores)
    return inverse(probabilities, uniform)


def inverse(masses: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of each row's cumulative distribution, in the order of the vocabulary.

    `masses` [N, V] are not negative and need not add up to 1; `uniform` float64 [N] is in [0, 1), in steps of 2^-52.
    Returns (places int64 [N], none of mass 0; bool [N], false for a row without a finite, positive sum).
    """
    width = masses.shape[1]
    whole = width // BLOCK * BLOCK
    sums = masses[:, :whole].unflatten(1, (whole // BLOCK, BLOCK)).sum(-1)
    if whole < width:
        sums = torch.cat([sums, masses[:, whole:].sum(-1, keepdim=True)], 1)
    behind = sums.double().cumsum(-1)
    total = behind[:, -1:]
    target = uniform[:, None] * total  # below total, since uniform is at most 1 - 2^-52
    block = torch.searchsorted(behind, target, right=True)
    start = torch.where(block > 0, behind.gather(1, (block - 1).clamp(min=0)), 0)
    places = block * BLOCK + torch.arange(BLOCK, device=masses.device)
    inside = masses.gather(1, places.clamp(max=width - 1)).masked_fill_(places >= width, 0).double().cumsum(-1)
    # the block's sum was rounded, so what is left of the target may be a little too large
    left = torch.minimum(target - start, inside[:, -1:] * (1 - 2.0**-52))
    token = block[:, 0] * BLOCK + torch.searchsorted(inside, left, right=True)[:, 0]
    return token.clamp(max=width - 1), (total.isfinite() & (total > 0))[:, 0]


# ------------------------------------------------------------------------------------------------------------- borders


def borders_by_sorting(probabilities: Tensor, top_k: list[int], top_p: list[float], min_p: list[float]) -> Tensor:
    """The smallest probability that stays in each row of `probabilities` [N, V], float32 [N]."""
    device, width = probabilities.device, probabilities.shape[1]
    k = torch.tensor([min(k or width, width) for k in top_k], device=device)[:, None]
    p, m = torch.tensor([top_p, min_p], dtype=torch.float64, device=device)[:, :, None]
    down = probabilities.sort(dim=-1, descending=True).values
    kth = down.gather(1, k - 1)
    stays = down >= kth
    mass = torch.where(stays, down, 0).cumsum(-1, dtype=torch.float64)
    stays &= (mass - down < p * mass[:, -1:]) | (p >= 1)
    last = stays.sum(-1, keepdim=True) - 1
    smallest = down.gather(1, last.clamp(min=0))[:, 0]
    return torch.maximum(smallest, (m[:, 0] * down[:, 0]).float())


def border(row: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.float32:
    """The same for one row, float32 [V], without sorting what is far from a border. 0 for a row of NaN."""
    largest = row.max()
    if not largest > 0:
        return np.float32(0)
    smallest, kept = np.float32(0), row
    if 0 < top_k < len(row):
        smallest, kept = _kth(row, top_k)
    if top_p < 1:
        total = float(kept.sum(dtype=np.float64))  # 1 but for rounding, which at the border is several tokens
        smallest = _nucleus(kept, top_p * total, total)
    return max(smallest, np.float32(min_p * largest))


def _kth(row: np.ndarray, k: int) -> tuple[np.float32, np.ndarray]:
    """(The k-th largest, all that are not smaller)."""
    columns = len(row) // BLOCK
    if columns > k:  # the k-th largest of some columns' maxima is not above the k-th largest of all
        maxima = row[: columns * BLOCK].reshape(BLOCK, columns).max(0)
        row = row[row >= np.partition(maxima, columns - k)[columns - k]]
    smallest = np.partition(row, len(row) - k)[len(row) - k]
    return smallest, row[row >= smallest]


def _nucleus(kept: np.ndarray, needed: float, total: float) -> np.float32:
    """The smallest of the fewest largest whose mass reaches `needed` of `total`."""
    above = 0.0
    candidate = kept > (total - needed) / len(kept)  # all others together are not more than what is not needed
    if np.count_nonzero(candidate) <= SORTED:
        kept = kept[candidate]
    else:
        # floats from 0 on are ordered as their bits are; of the fraction 7 bits stay: a part is 1/128 of a value wide
        part = kept.view(np.int32) >> 16
        part -= part.min()
        masses = np.bincount(part, weights=kept)
        from_top = masses[::-1].cumsum()
        found = min(int(np.searchsorted(from_top, needed)), len(masses) - 1)
        above = float(from_top[found] - masses[::-1][found])
        kept = kept[part == len(masses) - 1 - found]
    down = np.sort(kept)[::-1]
    reached = np.searchsorted(down.cumsum(dtype=np.float64) + above, needed)
    return down[min(int(reached), len(down) - 1)] if len(down) else np.float32(0)


# ---------------------------------------------------------------------------------------------------- log probabilities


class _Logprobs:
    """Log probabilities of the rows that ask for them, taken before anything changes the scores."""

    def __init__(self, scores: Tensor, choices: Sequence[Choice]) -> None:
        rows = [row for row, choice in enumerate(choices) if choice.sampling.logprobs is not None]
        self._place = {row: i for i, row in enumerate(rows)}
        self._asked = [choices[row].sampling.logprobs or 0 for row in rows]
        self._rows = torch.tensor(rows, device=scores.device) if rows else None
        self._table = torch.log_softmax(_select(scores, rows), -1) if rows else None

    def of(self, tokens: Tensor) -> list[Tensor]:
        """[log probability of each row's token, those of its most probable ones, their ids]; nothing for no rows."""
        if self._table is None:
            return []
        own = self._table.gather(1, tokens[self._rows][:, None])
        top = self._table.topk(max(self._asked), -1)
        return [own, top.values, top.indices]

    def read(self, row: int, token: int, fetched: list[np.ndarray]) -> Logprob | None:
        place = self._place.get(row)
        if place is None:
            return None
        own, values, ids = fetched
        count = self._asked[place]
        best = sorted(
            zip(ids[place].tolist(), values[place].tolist(), strict=True), key=lambda pair: (-pair[1], pair[0])
        )
        return Logprob(token, float(own[place, 0]), tuple((int(i), value) for i, value in best[:count]))
