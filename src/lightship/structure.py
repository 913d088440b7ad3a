"""Layers that differ from each other: their sizes in `structure.json`, and models that are built by them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightship.errors import SourceError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STRUCTURE_VERSION = 1
STRUCTURE_FIELDS = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
LLAMA_PARTS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.head_dim",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def checked_structure(value: Mapping[str, Any], path: Path, config: Mapping[str, Any]) -> list[dict[str, int]]:
    """The layers in `value`, which `path` (structure.json) holds, checked against `config`: as many layers, sizes
    positive and never grown, query heads a multiple of the key-value heads. Raises `SourceError` saying which layer is
    wrong."""
    layers = value.get("layers")
    if value.get("version") != STRUCTURE_VERSION or not isinstance(layers, list):
        raise SourceError(f"{path} is of version {value.get('version')!r}, expected {STRUCTURE_VERSION} with layers")
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
    return layers


def structure_of(model: PreTrainedModel) -> list[dict[str, int]] | None:
    """The sizes of every layer as the weights of `model` have them; None where all agree with its configuration."""
    config = model.config
    whole = {name: getattr(config, name, None) for name in STRUCTURE_FIELDS}
    try:
        layers = llama_layers(model)
    except UnsupportedError:
        return None  # such a model has no layers that could be cut
    found = []
    for layer in layers:
        attention = layer.self_attn
        sizes = (
            layer.mlp.down_proj.in_features,
            attention.q_proj.out_features // attention.head_dim,
            attention.k_proj.out_features // attention.head_dim,
        )
        found.append(dict(zip(STRUCTURE_FIELDS, sizes, strict=True)))
    return None if all(sizes == whole for sizes in found) else found


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
