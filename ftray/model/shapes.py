"""The shape of a base, from its config.json alone: every linear layer, and exact parameter counts. No torch.

    shapes = shapes_of({"model_type": "llama", "hidden_size": 4096, …})
    shapes.parameters, shapes.linears[0].path

Paths and counts are those of transformers' `…ForCausalLM` classes (a test compares them). `source.py` finds the
config.json; families unknown here are measured there on torch's meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ftray.errors import ModelError

NF4_OUTPUTS_MULTIPLE = 32
"""bitsandbytes 0.50 packs NF4 weights for the CPU only when out_features is a multiple of this."""
NF4_INPUTS_MULTIPLE = 64
"""A block of 64 weights with one scale must not reach over the end of a row."""


@dataclass(frozen=True)
class Linear:
    path: str
    """Full name of the module, for example `model.layers.0.self_attn.q_proj`."""
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Elements of the weight, without bias."""
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        return self.weights + (self.outputs if self.bias else 0)

    @property
    def fits_nf4(self) -> bool:
        """False: NF4 cannot hold this layer, it stays unquantized and the user is told."""
        return self.outputs % NF4_OUTPUTS_MULTIPLE == 0 and self.inputs % NF4_INPUTS_MULTIPLE == 0


@dataclass(frozen=True)
class Part:
    """A parameter that belongs to no linear layer."""

    path: str
    """Its full name, for example `model.norm.weight`."""
    elements: int
    kind: str
    """`embedding`, `norm` or `other`."""


@dataclass(frozen=True)
class Shapes:
    family: str
    """`model_type` of config.json."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width between the two (or three) linears of the feed-forward part."""
    gated: bool
    """The feed-forward part multiplies by a gate (SwiGLU, GeGLU)."""
    vocabulary: int
    linears: tuple[Linear, ...]
    """Every linear layer but the output head, in the model's order."""
    head: Linear
    tied: bool
    """The head's weight is the embedding's."""
    parts: tuple[Part, ...]
    """Embeddings, normalizations and whatever else is no linear layer, each parameter once."""
    positions: int | None = None
    """The longest sequence; None where config.json does not say."""
    learned_positions: bool = False
    """Each position has an embedding, so that there are no others; false: they are computed (RoPE)."""

    @property
    def embeddings(self) -> int:
        """Parameters of token and position embeddings."""
        return sum(part.elements for part in self.parts if part.kind == "embedding")

    @property
    def norms(self) -> int:
        """Parameters of all normalizations."""
        return sum(part.elements for part in self.parts if part.kind != "embedding")

    @property
    def parameters(self) -> int:
        """All parameters, each counted once."""
        head = 0 if self.tied else self.head.parameters
        return self.embeddings + self.norms + sum(layer.parameters for layer in self.linears) + head

    def unquantized(self) -> list[str]:
        """Paths of the linears that NF4 cannot hold."""
        return [layer.path for layer in self.linears if not layer.fits_nf4]


def shapes_of(config: dict[str, Any], where: str = "config.json") -> Shapes:
    """Shapes of a config.json. Raises ModelError for one that lacks what its family needs; `KNOWN_FAMILIES` lists what
    can be read here."""
    family = config.get("model_type")
    if family not in KNOWN_FAMILIES:
        raise ModelError(
            f"no shape table for model_type {family!r}", where=where, hint=f"known: {', '.join(sorted(KNOWN_FAMILIES))}"
        )
    try:
        return KNOWN_FAMILIES[family](config)
    except KeyError as error:
        raise ModelError(f"{family} needs the key {error.args[0]!r}", where=where) from None


# -------------------------------------------------------------------------------------------------- the Llama-like ones


@dataclass(frozen=True)
class _LlamaLike:
    """What the members of the family differ in."""

    qkv_bias: bool | None = None
    """None: as `attention_bias` says."""
    output_bias: bool | None = None
    default_kv_heads: int | None = None
    default_head_dim: int | None = None
    default_tied: bool = False
    block_norms: int = 2
    head_norms: bool = False
    """Norms of queries and keys, of head_dim each."""
    fused: bool = False
    """`qkv_proj` and `gate_up_proj`, as in Phi-3."""

    def __call__(self, config: dict[str, Any]) -> Shapes:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        layers, vocabulary = config["num_hidden_layers"], config["vocab_size"]
        kv_heads = config.get("num_key_value_heads") or self.default_kv_heads or heads
        head_dim = config.get("head_dim") or self.default_head_dim or hidden // heads
        linears = self._linears(config, layers, hidden, heads * head_dim, kv_heads * head_dim)
        return Shapes(
            family=config["model_type"],
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=config["intermediate_size"],
            gated=True,
            vocabulary=vocabulary,
            linears=tuple(linears),
            head=Linear("lm_head", hidden, vocabulary),
            tied=config.get("tie_word_embeddings", self.default_tied),
            parts=tuple(self._parts(layers, hidden, head_dim, vocabulary)),
            positions=config.get("max_position_embeddings"),
        )

    def _parts(self, layers: int, hidden: int, head_dim: int, vocabulary: int) -> Iterator[Part]:
        yield Part("model.embed_tokens.weight", vocabulary * hidden, "embedding")
        block_norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")[: self.block_norms]
        for i in range(layers):
            for name in block_norms:
                yield Part(f"model.layers.{i}.{name}_layernorm.weight", hidden, "norm")
            for name in ("q_norm", "k_norm") if self.head_norms else ():
                yield Part(f"model.layers.{i}.self_attn.{name}.weight", head_dim, "norm")
        yield Part("model.norm.weight", hidden, "norm")

    def _linears(self, config: dict[str, Any], layers: int, hidden: int, q: int, kv: int) -> Iterator[Linear]:
        by_config = bool(config.get("attention_bias", False))
        qkv_bias = by_config if self.qkv_bias is None else self.qkv_bias
        o_bias = by_config if self.output_bias is None else self.output_bias
        mlp_bias, width = bool(config.get("mlp_bias", False)), config["intermediate_size"]
        for i in range(layers):
            attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
            if self.fused:
                yield Linear(f"{attention}.o_proj", q, hidden)
                yield Linear(f"{attention}.qkv_proj", hidden, q + 2 * kv)
                yield Linear(f"{mlp}.gate_up_proj", hidden, 2 * width)
            else:
                yield Linear(f"{attention}.q_proj", hidden, q, qkv_bias)
                yield Linear(f"{attention}.k_proj", hidden, kv, qkv_bias)
                yield Linear(f"{attention}.v_proj", hidden, kv, qkv_bias)
                yield Linear(f"{attention}.o_proj", q, hidden, o_bias)
                yield Linear(f"{mlp}.gate_proj", hidden, width, mlp_bias)
                yield Linear(f"{mlp}.up_proj", hidden, width, mlp_bias)
            yield Linear(f"{mlp}.down_proj", width, hidden, mlp_bias)


