"""Export: what a run left, as others want it. An adapter as it is, merged into a model, or several combined into one.

    export([Exported.of("runs/cheese")], "cheese-merged", merge=True)

Everything is verified before it is used. A merge goes into a freshly loaded base that is not quantized: NF4 could not
hold the sum, and bitsandbytes may have repacked its weights.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray import __version__
from ftray.config import Full, LoRA, QLoRA, Run
from ftray.data.remote import local_copy
from ftray.data.tokenizer import load_tokenizer, local_model_folder
from ftray.errors import ArtefactError, ConfigError
from ftray.manifest import describe_files, filesystem, join, sha256
from ftray.model.load import DTYPES, base_digest, load_base
from ftray.train.artefact import FACTS, staged
from ftray.train.card import export_card

COMBINATIONS = {
    "linear": "weighted sums of A and of B; equal ranks; rough, since a sum of products is not a product of sums",
    "cat": "the exact weighted sum; the rank is the sum of ranks",
    "svd": "the exact weighted sum, cut to a rank by singular values",
    "ties": "trim, elect signs, merge (Yadav et al. 2023), on A and on B; equal ranks",
    "ties_svd": "the same on the whole updates, cut to a rank",
    "dare_linear": "drop at random and rescale (Yu et al. 2023), on A and on B; equal ranks",
    "dare_linear_svd": "the same on the whole updates, cut to a rank",
    "dare_ties": "DARE, then TIES' signs, on A and on B; equal ranks",
    "dare_ties_svd": "the same on the whole updates, cut to a rank",
    "magnitude_prune": "the largest values alone, on A and on B; equal ranks",
    "magnitude_prune_svd": "the same on the whole updates, cut to a rank",
}
"""PEFT's ways to combine LoRA adapters (`add_weighted_adapter`), in words."""
_UNMERGEABLE = {
    "prefix": "its keys and values stand in front of every layer's own, and no weight of the base can hold them",
    "prompt": "its virtual tokens stand in the input, and no weight of the base can hold them",
    "p_tuning": "its virtual tokens stand in the input, and no weight of the base can hold them",
    "bottleneck": "its layers have an activation between them, and no linear layer of the base can hold that",
}


@dataclass(frozen=True)
class Combination:
    """How several adapters become one."""

    kind: str
    weights: tuple[float, ...]
    density: float | None = None
    """Share of the values that TIES, DARE and pruning keep."""
    rank: int | None = None
    """Of the result, for those by singular values; None: the largest of the adapters' ranks."""
    seed: int = 0
    """Of what DARE drops."""


@dataclass(frozen=True)
class Exported:
    """A run's artefact, verified, in a folder on this machine."""

    run: Run
    folder: Path
    facts: dict[str, Any]

    @classmethod
    def of(cls, run: Run, folder: str) -> Exported:
        """The artefact in a run's folder. Raises ArtefactError unless it is the run's and its files are those that
        `ftray.json` names."""
        where = join(folder, "artefact")
        try:
            local = Path(local_copy(where))
            facts = json.loads((local / FACTS).read_text(encoding="utf-8"))
            promised, method = facts["files"], facts["method"]
            base = facts["base"]["sha256"]
            known = all(key in facts for key in ("kind", "step", "data_sha256", "chat_template_sha256"))
        except FileNotFoundError:
            raise ArtefactError(
                "no artefact: the run is not finished", where=where, hint=f"ftray train {folder} goes on"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"{FACTS} is damaged: {error!r}", where=where) from None
        if not known or (base is None and run.method.frozen_base):
            raise ArtefactError(f"{FACTS} is damaged: facts are missing", where=where)
        if method != run.method.model_dump(mode="json"):
            raise ArtefactError("it was made with other settings of `method` than the run file has now", where=where)
        found = describe_files(local)
        found.pop(FACTS, None)
        if odd := sorted(name for name in found.keys() | promised.keys() if found.get(name) != promised.get(name)):
            names = ", ".join(odd[:3])
            raise ArtefactError(f"{names}: missing, added or changed since the run wrote its artefact", where=where)
        return cls(run, local, facts)

    @property
    def is_model(self) -> bool:
        return self.facts["kind"] == "model"


