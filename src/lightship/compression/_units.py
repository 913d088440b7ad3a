"""What can be cut out of a layer: channels of its MLP, and heads together with the keys and values that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightship.errors import UnsupportedError, UsageError
from lightship.layers import stacks, weight_of
from lightship.low_rank import LowRank
from lightship.structure import llama_layers

if TYPE_CHECKING:
    import torch
    from torch import nn

# The linear layers that write the channels of an MLP, and the one that reads them.
MLPS = (
    (("gate_proj", "up_proj"), "down_proj"), (("c_fc",), "c_proj"), (("wi",), "wo"), (("wi_0", "wi_1"), "wo"),
    (("lin1",), "lin2"), (("fc1",), "fc2"), (("intermediate.dense",), "output.dense"),
)  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEADS_HINT = "leave heads at 1.0 and cut channels with the option mlp"


@dataclass(frozen=True)
class Units:
    """Equal units of one layer that can be cut out: `reader`, called `name`, reads `width` inputs of each; `writers`
    are the linear layers that make them, each with its outputs a unit."""

    name: str
    reader: nn.Module
    width: int
    writers: tuple[tuple[nn.Module, int], ...]

    @property
    def count(self) -> int:
        """How many there are."""
        return int(inputs_of(self.reader).shape[1]) // self.width

    def energy(self, norms: torch.Tensor, metric: torch.Tensor | None = None) -> torch.Tensor:
        """Σ ‖X_j‖² W_jᵀ M W_j over the inputs of each unit: what it adds to the reader's output, as if they were
        independent, in the `metric` M (outputs, outputs), None for the identity. `norms` are ‖X_j‖ of all inputs."""
        return self._sums(norms.square() * columns(self.reader, metric), self.width)

    def size(self) -> torch.Tensor:
        """The sum of the squares of all weights of each unit."""
        found = self._sums(columns(self.reader), self.width)
        for writer, width in self.writers:
            found = found + self._sums(rows(writer), width)
        return found

    def _sums(self, values: torch.Tensor, width: int) -> torch.Tensor:
        return values.reshape(self.count, width).sum(1)

    def keep(self, kept: torch.Tensor, new: torch.Tensor | None = None) -> None:
        """Leave only the units `kept`, ascending; what reads them is `new` (outputs, inputs kept), if given."""
        for writer, width in self.writers:
            _keep_outputs(writer, spread(kept, width))
        _set_inputs(self.reader, inputs_of(self.reader)[:, spread(kept, self.width)] if new is None else new)


@dataclass(frozen=True)
class Kind:
    """All units of one kind, one entry a layer; the `share` that stays at most, in multiples of `multiple`."""

    name: str
    units: list[Units]
    share: float
    multiple: int

    @property
    def owner(self) -> str:
        """The module of the first layer in which the reader is."""
        return self.units[0].name.rpartition(".")[0]


def spread(units: torch.Tensor, width: int) -> torch.Tensor:
    """The indices of all members of `units`, `width` each."""
    import torch

    return (units[:, None] * width + torch.arange(width)).flatten()


def mlps(model: Any) -> list[Units]:
    """The channels of the MLP in every layer. Raises `UnsupportedError` where a layer has none that is known, or more
    than one, as a mixture of experts has."""
    found = []
    for stack, layers in stacks(model).items():
        for index, layer in enumerate(layers):
            here = [
                Units(f"{stack}.{index}.{name}.{reader}".replace("..", "."), owner.get_submodule(reader), 1,
                      tuple((owner.get_submodule(writer), 1) for writer in writers))
                for name, owner in layer.named_modules() for writers, reader in MLPS
                if all(_has(owner, each) for each in (*writers, reader))
            ]  # fmt: skip
            if len(here) != 1:
                raise UnsupportedError(
                    f"{type(model).__name__} has {len(here)} MLPs known here in layer {index}, expected 1",
                    hint="use depth, which cuts layers whole, or svd",
                )
            found += here
    return found


def heads(model: Any) -> list[Units]:
    """The key-value groups of every layer of a llama-like model, each with the query heads that read it.

    Raises `UnsupportedError` where the size of a head is not a number of its own, or what else the attention holds
    depends on how many there are.
    """
    kind = type(model).__name__
    try:
        layers = llama_layers(model)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"heads are cut in llama-like models only; {kind} has other layers", hint=HEADS_HINT
        ) from error
    found = []
    for index, layer in enumerate(layers):
        attention = layer.self_attn
        q, k, v, o = (getattr(attention, name) for name in PROJECTIONS)
        width = int(attention.head_dim)
        groups = outputs_of(k) // width
        queries = outputs_of(q) // groups
        others = [name for name, each in attention.named_parameters()
                  if name.partition(".")[0] not in PROJECTIONS and each.numel() != width]  # fmt: skip
        counted = [name for name in ("num_heads", "num_key_value_heads") if hasattr(attention, name)]
        if others or counted or outputs_of(q) != inputs_of(o).shape[1] or outputs_of(k) != outputs_of(v):
            raise UnsupportedError(
                f"heads of {kind} cannot be cut: its attention has {', '.join([*others, *counted]) or 'other sizes'}",
                hint=HEADS_HINT,
            )
        found.append(
            Units(f"model.layers.{index}.self_attn.o_proj", o, queries, ((q, queries), (k, width), (v, width)))
        )
    return found


def _has(owner: nn.Module, name: str) -> bool:
    for part in name.split("."):
        if part not in owner._modules:
            return False
        owner = owner.get_submodule(part)
    return True


# ── Linear layers, also of low rank ─────────────────────────────────────────


def inputs_of(layer: Any) -> torch.Tensor:
    """The matrix that reads the inputs of `layer`: (outputs or rank, inputs)."""
    return weight_of(layer.reduce if isinstance(layer, LowRank) else layer)


def outputs_of(layer: Any) -> int:
    """Outputs of `layer`."""
    return int(weight_of(layer.expand if isinstance(layer, LowRank) else layer).shape[0])


def columns(layer: Any, metric: torch.Tensor | None = None) -> torch.Tensor:
    """Squared length, by `metric` (outputs, outputs), of what each input of `layer` adds to its output: (inputs,),
    float64."""
    found = inputs_of(layer).double()
    if isinstance(layer, LowRank):
        found = layer.expand.weight.data.double() @ found
    return (found * (found if metric is None else metric @ found)).sum(0)


def rows(layer: Any) -> torch.Tensor:
    """Squared length of the weights that make each output of `layer`: (outputs,), float64."""
    if isinstance(layer, LowRank):
        return (layer.expand.weight.data.double() @ layer.reduce.weight.data.double()).square().sum(1)
    return weight_of(layer).double().square().sum(1)


def _set_inputs(layer: Any, weight: torch.Tensor) -> None:
    _set(layer.reduce if isinstance(layer, LowRank) else layer, weight)


def _keep_outputs(layer: Any, kept: torch.Tensor) -> None:
    part = layer.expand if isinstance(layer, LowRank) else layer
    _set(part, weight_of(part)[kept], None if part.bias is None else part.bias.data[kept])


def _set(layer: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Give a Linear or Conv1D another weight (outputs, inputs), and a bias where the outputs are others."""
    from torch import nn

    linear = isinstance(layer, nn.Linear)
    for name, size in zip(("out_features", "in_features") if linear else ("nf", "nx"), weight.shape, strict=True):
        setattr(layer, name, size)
    layer.weight = nn.Parameter(
        (weight if linear else weight.T).contiguous().to(layer.weight.dtype), requires_grad=False
    )
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)


