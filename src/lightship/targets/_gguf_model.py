"""A llama or qwen2 as GGUF describes it: keys, names of tensors, and llama.cpp's order of the rotary pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.errors import UnsupportedError

ARCHITECTURES = ("llama", "qwen2")  # model types that are called the same in GGUF
ROPE = ("default", "linear", "llama3")
FREQUENCIES = "rope_freqs.weight"
Floats = npt.NDArray[np.float32]


def refuse(config: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError`, with the reason, for a model that is not written: it would be another one there."""
    name = config.get("model_type")
    if name not in ARCHITECTURES:
        raise UnsupportedError(f"GGUF is written for {' and '.join(ARCHITECTURES)}, not for {name!r}",
                               hint="llama.cpp's own convert_hf_to_gguf.py knows more architectures")  # fmt: skip
    rope = rope_of(config)
    windows = "sliding_attention" in (config.get("layer_types") or ())
    biased = config.get("attention_bias") or config.get("mlp_bias")
    reasons = {
        "biases (attention_bias, mlp_bias)": name == "llama" and biased,
        "sliding windows": config.get("use_sliding_window") or windows,
        f"the activation {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
        f"positions scaled by {rope['rope_type']!r}": rope["rope_type"] not in ROPE,
        "partly rotated heads": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }  # fmt: skip
    for what, found in reasons.items():
        if found:
            raise UnsupportedError(f"a {name} with {what} is not written to GGUF here",
                                   hint="try llama.cpp's own convert_hf_to_gguf.py")  # fmt: skip


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base, type and scaling of the rotary positions: `rope_parameters` of transformers 5, before that `rope_theta` and
    `rope_scaling`."""
    older = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    found = older | (config.get("rope_parameters") or {})
    return {**found, "rope_type": found.get("rope_type", found.get("type", "default"))}


def describe(writer: Any, config: Mapping[str, Any]) -> None:
    """Put the architecture of a complete transformers `config` into a `GGUFWriter`."""
    import gguf

    rope, heads = rope_of(config), config["num_attention_heads"]
    width = head_width(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def head_width(config: Mapping[str, Any]) -> int:
    """Values in a head of attention, which need not be the hidden size over the heads."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def tensors(model: Any) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Floats]]]:
    """Name, shape and content of every tensor of `model` (transformers) as GGUF has it. A tied head is none of its own.

    Raises `UnsupportedError` for a parameter that has no name there.
    """
    import gguf

    config = model.config.to_dict()
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config["model_type"])
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, parameter in model.named_parameters():  # a shared one comes once
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedError(f"GGUF has no name for the tensor {name}")
        turned = heads.get(name.split(".")[-2]) if config["model_type"] == "llama" else None
        yield found, tuple(parameter.shape), _reading(parameter, turned)
    if (factors := llama3_factors(config)) is not None:
        yield FREQUENCIES, factors.shape, lambda: factors


def _reading(parameter: Any, heads: int | None) -> Callable[[], Floats]:
    def read() -> Floats:
        values: Floats = parameter.detach().float().numpy()
        return values if heads is None else paired(values, heads)

    return read


def paired(rows: Floats, heads: int) -> Floats:
    """The rows (heads · width, …) of a q or k projection in llama.cpp's order. It rotates neighbours, row 2i with
    2i + 1 of each head; transformers rotates row i with i + width/2."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama3_factors(config: Mapping[str, Any]) -> Floats | None:
    """What llama.cpp divides each rotary frequency by for Llama 3.1's longer context, (width/2,); None without it.

    Frequencies whose wave is longer than the old context over `low_freq_factor` are slowed by `factor`, those shorter
    than it over `high_freq_factor` stay, those between are in between (arXiv:2407.21783, and Meta's code for it).
    """
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    width, low, high = head_width(config), rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies = rope["rope_theta"] ** (-np.arange(0, width, 2) / width)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the old context
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: Floats = (1 / ((1 - share) / rope["factor"] + share)).astype(np.float32)
    return factors


def rope_factors_in(reader: Any, architecture: str) -> Floats | None:
    """What a GGUF file says its rotary frequencies are to be divided by, None where nothing."""
    found = [np.array(tensor.data, np.float32) for tensor in reader.tensors if tensor.name == FREQUENCIES]
    if found:
        return found[0]
    kind = reader.get_field(f"{architecture}.rope.scaling.type")
    if kind is None or kind.contents() != "linear":
        return None
    return np.array([reader.get_field(f"{architecture}.rope.scaling.factor").contents()], np.float32)
