"""Decoding speed of a base, of the same base with a LoRA merged into it, and with the LoRA left beside it.

    python tests/bench/merged_decode.py [--tokens 64] [--rounds 7]

The base is a random Llama of 28 million parameters in fp32, the adapter has rank 16 on every linear layer. Rounds
alternate between the three; greedy decoding of one sequence by transformers. Printed: tokens/s, and each one's ratio to
the base in the same round. Also that merged equals base + delta.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
         "intermediate_size": 1408, "vocab_size": 4096, "max_position_embeddings": 2048}  # fmt: skip


def decode(model: Any, tokens: int) -> float:
    """Tokens a second."""
    prompt = torch.arange(16)[None] + 5
    started = time.perf_counter()
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return (out.shape[1] - 16) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)).eval()
    beside = get_peft_model(copy.deepcopy(base), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).eval()
    for name, parameter in beside.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    merged = copy.deepcopy(beside).merge_and_unload(safe_merge=True).eval()
    kinds = {"base": base, "merged": merged, "adapter beside": beside}
    with torch.no_grad():
        probe = torch.randint(5, 4000, (2, 64))
        apart = (merged(probe).logits - beside(probe).logits).abs().max() / beside(probe).logits.abs().max()
        for model in kinds.values():
            decode(model, 8)
        rounds = [
            {name: decode(model, arguments.tokens) for name, model in kinds.items()} for _ in range(arguments.rounds)
        ]
    print(f"largest difference of merged logits from base + delta: {apart:.1e} of the largest logit")
    for name in kinds:
        speed = statistics.median(r[name] for r in rounds)
        ratios = [r[name] / r["base"] for r in rounds]
        spread = f"{statistics.median(ratios):.2f} of the base [{min(ratios):.2f}–{max(ratios):.2f}]"
        print(f"{name}: {speed:.0f} tokens/s, {spread}")


if __name__ == "__main__":
    main()