# ── How many of each, and the weights that remain ───────────────────────────


def allocate(scores: Sequence[torch.Tensor], share: float, multiple: int) -> list[int]:
    """How many units each layer keeps, where all together keep at most `share`: the lowest sums of `scores` go first,
    whichever layer they are in, down to the next multiple of `multiple`, the last of which stays."""
    ordered = [each.sort().values for each in scores]
    kept = [len(each) for each in ordered]
    limit = share * sum(kept) + 1e-9

    def lower(index: int) -> int:
        return (kept[index] - 1) // multiple * multiple

    def price(index: int) -> float:
        gone, after = len(ordered[index]) - kept[index], len(ordered[index]) - lower(index)
        return float(ordered[index][gone:after].mean())

    while sum(kept) > limit:
        able = [index for index in range(len(kept)) if lower(index) > 0]
        if not able:
            raise UsageError(f"width: a share of {share:g} is less than the smallest layers in steps of {multiple}",
                             hint="raise the share, or lower the option multiple")  # fmt: skip
        best = min(able, key=price)
        kept[best] = lower(best)
    return kept


def refit(weight: torch.Tensor, moments: torch.Tensor, kept: torch.Tensor, ridge: float) -> torch.Tensor:
    """The weights (outputs, kept) that come closest to what `weight` (outputs, inputs) computes on inputs with the
    second moments XᵀX = `moments`: argmin ‖X Wᵀ − X_K W'ᵀ‖² + λ‖W' − W_K‖², λ being `ridge` times the mean of the
    diagonal: W' = (W C[:, K] + λ W_K)(C[K, K] + λ)⁻¹, in float64."""
    import torch

    whole = weight.double()
    damp = ridge * float(moments.diagonal().mean())
    matrix = moments[kept][:, kept] + damp * torch.eye(len(kept), dtype=torch.float64)
    right = whole @ moments[:, kept] + damp * whole[:, kept]
    return torch.linalg.solve(matrix, right.T).T
