"""Direct preference optimization (Rafailov et al. 2023): the better completion of a pair becomes more probable than the
worse one, compared with what a reference says."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ftray.config import DPO, Run
from ftray.model.load import DTYPES, evaluating
from ftray.model.plan import LOSS_CHUNK_TOKENS
from ftray.train.batch import Batch
from ftray.train.loss import Head, causal_model, target_states

_FIGURES = ("margin", "accuracy", "chosen_reward", "rejected_reward")


class PreferenceLoss(nn.Module):
    """Sum over a micro-batch's pairs of -(1 - e) log sigmoid(m) - e log sigmoid(-m), a scalar in fp32 (section 4 of the
    paper; e is `label_smoothing`, from Mitchell 2023, "A note on DPO with noisy preferences").

    m is the margin: the chosen completion's reward less the rejected one's. A reward is beta times the log-probability
    of the whole completion less what the reference gives it. A row of the batch is a pair: two sequences, the chosen
    one first.
    """

    per_row = True
    """A step's loss is divided by its rows, which are pairs."""

    def __init__(self, run: Run, model: Any) -> None:
        super().__init__()
        assert isinstance(run.objective, DPO)
        self.model, self.options, self.neftune = model, run.objective, run.train.neftune
        # in a tuple, so that what wraps this module (DDP, DeepSpeed) does not take the copy for something to train
        copied = not run.method.frozen_base and not run.objective.reference_free
        self._copy = (frozen_copy(model, DTYPES[run.train.precision]),) if copied else ()
        self._sums: list[Tensor] = []

    def forward(self, batch: Batch) -> Tensor:
        policy = completion_log_probabilities(self.model, batch, self.neftune)
        pairs = len(policy) // 2  # the filler of a worker without rows is one sequence, and no pair
        rewards = self.options.beta * (policy - self._reference(batch))
        chosen, rejected = rewards[: 2 * pairs].view(pairs, 2).unbind(1)
        margin, wrong = chosen - rejected, self.options.label_smoothing
        hits = (margin > 0).float() + 0.5 * (margin == 0)  # at the start nearly every pair is a tie
        told = torch.stack([margin, hits, chosen, rejected]).detach().sum(1)
        self._sums.append(torch.cat([told.new_tensor([pairs]), told]))
        return -((1 - wrong) * F.logsigmoid(margin) + wrong * F.logsigmoid(-margin)).sum()

    def _reference(self, batch: Batch) -> Tensor | float:
        """Log-probabilities of the completions in the reference [S], whose dropout is off."""
        if self.options.reference_free:
            return 0.0
        if self._copy:
            with torch.no_grad():
                return completion_log_probabilities(self._copy[0], batch)
        with evaluating(self.model), without_adapter(self.model):
            return completion_log_probabilities(self.model, batch.bare or batch)

    def take(self) -> list[float]:
        """(pairs, and sums over them of margin, hits, chosen and rejected reward) since the last call."""
        sums = torch.stack(self._sums).sum(0).tolist() if self._sums else [0.0] * (1 + len(_FIGURES))
        self._sums.clear()
        return sums

    def figures(self, sums: list[float]) -> dict[str, float]:
        """Means over pairs: the margin, the share of pairs whose chosen completion has the higher reward (`accuracy`,
        a tie being half), and both rewards."""
        return {name: value / sums[0] for name, value in zip(_FIGURES, sums[1:], strict=True)}


def completion_log_probabilities(model: Any, batch: Batch, neftune: float | None = None) -> Tensor:
    """Sum of the log-probabilities of each sequence's targets, in nats: fp32 [S]."""
    causal = causal_model(model)
    states = target_states(model, batch, neftune)
    each = log_probabilities(Head(causal.get_output_embeddings(), causal.config), states, batch.labels)
    of = torch.searchsorted(batch.lengths.cumsum(0), batch.predictors, right=True)  # a predictor's sequence
    own = of[None] == torch.arange(len(batch.lengths), device=of.device)[:, None]  # sums without atomic additions
    return torch.where(own, each[None], 0.0).sum(1)


def log_probabilities(head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, in nats: hidden [N, D], labels [N] → fp32 [N]. A chunk's logits are computed again
    in the backward pass, so that no more than one chunk's are ever held."""

    def piece(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = head(hidden).float()
        return logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1)

    chunks = list(zip(hidden.split(LOSS_CHUNK_TOKENS), labels.split(LOSS_CHUNK_TOKENS), strict=True))
    if not torch.is_grad_enabled():
        return torch.cat([piece(*chunk) for chunk in chunks])
    again: Any = [checkpoint(piece, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.cat(again)


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The base alone, adapters left where they are. PEFT's own switch would also take `requires_grad` from their
    parameters and give it back, under the feet of what wraps the model."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def frozen_copy(model: nn.Module, dtype: torch.dtype) -> Any:
    """The model as it is now, in evaluation mode. Its trained parameters are copied, in `dtype`; the others, which stay
    as they are, are shared."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    twin = copy.deepcopy(model, shared)
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(False)
    return twin.eval()