# --------------------------------------------------------------------------------------------------- GPT-2 and GPT-NeoX


def _layer_norms(paths: list[str], hidden: int) -> Iterator[Part]:
    for path in paths:
        for name in ("weight", "bias"):
            yield Part(f"{path}.{name}", hidden, "norm")


def _gpt2(config: dict[str, Any]) -> Shapes:
    hidden, heads = config["n_embd"], config["n_head"]
    layers, vocabulary = config["n_layer"], config["vocab_size"]
    width = config.get("n_inner") or 4 * hidden
    linears = []
    for i in range(layers):
        block = f"transformer.h.{i}"
        linears += [
            Linear(f"{block}.attn.c_attn", hidden, 3 * hidden, True),
            Linear(f"{block}.attn.c_proj", hidden, hidden, True),
            Linear(f"{block}.mlp.c_fc", hidden, width, True),
            Linear(f"{block}.mlp.c_proj", width, hidden, True),
        ]
    positions = config.get("n_positions", 1024)
    return Shapes(
        family="gpt2",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=width,
        gated=False,
        vocabulary=vocabulary,
        linears=tuple(linears),
        head=Linear("lm_head", hidden, vocabulary),
        tied=config.get("tie_word_embeddings", True),
        parts=(
            Part("transformer.wte.weight", vocabulary * hidden, "embedding"),
            Part("transformer.wpe.weight", positions * hidden, "embedding"),
            *_layer_norms([f"transformer.h.{i}.ln_{n}" for i in range(layers) for n in (1, 2)], hidden),
            *_layer_norms(["transformer.ln_f"], hidden),
        ),
        positions=positions,
        learned_positions=True,
    )


def _gpt_neox(config: dict[str, Any]) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    layers, vocabulary, width = config["num_hidden_layers"], config["vocab_size"], config["intermediate_size"]
    bias = config.get("attention_bias", True)
    norms = ("input", "post_attention")
    linears = []
    for i in range(layers):
        block = f"gpt_neox.layers.{i}"
        linears += [
            Linear(f"{block}.attention.query_key_value", hidden, 3 * hidden, bias),
            Linear(f"{block}.attention.dense", hidden, hidden, bias),
            Linear(f"{block}.mlp.dense_h_to_4h", hidden, width, True),
            Linear(f"{block}.mlp.dense_4h_to_h", width, hidden, True),
        ]
    return Shapes(
        family="gpt_neox",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=width,
        gated=False,
        vocabulary=vocabulary,
        linears=tuple(linears),
        head=Linear("lm_head", hidden, vocabulary),
        tied=config.get("tie_word_embeddings", False),
        parts=(
            Part("gpt_neox.embed_in.weight", vocabulary * hidden, "embedding"),
            *_layer_norms([f"gpt_neox.layers.{i}.{n}_layernorm" for i in range(layers) for n in norms], hidden),
            *_layer_norms(["gpt_neox.final_layer_norm"], hidden),
        ),
        positions=config.get("max_position_embeddings"),
    )


KNOWN_FAMILIES: dict[str, Callable[[dict[str, Any]], Shapes]] = {
    "llama": _LlamaLike(),
    "mistral": _LlamaLike(qkv_bias=False, output_bias=False, default_kv_heads=8),
    "qwen2": _LlamaLike(qkv_bias=True, output_bias=False, default_kv_heads=32),
    "qwen3": _LlamaLike(default_kv_heads=32, default_head_dim=128, head_norms=True),
    "gemma": _LlamaLike(default_kv_heads=16, default_head_dim=256, default_tied=True),
    "gemma2": _LlamaLike(default_kv_heads=4, default_head_dim=256, default_tied=True, block_norms=4),
    "phi3": _LlamaLike(qkv_bias=False, output_bias=False, fused=True),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
