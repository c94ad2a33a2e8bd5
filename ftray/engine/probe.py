"""Whether a base can run over slots: tried out when it is loaded, since families differ in what their attention does
(sinks, differences of softmaxes, keys wider than values), and what is ignored would give wrong answers in silence."""

from __future__ import annotations

import torch
from torch import Tensor

from ftray.engine.slots import IMPLEMENTATION, Piece, Slots
from ftray.errors import ModelError
from ftray.model.pooled import Route
from ftray.model.served import Base

NEAR, NEAR_IN_NF4, ROUGHLY = 1e-3, 0.02, 0.2
"""How far logits may be from those of the model's own attention, relative to how far they spread: in fp32; in fp32 over
NF4, whose products on a CPU round what they take to bf16 (measured: 0.0014); in types of 16 bits, which round
differently in another order, by some 0.02. What is wrong is off by 0.3 and more."""


@torch.inference_mode()
def try_slots(base: Base) -> None:
    """Raises ModelError unless two texts that go through the slots in pieces, side by side, get the logits that the
    base's own attention gives each of them alone."""
    model = base.model
    vocabulary = model.get_input_embeddings().num_embeddings
    texts = [[(start + 7919 * i) % vocabulary for i in range(8)] for start in (1, 5)]
    slots = Slots(model, 2, 8)
    steps: list[tuple[list[Piece], list[Piece]]] = [
        ([], [Piece(0, 0, 6), Piece(1, 0, 4)]),
        ([Piece(0, 6, 1)], [Piece(1, 4, 3)]),
        ([Piece(0, 7, 1), Piece(1, 7, 1)], []),
    ]
    try:
        for decoding, prompts in steps:
            pieces = [*decoding, *prompts]
            ids = [token for p in pieces for token in texts[p.slot][p.place : p.place + p.count]]
            step = slots.step = slots.plan(decoding, prompts)
            with base.pooled.routed(Route(((None, len(ids)),), slots.device)):
                ours = _logits(base, ids, position_ids=step.positions[None])
    except Exception as error:
        raise _unfit(base, f"it fails: {type(error).__name__}: {error}") from error
    model.set_attn_implementation("eager")
    try:
        theirs = torch.stack([_logits(base, text)[-1] for text in texts])
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
    spread = float((theirs - theirs.mean(-1, keepdim=True)).norm())
    far = float((ours - theirs).norm())
    in_fp32 = NEAR_IN_NF4 if getattr(model.config, "quantization_config", None) else NEAR
    if not far <= (in_fp32 if model.dtype == torch.float32 else ROUGHLY) * spread + 1e-6:
        raise _unfit(base, f"logits are {far / spread:.2g} of their spread away from those of its own attention")


def _logits(base: Base, ids: list[int], **options: Tensor) -> Tensor:
    """[tokens, vocabulary], fp32"""
    row = torch.tensor([ids], device=base.model.device)
    return base.model(input_ids=row, use_cache=False, **options).logits[0].float()


def _unfit(base: Base, why: str) -> ModelError:
    return ModelError(
        f"a base of family {base.config.model_type!r} cannot be served: over slots of many requests {why}",
        hint="take a base of Llama's, Mistral's, Qwen's, Gemma 3's, GPT-2's or GPT-NeoX's family",
    )
