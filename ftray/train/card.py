"""The model card of an artefact: what it is, what it learned from, how well, how to load it, how to make it again.

A card leaves the machine with the artefact, so it names no folder of the machine beyond its last part, and no
credentials. The front matter is that of the Hugging Face hub (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import yaml

from ftray import __version__
from ftray.config import DPO, LOW_RANK, Bottleneck, Freeze, Full, LoRA, Run, Strategy, Train
from ftray.redact import redact, redact_values

METHOD_NAMES = {
    "full": "Full tuning",
    "freeze": "Partial tuning",
    "lora": "LoRA",
    "dora": "DoRA",
    "qlora": "QLoRA",
    "qdora": "QDoRA",
    "adalora": "AdaLoRA",
    "vera": "VeRA",
    "ia3": "IA3",
    "prefix": "Prefix tuning",
    "prompt": "Prompt tuning",
    "p_tuning": "P-tuning",
    "bottleneck": "Bottleneck",
}


def model_card(run: Run, summary: dict[str, Any], data_facts: dict[str, Any]) -> str:
    """The card as Markdown with YAML front matter. `summary` is the run's, `data_facts` those of its prepared data;
    what either lacks is left out."""
    parts = [
        _front_matter(run),
        f"# {run.name}\n\n{_introduction(run, summary)}",
        _results(run, summary),
        _data(run, data_facts),
        _hyperparameters(run, summary),
        _loading(run),
        _reproduction(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def base_name(run: Run) -> str:
    """The base as a card names it: a hub name as it is, of a folder or URI its last part."""
    if run.model.path == "embedded":
        return "ftray's embedded base"
    return run.model.path if is_hub_name(run.model.path) else last_part(run.model.path)


def is_hub_name(path: str) -> bool:
    """True for `owner/name` that is no folder here."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path)) and not os.path.isdir(path)


def last_part(path: str) -> str:
    """`s3://bucket/rows/train-*.jsonl` → `train-*.jsonl`."""
    return redact(path).rstrip("/").rsplit("/", 1)[-1]


def _front_matter(run: Run, tag: str | None = None) -> str:
    fields: dict[str, Any] = {
        "library_name": _library(run),
        "pipeline_tag": "text-generation",
        "tags": ["ftray", tag or run.method.name],
    }
    if is_hub_name(run.model.path) and not run.model.random_weights:
        fields = {"base_model": run.model.path, **fields}
    datasets = sorted({s.path for s in run.data.sources if s.reader == "datasets" and is_hub_name(s.path)})
    if datasets:
        fields["datasets"] = datasets
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _library(run: Run) -> str:
    """Which library loads the artefact."""
    if isinstance(run.method, Bottleneck):
        return "ftray"
    return "peft" if run.method.frozen_base else "transformers"


def _introduction(run: Run, summary: dict[str, Any]) -> str:
    name, base = METHOD_NAMES[run.method.name], base_name(run)
    if isinstance(run.method, Freeze):
        text = f"A whole model, of which a part was trained from the weights of **{base}**"
    elif isinstance(run.method, Full):
        start = "fresh weights in the shape of" if run.model.random_weights else "the weights of"
        text = f"A whole model, trained from {start} **{base}**"
    else:
        rank = getattr(run.method, "rank", None)
        article = "An" if name[0] in "AI" else "A"
        text = f"{article} {name} adapter{f' of rank {rank}' if rank else ''} for **{base}**"
    step = summary.get("artefact_step")
    steps = summary.get("steps")
    if step is not None:
        text += f", as of step {step:,}" + (f" of {steps:,}" if steps and steps != step else "")
    return f"{text}. Trained with ftray {__version__}."


def _results(run: Run, summary: dict[str, Any]) -> str:
    base, tuned = (_finite(summary.get(k)) for k in ("base_loss", "artefact_loss"))
    if base is None or tuned is None:
        return ""
    preferences = run.objective.name == "dpo"
    loss = "DPO loss, nats per pair" if preferences else "Loss, nats per target token"
    rows = [(loss, f"{base:.4f}", f"{tuned:.4f}", f"{tuned / base:.3f}" if base else "–")]
    if not preferences:
        change = f"{math.exp(tuned - base):.3g}"
        rows.append(("Perplexity", f"{_perplexity(base):.4g}", f"{_perplexity(tuned):.4g}", change))
    return "## Results\n\nOn the same held-out rows:\n\n" + _table(("", "Base", "Tuned", "Ratio"), rows)


