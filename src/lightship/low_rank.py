"""Linear layers, and tables of tokens, as the product of two smaller ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class LowRank(nn.Sequential):  # type: ignore[misc]  # torch has no types here
    """x → (x · reduceᵀ) · expandᵀ + bias: `reduce` (rank, inputs) has no bias, `expand` (outputs, rank) has the
    layer's own. Two plain products, so every runtime knows it."""

    # What transformers may leave out of a file, where it is the same tensor as another: a head's rows.
    _tied_weights_keys = {"expand.weight": ""}  # noqa: RUF012  (a plain dict is what transformers looks for)

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


class LowRankEmbedding(nn.Module):  # type: ignore[misc]  # torch has no types here
    """ids → reduce[ids] · expandᵀ: `reduce` (tokens, rank) is looked up, `expand` (width, rank) multiplied."""

    _tied_weights_keys = {"reduce.weight": ""}  # noqa: RUF012

    def __init__(self, tokens: int, width: int, rank: int, **like: Any) -> None:
        super().__init__()
        self.reduce = nn.Embedding(tokens, rank, **like)
        self.expand = nn.Linear(rank, width, bias=False, **like)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (…) → vectors (…, width)."""
        found: torch.Tensor = self.expand(self.reduce(ids))
        return found

    @property
    def weight(self) -> torch.Tensor:
        """The rows, one for each token."""
        found: torch.Tensor = self.reduce.weight
        return found

    @property
    def rank(self) -> int:
        """The inner width."""
        return int(self.expand.in_features)

    @classmethod
    def of(cls, table: nn.Embedding, rank: int) -> LowRankEmbedding:
        """As `table`, with its dtype; contents undefined."""
        tokens, width = table.weight.shape
        return cls(tokens, width, rank, device=table.weight.device, dtype=table.weight.dtype)


def tables(model: Any) -> dict[str, nn.Module]:
    """The modules of `model` with a row for each token, by name: the embedding, wherever it is used, and the head; not
    those of low rank already."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    rows = {id(each.weight) for each in ends if isinstance(each, nn.Embedding | nn.Linear)}
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Embedding | nn.Linear) and id(module.weight) in rows}  # fmt: skip


def build_tables(model: Any, ranks: Mapping[str, int]) -> None:
    """Give the tables named in `ranks` that inner width, contents undefined. Those of one weight share their rows."""
    from lightship.structure import replace_module

    found, shared = tables(model), dict[int, Any]()
    for name, rank in ranks.items():
        old: Any = found[name]
        if isinstance(old, nn.Embedding):
            made: Any = LowRankEmbedding.of(old, rank)
            made.reduce.weight = shared.setdefault(id(old.weight), made.reduce.weight)
        else:
            made = LowRank.of(old, rank)
            made.expand.weight = shared.setdefault(id(old.weight), made.expand.weight)
        replace_module(model, name, made)
