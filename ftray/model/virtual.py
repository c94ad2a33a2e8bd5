"""Virtual tokens: prompt tuning and p-tuning put trained embeddings in front of every sequence of a packed row, prefix
tuning trained keys and values in front of every layer's own.

PEFT has the encoders and the artefact; its forward pass knows no packed rows and is not used. Positions are PEFT's: a
sequence's own tokens come after the virtual ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ftray.config import Prefix, Prompt, PTuning, Run
from ftray.data.tokenizer import load_tokenizer
from ftray.errors import ModelError
from ftray.model.adapters import origin, peft_model


def attach_virtual(model: Any, run: Run) -> Any:
    """PEFT's model of `run.method` on a frozen base."""
    method: Any = run.method
    if isinstance(method, Prompt):
        initial = _initial_prompt(model, run, method)
    model = peft_model(model, _config(model, run), run)
    if isinstance(method, Prompt):
        model.prompt_encoder["default"].embedding.weight.data.copy_(initial)
    return model


def _config(model: Any, run: Run) -> Any:
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    method = run.method
    if isinstance(method, Prefix):
        return PrefixTuningConfig(
            **origin(run),
            num_virtual_tokens=method.tokens,
            prefix_projection=method.projection,
            encoder_hidden_size=method.hidden or model.config.get_text_config().hidden_size,
        )
    if isinstance(method, Prompt):
        return PromptTuningConfig(**origin(run), num_virtual_tokens=method.tokens)
    assert isinstance(method, PTuning)
    return PromptEncoderConfig(
        **origin(run),
        num_virtual_tokens=method.tokens,
        encoder_reparameterization_type=method.encoder.upper(),
        encoder_hidden_size=method.hidden,
        encoder_num_layers=method.layers,
        encoder_dropout=method.dropout,
    )


def _initial_prompt(model: Any, run: Run, method: Prompt) -> Tensor:
    """[tokens, hidden]: embeddings of the text's tokens, or of random ones."""
    embeddings = model.get_input_embeddings()
    if method.text is None:
        ids = torch.randint(0, model.config.get_text_config().vocab_size, (method.tokens,))
    else:
        found = load_tokenizer(run.model).encode(method.text, add_special_tokens=False)
        if not found:
            raise ModelError("the text has no tokens", where="method.text", hint="write some, or null")
        ids = torch.tensor([found[i % len(found)] for i in range(method.tokens)])
    with torch.no_grad():
        return embeddings(ids.to(embeddings.weight.device)).float()


def with_virtual_tokens(model: Any, batch: Any) -> dict[str, Any]:
    """The inputs of the base for a `Batch`, with what `model` puts in front of its sequences. A batch that was laid out
    without virtual tokens goes through the base as it is.

    Encoders run in fp32, so that training sees what the artefact will hold.
    """
    inputs: dict[str, Any] = batch.inputs()
    if batch.virtual is not None:
        ids = inputs.pop("input_ids")
        embeds = model.get_base_model().get_input_embeddings()(ids)
        prompt = _encoded(model).to(embeds.dtype)  # [V, D]
        count = len(batch.virtual) // len(prompt)
        inputs["inputs_embeds"] = embeds[0].index_copy(0, batch.virtual, prompt.repeat(count, 1))[None]
    elif batch.prefixed:
        config = model.peft_config["default"]
        heads, flat = config.num_attention_heads, _encoded(model)  # [V, layers · 2 · heads · D]
        inputs["prefix"] = flat.view(len(flat), config.num_layers, 2, heads, -1).permute(1, 2, 3, 0, 4)
    return inputs


def _encoded(model: Any) -> Tensor:
    encoder = model.prompt_encoder["default"]
    tokens = torch.arange(model.peft_config["default"].num_virtual_tokens, device=encoder.embedding.weight.device)
    with torch.autocast(tokens.device.type, enabled=False):
        return encoder(tokens[None])[0]
