"""A base that serves, and adapters in memory: from an artefact's tensors to what the pools hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftray.config import Model
from ftray.data.tokenizer import load_tokenizer, local_model_folder
from ftray.model import load
from ftray.model.adapter_config import (
    AdaLoraSettings,
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    VeraSettings,
    read_settings,
)
from ftray.model.pooled import Bottleneck, Delta, PooledModel
from ftray.model.targets import BOTTLENECK, by_pattern


@dataclass(frozen=True)
class Adapter:
    """An adapter in the host's memory, of any method on a frozen base."""

    deltas: dict[str, Delta]
    """By path of a linear layer of the base."""
    bottlenecks: dict[str, Bottleneck]
    """By path of a part of a block."""
    prefix: Tensor | None = None
    """[layers, 2, key heads, V, D]: keys and values in front of every layer's own."""
    prompt: Tensor | None = None
    """[V, hidden]: embeddings in front of the prompt's."""

    @property
    def virtual_tokens(self) -> int:
        """Places of a slot that it takes before the prompt."""
        if self.prefix is not None:
            return self.prefix.shape[3]
        return 0 if self.prompt is None else len(self.prompt)

    @property
    def nbytes(self) -> int:
        values = [v for part in [*self.deltas.values(), *self.bottlenecks.values()] for v in vars(part).values()]
        return sum(v.nbytes for v in [*values, self.prefix, self.prompt] if isinstance(v, Tensor))