def export(
    artefacts: list[Exported],
    to: str,
    *,
    merge: bool = False,
    precision: str | None = None,
    combination: Combination | None = None,
) -> dict[str, Any]:
    """Write one artefact, or several combined, to the folder or fsspec URI `to`, which must not hold anything yet;
    returns the `ftray.json` written there. `precision` (`bf16`, `fp32`) is that of a merged model; None: the first
    run's. Raises ConfigError for what does not go together, ArtefactError for an adapter of another base."""
    _refuse(artefacts, to, merge, precision, combination)
    first = artefacts[0]
    precision = precision or first.run.train.precision
    with staged(to) as stage:
        facts = {key: first.facts[key] for key in first.facts if key != "files"}
        if len(artefacts) == 1 and (first.is_model or not merge):
            shutil.copytree(first.folder, stage, dirs_exist_ok=True)
        else:
            facts |= _write(artefacts, stage, merge, precision, combination)
        weights = combination.weights if combination else (1.0,)
        facts |= {"ftray": __version__, "origins": [_origin(a, w) for a, w in zip(artefacts, weights, strict=True)]}
        if len(artefacts) > 1 or (merge and not first.is_model):
            (stage / "README.md").write_text(export_card(first.run, facts, precision), encoding="utf-8")
        (stage / FACTS).unlink(missing_ok=True)
        facts["files"] = describe_files(stage)
        (stage / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def _origin(artefact: Exported, weight: float) -> dict[str, Any]:
    return {
        "name": artefact.run.name,
        "method": artefact.facts["method"]["name"],
        "step": artefact.facts["step"],
        "data_sha256": artefact.facts["data_sha256"],
        "facts_sha256": sha256(artefact.folder / FACTS),
        "weight": weight,
    }


def _refuse(
    artefacts: list[Exported], to: str, merge: bool, precision: str | None, combination: Combination | None
) -> None:
    fs, path = filesystem(to)
    if fs.exists(path) and (not fs.isdir(path) or fs.ls(path)):
        raise ConfigError("there is something already", where=f"--to {to}", hint="name a folder that is new or empty")
    if precision and not (merge and not artefacts[0].is_model):
        raise ConfigError("--precision is that of a merged model; an artefact is copied as it is", where="--precision")
    for artefact in artefacts:
        reason = _UNMERGEABLE.get(artefact.run.method.name)
        if merge and reason:
            raise ConfigError(
                f"a {artefact.run.method.name} adapter cannot be merged: {reason}",
                where=f"run {artefact.run.name}",
                hint="leave --merge out: the adapter itself is exported",
            )
    if merge or len(artefacts) > 1:
        _refuse_other_bases(artefacts)
    if len(artefacts) > 1:
        _refuse_combination(artefacts, combination)
    elif combination:
        raise ConfigError("there is one run and nothing to combine it with", where="--combine", hint="name more runs")


def _refuse_other_bases(artefacts: list[Exported]) -> None:
    first = artefacts[0]
    for other in artefacts[1:]:
        if other.facts["base"]["sha256"] != first.facts["base"]["sha256"]:
            raise ConfigError(
                f"{first.run.name} was trained on {first.facts['base']['path']}, {other.run.name} on"
                f" {other.facts['base']['path']}, which is another base (SHA-256 differs)",
                hint="only adapters of one base can be combined",
            )
        if other.facts["chat_template_sha256"] != first.facts["chat_template_sha256"]:
            raise ConfigError(
                f"{first.run.name} and {other.run.name} were trained with different chat templates, and one prompt"
                " cannot follow both",
                hint="train them with the same data.chat_template",
            )
    if not first.is_model and base_digest(local_model_folder(first.run.model)) != first.facts["base"]["sha256"]:
        raise ArtefactError(
            f"{first.run.model.path} is not the base that the adapter was trained on (SHA-256 differs)",
            where=f"run {first.run.name}",
            hint="put the base's own files back; a changed base would be silently wrong",
        )


def _refuse_combination(artefacts: list[Exported], combination: Combination | None) -> None:
    if combination is None:
        raise ConfigError(f"{len(artefacts)} runs and no --combine", hint=f"one of: {', '.join(COMBINATIONS)}")
    for artefact in artefacts:
        method = artefact.run.method
        if not isinstance(method, LoRA | QLoRA):
            raise ConfigError(
                f"run {artefact.run.name} is of method {method.name}, and only LoRA updates (lora, qlora) add up",
                where="--combine",
                hint="merge and evaluate them one by one",
            )
    kind, ranks = combination.kind, [a.run.method.rank for a in artefacts]  # type: ignore[union-attr]
    if kind not in COMBINATIONS:
        raise ConfigError(f"no such combination {kind!r}", where="--combine", hint=f"one of: {', '.join(COMBINATIONS)}")
    if len(combination.weights) != len(artefacts):
        raise ConfigError(
            f"{len(combination.weights)} weights for {len(artefacts)} runs", where="--weights", hint="one for each run"
        )
    whole = kind == "cat" or kind.endswith("svd")
    mixed = len(set(ranks)) > 1 or any(a.run.method.rank_pattern for a in artefacts)  # type: ignore[union-attr]
    if not whole and mixed:
        raise ConfigError(
            f"{kind} needs the same rank everywhere, and these adapters have {', '.join(map(str, ranks))}"
            + (" and rank patterns" if len(set(ranks)) == 1 else ""),
            where="--combine",
            hint="use cat, svd, or the _svd form, which work on the whole updates",
        )
    if kind == "cat" and any(a.run.method.rank_pattern for a in artefacts):  # type: ignore[union-attr]
        raise ConfigError("cat cannot lay ranks side by side that differ from layer to layer", hint="use --combine svd")
    thinned = kind not in ("linear", "cat", "svd")
    if thinned and not (combination.density is not None and 0 < combination.density <= 1):
        raise ConfigError(f"{kind} needs the share of values to keep, above 0 and at most 1", where="--density")
    if not thinned and combination.density is not None:
        raise ConfigError(f"{kind} keeps every value", where="--density", hint="leave it out")
    if combination.rank is not None and not kind.endswith("svd"):
        raise ConfigError(f"{kind} has its rank from the adapters", where="--rank", hint="leave it out, or use svd")


# ----------------------------------------------------------------------------------------------------------- the doing


def _write(
    artefacts: list[Exported], stage: Path, merge: bool, precision: str, combination: Combination | None
) -> dict[str, Any]:
    """Write the combined adapter or the merged model; returns the facts that differ from the first artefact's."""
    run = artefacts[0].run
    model = _with_adapters(artefacts)
    facts: dict[str, Any] = {}
    if combination:
        _combine(model, artefacts, combination)
        combined = model.peft_config["default"]
        method = LoRA(name="lora", rank=combined.r, alpha=combined.lora_alpha, targets=sorted(combined.target_modules))
        facts = {"method": method.model_dump(mode="json"), "data_sha256": None, "run": None, "step": None}
        facts |= {"metrics": {}, "combination": {k: v for k, v in vars(combination).items() if v is not None}}
    if not merge:
        model.save_pretrained(stage, selected_adapters=["default"], save_embedding_layers=False)
        return facts | {"kind": "adapter"}
    merged = model.merge_and_unload(safe_merge=True, adapter_names=["default"]).to(DTYPES[precision])
    merged.config.use_cache = True
    merged.save_pretrained(stage)
    load_tokenizer(run.model, run.data.chat_template).save_pretrained(stage)
    return facts | {"kind": "model", "merged": {"precision": precision}}


def _with_adapters(artefacts: list[Exported]) -> Any:
    """PEFT's model over a fresh fp32 base with every artefact in it: one as `default`, several as `origin0`…"""
    from peft import PeftModel

    run = artefacts[0].run
    base, _ = load_base(run.model_copy(update={"method": Full(name="full")}))
    names = ["default"] if len(artefacts) == 1 else [f"origin{i}" for i in range(len(artefacts))]
    with warnings.catch_warnings():
        # AdaLoRA's ranks have keys that PEFT's check of LoRA's patterns does not know
        warnings.filterwarnings("ignore", message="The following rank_pattern keys")
        model = PeftModel.from_pretrained(base, str(artefacts[0].folder), adapter_name=names[0])
    for name, artefact in zip(names[1:], artefacts[1:], strict=True):
        model.load_adapter(str(artefact.folder), adapter_name=name, torch_device="cpu")
    return model


def _combine(model: Any, artefacts: list[Exported], combination: Combination) -> None:
    """Add the adapter `default` to the model, made of the others."""
    import torch

    names = [f"origin{i}" for i in range(len(artefacts))]
    # the result's alpha is its rank, which is the scale 1 that PEFT reckons with only without this
    model.peft_config[names[0]].use_rslora = False
    torch.manual_seed(combination.seed)
    model.base_model.add_weighted_adapter(
        names,
        list(combination.weights),
        "default",
        combination_type=combination.kind,
        density=combination.density,
        svd_rank=combination.rank,
        svd_full_matrices=False,
    )
    model.peft_config["default"].base_model_name_or_path = artefacts[0].run.model.path
    model.set_adapter("default")
