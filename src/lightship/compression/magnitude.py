"""Zero the smallest weights (Han et al. 2015, arXiv:1506.02626): the baseline of all pruning. Nothing gets faster."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from lightship.checkpoint import Checkpoint
from lightship.compression._patterns import PATTERN, Pattern, check_pattern, zero_groups
from lightship.layers import linears, weight_of
from lightship.step import Context, WeightStep

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Magnitude(WeightStep):
    """Zero the weights of linear layers that are smallest in magnitude. Embedding and head are left whole."""

    sparsity: float = Field(0.5, ge=0.0, lt=1.0, description="share of the weights that become zero")
    scope: Literal["layer", "model"] = Field("layer", description="compared within each linear layer, or all together")
    pattern: Pattern = Field("unstructured", description=PATTERN)

    @model_validator(mode="after")
    def _agree(self) -> Magnitude:
        check_pattern(self.pattern, self.sparsity)
        return self

    def predicted_bytes(self, checkpoint: Checkpoint) -> int:
        """Of the whole model's weights another copy of their sizes, and what selecting among them takes."""
        weights = sum(map(prod, checkpoint.shapes.values()))
        return super().predicted_bytes(checkpoint) + (3 * 4 * weights if self.scope == "model" else 0)

    def change(self, model: PreTrainedModel, context: Context) -> dict[str, Any]:
        weights = {name: weight_of(layer) for name, layer in linears(model).items()}
        if self.pattern == "unstructured":
            alone = [[weight] for weight in weights.values()]
            for together in [list(weights.values())] if self.scope == "model" else alone:
                _zero_smallest(together, self.sparsity)
        else:
            for name, weight in weights.items():
                zero_groups(weight, weight.abs(), self.pattern, name)
        zeros = sum(int((weight == 0).sum()) for weight in weights.values())
        return {"zeros": zeros, "of": sum(weight.numel() for weight in weights.values())}


def _zero_smallest(weights: list[torch.Tensor], sparsity: float) -> None:
    import torch

    sizes = torch.cat([weight.abs().flatten() for weight in weights])
    count = int(sparsity * len(sizes))
    if not count:
        return
    limit = sizes.kthvalue(count).values
    left = count - int((sizes < limit).sum())  # of those that are as small as the last, the first ones: 4 bits repeat
    for weight in weights:
        gone = weight.abs() < limit
        ties = (weight.abs() == limit).nonzero()[:left]
        gone[tuple(ties.T)] = True
        left -= len(ties)
        weight[gone] = 0
