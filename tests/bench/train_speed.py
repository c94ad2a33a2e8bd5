"""Training speed: ftray's loop against transformers' Trainer with PEFT and a dynamically padding collator, in one run.

    FTRAY_DATA=… python tests/bench/train_speed.py [--rows e2e mixture] [--rounds 8] [--trainer-rows 16]

Both train LoRA adapters of the same rank on the same NF4 base (a random-weight Llama), with the same rows in the same
order, so the same target tokens a step. Blocks of steps alternate between the two, so that a machine that speeds up or
slows down does so for both; the ratio is that of each pair of blocks. Printed: target tokens/s of either side, the
ratio's median and range, the share of padding, and the mean loss of both over the same steps, which must agree.

`--trainer-rows` is Trainer's per-device batch; accumulation makes up the 16 rows of a step. `--cpu-time` with
OMP_NUM_THREADS=1 counts CPU seconds instead: what remains comparable on a machine that others keep busy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from ftray.config import Run, parse_run
from ftray.data.order import Order
from ftray.data.prepare import prepare
from ftray.data.prepared import PreparedData
from ftray.manifest import digest_of
from ftray.session import ray_session
from ftray.train.loop import _alone, _Worker
from ftray.train.world import World

Clock = Callable[[], float]
STEP_ROWS, RANK, RATE = 16, 16, 2e-4
SHAPE: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
         "intermediate_size": 1408, "vocab_size": 32_000, "max_position_embeddings": 2048}  # fmt: skip
DESCRIBE = {"name": "prompt_completion", "prompt": "{mr}\n", "completion": "{ref}"}
SOLVE = {"name": "prompt_completion", "prompt": "{question}\n", "completion": "{answer}"}
E2E: dict[str, Any] = {"path": "e2e/trainset.csv", "format": DESCRIBE}
OTHERS: list[dict[str, Any]] = [
    {"path": "instructions/instructions.json", "format": "instruction"},
    {"path": "gsm8k/train.jsonl", "format": SOLVE},
]
OTHER_ROWS = 1_100 + 7_473
SOURCES = {"e2e": [E2E], "mixture": [{**E2E, "limit": OTHER_ROWS}, *OTHERS]}


# ----------------------------------------------------------------------------------------------------- base and rows


def make_base(data: Path, folder: Path) -> Path:
    """The base's folder: random weights, and a byte-level BPE of 32,000 entries trained on the data's own text."""
    if (folder / "model.safetensors").exists():
        return folder
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = (line for path in text_files(data) for line in path.read_text(encoding="utf-8").splitlines())
    special = ["<eos>", "<pad>"]
    bpe.train_from_iterator(texts, vocab_size=SHAPE["vocab_size"], special_tokens=special, show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False, eos_token_id=0, pad_token_id=1))
    fast.save_pretrained(folder)
    model.bfloat16().save_pretrained(folder)
    return folder


def text_files(data: Path) -> list[Path]:
    names = ["e2e/trainset.csv", "gsm8k/train.jsonl", "instructions/instructions.json", "text/wikipedia.txt",
             "text/tinystories_1000.json", "text/wikitext_1000.json"]  # fmt: skip
    return [data / name for name in names]


def make_run(rows: str, data: Path, scratch: Path, steps: int) -> Run:
    sources = [{**source, "path": str(data / source["path"])} for source in SOURCES[rows]]
    values = {
        "name": f"speed-{rows}",
        "model": {"path": str(make_base(data, scratch / "base"))},
        "method": {"name": "qlora", "rank": RANK, "alpha": 2 * RANK},
        "data": {"sources": sources, "max_length": 1024, "packing": "batch", "cache": str(scratch / "prepared")},
        "train": {"steps": steps, "batch_rows": STEP_ROWS, "micro_batch_rows": STEP_ROWS, "learning_rate": RATE,
                  "schedule": {"name": "constant", "warmup": 0}},
        "output": str(scratch / "runs" / digest_of([rows, time.time()])[:12]),
    }  # fmt: skip
    return parse_run(json.dumps(values), "benchmark")


# ------------------------------------------------------------------------------------------------------------- ftray


class Ours:
    """ftray's own loop, without Ray around it, a block of steps at a time."""

    def __init__(self, run: Run, data: PreparedData) -> None:
        self.losses: list[float] = []
        self.targets: list[int] = []
        self.worker = _Worker(run, data, World(), self, _alone)
        self.worker.resume()
        self.steps = self.worker.feed.steps(0, self.worker.steps)

    def emit(self, event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            self.losses.append(event["loss"])
            self.targets.append(event["target_tokens"])

    def stop_requested(self) -> bool:
        return False

    def block(self, steps: int, clock: Clock) -> float:
        """Seconds for some steps, waiting for their rows included."""
        started = clock()
        for _ in range(steps):
            self.worker.step(next(self.steps))
        return clock() - started


# ----------------------------------------------------------------------------------------- transformers, PEFT, padding


@dataclass
class Counting:
    """DataCollatorForSeq2Seq, which pads to the longest row of a batch, and what it made."""

    pad: DataCollatorForSeq2Seq
    targets: list[int] = field(default_factory=list)
    real: int = 0
    padded: int = 0

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        batch = self.pad(rows)
        self.targets.append(int((batch["labels"] != -100).sum()))
        self.real += int(batch["attention_mask"].sum())
        self.padded += batch["input_ids"].numel()
        return batch


class Alternate(TrainerCallback):
    """Times a block of Trainer's steps, then a block of ours, and so on. The first block of either is warm-up."""

    def __init__(self, ours: Ours, block: int, clock: Clock) -> None:
        self.ours, self.block, self.clock = ours, block, clock
        self.pairs: list[tuple[float, float]] = []
        """Seconds of a block: (Trainer's, ours)."""

    def on_train_begin(self, args, state, control, **_):
        self.started = self.clock()

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.block == 0:
            theirs = self.clock() - self.started
            self.pairs.append((theirs, self.ours.block(self.block, self.clock)))
            print(f"  block {len(self.pairs)}: {theirs:.2f} s against {self.pairs[-1][1]:.2f} s", flush=True)
            self.started = self.clock()


class InOrder(Trainer):
    """Trainer that takes the rows in the order in which they are given."""

    def _get_train_sampler(self, *_, **__):
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def trainer(run: Run, rows: list[dict[str, list[int]]], steps: int, per_device: int, out: Path, alternate: Alternate):
    """As a user of transformers and PEFT sets up QLoRA: NF4 with double quantization, bf16 compute, adapters in fp32,
    Trainer's own defaults for optimizer and clipping; nothing is logged, saved or evaluated."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    tokenizer = AutoTokenizer.from_pretrained(run.model.path)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        run.model.path, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    base.config.use_cache = False
    adapter = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=STEP_ROWS // per_device,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        bf16=True,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    collator = Counting(DataCollatorForSeq2Seq(tokenizer, padding="longest", label_pad_token_id=-100))
    made = InOrder(get_peft_model(base, adapter), arguments, train_dataset=rows, data_collator=collator)
    made.remove_callback(PrinterCallback)
    made.add_callback(alternate)
    return made, collator


def rows_in_order(data: PreparedData, run: Run, steps: int) -> list[dict[str, list[int]]]:
    """The same rows that our loop will take, as Trainer wants them: labels of -100 where there is no target."""
    order = Order(run.seed, data.train.sizes, data.train.weights)
    rows = [data.train[int(i)] for i in order.rows(0, steps * STEP_ROWS)]
    return [
        {
            "input_ids": row.tokens.tolist(),
            "attention_mask": [1] * len(row.tokens),
            "labels": [t if target else -100 for t, target in zip(row.tokens.tolist(), row.targets, strict=True)],
        }
        for row in rows
    ]


# ------------------------------------------------------------------------------------------------------------ compare


def compare(
    rows: str, data: Path, scratch: Path, rounds: int, block: int, per_device: int, clock: Clock
) -> dict[str, Any]:
    steps = (rounds + 1) * block
    run = make_run(rows, data, scratch, steps)
    with ray_session(cpus=2):
        data_uri = prepare(run, lambda event: None)
    prepared = PreparedData.open(data_uri)
    ours = Ours(run, prepared)
    alternate = Alternate(ours, block, clock)
    ordered = rows_in_order(prepared, run, steps)
    made, collator = trainer(run, ordered, steps, per_device, scratch / "trainer", alternate)
    print(f"{rows}: {rounds} pairs of blocks of {block} steps, after one that warms up", flush=True)
    outcome = made.train()
    pieces = STEP_ROWS // per_device
    theirs = [sum(collator.targets[i * pieces : (i + 1) * pieces]) for i in range(steps)]
    assert theirs == ours.targets, "the two sides trained on different targets"
    targets = [sum(theirs[i * block : (i + 1) * block]) for i in range(1, rounds + 1)]
    pairs = alternate.pairs[1:]
    ratios = [a / b for a, b in pairs]
    return {
        "rows": rows,
        "per_device": per_device,
        "trainer": statistics.median(t / a for t, (a, _) in zip(targets, pairs, strict=True)),
        "ours": statistics.median(t / b for t, (_, b) in zip(targets, pairs, strict=True)),
        "ratio": statistics.median(ratios),
        "range": (min(ratios), max(ratios)),
        "padding": 1 - collator.real / collator.padded,
        "targets_a_step": statistics.mean(theirs),
        "tokens_a_step": collator.real / steps,
        "losses": (outcome.training_loss, statistics.mean(ours.losses)),
    }


def table(results: list[dict[str, Any]]) -> str:
    head = ("rows", "per device", "Trainer", "ftray", "ratio", "[min–max]", "padding", "tokens/step", "targets/step",
            "losses")  # fmt: skip
    lines = [
        (r["rows"], str(r["per_device"]), f"{r['trainer']:,.0f}", f"{r['ours']:,.0f}", f"{r['ratio']:.2f}",
         f"[{r['range'][0]:.2f}–{r['range'][1]:.2f}]", f"{r['padding']:.0%}", f"{r['tokens_a_step']:,.0f}",
         f"{r['targets_a_step']:,.0f}", "{:.4f} {:.4f}".format(*r["losses"]))
        for r in results
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in (head, *lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=sorted(SOURCES), default=["e2e", "mixture"])
    parser.add_argument("--rounds", type=int, default=8, help="pairs of blocks, after one of warm-up")
    parser.add_argument("--block", type=int, default=3, help="steps of a block")
    parser.add_argument("--trainer-rows", type=int, nargs="+", default=[STEP_ROWS], help="Trainer's per-device batch")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds: on a machine that others use")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    disable_progress_bar()
    data = Path(os.environ["FTRAY_DATA"]).resolve()
    data = data / "data" if (data / "data").is_dir() else data
    scratch = Path(tempfile.gettempdir()) / f"ftray-train-speed-{digest_of(SHAPE)[:8]}"
    results = [
        compare(rows, data, scratch, arguments.rounds, arguments.block, per_device, clock)
        for rows in arguments.rows
        for per_device in arguments.trainer_rows
    ]
    unit = "CPU second" if arguments.cpu_time else "second"
    print(f"\ntarget tokens a {unit}, {torch.get_num_threads()} threads, torch {torch.__version__}\n{table(results)}")


if __name__ == "__main__":
    main()
