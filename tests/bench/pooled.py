"""Ways to multiply the low-rank rows of many adapters: which is fastest for which shapes. The rules in
`ftray/model/pooled.py` (LONG, LONG_IN_C, faster_in_c) come from this table.

    python tests/bench/pooled.py [--threads 2] [--device cpu] [--cpu-time]

Milliseconds for the linear layers of a Llama of hidden 1,024 with 8 layers, bf16, each layer with rows of its own, so
that nothing stays in a cache. `blocks`: batched products over the pool's blocks as they lie; `masked`: one product with
all adapters' rows, masked; `each`: a product for each adapter; `C`: `LowRank`, on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ftray.model import lowrank
from ftray.model.pooled import Pools, Products, Route, _entries, low_rank

LAYERS = 8
SHAPES = [(1024, 1024)] * 4 + [(1024, 2816)] * 2 + [(2816, 1024)]
CASES = [
    (1, 1), (8, 8), (32, 32), (32, 8), (32, 2), (32, 1), (64, 32), (64, 8), (64, 1), (96, 32), (96, 8), (128, 32),
    (128, 8), (128, 1), (256, 32), (256, 8), (256, 1), (512, 8),
]  # fmt: skip
"""(tokens, adapters)"""


def fastest(functions: dict[str, Callable[[], object]], clock: Callable[[], float], times: int = 8) -> dict[str, float]:
    """Milliseconds of each, its second best of turns taken in rotation."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(times):
        for name, function in functions.items():
            begun = clock()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found[name].append(clock() - begun)
    return {name: sorted(values)[1] * 1e3 for name, values in found.items()}


def masked(x: Tensor, y: Tensor, down: Tensor, up: Tensor, mask: Tensor) -> None:
    y += ((x @ down.flatten(0, 1).T) * mask) @ up.flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, for a busy machine")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.cpu_time else arguments.threads)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    device, rank = torch.device(arguments.device), arguments.rank
    compiled, why = lowrank.load() if device.type == "cpu" else (None, "not a CPU")
    print(f"rank {rank}, {device}, {torch.get_num_threads()} threads{'' if compiled else f', without C: {why}'}\n")
    print("| tokens | adapters | blocks | masked | each | C |\n|---:|---:|---:|---:|---:|---:|")
    for tokens, adapters in CASES:
        with torch.inference_mode():
            print(row(tokens, adapters, rank, device, compiled, clock), flush=True)


def row(
    tokens: int,
    adapters: int,
    rank: int,
    device: torch.device,
    compiled: lowrank.LowRank | None,
    clock: Callable[[], float],
) -> str:
    layers = []
    for i, o in SHAPES * LAYERS:
        pools = Pools(torch.bfloat16, device)
        for key in range(adapters):
            pools.put(key, rank, torch.randn(rank, i), torch.randn(rank, o))
        x, y = torch.randn(tokens, i), torch.zeros(tokens, o)
        layers.append((pools, x.to(device, torch.bfloat16), y.to(device, torch.bfloat16)))
    segments = tuple((key, tokens // adapters) for key in range(adapters))
    owner = torch.arange(adapters, device=device).repeat_interleave(tokens // adapters)
    mask = (owner[:, None] == torch.arange(adapters, device=device)).repeat_interleave(rank, 1).bfloat16()

    def planned(long: int, compiled: lowrank.LowRank | None) -> Callable[[], None]:
        route = Route(segments, device, compiled)
        at = tuple(layers[0][0].where[key] for key, _ in segments)
        plan = route._make_products(at, long)
        if compiled:
            plan = Products((), tuple(_entries(*kind) for kind in route._divided(at, long)[0].items()), ())

        def run() -> None:
            for pools, x, y in layers:
                plan.add(pools, x, y, low_rank, compiled)

        return run

    def run_masked() -> None:
        for pools, x, y in layers:
            down, up = pools.kinds[rank].tensors
            masked(x, y, down[:adapters], up[:adapters], mask)

    ways = {"blocks": planned(1 << 30, None), "masked": run_masked, "each": planned(1, None)}
    if compiled:
        ways["C"] = planned(1 << 30, compiled)
    found = fastest(ways, clock)
    best = min(found.values())
    cells = [f"**{t:.1f}**" if t == best else f"{t:.1f}" for t in found.values()] + [""] * (4 - len(found))
    return f"| {tokens} | {adapters} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
