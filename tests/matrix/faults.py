"""Faults seeded into what is exported, while the original stays right: the gate must stop every one.

Each is a mistake that converters have really made, at its real size. A fault changes the loaded model in place; the
export then traces the changed model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightship.checkpoint import Checkpoint
from tests.matrix.families import FAMILIES, SPREAD

Fault = Callable[[Any], None]
LOST_BASE = 10_000.0  # what a converter that finds no base takes


@dataclass(frozen=True)
class Faulty(Checkpoint):
    """A checkpoint that an export loads wrongly."""

    fault: Fault

    def load(self, dtype: str | None = None) -> Any:
        model = super().load(dtype)
        self.fault(model)
        return model


# ── Positions ───────────────────────────────────────────────────────────────


def rope_base(model: Any) -> None:
    """The RoPE base falls back to 10 000."""
    _rotate(model, {"rope_theta": LOST_BASE})


def rope_scaling(model: Any) -> None:
    """The RoPE is not scaled."""
    _rotate(model, {"rope_type": "default"})


def partial_rotary(model: Any) -> None:
    """All channels are rotated instead of a share."""
    _rotate(model, {"partial_rotary_factor": 1.0})


def rope_layout(model: Any) -> None:
    """Queries and keys lie in the layout of interleaved pairs, as GGUF has them, and are rotated by halves."""
    for attention in attentions(model):
        for projection in (attention.q_proj, attention.k_proj):
            for each in projection.parameters():
                pairs = each.data.reshape(-1, attention.head_dim // 2, 2, *each.shape[1:])
                each.data = pairs.transpose(1, 2).reshape(each.shape).contiguous()


def nope_layers(model: Any) -> None:
    """The layers without RoPE have it."""
    for attention in attentions(model):
        attention.use_rope = 1


def padding_counted(model: Any) -> None:
    """Padding on the left counts as positions: harmless with RoPE, which is relative."""

    def shift(module: Any, arguments: Any, given: dict[str, Any]) -> Any:
        padding = (given["attention_mask"] == 0).sum(-1, keepdim=True)
        return arguments, {**given, "position_ids": given["position_ids"] + padding}

    body(model).register_forward_pre_hook(shift, with_kwargs=True)


# ── Masks ───────────────────────────────────────────────────────────────────


def causal_mask(model: Any) -> None:
    """Every token sees what the last one sees."""

    def open_up(module: Any, arguments: Any, given: dict[str, Any]) -> Any:
        mask = given["attention_mask"]  # None: nothing is padded, and `is_causal` decides
        seen = mask if mask is None else mask[:, :, -1:, :].expand_as(mask)
        return arguments, {**given, "attention_mask": seen}

    for attention in attentions(model):
        attention.is_causal = False
        attention.register_forward_pre_hook(open_up, with_kwargs=True)


def left_padding(model: Any) -> None:
    """Padding is read as text."""

    def see_all(module: Any, arguments: Any, given: dict[str, Any]) -> Any:
        mask = given["attention_mask"]
        return arguments, {**given, "attention_mask": (mask >= 0).to(mask.dtype)}

    body(model).register_forward_pre_hook(see_all, with_kwargs=True)


def sliding_window(model: Any) -> None:
    """Layers with a window see everything."""
    model.config.sliding_window = 1_000_000


# ── Attention and layers ────────────────────────────────────────────────────


def attention_softcap(model: Any) -> None:
    """Attention scores are not capped."""
    for attention in attentions(model):
        attention.attn_logit_softcapping = None


def final_softcap(model: Any) -> None:
    """Logits are not capped."""
    model.config.final_logit_softcapping = None


def attention_scale(model: Any) -> None:
    """Scores are scaled by the square root of the head's width, not as the configuration says."""
    for attention in attentions(model):
        attention.scaling = attention.head_dim**-0.5


def head_grouping(model: Any) -> None:
    """Query head i reads the keys of head i mod groups instead of i div groups; fused projections are cut wrongly."""
    import torch

    heads = model.config.num_attention_heads
    order = torch.arange(heads).reshape(2, -1).T.flatten()
    for attention in attentions(model):
        if hasattr(attention, "query_key_value"):  # stored as (heads, 3, width), read as (3, heads, width)
            for each in attention.query_key_value.parameters():
                cut = each.data.reshape(heads, 3, -1, *each.shape[1:]).transpose(0, 1)
                each.data = cut.reshape(each.shape).contiguous()
            continue
        width = attention.head_dim
        rows = (order[:, None] * width + torch.arange(width)).flatten()
        queries = attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.q_proj
        for each in queries.parameters():
            each.data[: len(rows)] = each.data[rows]
        attention.o_proj.weight.data = attention.o_proj.weight.data[:, rows].contiguous()


