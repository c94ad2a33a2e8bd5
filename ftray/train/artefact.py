"""The artefact: what a run leaves for others. A PEFT adapter or a transformers model folder, and `ftray.json`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch

from ftray import __version__
from ftray.config import AdaLoRA, Bottleneck, Run
from ftray.data.prepared import PreparedData
from ftray.data.tokenizer import load_tokenizer, local_model_folder
from ftray.errors import ArtefactError
from ftray.manifest import describe_files, filesystem, is_local, join
from ftray.model import bottleneck
from ftray.model.load import DTYPES, base_digest
from ftray.redact import redact_values
from ftray.train.card import model_card

FACTS = "ftray.json"


def write_artefact(run: Run, model: Any, data: PreparedData, summary: dict[str, Any]) -> str:
    """Write RUN/artefact whole and return its path; an older one is replaced. Raises ArtefactError if what was
    trained is empty or not finite."""
    _check(model)
    target = join(run.folder, "artefact")
    with tempfile.TemporaryDirectory(prefix="ftray-artefact-") as temporary:
        stage = Path(temporary)
        _save(run, model, stage)
        (stage / "README.md").write_text(model_card(run, summary, data.facts), encoding="utf-8")
        facts = artefact_facts(run, data, summary) | {"files": describe_files(stage)}
        (stage / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        place(stage, target)
    return target


def _check(model: Any) -> None:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained or any(p.numel() == 0 for _, p in trained):
        raise ArtefactError("nothing was trained, or it is empty on this worker; no artefact was written")
    for name, p in trained:
        if not torch.isfinite(p).all():
            raise ArtefactError(f"{name} holds values that are not finite; no artefact was written")


def _save(run: Run, model: Any, stage: Path) -> None:
    if not run.method.frozen_base:
        kept = {p: p.data for p in model.parameters()}
        try:
            model.to(DTYPES[run.train.precision])
            model.config.use_cache = True
            model.save_pretrained(stage)
        finally:
            for p, data in kept.items():
                p.data = data
        load_tokenizer(run.model, run.data.chat_template).save_pretrained(stage)
    elif isinstance(run.method, Bottleneck):
        bottleneck.save(model, run.method, run.model, stage)
    else:
        with warnings.catch_warnings():
            if isinstance(run.method, AdaLoRA):  # PEFT takes a layer without any rank left for one that ZeRO emptied
                warnings.filterwarnings("ignore", message=r"Adapter .* LoRA tensor\(s\) have invalid shape")
            model.save_pretrained(stage, save_embedding_layers=False)  # else PEFT asks a hub about the base
        (stage / "README.md").unlink(missing_ok=True)  # PEFT's; ours follows


def artefact_facts(run: Run, data: PreparedData, summary: dict[str, Any]) -> dict[str, Any]:
    """What `ftray.json` says, the files' digests aside."""
    base = None if run.model.random_weights else base_digest(local_model_folder(run.model))
    return {
        "format": 1,
        "ftray": __version__,
        "kind": "adapter" if run.method.frozen_base else "model",
        "base": {"path": run.model.path, "revision": run.model.revision, "sha256": base},
        "method": run.method.model_dump(mode="json"),
        "chat_template_sha256": data.facts.get("chat_template_hash"),
        "tokenizer_sha256": data.facts.get("tokenizer_digest"),
        "data_sha256": data.digest,
        "run": redact_values(run.dump()),
        "step": summary["artefact_step"],
        "metrics": {
            key: summary[key]
            for key in ("base_loss", "best_loss", "final_loss", "target_tokens", "trainable_parameters")
        },
    }


def _open_to_others(folder: Path) -> None:
    """The modes that new files have here: the scratch folder, and what safetensors writes, are the owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [folder, *folder.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def place(stage: Path, target: str) -> None:
    """Put a finished local folder at a path or fsspec URI, whole or not at all; what was there is replaced."""
    fs, path = filesystem(target)
    if is_local(target):
        new = Path(path).with_name(f".artefact.{uuid.uuid4().hex[:8]}.part")
        shutil.copytree(stage, new)
        _open_to_others(new)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(new, path)
        return
    if fs.exists(path):
        fs.rm(path, recursive=True)
    names = sorted(p.relative_to(stage).as_posix() for p in stage.rglob("*") if p.is_file())
    for name in sorted(names, key=lambda name: name == FACTS):  # the facts last: until then it does not count
        fs.put_file(str(stage / name), f"{path}/{name}")
