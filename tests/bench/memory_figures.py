"""The figures that courses on fine-tuning quote, from ftray's own memory plan: markdown tables for the README.

python tests/bench/memory_figures.py
"""

from __future__ import annotations

from ftray.config import Run, parse_run
from ftray.model.counts import trained_tensors
from ftray.model.plan import make_plan
from ftray.model.shapes import Linear, Shapes, shapes_of
from ftray.model.source import find_shapes
from ftray.model.states import GIB, Item, states
from ftray.model.targets import select

BASES = {
    "7B": ("meta-llama/Llama-2-7b-hf", 7),
    "13B": ("meta-llama/Llama-2-13b-hf", 13),
    "70B": ("meta-llama/Llama-2-70b-hf", 70),
    "180B": ("tiiuae/falcon-180B", 180),
}
RANKS = (1, 2, 8, 16, 512, 1024, 8192)
TEN_BILLION = {
    "model_type": "llama",
    "hidden_size": 4480,
    "intermediate_size": 15936,
    "num_hidden_layers": 33,
    "num_attention_heads": 35,
    "num_key_value_heads": 35,
    "vocab_size": 32_000,
}
"""A Llama of ten billion parameters, as near as a round shape comes."""


def a_run(method: str, path: str = "meta-llama/Llama-2-7b-hf", train: str = "") -> Run:
    text = f"""
        name: figures
        model: {{path: {path}}}
        method: {method}
        data: {{sources: [{{path: rows.jsonl, format: text}}], max_length: 1024}}
        train: {{steps: 1, batch_rows: 16, micro_batch_rows: 4{train}}}
        """
    return parse_run(text, "figures")


def ten_billion() -> list[tuple[str, str, str]]:
    """(what, GB, what it counts)"""
    shapes = shapes_of(TEN_BILLION)
    n = shapes.parameters
    full = a_run("{name: full}")
    rows = [
        ("weights in fp16 alone", _gb(2 * n), "2 B a parameter"),
        ("fp16 with Adam, as quoted", _gb(12 * n), "2 B weights + 2 B gradients + 8 B of Adam's two fp32 states"),
        ("as ftray trains it: all of these in fp32, bf16 by autocast", _gb(_bytes(full, shapes)), _how(full, shapes)),
    ]
    qlora = a_run("{name: qlora}", train=", gradient_checkpointing: true, optimizer: paged_adamw_8bit")
    plan = make_plan(qlora, shapes)
    rows.append(
        ("QLoRA, rank 16 on every linear layer: weights and states", _gb(_bytes(qlora, shapes)), _how(qlora, shapes))
    )
    total = f"with activations of 4 × 1,024 tokens, one chunk of logits, slack and context ({plan.total_gib:.1f} GiB)"
    rows.append(("the whole of it, as `ftray check` says", _gb(plan.total_gib * GIB), total))
    return rows


def _kept(run: Run, shapes: Shapes) -> list[Item]:
    return list(states(run, shapes, trained_tensors(run, shapes)))


def _bytes(run: Run, shapes: Shapes) -> int:
    return sum(item.bytes for item in _kept(run, shapes))


def _how(run: Run, shapes: Shapes) -> str:
    return ", ".join(f"{item.name} {_gb(item.bytes)}" for item in _kept(run, shapes) if item.bytes)


def trained(rank: int, shapes: Shapes) -> int:
    """LoRA of this rank on every linear layer of a base."""
    return sum(rank * (layer.inputs + layer.outputs) for layer in shapes.linears)


def one_square(rank: int, billions: int) -> int:
    """What courses quote: the whole base taken as one square matrix, 2 · rank · √parameters."""
    return round(2 * rank * (billions * 1e9) ** 0.5)


def mistral(rank: int = 64) -> int:
    """LoRA on the queries and values of Mistral 7B."""
    shapes = find_shapes(a_run("{name: full}", "mistralai/Mistral-7B-v0.1").model)[0]
    layers = {layer.path: layer for layer in shapes.linears}
    return sum(rank * (layers[p].inputs + layers[p].outputs) for p in select(["q_proj", "v_proj"], layers))


def one_matrix(rank: int = 4) -> int:
    layer = Linear("a", 1000, 1000)
    return rank * (layer.inputs + layer.outputs)


def tables() -> str:
    lines = [
        f"| {shapes_of(TEN_BILLION).parameters / 1e9:.1f} billion parameters | GB | what it counts |",
        "|---|---:|---|",
    ]
    lines += [f"| {what} | {gb} | {how} |" for what, gb, how in ten_billion()]
    lines += ["", "| rank | " + " | ".join(f"{name}, one matrix | {name}, every layer" for name in BASES) + " |"]
    lines.append("|---:|" + "---:|---:|" * len(BASES))
    shapes = {name: find_shapes(a_run("{name: full}", path).model)[0] for name, (path, _) in BASES.items()}
    for rank in RANKS:
        cells = [
            f"{_short(one_square(rank, size))} | {_short(trained(rank, shapes[name]))}"
            for name, (_, size) in BASES.items()
        ]
        lines.append(f"| {rank} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"LoRA of rank 4 on one 1000 × 1000 matrix trains {one_matrix():,} of its 1,000,000 parameters; of rank 64",
    ]
    lines += [f"on the queries and values of Mistral 7B, {mistral():,}."]
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def _short(n: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= unit:
            return f"{n / unit:.3g}{name}" if n / unit < 1000 else f"{n / unit:,.0f}{name}"
    return str(n)


if __name__ == "__main__":
    print(tables())
