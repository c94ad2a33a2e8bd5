"""What a run is: the run file, strict and complete. No torch, no Ray: it loads in a few hundredths of a second.

    run = load_run("cheese.yaml", overrides=["train.steps=100"])

A run file is YAML. `${NAME}` and `${NAME:-default}` are taken from the environment. Relative paths are relative to the
working directory, as in a shell. Every key is documented under itself; an unknown key is refused with the nearest known
one, and keys that do not go together with the reason and what does.
"""

from ftray.config.data import (
    Data,
    Format,
    InstructionFormat,
    MessagesFormat,
    PreferenceFormat,
    PromptCompletionFormat,
    Source,
    TextFormat,
)
from ftray.config.evaluation import Decoding, Evaluation
from ftray.config.methods import (
    IA3,
    LOW_RANK,
    VIRTUAL_TOKENS,
    AdaLoRA,
    Bottleneck,
    DoRA,
    Freeze,
    Full,
    LoRA,
    Method,
    Prefix,
    Prompt,
    PTuning,
    QDoRA,
    QLoRA,
    VeRA,
)
from ftray.config.reading import load_run, parse_run, recipe_names
from ftray.config.run import DPO, SFT, Model, Run, Strategy, Workers
from ftray.config.training import Schedule, Train

__all__ = [
    "DPO",
    "IA3",
    "LOW_RANK",
    "SFT",
    "VIRTUAL_TOKENS",
    "AdaLoRA",
    "Bottleneck",
    "Data",
    "Decoding",
    "DoRA",
    "Evaluation",
    "Format",
    "Freeze",
    "Full",
    "InstructionFormat",
    "LoRA",
    "MessagesFormat",
    "Method",
    "Model",
    "PTuning",
    "PreferenceFormat",
    "Prefix",
    "Prompt",
    "PromptCompletionFormat",
    "QDoRA",
    "QLoRA",
    "Run",
    "Schedule",
    "Source",
    "Strategy",
    "TextFormat",
    "Train",
    "VeRA",
    "Workers",
    "load_run",
    "parse_run",
    "recipe_names",
]
