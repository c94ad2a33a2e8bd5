"""Load a base: in bf16 or fp32, or its linear layers in NF4."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftray.config import Model, Run
from ftray.data.tokenizer import local_model_folder
from ftray.errors import ModelError
from ftray.manifest import sha256
from ftray.model import attention
from ftray.model.shapes import Linear


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """`torch.compile` leaves functions as they are."""
    name, before = "TORCHDYNAMO_DISABLE", os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.__setitem__(name, before)


# Here, before transformers or PEFT import it: it compiles what CPUs have no kernels for, and the part of torch's
# compiler that writes code, which nothing else here needs, takes each process 1.1 s of a processor (measured).
# On processors with bf16 it warns that a package is missing, which would fetch code from a model hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
with _uncompiled():
    import bitsandbytes  # noqa: F401

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_base(
    run: Run, device: torch.device | str = "cpu", division: dict[str, Any] | None = None
) -> tuple[Any, list[str]]:
    """(the base on `device`, names of the linear layers that had to stay unquantized)

    Trained from scratch (`model.random_weights`), weights are drawn from the run's seed. Full tuning holds weights in
    fp32, but for MeZO, which must not hold more than inference does; otherwise the frozen base takes
    `train.precision`. With `division`, DeepSpeed's configuration of ZeRO 3, the base is created divided. Raises
    ModelError.
    """
    from transformers import AutoModelForCausalLM

    attention.register()
    own = run.method.name == "full" or (division is not None and not run.method.frozen_base)
    whole_in_fp32 = own and run.train.optimizer != "mezo"  # ZeRO 3 divides all weights in one type
    dtype = torch.float32 if whole_in_fp32 else DTYPES[run.train.precision]
    folder, config, options = _prepared(run.model, dtype, attention.IMPLEMENTATION)
    if division is not None:
        return _load_divided(run, folder, config, options, division), []
    if run.model.random_weights:
        torch.manual_seed(run.seed)
        return AutoModelForCausalLM.from_config(config, **options).to(device), []
    double = run.method.double_quantization if run.method.quantized else None  # type: ignore[union-attr]
    return _loaded(folder, config, options, device, double)


def load_frozen(
    model: Model,
    *,
    quantized: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    attention: str,
    double_quantization: bool = True,
) -> tuple[Any, list[str]]:
    """(a base that nothing trains, names of the linear layers that had to stay unquantized). `attention` names an
    implementation that transformers knows. Raises ModelError."""
    folder, config, options = _prepared(model, dtype, attention)
    loaded, unquantized = _loaded(folder, config, options, device, double_quantization if quantized else None)
    return loaded.requires_grad_(False), unquantized


def _prepared(model: Model, dtype: torch.dtype, attention: str) -> tuple[str, Any, dict[str, Any]]:
    """(folder, its config, options of transformers' loading)"""
    from transformers import AutoConfig

    folder = local_model_folder(model)
    options = {
        "trust_remote_code": model.trust_remote_code,
        "attn_implementation": attention,
        "dtype": dtype,
    }
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"no usable config.json: {_first_line(error)}", where=folder) from None
    if getattr(config, "attn_logit_softcapping", None):
        raise ModelError(
            "this base caps its attention scores (attn_logit_softcapping), which ftray's attention cannot do yet",
            where=f"{folder}/config.json",
            hint="take a base without it, such as Gemma 3, Llama, Mistral or Qwen",
        )
    return folder, config, options


def _loaded(
    folder: str, config: Any, options: dict[str, Any], device: torch.device | str, double_quantization: bool | None
) -> tuple[Any, list[str]]:
    """`double_quantization` None: not in NF4."""
    from transformers import AutoModelForCausalLM

    unquantized: list[str] = []
    if double_quantization is not None:
        head, unquantized = misfits(config, options["trust_remote_code"])
        options["quantization_config"] = _nf4(double_quantization, options["dtype"], [head, *unquantized])
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, device_map={"": device}, output_loading_info=True, use_safetensors=True, **options
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"the weights cannot be loaded: {_first_line(error)}", where=folder) from None
    model, report = loaded
    _refuse_missing(sorted(report["missing_keys"]), folder)
    model.config.use_cache = False
    return model, unquantized


