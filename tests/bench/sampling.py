"""What choosing the tokens of one step costs, and turning them into text.

    python tests/bench/sampling.py [--rows 32] [--rounds 25] [--threads 0] [--device cpu]

Random logits of two vocabularies, flat (all tokens nearly equal, as of a base with random weights: the worst case for
top-p) and peaked (fifty likely tokens). Printed: milliseconds a step, the fastest and the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer

from ftray import embedded
from ftray.engine.choice import Choice
from ftray.engine.grammar import Grammars, fill_masks
from ftray.engine.request import Grammar, Sampling
from ftray.engine.sampling import Sampler
from ftray.engine.text import Detokenizer, TextStream

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.7},
    "top-p": {"temperature": 0.7, "top_p": 0.9},
    "top-k": {"top_k": 50},
    "top-k and top-p": {"top_k": 50, "top_p": 0.95, "temperature": 0.8},
    "min-p": {"min_p": 0.05},
    "greedy, penalties": {"temperature": 0, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "greedy, 5 log probabilities": {"temperature": 0, "logprobs": 5},
}


def measured(prepare: Callable[[], Any], run: Callable[[Any], Any], rounds: int) -> str:
    seconds = []
    for _ in range(rounds + 2):
        given = prepare()
        started = time.perf_counter()
        run(given)
        seconds.append(time.perf_counter() - started)
    return f"{min(seconds[2:]) * 1e3:.2f} / {statistics.median(seconds[2:]) * 1e3:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as it comes")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows, rounds = arguments.rows, arguments.rounds

    print(f"ms a step of {rows} rows, fastest / median | 32,000 flat | peaked | 128,256 flat | peaked")
    for kind, asked in KINDS.items():
        cells = []
        for width in (32_000, 128_256):
            for peaks in (0, 50):
                logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) * (2 if peaks else 1)
                logits[:, :: width // 50][:, :peaks] += 12
                logits = logits.to(arguments.device)
                sampling = Sampling(max_tokens=10**9, seed=1, **asked)
                choices = [Choice(sampling, range(500), width, [2]) for _ in range(rows)]
                cells.append(measured(logits.clone, lambda x, c=choices: Sampler().choose(x, c), rounds))
        print(f"{kind} | " + " | ".join(cells))

    tokenizer = AutoTokenizer.from_pretrained(embedded.base_path())
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    matchers = [grammars.matcher(Grammar("json")) for _ in range(rows)]
    answer = tokenizer('{"cheese": "ripe", "age": [1, 2, 3], "more": {"a": null}}', add_special_tokens=False).input_ids
    seconds = []
    for token in answer:
        started = time.perf_counter()
        fill_masks(matchers)
        seconds.append(time.perf_counter() - started)
        for matcher in matchers:
            matcher.accept(token)
    shown = f"{statistics.median(seconds) * 1e3:.2f} / {max(seconds) * 1e3:.2f}"
    print(f"masks of {rows} JSON answers, vocabulary of {len(tokenizer):,}: {shown} ms a step, median / slowest")

    detokenizer, ids = Detokenizer(tokenizer), tokenizer(" ".join(["A ripe cheese."] * 300)).input_ids
    for stop in ((), ("\n\n", "###", "User:")):
        stream = TextStream(detokenizer, stop)
        started = time.perf_counter()
        for token in ids:
            stream.add(token)
        micros = (time.perf_counter() - started) / len(ids) * 1e6
        print(f"text: {micros:.1f} µs a token with {len(stop)} stop strings")


if __name__ == "__main__":
    main()
