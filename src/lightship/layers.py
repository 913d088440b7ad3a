"""Where a model has its layers, and the linear layers in them, whatever the architecture calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightship.errors import UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import nn


def stacks(model: Any) -> dict[str, nn.ModuleList]:
    """The stacks of layers of `model` by name: one of a decoder or encoder, two of an encoder-decoder.

    Raises `UnsupportedError` when there is none.
    """
    from torch import nn

    config = model.config
    names = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
    counts = {getattr(config, name, None) for name in names} - {None}
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) in counts and not inside:
            found[name] = module
    if not found:
        raise UnsupportedError(f"{type(model).__name__} has no stack of layers that is known here")
    return found


def linears(model: Any) -> dict[str, nn.Module]:
    """The linear layers within the stacks by their name in `model`, in its order: each a Linear, or the Conv1D of GPT-2
    which is one with a transposed weight. Embedding and head are not among them, nor layers of low rank."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from lightship.low_rank import LowRank

    found = {}
    for stack, layers in stacks(model).items():
        factors = {id(part) for each in layers.modules() if isinstance(each, LowRank) for part in each}
        for name, module in layers.named_modules():
            if type(module) in (nn.Linear, Conv1D) and id(module) not in factors:  # a router of experts is one too
                found[f"{stack}.{name}"] = module
    return found


def weight_of(layer: Any) -> torch.Tensor:
    """The weight of a linear layer as (outputs, inputs); of a Conv1D a transposed view of its own."""
    from torch import nn

    weight: torch.Tensor = layer.weight.data
    return weight if isinstance(layer, nn.Linear) else weight.T