def _load_divided(run: Run, folder: str, config: Any, options: dict[str, Any], division: dict[str, Any]) -> Any:
    """A base whose parameters are divided among the workers from the moment each is made (deepspeed.zero.Init). Rank 0
    reads its weights, one at a time."""
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.integrations.deepspeed import (
        HfDeepSpeedConfig,
        initialize_weights_zero3,
        prevent_arange_dtype_change,
    )
    from transformers.modeling_utils import set_zero3_state

    with (
        no_init_weights(),
        prevent_arange_dtype_change(),
        deepspeed.zero.Init(config_dict_or_path=division | {"bf16": {"enabled": options["dtype"] == torch.bfloat16}}),
        set_zero3_state(),
    ):
        model = AutoModelForCausalLM.from_config(config, **options)
    model.tie_weights()
    model.config.use_cache = False
    if run.method.name == "dora":  # PEFT gathers the weights whose norms it takes as long as this lives
        model.divided = HfDeepSpeedConfig(division)
    if run.model.random_weights:
        torch.manual_seed(run.seed)
        initialize_weights_zero3(model)
    else:
        _fill(model, folder)
    return model


def _fill(model: Any, folder: str) -> None:
    """Weights from the safetensors files of `folder` into a divided model. Raises ModelError, on every worker alike."""
    from deepspeed import zero
    from safetensors import SafetensorError, safe_open

    files: dict[str, Any] = {}
    try:
        for path in sorted(Path(folder).glob("*.safetensors")):
            file = safe_open(path, "pt")
            files |= dict.fromkeys(file.keys(), file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the weights cannot be loaded: {_first_line(error)}", where=folder) from None
    stem = f"{model.base_model_prefix}."  # a base saved without its head has keys without it
    keys: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        key = name if name in files else name.removeprefix(stem)
        if key not in files:
            continue
        found = tuple(files[key].get_slice(key).get_shape())
        if found != tuple(shape(parameter)):
            raise ModelError(f"{key} is {found} in the files and {tuple(shape(parameter))} in the model", where=folder)
        keys[name] = key
    _refuse_missing([name for name, _ in model.named_parameters() if name not in keys], folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            with zero.GatheredParameters([parameter], modifier_rank=0):
                if torch.distributed.get_rank() == 0:
                    parameter.copy_(files[keys[name]].get_tensor(keys[name]))
        for name, buffer in model.named_buffers():
            if name in files:
                buffer.copy_(files[name].get_tensor(name))


def _refuse_missing(missing: list[str], folder: str) -> None:
    if missing:
        raise ModelError(
            f"{len(missing)} weights are missing, first {missing[:3]}: transformers would fill them with noise",
            where=folder,
            hint="use a complete folder, or model.random_weights: true to train from scratch",
        )


def shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter, also where ZeRO 3 has left this worker a part of it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def elements(parameter: nn.Parameter) -> int:
    """Of the whole parameter, also where ZeRO 3 has left this worker a part of it."""
    return shape(parameter).numel()


def largest_parameter(run: Run) -> int:
    """Elements of the base's largest parameter. Builds the model without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(local_model_folder(run.model), trust_remote_code=run.model.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=run.model.trust_remote_code)
    return max(p.numel() for p in model.parameters())


def _nf4(double_quantization: bool, compute: torch.dtype, skip: list[str]) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=skip,
    )


def misfits(config: Any, trust_remote_code: bool = False) -> tuple[str, list[str]]:
    """(name of the output head, names of the other linear layers whose shape NF4 cannot hold). Builds the model without
    memory."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    head = model.get_output_embeddings()
    sizes = {
        name: (module.in_features, module.out_features) if isinstance(module, nn.Linear) else tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)  # transformers quantizes GPT-2's Conv1D too
    }
    name_of_head = next(name for name, module in model.named_modules() if module is head)
    return name_of_head, [
        name for name, size in sizes.items() if name != name_of_head and not Linear(name, size[0], size[1]).fits_nf4
    ]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, in which NF4 layers keep training mode.

    In evaluation mode bitsandbytes repacks NF4 weights on CPUs with AVX512-BF16, and what reads them afterwards
    (DoRA's norms, a backward pass) silently gets wrong values.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was in training.items():
            module.training = was


def base_digest(folder: str | os.PathLike[str]) -> str:
    """SHA-256 over config.json and every safetensors file of a model folder, in hexadecimal.

    A file of the hub's cache is a link to a blob that is named by its SHA-256, which is then taken as it is.
    """
    digest = hashlib.sha256()
    files = [p for p in Path(folder).iterdir() if p.name == "config.json" or p.suffix == ".safetensors"]
    for path in sorted(files):
        blob = path.resolve().name
        known = path.is_symlink() and len(blob) == 64 and all(c in "0123456789abcdef" for c in blob)
        digest.update(f"{path.name} {blob if known else sha256(path)}\n".encode())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
