"""The layers of a model as a list from which some can be left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightship.errors import UnsupportedError
from lightship.layers import stacks

if TYPE_CHECKING:
    from torch import nn

# What a configuration says of each layer, as a list; what it says by a rule (every sixth) is one once it is read.
PER_LAYER = (
    "layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "attention_layers", "layer_rope_theta",
    "num_attention_heads_per_layer", "num_key_value_heads_per_layer", "rope_scaling_layers",
)  # fmt: skip
# How a configuration counts the layers of a stack whose name has the key; the first that it has.
COUNTS = {
    "decoder": ("decoder_layers", "num_decoder_layers", "num_hidden_layers"),
    "": ("num_hidden_layers", "encoder_layers", "num_layers"),
}


@dataclass(frozen=True)
class Stack:
    """One stack as it was: its name in the model, its layers, what the configuration calls their number, and its lists
    with one entry a layer."""

    name: str
    layers: tuple[nn.Module, ...]
    count: str
    lists: Mapping[str, list[Any]]


class Layers:
    """All layers of `model`, numbered through: of an encoder-decoder the decoder's after the encoder's. The numbers
    stay those of the whole model, whatever is left out."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.stacks = [_stack(model, name, layers) for name, layers in stacks(model).items()]
        self.all = [layer for stack in self.stacks for layer in stack.layers]
        self.fixed = self._fixed()

    def __len__(self) -> int:
        return len(self.all)

    def _fixed(self) -> frozenset[int]:
        """Layers that are not built as most of their stack are, such as the first of T5, which holds the position bias
        of all: they stay."""
        found, first = set(), 0
        for stack in self.stacks:
            built = [_weights(layer) for layer in stack.layers]
            usual = max(reversed(built), key=built.count)
            found |= {first + index for index, names in enumerate(built) if names != usual}
            first += len(built)
        return frozenset(found)

    def droppable(self, kept: Collection[int]) -> list[int]:
        """Those of `kept` that may go: not fixed, nor the last of their stack."""
        found, first = [], 0
        for stack in self.stacks:
            here = [number for number in range(first, first + len(stack.layers)) if number in kept]
            if len(here) > 1:
                found += [number for number in here if number not in self.fixed]
            first += len(stack.layers)
        return found

    def keep(self, kept: Collection[int]) -> None:
        """Let the model have the layers `kept` only, and its configuration say so."""
        from torch import nn

        first = 0
        for stack in self.stacks:
            here = [index for index in range(len(stack.layers)) if first + index in kept]
            owner, _, last = stack.name.rpartition(".")
            setattr(self.model.get_submodule(owner), last, nn.ModuleList([stack.layers[index] for index in here]))
            # First the lists: a configuration may refuse a number of layers that they contradict.
            for name, values in stack.lists.items():
                setattr(self.model.config, name, [values[index] for index in here])
            setattr(self.model.config, stack.count, len(here))
            first += len(stack.layers)

    def renumber(self) -> None:
        """Tell every layer its new place: caches of keys and values are found by it."""
        for layers in stacks(self.model).values():
            for index, layer in enumerate(layers):
                for module in layer.modules():
                    if getattr(module, "layer_idx", None) is not None:  # an encoder's attention has no cache
                        module.layer_idx = index


def _stack(model: Any, name: str, layers: nn.ModuleList) -> Stack:
    config = model.config
    names = next(names for key, names in COUNTS.items() if key in name)
    count = next((each for each in names if getattr(config, each, None) == len(layers)), None)
    if count is None:
        raise UnsupportedError(
            f"the configuration of {type(model).__name__} does not say how many layers {name} has",
            hint="supported are stacks counted as num_hidden_layers, encoder_layers, decoder_layers or num_layers",
        )
    found = {each: getattr(config, each, None) for each in PER_LAYER}
    lists = {each: list(values) for each, values in found.items()
             if isinstance(values, list | tuple) and len(values) == len(layers)}  # fmt: skip
    return Stack(name, tuple(layers), count, lists)


def _weights(layer: nn.Module) -> frozenset[str]:
    """The names of a layer's weights, those of low rank as if they were whole."""
    from lightship.low_rank import LowRank

    factors = {name for name, module in layer.named_modules() if isinstance(module, LowRank)}
    found = set()
    for name, _ in layer.named_parameters():
        owner, _, last = name.rpartition(".")
        outer = owner.rpartition(".")[0]
        found.add(f"{outer}.{last}" if outer in factors else name)
    return frozenset(found)
