"""25 adapters × 25 tasks: every adapter answers every task's questions, from one pass of the engine, and with PEFT.

    python tests/bench/evaluate_matrix.py [--adapters 25] [--questions 4] [--tokens 8] [--share 1.0] [--cpu-time]

Random LoRA adapters of rank 8 on the embedded base in bf16; prompts of random tokens, 20 to 60 long, as short answers
to short questions have (bAbI, CLINC). PEFT loads one adapter at a time, merges nothing, and answers each task's
questions in one padded batch with transformers' `generate`, greedy; so nothing there waits for a single row. `--share`
of the adapters is timed with PEFT, and its time is scaled. Both sides' answers of the first adapter are compared.
`--cpu-time` counts the process's CPU seconds, on a machine that others keep busy.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from ftray.config import Decoding, Model
from ftray.embedded import base_path
from ftray.engine.engine import load_base
from ftray.evaluate.answers import Prompt, answers_of

MARK = 5.0
Tasks = list[list[tuple[int, ...]]]
"""The prompts of each task, in tokens."""
clock = time.perf_counter


def make_adapters(folder: Path, count: int) -> list[Path]:
    made = []
    for number in range(count):
        torch.manual_seed(number)
        base = AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.float32)
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        get_peft_model(base, config).save_pretrained(folder / str(number))
        made.append(folder / str(number))
    return made


def with_engine(folders: list[Path], tasks: Tasks, tokens: int) -> tuple[float, list[str]]:
    """(seconds with reading the adapters, the first adapter's answers)"""
    base = load_base(Model(path="embedded"), quantized=False, dtype=torch.bfloat16)
    began = clock()
    adapters = {str(folder): base.read(folder) for folder in folders}
    prompts = [Prompt(key, prompt) for key in adapters for task in tasks for prompt in task]
    longest = max(len(prompt.tokens) for prompt in prompts)
    answers = answers_of(base, adapters, prompts, Decoding(max_tokens=tokens), longest=longest)
    seconds = clock() - began
    return seconds, [answer.text for answer in answers[: sum(map(len, tasks))]]


def with_peft(
    folders: list[Path], tasks: list[list[tuple[int, ...]]], tokens: int, share: float
) -> tuple[float, list[str]]:
    from ftray.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Model(path="embedded"))
    some = folders[: max(1, round(share * len(folders)))]
    base = AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.bfloat16)
    texts: list[str] = []
    began = clock()
    for folder in some:
        model = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval()
        for task in tasks:
            longest = max(map(len, task))
            ids = torch.full((len(task), longest), tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(task):
                ids[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1
            with torch.inference_mode():
                found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
            if folder == some[0]:
                texts += tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)
        base = model.unload()
    return (clock() - began) * len(folders) / len(some), texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=25)
    parser.add_argument("--questions", type=int, default=4, help="of each task")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer, at most")
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        global clock
        clock = time.process_time
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    random = np.random.default_rng(0)
    tasks = [
        [tuple(random.integers(20, 2000, random.integers(20, 60)).tolist()) for _ in range(arguments.questions)]
        for _ in range(arguments.adapters)
    ]
    with tempfile.TemporaryDirectory() as folder:
        folders = make_adapters(Path(folder), arguments.adapters)
        ours, said = with_engine(folders, tasks, arguments.tokens)
        theirs, also = with_peft(folders, tasks, arguments.tokens, arguments.share)
    same = sum(a.strip() == b.strip() for a, b in zip(said, also, strict=True))
    cells = arguments.adapters**2
    print(f"{cells} cells of {arguments.questions} questions: engine {ours:.1f} s, PEFT {theirs:.1f} s")
    print(f"{theirs / ours:.1f} times as fast; mark {MARK}")
    print(f"{same} of {len(said)} answers are the same to the letter (bf16: ties fall either way)")


if __name__ == "__main__":
    main()
