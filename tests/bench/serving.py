"""The engine's speed: many adapters against one and none, against PEFT and transformers, all in one run.

    python tests/bench/serving.py [--rounds 3] [--tokens 3000] [--only base,32]

A Llama with random weights in NF4 (hidden 1,024, 8 layers, 135M parameters), adapters of rank 16 on all linear layers,
32 slots, prompts of 32 tokens, answers of 64, closed loop: a new request for each that ends, as many waiting as slots.
Rounds go through all cases in turn; printed are medians of tokens/s and of the ratios within a round [least–most].
`base`, `one`, `32`: no adapter, one for all, another one in each slot. `zipf 10`, `zipf 1000`: adapters by a power
law, read from disk when they are not in memory, at most 256 MiB of them held there. `generate`: transformers, the same
batch.
`mixed`, `switched`: PEFT with adapter_names in one batch, and with set_adapter request by request.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftray.config import Model
from ftray.embedded import base_path
from ftray.engine.engine import Engine, load_base
from ftray.engine.options import EngineOptions
from ftray.engine.request import Chunk, Request, Sampling
from ftray.manifest import digest_of
from ftray.model.load import _nf4
from ftray.model.pooled import Delta
from ftray.model.served import Adapter, Base
from ftray.registry.ref import Ref

SHAPE: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 32_000, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
SLOTS, PROMPT, ANSWER, RANK = 32, 32, 64, 16
ON_DISK = 64
"""Adapters that are really different; the thousand are these under other names."""


def the_base() -> Path:
    """A folder with the random model, made once."""
    folder = Path(tempfile.gettempdir()) / f"ftray-serving-{digest_of(SHAPE)[:8]}"
    if not (folder / "config.json").exists():
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16().save_pretrained(folder)
        AutoTokenizer.from_pretrained(base_path()).save_pretrained(folder)
    return folder


def random_adapter(base: Base, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def rows(width: int) -> torch.Tensor:
        return (torch.randn(RANK, width, generator=generator) * 0.02).bfloat16()

    return Adapter(
        {p: Delta(rows(layer.inputs), rows(layer.base.out_features)) for p, layer in base.pooled.linears.items()}, {}
    )


def on_disk(base: Base, folder: Path) -> Callable[[Ref], Adapter]:
    """Adapters as files, and what reads one."""
    from safetensors.torch import load_file, save_file

    for i in range(ON_DISK):
        if not (path := folder / f"{i}.safetensors").exists():
            deltas = random_adapter(base, i).deltas
            save_file({f"{p}.{k}": getattr(d, k) for p, d in deltas.items() for k in ("down", "up")}, path)

    def load(ref: Ref) -> Adapter:
        tensors = load_file(folder / f"{int(ref.name) % ON_DISK}.safetensors")
        return Adapter({p: Delta(tensors[f"{p}.down"], tensors[f"{p}.up"]) for p in base.pooled.linears}, {})

    return load


def closed_loop(engine: Engine, names: Iterator[str | None], tokens: int) -> dict[str, float]:
    """tokens/s once all slots are busy, and the time between two tokens of an answer: median, 99th percentile (ms)."""
    random = np.random.default_rng(0)
    numbers = itertools.count()

    def ask() -> None:
        name = next(names)
        prompt = tuple(random.integers(10, 2000, PROMPT).tolist())
        sampling = Sampling(max_tokens=ANSWER, temperature=0, ignore_end=True)
        engine.add(Request(str(next(numbers)), prompt, sampling, Ref("t", name, name) if name else None, "t"))

    for _ in range(2 * SLOTS):
        ask()
    written, begun, last, gaps = 0, 0.0, {}, []
    while written < tokens:
        engine.wait(1)
        for event in engine.step():
            if not isinstance(event, Chunk):
                last.pop(event.id, None)
                ask()
            elif event.tokens:
                now = time.perf_counter()
                if begun:
                    written += len(event.tokens)
                    if event.id in last:
                        gaps.append(now - last[event.id])
                last[event.id] = now
        if not begun and len(last) >= SLOTS:
            begun = time.perf_counter()
    speed = written / (time.perf_counter() - begun)
    for number in range(next(numbers)):
        engine.cancel(str(number))
    while engine.in_flight():
        engine.step()
    return {"speed": speed, "median": float(np.median(gaps)) * 1e3, "p99": float(np.percentile(gaps, 99)) * 1e3}


def zipf(count: int) -> Iterator[str]:
    shares = 1 / np.arange(1, count + 1)
    random = np.random.default_rng(1)
    while True:
        yield str(random.choice(count, p=shares / shares.sum()))


class Peers:
    """transformers and PEFT on an NF4 base of their own."""

    def __init__(self, folder: Path) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        nf4 = _nf4(True, torch.bfloat16, ["lm_head"])
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=nf4)
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=nf4)
        config = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
        self.peft = get_peft_model(other, config, adapter_name="0", autocast_adapter_dtype=False)
        for i in range(1, SLOTS):
            self.peft.add_adapter(str(i), config, autocast_adapter_dtype=False)
        self.peft.eval(), self.base.eval()

    def _speed(self, model: Any, rows: int, answer: int = ANSWER, **options: Any) -> float:
        ids = torch.randint(10, 2000, (rows, PROMPT))
        begun = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=answer, min_new_tokens=answer,
                do_sample=False, pad_token_id=0, eos_token_id=None, **options,
            )  # fmt: skip
        assert out.shape[1] == PROMPT + answer
        return rows * answer / (time.perf_counter() - begun)

    def generate(self) -> float:
        return self._speed(self.base, SLOTS)

    def mixed(self) -> float:
        return self._speed(self.peft, SLOTS, ANSWER // 4, adapter_names=[str(i) for i in range(SLOTS)])

    def switched(self) -> float:
        speeds = []
        for i in range(2):
            self.peft.set_adapter(str(i))
            speeds.append(self._speed(self.peft, 1, ANSWER // 2))
        return statistics.mean(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=3000, help="of each case in a round")
    parser.add_argument("--only", default="base,one,32,zipf 10,zipf 1000,generate,mixed,switched")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = the_base()
    base = load_base(Model(path=str(folder)))
    options = EngineOptions(slots=SLOTS, context=512, adapter_memory=256 << 20, reuse_prefixes=False)
    engine = Engine(base, on_disk(base, folder), options)
    cases: dict[str, Callable[[], dict[str, float]]] = {
        "base": lambda: closed_loop(engine, itertools.repeat(None), arguments.tokens),
        "one": lambda: closed_loop(engine, itertools.repeat("0"), arguments.tokens),
        "32": lambda: closed_loop(engine, map(str, itertools.cycle(range(SLOTS))), arguments.tokens),
        "zipf 10": lambda: closed_loop(engine, zipf(10), arguments.tokens),
        "zipf 1000": lambda: closed_loop(engine, zipf(1000), arguments.tokens),
    }
    wanted = arguments.only.split(",")
    if {"generate", "mixed", "switched"} & set(wanted):
        peers = Peers(folder)
        for name in ("generate", "mixed", "switched"):
            cases[name] = lambda name=name: {"speed": getattr(peers, name)()}  # type: ignore[misc]
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(arguments.rounds):
        rounds.append({})
        for name in wanted:
            rounds[-1][name] = found = cases[name]()
            print(f"  round {number + 1}, {name}: {found['speed']:,.0f} tokens/s", flush=True)
    print(table(rounds))
    engine.close()


RATIOS = (
    ("32", "base", 0.85), ("32", "one", 0.95), ("32", "mixed", 3.0), ("32", "switched", 6.0),
    ("zipf 1000", "zipf 10", 0.85), ("base", "generate", 1.0),
)  # fmt: skip


def table(rounds: list[dict[str, dict[str, float]]]) -> str:
    lines = ["", "| case | tokens/s | between tokens, median | 99th percentile |", "|---|---:|---:|---:|"]
    for name in rounds[0]:
        middle = {key: statistics.median(r[name][key] for r in rounds) for key in rounds[0][name]}
        gaps = [f"{middle[key]:.0f} ms" if key in middle else "" for key in ("median", "p99")]
        lines.append(f"| {name} | {middle['speed']:,.0f} | {gaps[0]} | {gaps[1]} |")
    lines += ["", "| ratio | median | mark |", "|---|---:|---:|"]
    for a, b, mark in RATIOS:
        if a in rounds[0] and b in rounds[0]:
            found = [r[a]["speed"] / r[b]["speed"] for r in rounds]
            lines.append(f"| {a} / {b} | {statistics.median(found):.2f} [{min(found):.2f}–{max(found):.2f}] | {mark} |")
    if "zipf 1000" in rounds[0]:
        found = [r["zipf 1000"]["p99"] / r["zipf 1000"]["median"] for r in rounds]
        lines.append(f"| 99th percentile / median between tokens, zipf 1000 | {statistics.median(found):.2f} | 3 |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
