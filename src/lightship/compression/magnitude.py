"""Zero the smallest weights (Han et al. 2015, arXiv:1506.02626): the baseline of all pruning. Nothing gets faster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lightship.layers import linears, weight_of
from lightship.step import Context, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Magnitude(Step):
    """Zero the weights of linear layers that are smallest in magnitude. Embedding and head are left whole."""

    sparsity: float = Field(0.5, ge=0.0, lt=1.0, description="share of the weights that become zero")
    scope: Literal["layer", "model"] = Field("layer", description="compared within each linear layer, or all together")

    def change(self, model: PreTrainedModel, context: Context) -> dict[str, Any]:
        import torch

        weights = [weight_of(layer) for layer in linears(model).values()]
        groups = [weights] if self.scope == "model" else [[weight] for weight in weights]
        for group in groups:
            sizes = torch.cat([weight.abs().flatten() for weight in group])
            count = int(self.sparsity * len(sizes))
            if count:
                limit = sizes.kthvalue(count).values
                for weight in group:
                    weight[weight.abs() <= limit] = 0
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        return {"zeros": zeros, "of": sum(weight.numel() for weight in weights)}