def query_key_norm(model: Any) -> None:
    """Queries and keys are not normalised."""
    import torch

    for attention in attentions(model):
        attention.q_norm, attention.k_norm = torch.nn.Identity(), torch.nn.Identity()


def dropped_bias(model: Any) -> None:
    """The attention has no biases."""
    for attention in attentions(model):
        for name, parameter in attention.named_parameters():
            if name.endswith("bias"):
                parameter.data.zero_()


def norm_epsilon(model: Any) -> None:
    """Norms take the other usual epsilon: 1e-6 for 1e-5, or the reverse."""
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 1e-6 if getattr(module, name) == 1e-5 else 1e-5)


def activation(model: Any) -> None:
    """GELU is computed exactly where its tanh form is meant, or the reverse."""
    from transformers.activations import ACT2FN

    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if type(child).__name__ in ("NewGELUActivation", "GELUTanh"):
                setattr(parent, name, ACT2FN["gelu"])
            elif type(child).__name__ == "GELUActivation":
                setattr(parent, name, ACT2FN["gelu_new"])


def shuffled_layer(model: Any) -> None:
    """The weights of the two layers are exchanged."""
    first, second = layers(model)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        one.data, other.data = other.data, one.data


def nan(model: Any) -> None:
    """One weight of the last layer is NaN."""
    matrices = [parameter for parameter in layers(model)[-1].parameters() if parameter.ndim == 2]
    matrices[-1].data[3, 5] = float("nan")


# ── Embedding and head ──────────────────────────────────────────────────────


def head(model: Any) -> None:
    """A tied head is left as it was drawn; one of its own is tied."""
    import torch

    output = model.get_output_embeddings()
    if model.config.tie_word_embeddings:
        drawn = torch.randn(output.weight.shape, generator=torch.Generator().manual_seed(1))
        output.weight = torch.nn.Parameter((drawn * SPREAD).to(model.dtype))
    else:
        output.weight = model.get_input_embeddings().weight


def embedding_scale(model: Any) -> None:
    """Embeddings are not multiplied."""
    table = model.get_input_embeddings()
    if hasattr(table, "embed_scale"):
        table.embed_scale.fill_(1.0)
    else:
        model.base_model.embedding_multiplier = 1.0


def logits_scale(model: Any) -> None:
    """Logits are not divided."""
    model.config.logits_scaling = 1.0


# ── Where they apply ────────────────────────────────────────────────────────

ALL = tuple(FAMILIES)
LEARNED = ("gpt2", "opt")  # positions
ROTARY = tuple(name for name in FAMILIES if name not in LEARNED)
GROUPED = tuple(name for name in ROTARY if name != "gpt-neox")
APPLIES: dict[Fault, tuple[str, ...]] = {
    rope_base: ROTARY,
    rope_scaling: ("llama", "qwen2", "gemma3"),
    rope_layout: tuple(name for name in GROUPED if name != "phi3"),
    partial_rotary: ("gpt-neox",),
    nope_layers: ("smollm3",),
    padding_counted: LEARNED,
    causal_mask: ALL,
    left_padding: ALL,
    sliding_window: ("mistral", "gemma2", "gemma3", "phi3", "starcoder2"),
    attention_softcap: ("gemma2",),
    final_softcap: ("gemma2",),
    attention_scale: ("gemma2", "gemma3", "granite"),
    head_grouping: ROTARY,
    query_key_norm: ("qwen3", "gemma3", "olmo2"),
    dropped_bias: ("qwen2", "gpt2", "opt", "gpt-neox", "starcoder2"),
    norm_epsilon: ALL,
    activation: ("gemma2", "gemma3", "gpt2", "gpt-neox", "starcoder2"),
    shuffled_layer: ALL,
    nan: ALL,
    head: ALL,
    embedding_scale: ("gemma2", "gemma3", "granite"),
    logits_scale: ("granite",),
}


def body(model: Any) -> Any:
    """The module that takes masks and positions."""
    return getattr(model.base_model, "decoder", model.base_model)


def layers(model: Any) -> list[Any]:
    """The decoder layers."""
    return next(list(module) for name, module in model.named_modules() if name.split(".")[-1] in ("layers", "h"))


def attentions(model: Any) -> Iterator[Any]:
    """The attention of every layer."""
    for layer in layers(model):
        yield next(child for name, child in layer.named_children() if name in ("self_attn", "attn", "attention"))


def _rotate(model: Any, changes: dict[str, Any]) -> None:
    """Build the rotary embeddings anew with `changes` in their parameters."""
    config = copy.deepcopy(model.config)
    by_layer_type = [value for value in config.rope_parameters.values() if isinstance(value, dict)]
    for parameters in by_layer_type or [config.rope_parameters]:
        parameters.update(changes)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RotaryEmbedding"):
                setattr(parent, name, type(child)(config))
