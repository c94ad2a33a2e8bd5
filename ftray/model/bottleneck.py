"""Bottleneck adapters: small layers behind the parts of every block (Houlsby et al. 2019, Pfeiffer et al. 2020).

An adapter takes what attention or feed-forward part puts out, before it joins the residual stream, and adds
scale · up(activation(down(x))) to it; `up` starts at zero, so the model starts as its base. PEFT has no such method:
this module also saves adapters and loads them onto any base of a family it knows.

    model = load(AutoModelForCausalLM.from_pretrained(base), folder)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ftray import config
from ftray.errors import ArtefactError, ModelError
from ftray.model.adapter_config import BottleneckSettings as Settings
from ftray.model.targets import ATTENTION_PARTS, BOTTLENECK, FEED_FORWARD_PARTS

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


def settings_of(method: config.Bottleneck, base: config.Model | None = None) -> Settings:
    origin = {"base_model_name_or_path": base.path, "revision": base.revision} if base else {}
    knobs = method.model_dump(include={"size", "placement", "activation", "dropout", "scale"})
    return Settings.model_validate(origin | knobs)


class BottleneckAdapter(nn.Module):
    """[…, hidden] → […, hidden]"""

    def __init__(self, hidden: int, settings: Settings) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(hidden, settings.size), nn.Linear(settings.size, hidden)
        self.activation, self.dropout = _ACTIVATIONS[settings.activation](), nn.Dropout(settings.dropout)
        self.scale = settings.scale
        self._disable_adapters = False
        """True: nothing is added. Named as in PEFT's layers, so that who switches those off switches this off too."""
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self._disable_adapters:
            return x
        inner = x if torch.is_autocast_enabled(x.device.type) else x.to(self.down.weight.dtype)
        added = self.scale * self.up(self.activation(self.down(self.dropout(inner))))
        return x + added.to(x.dtype)


def insert(model: Any, settings: Settings) -> None:
    """Put fresh adapters, in fp32, into a transformers model. Raises ModelError when its blocks are not known."""
    hidden = model.config.get_text_config().hidden_size
    for part in _places(model, settings.placement):
        device = next(part.parameters()).device
        part.add_module(BOTTLENECK, BottleneckAdapter(hidden, settings).to(device))
        part.register_forward_hook(_adapt)


def _adapt(part: nn.Module, _inputs: Any, output: Any) -> Any:
    adapter = part.get_submodule(BOTTLENECK)
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


def _places(model: Any, placement: str) -> Iterator[nn.Module]:
    """The attention (`houlsby` alone) and feed-forward parts of every block, in order."""
    count = model.config.get_text_config().num_hidden_layers
    stacks = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    wanted = (ATTENTION_PARTS, FEED_FORWARD_PARTS) if placement == "houlsby" else (FEED_FORWARD_PARTS,)
    for block in stacks[0] if stacks else []:
        for names in wanted:
            parts = [child for name, child in block.named_children() if name in names]
            if len(parts) != 1:
                raise _unknown(model, f"a block has {', '.join(dict(block.named_children()))}")
            yield parts[0]
    if not stacks:
        raise _unknown(model, f"no list of {count} blocks was found")


def _unknown(model: Any, why: str) -> ModelError:
    family = model.config.get_text_config().model_type
    return ModelError(
        f"bottleneck adapters do not know where to stand in the family {family!r}: {why}",
        where="method.name",
        hint=f"they need one of {', '.join(ATTENTION_PARTS)} and one of {', '.join(FEED_FORWARD_PARTS)} in each block;"
        " use lora",
    )


def _tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if f".{BOTTLENECK}." in name}


# --------------------------------------------------------------------------------------------------------- on the disk


def save(model: nn.Module, method: config.Bottleneck, base: config.Model, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`."""
    from safetensors.torch import save_file

    tensors = {name: p.detach().cpu().contiguous() for name, p in _tensors(model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = settings_of(method, base).model_dump_json(indent=2)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def load(model: Any, folder: str | os.PathLike[str]) -> Any:
    """`model`, a transformers model, with the adapters of `folder` in it, in evaluation mode.

    Raises ArtefactError unless keys and shapes are exactly those that base and config imply and all values are finite;
    the model is unchanged then.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = os.fspath(folder)
    try:
        text = (Path(folder) / "adapter_config.json").read_text(encoding="utf-8")
        settings = Settings.model_validate(json.loads(text))
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
    except (OSError, ValueError, ValidationError, SafetensorError) as error:
        raise ArtefactError(f"no bottleneck adapter that can be read: {error}", where=where) from None
    if _tensors(model):
        raise ArtefactError("the model has bottleneck adapters already", where=where, hint="load the base again")
    expected = _expected(model, settings)
    if odd := sorted(expected.keys() ^ tensors.keys()):
        raise ArtefactError(f"its tensors are not those that this base implies, for example {odd[:3]}", where=where)
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise ArtefactError(f"{name} is {tuple(tensor.shape)}, and this base needs {expected[name]}", where=where)
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ArtefactError(f"{name} holds values that are not finite numbers", where=where)
    insert(model, settings)
    with torch.no_grad():
        for name, parameter in _tensors(model).items():
            parameter.copy_(tensors[name])
            parameter.requires_grad_(False)
    return model.eval()


def _expected(model: Any, settings: Settings) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by key."""
    hidden = model.config.get_text_config().hidden_size
    with torch.device("meta"):
        adapter = BottleneckAdapter(hidden, settings)
    names = {module: name for name, module in model.named_modules()}
    places = [names[part] for part in _places(model, settings.placement)]
    return {f"{at}.{BOTTLENECK}.{key}": tuple(p.shape) for at in places for key, p in adapter.named_parameters()}
