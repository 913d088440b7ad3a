"""What a configuration cannot say, in `structure.json`: layers whose sizes differ, what is of low rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightship.errors import SourceError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSIONS = (1, 2)  # the first knows no layers of low rank, and is still written where there are none
STRUCTURE_FIELDS = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
LLAMA_PARTS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.head_dim",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Structure:
    """How a model differs from its configuration: the sizes of every layer, None where all are as configured; and the
    rank of each linear layer, embedding or head that is a product of two, by its name in the model."""

    layers: list[dict[str, int]] | None = None
    low_rank: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.layers is not None or bool(self.low_rank)

    @staticmethod
    def read(value: Mapping[str, Any], path: Path, config: Mapping[str, Any]) -> Structure:
        """What `path` (structure.json) holds, checked against `config`. Raises `SourceError` saying what is wrong."""
        version, layers = value.get("version"), value.get("layers")
        if version not in VERSIONS or not isinstance(layers, list if version == 1 else list | None):
            raise SourceError(
                f"{path} is of version {version!r}, expected {' or '.join(map(str, VERSIONS))} with layers"
            )
        low_rank = value.get("low_rank", {}) if version == 2 else {}
        if not isinstance(low_rank, dict) or any(type(rank) is not int or rank < 1 for rank in low_rank.values()):
            raise SourceError(f"{path}: low_rank needs the rank, 1 or more, of each layer that it names")
        if layers is not None:
            _check_layers(layers, path, config)
        return Structure(layers, low_rank)

    def written(self) -> dict[str, Any]:
        """As `structure.json` holds it."""
        if not self.low_rank:
            return {"version": 1, "layers": self.layers}
        return {"version": 2, "layers": self.layers, "low_rank": dict(self.low_rank)}

    def build(self, model: Any) -> None:
        """Give `model`, made from its configuration, these shapes, contents undefined. Raises `SourceError` for a layer
        that it does not have, `UnsupportedError` for sizes of layers that are not llama-like."""
        from lightship.layers import linears
        from lightship.low_rank import LowRank, build_tables, tables

        if self.layers is not None:
            for layer, sizes in zip(llama_layers(model), self.layers, strict=True):
                resize(layer, sizes)
        if not self.low_rank:
            return
        known, of_tokens = linears(model), tables(model)
        for name, rank in self.low_rank.items():
            if name not in known and name not in of_tokens:
                raise SourceError(f"structure.json: {type(model).__name__} has no linear layer {name[:200]!r}")
            if name in known:
                replace_module(model, name, LowRank.of(known[name], rank))
        build_tables(model, {name: rank for name, rank in self.low_rank.items() if name in of_tokens})


def replace_module(model: Any, name: str, module: Any) -> None:
    """Put `module` where `name` is in `model`."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)


def _check_layers(layers: list[Any], path: Path, config: Mapping[str, Any]) -> None:
    """As many layers as configured, sizes positive and never grown, query heads a multiple of the key-value heads."""
    if len(layers) != config.get("num_hidden_layers"):
        raise SourceError(f"{path} has {len(layers)} layers, config.json {config.get('num_hidden_layers')}")
    heads = config.get("num_attention_heads")
    whole = {
        "intermediate_size": config.get("intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
    }
    for layer, sizes in enumerate(layers):
        if not isinstance(sizes, dict) or set(sizes) != set(STRUCTURE_FIELDS):
            raise SourceError(f"{path}, layer {layer}: expected exactly {', '.join(STRUCTURE_FIELDS)}")
        for name, size in sizes.items():
            if type(size) is not int or not 1 <= size <= (whole[name] or 0):
                raise SourceError(f"{path}, layer {layer}: {name} is {size!r}, expected 1 to {whole[name]}")
        if sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
            raise SourceError(f"{path}, layer {layer}: query heads are no multiple of key-value heads: {sizes}")


def structure_of(model: PreTrainedModel) -> Structure:
    """How the weights of `model` differ from its configuration."""
    from lightship.low_rank import LowRank, LowRankEmbedding

    both = LowRank | LowRankEmbedding
    low_rank = {name: module.rank for name, module in model.named_modules() if isinstance(module, both)}
    return Structure(_sizes(model), low_rank)


def _sizes(model: PreTrainedModel) -> list[dict[str, int]] | None:
    """The sizes of every layer as the weights have them; None where all agree with the configuration."""
    whole = {name: getattr(model.config, name, None) for name in STRUCTURE_FIELDS}
    try:
        layers = llama_layers(model)
    except UnsupportedError:
        return None  # such a model has no layers that could be cut
    found = []
    for layer in layers:
        attention = layer.self_attn
        sizes = (
            _width(layer.mlp.down_proj, "in_features"),
            _width(attention.q_proj, "out_features") // attention.head_dim,
            _width(attention.k_proj, "out_features") // attention.head_dim,
        )
        found.append(dict(zip(STRUCTURE_FIELDS, sizes, strict=True)))
    return None if all(sizes == whole for sizes in found) else found


def _width(layer: Any, side: str) -> int:
    """`in_features` or `out_features` of a layer, which may be of low rank."""
    part = {"in_features": "reduce", "out_features": "expand"}[side]
    return int(getattr(getattr(layer, part, layer), side))


def llama_layers(model: Any) -> list[Any]:
    """The decoder layers of a llama-like model (separate q, k, v, o and gate, up, down projections). Raises
    `UnsupportedError` for others."""
    layers = list(getattr(getattr(model, "model", None), "layers", ()))
    if not layers or not all(_has(layer, part) for layer in layers for part in LLAMA_PARTS):
        raise UnsupportedError(
            f"structure.json needs llama-like layers; {type(model).__name__} has others",
            hint="cut layers differ only in models with q, k, v, o and gate, up, down projections",
        )
    return layers


def _has(layer: Any, part: str) -> bool:
    outer, inner = part.split(".")
    return hasattr(getattr(layer, outer, None), inner)


def resize(layer: Any, sizes: Mapping[str, int]) -> None:
    """Give the projections of one llama-like layer new shapes, their contents undefined."""
    attention, mlp = layer.self_attn, layer.mlp
    queries = sizes["num_attention_heads"] * attention.head_dim
    keys = sizes["num_key_value_heads"] * attention.head_dim
    channels = sizes["intermediate_size"]
    for owner, name, inputs, outputs in (
        (attention, "q_proj", None, queries), (attention, "k_proj", None, keys), (attention, "v_proj", None, keys),
        (attention, "o_proj", queries, None), (mlp, "gate_proj", None, channels), (mlp, "up_proj", None, channels),
        (mlp, "down_proj", channels, None),
    ):  # fmt: skip
        old = getattr(owner, name)
        shape = (inputs or old.in_features, outputs or old.out_features)
        weight = old.weight
        setattr(owner, name, type(old)(*shape, old.bias is not None, device=weight.device, dtype=weight.dtype))
    attention.num_key_value_groups = sizes["num_attention_heads"] // sizes["num_key_value_heads"]
