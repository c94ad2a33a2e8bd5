"""The artefact: what a run leaves for others. A PEFT adapter or a transformers model folder, and `ftray.json`."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftray import __version__
from ftray.config import AdaLoRA, Bottleneck, Run
from ftray.data.prepared import PreparedData
from ftray.data.tokenizer import load_tokenizer, local_model_folder
from ftray.errors import ArtefactError
from ftray.manifest import describe_files, filesystem, is_local, join, read_text, wrong_files
from ftray.model import bottleneck
from ftray.model.load import DTYPES, base_digest
from ftray.model.methods import load_trained_state
from ftray.redact import redact_values
from ftray.storage import reached
from ftray.train.card import model_card
from ftray.train.commits import take_place, write_shards

FACTS = "ftray.json"


def write_artefact(
    run: Run,
    model: Any,
    trained: Mapping[str, Tensor],
    frozen: Iterable[tuple[str, Tensor]],
    data: PreparedData,
    summary: dict[str, Any],
) -> str:
    """Write RUN/artefact whole and return its path; an older one is replaced. `trained` is a commit's parameters,
    `frozen` the others of a model that is saved whole. Raises ArtefactError if what was trained is empty or not
    finite."""
    _check(trained)
    target = place_of(run.folder)
    with staged(target) as stage:
        _save(run, model, trained, frozen, stage)
        (stage / "README.md").write_text(model_card(run, summary, data.facts), encoding="utf-8")
        facts = artefact_facts(run, data, summary) | {"files": describe_files(stage)}
        (stage / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return target


def place_of(folder: str) -> str:
    """Of the artefact in a run's folder."""
    return join(folder, "artefact")


def step_and_loss(folder: str) -> tuple[int, float | None] | None:
    """Of the artefact in a run's folder: the step that it is of, and its held-out loss. None where there is none, or
    none that is whole."""
    where = place_of(folder)
    try:
        facts = json.loads(read_text(join(where, FACTS)))
        whole = not any(wrong_files(where, facts["files"]))
        return (facts["step"], facts["metrics"].get("artefact_loss")) if whole else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def pass_frozen(run: Run, frozen: Iterable[tuple[str, Tensor]]) -> None:
    """What the other workers do while rank 0 writes the artefact: under ZeRO 3 they take part in gathering."""
    for _ in frozen if not run.method.frozen_base else ():
        pass


def _check(trained: Mapping[str, Tensor]) -> None:
    if not trained:
        raise ArtefactError("nothing was trained; no artefact was written")
    for name, tensor in trained.items():
        if tensor.numel() == 0:
            raise ArtefactError(f"{name} is empty; no artefact was written")
        if not torch.isfinite(tensor).all():
            raise ArtefactError(f"{name} holds values that are not finite; no artefact was written")


def _save(
    run: Run, model: Any, trained: Mapping[str, Tensor], frozen: Iterable[tuple[str, Tensor]], stage: Path
) -> None:
    if run.method.frozen_base:
        divided = any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # ZeRO 3
        if not divided:
            load_trained_state(model, trained)
        if isinstance(run.method, Bottleneck):
            bottleneck.save(model, run.method, run.model, stage)
            return
        with warnings.catch_warnings():
            if isinstance(run.method, AdaLoRA):  # PEFT takes a layer without any rank left for one that ZeRO emptied
                warnings.filterwarnings("ignore", message=r"Adapter .* LoRA tensor\(s\) have invalid shape")
            state = dict(trained) if divided else None
            model.save_pretrained(stage, state_dict=state, save_embedding_layers=False)  # else PEFT asks a hub about it
        _order_sets(stage / "adapter_config.json")
        (stage / "README.md").unlink(missing_ok=True)  # PEFT's; ours follows
    else:
        _save_model(model, DTYPES[run.train.precision], itertools.chain(trained.items(), frozen), stage)
        load_tokenizer(run.model, run.data.chat_template).save_pretrained(stage)


def _order_sets(path: Path) -> None:
    """PEFT writes its sets in an order that differs from process to process; equal runs shall leave equal files."""
    config = json.loads(path.read_text())
    for name in ("target_modules", "feedforward_modules"):
        if isinstance(config.get(name), list):
            config[name].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def _save_model(model: Any, dtype: torch.dtype, tensors: Iterable[tuple[str, Tensor]], stage: Path) -> None:
    """A folder as of `save_pretrained`, written a tensor at a time: a whole model may not fit one process."""
    buffers = model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    kept = ((name, buffer) for name, buffer in model.named_buffers() if name in buffers)
    whole = ((name, t.to(dtype) if t.is_floating_point() else t) for name, t in itertools.chain(tensors, kept))
    sizes: dict[str, int] = {}

    def counted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in whole:
            sizes[name] = tensor.nbytes
            yield name, tensor

    part = "model-{:05}.safetensors"
    numbers = write_shards(counted(), lambda n: stage / part.format(n))
    count = max(numbers.values())
    names = {n: f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)}
    if count == 1:
        names = {1: "model.safetensors"}
    for n, name in names.items():
        (stage / part.format(n)).rename(stage / name)
    if count > 1:
        places = {name: names[n] for name, n in numbers.items()}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (stage / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype, config.use_cache = [type(model).__name__], dtype, True
    config.save_pretrained(stage)
    if model.can_generate():
        model.generation_config.save_pretrained(stage)


_METRICS = ("base_loss", "artefact_loss", "best_loss", "final_loss", "target_tokens", "trainable_parameters")


def _number(value: float | None) -> float | None:
    """JSON has no word for a loss that is not finite, and a registry takes no such file."""
    return value if value is None or math.isfinite(value) else None


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
        "metrics": {key: _number(summary[key]) for key in _METRICS},
    }


@contextmanager
def staged(target: str) -> Iterator[Path]:
    """An empty local folder. At the end of the block it is put at `target`, a path or fsspec URI, whole or not at all,
    and what was there is replaced. On a local disk it lies beside, where `ftray doctor` finds what a crash left."""
    with reached(target, lasting=True):
        if not is_local(target):
            with tempfile.TemporaryDirectory(prefix="ftray-artefact-") as temporary:
                yield Path(temporary)
                with reached(target):
                    _upload(Path(temporary), target)
            return
        path = Path(filesystem(target)[1])
        stage = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            stage.mkdir(parents=True)
            yield stage
            _open_to_others(stage)
            take_place(stage, path)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _open_to_others(folder: Path) -> None:
    """The modes that new files have here: what safetensors writes is the owner's alone, and a copy has its source's."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [folder, *folder.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _upload(stage: Path, target: str) -> None:
    fs, path = filesystem(target)
    if fs.exists(path):
        fs.rm(path, recursive=True)
    names = sorted(p.relative_to(stage).as_posix() for p in stage.rglob("*") if p.is_file())
    for name in sorted(names, key=lambda name: name == FACTS):  # the facts last: until then it does not count
        fs.put_file(str(stage / name), f"{path}/{name}")
