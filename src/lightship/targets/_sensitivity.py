"""Which matrices stay in int8: measured on the original, one matrix in int4 at a time; chosen under a budget."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightship.errors import UnsupportedError
from lightship.layers import weight_of
from lightship.targets._integers import Floats, nearest

ROWS, TOKENS = 2, 256  # that each matrix is measured on: differences are paired, so few tokens tell them apart


@dataclass(frozen=True)
class Cost:
    """A matrix: its key, its number of weights, and the mean KL divergence (nats per token) from the original when it
    alone is in int4."""

    key: str
    weights: int
    kld: float


def key_of(matrix: Floats) -> str:
    """What a matrix (outputs, inputs) is known by in the model and in an exported graph: a digest of its values."""
    return hashlib.sha256(np.ascontiguousarray(matrix, np.float32).data).hexdigest()


def body(model: Any) -> dict[str, Any]:
    """The modules of a decoder that multiply by a matrix, by name; the head left out."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    head = getattr(head, "expand", head)  # of one of low rank the part that makes the logits
    found = model.named_modules()
    return {name: module for name, module in found if isinstance(module, nn.Linear | Conv1D) and module is not head}


def measure(model: Any, rows: Sequence[Sequence[int]], group: int) -> list[Cost]:
    """For every matrix of `model`'s body what rounding it, and nothing else, to int4 in groups of `group` costs on the
    first tokens of `rows`. Layers before the matrix are not computed again."""
    import torch

    ids = torch.tensor([list(row[:TOKENS]) for row in rows[:ROWS]])
    found = []
    with torch.inference_mode(), _replayed(model) as replay:
        exact = _logprobs(model, ids)
        replay.recorded = True
        for name, module in body(model).items():
            matrix = weight_of(module)
            kept = matrix.clone()
            whole = kept.float().numpy()
            replay.start_at(name)
            matrix.copy_(torch.from_numpy(nearest(whole, 4, group).weights()))
            drift = _divergence(exact, _logprobs(model, ids))
            matrix.copy_(kept)
            found.append(Cost(key_of(whole), whole.size, drift))
    return found


def _logprobs(model: Any, ids: Any) -> Any:
    return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


def _divergence(exact: Any, other: Any) -> float:
    return max(float((exact.exp() * (exact - other)).sum(-1).mean()), 0.0)


class _Replay:
    """The layers of a model, each with what went into it. Once `recorded`, those before `first` compute nothing."""

    def __init__(self, layers: dict[str, Any]) -> None:
        self._names = list(layers)
        self._inputs: list[Any] = []
        self._rest: list[Any] = []
        self._first = 0
        self.recorded = False

    def start_at(self, module: str) -> None:
        """Compute from the layer that holds `module` on."""
        inside = [index for index, name in enumerate(self._names) if module.startswith(f"{name}.")]
        self._first = inside[0] if inside else 0

    def forward(self, index: int, real: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of the layer's own."""
        if not self.recorded:
            self._inputs.append(args[0] if args else kwargs["hidden_states"])
            out = real(*args, **kwargs)
            self._rest.append(out[1:] if isinstance(out, tuple) else None)
            return out
        if index >= self._first:
            return real(*args, **kwargs)
        rest, hidden = self._rest[index], self._inputs[index + 1]
        return hidden if rest is None else (hidden, *rest)


@contextlib.contextmanager
def _replayed(model: Any) -> Iterator[_Replay]:
    from functools import partial

    from torch import nn

    lists = [(name, found) for name, found in model.named_modules() if isinstance(found, nn.ModuleList)]
    name, layers = max(lists, key=lambda pair: sum(each.numel() for each in pair[1].parameters()), default=("", []))
    named = {f"{name}.{index}": layer for index, layer in enumerate(layers)}
    replay = _Replay(named)
    for index, layer in enumerate(named.values()):
        layer.forward = partial(replay.forward, index, layer.forward)
    try:
        yield replay
    finally:
        for layer in named.values():
            del layer.forward


def choose(costs: Sequence[Cost], group: int, budget: float) -> frozenset[str]:
    """The keys of the matrices that go to int4 so that all of `costs` take at most `budget` bytes: first those that
    cost least per byte saved, as many as are needed. Divergences are taken to add up.

    Raises `UnsupportedError` where all of them in int4 are too large still.
    """
    size = sum(wide_bytes(cost.weights) for cost in costs)
    narrow = set()
    for cost in sorted(costs, key=lambda cost: cost.kld / cost.weights):
        if size <= budget:
            break
        size -= saved_bytes(cost.weights, group)
        narrow.add(cost.key)
    if size > budget:
        raise UnsupportedError(
            f"the body takes {size / 1e6:.2f} MB where all of it is in int4, and {max(budget, 0) / 1e6:.2f} MB are left"
            " for it", hint="raise `bits`, or set `tables` to int4")  # fmt: skip
    return frozenset(narrow)


def wide_bytes(weights: int) -> float:
    """Bytes of a matrix in int8; the scales of its outputs are too few to count."""
    return float(weights)


def saved_bytes(weights: int, group: int) -> float:
    """Bytes that int4 in groups of `group`, with scales of 2 bytes, saves over int8."""
    return weights * (1 - 0.5 - 2 / group)