def _data(run: Run, facts: dict[str, Any]) -> str:
    """What the rows are, how they became text, and how many there were."""
    lines = [f"- {_code(last_part(s.path))}: {_format(s.format)}" for s in run.data.sources]
    rows, targets = facts.get("rows") or {}, facts.get("target_tokens") or {}
    counts = [
        (name, f"{rows[key]:,}", f"{targets[key]:,}" if targets.get(key) is not None else "–")
        for name, key in (("Training", "train"), ("Held-out", "held_out"))
        if rows.get(key)
    ]
    text = "## Data\n\n" + "\n".join(lines)
    if counts:
        text += "\n\n" + _table(("Split", "Rows", "Target tokens"), counts)
    if facts.get("digest"):
        text += f"\n\nDigest of the prepared rows: {_code(str(facts['digest']))}"
    return text


def _format(form: Any) -> str:
    """What a prompt must look like for the model to know it again."""
    if form.name == "text":
        return "plain text, every token a target"
    if form.name == "messages":
        return "conversations in the tokenizer's chat template, the assistant's turns as targets"
    if form.name == "instruction":
        wording = "in the tokenizer's chat template" if form.chat else "in Alpaca's wording"
        return f"instructions {wording}, the responses as targets"
    where = ", as two turns in the tokenizer's chat template" if form.chat else ""
    if form.name == "preference":
        columns = f"{_code(form.chosen)} preferred to {_code(form.rejected)}"
        return f"preferences, prompts in the column {_code(form.prompt)}{where}; {columns}"
    return f"prompt {_code(form.prompt)}, completion {_code(form.completion)}{where}; the completions are the targets"


def _hyperparameters(run: Run, summary: dict[str, Any]) -> str:
    train, method = run.train, run.method
    rows: list[tuple[str, str]] = [("Method", METHOD_NAMES[method.name])]
    if not isinstance(method, LOW_RANK):
        rows += [(_in_words(key), _knob(value)) for key, value in _knobs(method)]
    else:
        targets = method.targets if isinstance(method.targets, str) else ", ".join(method.targets)
        scale = " / √rank" if method.rslora else " / rank"
        rows += [
            ("Rank", str(method.rank)),
            ("Scale", f"{method.alpha:g}{scale}"),
            ("Dropout", f"{method.dropout:g}"),
            ("Targets", _code(targets)),
        ]
    if method.quantized:
        double = getattr(method, "double_quantization", False)
        rows.append(("Base in training", "NF4" + (", double quantization" if double else "")))
    trained = summary.get("trainable_parameters")
    if trained:
        rows.append(("Trained parameters", f"{trained:,}"))
    if isinstance(run.objective, DPO):
        rows.append(("Objective", f"DPO (preferences), β {run.objective.beta:g}"))
    rows += [
        ("Optimizer", _optimizer(train)),
        ("Learning rate", f"{train.learning_rate:g}, {train.schedule.name}, warm-up {train.schedule.warmup:g}"),
        ("Weight decay", f"{train.weight_decay:g}"),
        ("Gradient clipping", f"norm {train.clip_norm:g}" if train.clip_norm else "off"),
        ("Rows a step", f"{train.batch_rows:,}"),
        ("Steps", f"{summary['steps']:,}" if summary.get("steps") else f"{train.steps or train.epochs}"),
        ("Longest row", f"{run.data.max_length:,} tokens"),
        ("Compute", train.precision),
        ("Workers", run.workers.number),
        *([("Divided by", _division(run.strategy))] if run.strategy else []),
        ("Seed", str(run.seed)),
    ]
    return "## Training\n\n" + _table(("", ""), rows)


def _division(strategy: Strategy) -> str:
    """What is divided among the workers, and what lies elsewhere than on the device."""
    what = {0: "nothing", 1: "optimizer states", 2: "optimizer states and gradients", 3: "all states and weights"}
    text = f"DeepSpeed ZeRO {strategy.zero}: {what[strategy.zero]}"
    for name, place in (("optimizer", strategy.offload_optimizer), ("weights", strategy.offload_parameters)):
        if place != "none":
            text += f"; {name} {'on the host' if place == 'cpu' else 'on NVMe'}"
    return text


def _knobs(method: Any) -> list[tuple[str, Any]]:
    """What a method says of itself, but its name and how the base is held."""
    return [(k, v) for k, v in method if k not in ("name", "quantization", "double_quantization")]


