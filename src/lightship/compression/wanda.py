"""Zero the weights that matter least where they are used (Wanda, Sun et al. 2023, arXiv:2306.11695): no speed-up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from lightship.compression._activations import norms
from lightship.compression._patterns import PATTERN, Pattern, check_pattern, zero_groups, zero_rows
from lightship.errors import UnsupportedError
from lightship.layers import linears, weight_of
from lightship.step import Context, WeightStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Wanda(WeightStep):
    """Zero the weights of linear layers whose |W_ij|·‖X_j‖₂ is smallest within output i, X_j being input j over the
    calibration set. Embedding and head are left whole.

    The norms are those of the model as it comes, from one pass; the paper's code takes those of each layer after the
    layers before it were pruned.
    """

    sparsity: float = Field(0.5, ge=0.0, lt=1.0, description="share of the weights of each output that become zero")
    pattern: Pattern = Field("unstructured", description=PATTERN)

    @model_validator(mode="after")
    def _agree(self) -> Wanda:
        check_pattern(self.pattern, self.sparsity)
        return self

    def change(self, model: PreTrainedModel, context: Context) -> dict[str, Any]:
        layers = linears(model)
        lengths = norms(model, layers, context.batches)
        unread = sorted(layers.keys() - lengths.keys())
        if unread:
            raise UnsupportedError(f"nothing of the calibration set reaches {unread[0]} ({len(unread)} layers in all)",
                                   hint="take magnitude, which needs no calibration")  # fmt: skip
        zeros = total = 0
        for name, layer in layers.items():
            weight = weight_of(layer)
            score = weight.abs() * lengths[name]
            if self.pattern == "unstructured":
                zero_rows(weight, score, self.sparsity)
            else:
                zero_groups(weight, score, self.pattern, name)
            zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
        return {"zeros": zeros, "of": total}