class Base:
    """One base, frozen, with pools beside its layers.

    `attention` names the implementation that transformers shall use. Raises ModelError.
    """

    def __init__(
        self,
        source: Model,
        *,
        attention: str,
        quantized: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        double_quantization: bool = True,
    ) -> None:
        self.source = source
        self.folder = local_model_folder(source)
        self.tokenizer = load_tokenizer(source)
        self.model, self.unquantized = load.load_frozen(
            source,
            quantized=quantized,
            dtype=dtype,
            device=device,
            attention=attention,
            double_quantization=double_quantization,
        )
        self.model.eval()
        self.config = self.model.config.get_text_config()
        self.pooled = PooledModel(self.model)
        self.row_norms = {path: row_norms(layer.base) for path, layer in self.pooled.linears.items()}
        """Squared norm of each row of a linear layer's weight, fp32 [out]. Taken here, because the first forward pass
        in evaluation mode lets bitsandbytes repack NF4 weights on some CPUs, after which none can be read."""
        with torch.no_grad():  # the repacking now, in one thread: two that come first together would both do it
            for layer in self.pooled.linears.values():
                layer.base(torch.zeros(1, 1, layer.inputs, dtype=dtype, device=self.model.device))

    @property
    def digest(self) -> str:
        """As in `ftray.json`."""
        return load.base_digest(self.folder)

    def read(self, folder: str | Path) -> Adapter:
        """The adapter of a checked artefact folder, on the host in the base's type. Raises ArtefactError."""
        from safetensors.torch import load_file

        text = Path(folder, "adapter_config.json").read_text(encoding="utf-8")
        settings = read_settings(json.loads(text), str(folder))
        tensors = load_file(Path(folder, "adapter_model.safetensors"))
        with torch.no_grad():
            own = {name.removeprefix("base_model.model."): tensor.float() for name, tensor in tensors.items()}
            return _READERS[type(settings)](self, settings, own)

    def gain(self, path: str, magnitude: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """DoRA's magnitude / ‖W + BA‖ by rows (Liu et al. 2024, equation 5), fp32 [out]; `up` is scaled.

        W is not at hand in NF4, but W Aᵀ is: the layer's own output for A's rows.
        """
        linear = self.pooled.linears[path].base
        image = linear(down.to(self.model.dtype).to(self.model.device)).float()  # [r, out]
        if (bias := getattr(linear, "bias", None)) is not None:
            image = image - bias.float()
        image, norms = image.cpu(), self.row_norms[path].cpu()
        squared = norms + 2 * (up * image).sum(0) + (up * ((down @ down.T) @ up)).sum(0)
        return magnitude / squared.clamp_min(1e-12).sqrt()

    def stored(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.model.dtype).contiguous()


def row_norms(linear: Any) -> Tensor:
    """Squared norm of each row of a linear layer's weight, fp32 [out]. Not after a forward pass in evaluation mode."""
    weight = linear.weight
    if type(linear).__name__ == "Linear4bit":
        import bitsandbytes as bnb

        whole = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        return whole.square().sum(1)
    outputs = 0 if type(linear).__name__ == "Conv1D" else 1  # GPT-2 holds weights as [in, out]
    return weight.detach().float().square().sum(outputs)


# ------------------------------------------------------------------------------------------- one reader for each type


def _of_layers(tensors: Mapping[str, Tensor], ending: str) -> dict[str, Tensor]:
    """Tensors whose names end so, by the path before it."""
    return {name.removesuffix(ending): t for name, t in tensors.items() if name.endswith(ending)}


def _lora(base: Base, settings: LoraSettings, tensors: Mapping[str, Tensor]) -> Adapter:
    deltas = {}
    ups = _of_layers(tensors, ".lora_B.weight")
    magnitudes = _of_layers(tensors, ".lora_magnitude_vector")
    for path, down in _of_layers(tensors, ".lora_A.weight").items():
        rank, alpha = len(down), by_pattern(path, settings.alpha_pattern, settings.lora_alpha)
        up = alpha / (rank**0.5 if settings.use_rslora else rank) * ups[path].T
        gain = base.gain(path, magnitudes[path], down, up) if path in magnitudes else None
        deltas[path] = Delta(base.stored(down), base.stored(up), None if gain is None else base.stored(gain))
    return Adapter(deltas, {})


def _adalora(base: Base, settings: AdaLoraSettings, tensors: Mapping[str, Tensor]) -> Adapter:
    deltas = {}
    ups, values = _of_layers(tensors, ".lora_B"), _of_layers(tensors, ".lora_E")
    scale = settings.lora_alpha / (settings.init_r + 1e-5)  # PEFT's, to the last digit
    for path, down in _of_layers(tensors, ".lora_A").items():
        if len(down):  # a layer may have lost all its ranks
            deltas[path] = Delta(base.stored(down * values[path]), base.stored(scale * ups[path].T))
    return Adapter(deltas, {})


def _vera(base: Base, settings: VeraSettings, tensors: Mapping[str, Tensor]) -> Adapter:
    """As low-rank rows of its own: what VeRA shares among layers would have to be multiplied all the same."""
    a, b = tensors["base_model.vera_A"], tensors["base_model.vera_B"]  # [r, widest in], [widest out, r]
    deltas = {}
    inner = _of_layers(tensors, ".vera_lambda_d")
    for path, outer in _of_layers(tensors, ".vera_lambda_b").items():
        down = inner[path][:, None] * a[:, : base.pooled.linears[path].inputs]
        up = b[: len(outer)].T * outer
        deltas[path] = Delta(base.stored(down), base.stored(up))
    return Adapter(deltas, {})


def _ia3(base: Base, settings: Ia3Settings, tensors: Mapping[str, Tensor]) -> Adapter:
    deltas = {}
    for path, vector in _of_layers(tensors, ".ia3_l").items():
        scale = base.stored(vector.flatten())
        deltas[path] = Delta(scale_in=scale) if settings.scales_inputs(path) else Delta(scale_out=scale)
    return Adapter(deltas, {})


def _prefix(base: Base, settings: PrefixSettings, tensors: Mapping[str, Tensor]) -> Adapter:
    flat = tensors["prompt_embeddings"]  # [V, layers · 2 · heads · D]
    parts = flat.view(len(flat), settings.num_layers, 2, settings.num_attention_heads, -1)
    return Adapter({}, {}, prefix=base.stored(parts.permute(1, 2, 3, 0, 4)))


def _prompt(base: Base, settings: PromptSettings, tensors: Mapping[str, Tensor]) -> Adapter:
    return Adapter({}, {}, prompt=base.stored(tensors["prompt_embeddings"]))


def _bottleneck(base: Base, settings: BottleneckSettings, tensors: Mapping[str, Tensor]) -> Adapter:
    parts = {}
    for path, down in _of_layers(tensors, f".{BOTTLENECK}.down.weight").items():
        stem = f"{path}.{BOTTLENECK}"
        parts[path] = Bottleneck(
            base.stored(down),
            base.stored(tensors[f"{stem}.down.bias"]),
            base.stored(settings.scale * tensors[f"{stem}.up.weight"].T),
            base.stored(settings.scale * tensors[f"{stem}.up.bias"]),
            settings.activation,
        )
    return Adapter({}, parts)


_READERS: dict[type, Callable[..., Adapter]] = {
    LoraSettings: _lora,
    AdaLoraSettings: _adalora,
    VeraSettings: _vera,
    Ia3Settings: _ia3,
    PrefixSettings: _prefix,
    PromptSettings: _prompt,
    BottleneckSettings: _bottleneck,
}