def _in_words(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _knob(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else f"{value:,}"
    return _code(", ".join(value) if isinstance(value, list) else value) if value else "–"


def _optimizer(train: Train) -> str:
    betas = f", β {train.betas[0]:g} and {train.betas[1]:g}"
    if "adamw" in train.optimizer:
        return f"{train.optimizer}{betas}, ε {train.epsilon:g}"
    own = {"lion": betas, "sgd": f", momentum {train.momentum:g}", "mezo": f", perturbation {train.perturbation:g}"}
    return train.optimizer + own.get(train.optimizer, "")


def _loading(run: Run) -> str:
    """Python that loads the artefact: without ftray, but for bottleneck adapters and the base that ships with it."""
    dtype = {"bf16": "torch.bfloat16", "fp32": "torch.float32"}
    if not run.method.frozen_base:
        code = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype={dtype[run.train.precision]})
"""
        return f"## How to load it\n\n```python\n{code.strip()}\n```"
    quantized = run.method.quantized
    imports = ", BitsAndBytesConfig" if quantized else ""
    options = f"dtype={dtype[run.train.precision]}"
    ours = isinstance(run.method, Bottleneck)
    lines = ["import torch", "from ftray.model.bottleneck import load" if ours else "from peft import PeftModel"]
    lines += [f"from transformers import AutoModelForCausalLM, AutoTokenizer{imports}", ""]
    lines += [_base_line(run), 'folder = "."  # this folder', "tokenizer = AutoTokenizer.from_pretrained(base)"]
    if quantized:
        double = getattr(run.method, "double_quantization", True)
        lines += [
            "nf4 = BitsAndBytesConfig(",
            f'    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant={double},',
            f"    bnb_4bit_compute_dtype={dtype[run.train.precision]},",
            ")",
        ]
        options += ", quantization_config=nf4"
    if run.model.revision and is_hub_name(run.model.path):
        options += f", revision={run.model.revision!r}"
    lines += [
        f"model = AutoModelForCausalLM.from_pretrained(base, {options})",
        "model = load(model, folder)" if ours else "model = PeftModel.from_pretrained(model, folder)",
    ]
    return "## How to load it\n\n```python\n" + "\n".join(lines) + "\n```"


def _base_line(run: Run) -> str:
    if run.model.path == "embedded":
        return "from ftray.embedded import base_path\n\nbase = str(base_path())"
    if is_hub_name(run.model.path):
        return f"base = {run.model.path!r}".replace("'", '"')
    return f'base = "{last_part(run.model.path)}"  # where this base lies on your machine'


def export_card(run: Run, facts: dict[str, Any], precision: str) -> str:
    """The card of a merged model or a combined adapter; `run` is the first of its origins, `facts` its `ftray.json`."""
    merged, origins = facts["kind"] == "model", facts["origins"]
    kind = Full(name="full") if merged else LoRA.model_validate(facts["method"])
    train = run.train.model_copy(update={"precision": precision})
    stand_in = run.model_copy(update={"method": kind, "train": train})
    what = "A model with adapters merged into its weights" if merged else "An adapter combined from several"
    rows = [(f"{o['name']}, {METHOD_NAMES[o['method']]}", f"{o['step']:,}", f"{o['weight']:g}") for o in origins]
    text = f"{what}, on **{base_name(run)}**. Made by `ftray export`, with ftray {__version__}."
    if combination := facts.get("combination"):
        text += f" Combined by {_code(combination['kind'])}."
    if merged and run.method.quantized:
        text += " In training the base was in NF4; here it is not, so outputs differ a little from those in training."
    parts = [
        _front_matter(stand_in, "merged" if merged else "combined"),
        f"# {' and '.join(o['name'] for o in origins)}\n\n{text}",
        "## Origins\n\n" + _table(("Run", "Step", "Weight"), rows),
        _loading(stand_in),
    ]
    return "\n\n".join(parts) + "\n"


def _reproduction(run: Run) -> str:
    """The run file, with the last part of each path."""
    values = redact_values(run.dump())
    _shorten_paths(run, values)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
    fence = "`" * max(3, 1 + max((len(m) for m in re.findall(r"`+", text)), default=0))
    return (
        "## How to make it again\n\nPut the base and the rows where the paths say, then"
        f" `ftray train {run.name}.yaml`, with ftray {__version__}:\n\n{fence}yaml\n{text}{fence}"
    )


def _shorten_paths(run: Run, values: dict[str, Any]) -> None:
    def short(path: str) -> str:
        return path if path.startswith("embedded") or is_hub_name(path) else last_part(path)

    values["model"]["path"] = short(run.model.path)
    for source in values["data"]["sources"] + values["data"]["held_out"]:
        source["path"] = short(source["path"])
    for key in ("cache", "chat_template"):
        if values["data"][key]:
            values["data"][key] = last_part(values["data"][key])
    if run.strategy and run.strategy.nvme_path:
        values["strategy"]["nvme_path"] = last_part(run.strategy.nvme_path)
    values["output"] = "runs/{name}"
    values.pop("logging", None)  # where this machine's numbers go is nobody else's matter


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Markdown; all columns but the first are right-aligned where there are more than two."""
    rule = ["---"] + (["---:"] if len(head) > 2 else ["---"]) * (len(head) - 1)
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (head, tuple(rule), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    """A code span that holds any text (CommonMark 0.31, section 6.1), on one line."""
    text = text.replace("\r", "").replace("\n", "⏎")
    ticks = "`" * (1 + max((len(m) for m in re.findall(r"`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
