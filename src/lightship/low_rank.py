"""A linear layer as the product of two smaller ones."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn


class LowRank(nn.Sequential):  # type: ignore[misc]  # torch has no types here
    """x → (x · reduceᵀ) · expandᵀ + bias: `reduce` (rank, inputs) has no bias, `expand` (outputs, rank) has the
    layer's own. Two plain products, so every runtime knows it."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool, **like: Any) -> None:
        super().__init__(
            OrderedDict(
                reduce=nn.Linear(inputs, rank, bias=False, **like), expand=nn.Linear(rank, outputs, bias=bias, **like)
            )
        )

    @property
    def weight(self) -> torch.Tensor:
        """Of the output side: some architectures (T5) ask a layer's weight for its dtype."""
        found: torch.Tensor = self.expand.weight
        return found

    @property
    def rank(self) -> int:
        """The inner width."""
        return int(self.expand.in_features)

    @classmethod
    def of(cls, layer: nn.Module, rank: int) -> LowRank:
        """As wide as `layer` (a Linear or a Conv1D), with its dtype and whether it has a bias; contents undefined."""
        weight: Any = layer.weight
        outputs, inputs = weight.shape if isinstance(layer, nn.Linear) else weight.shape[::-1]
        bias = getattr(layer, "bias", None) is not None
        return cls(int(inputs), int(outputs), rank, bias, device=weight.device, dtype=weight.dtype)
