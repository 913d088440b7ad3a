"""Embedding and head of low rank: which directions of their rows to keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightship.compression._activations import second_moments
from lightship.errors import LightshipError, UnsupportedError
from lightship.low_rank import build_tables, tables
from lightship.step import Inputs

if TYPE_CHECKING:
    import torch

DAMPING = 0.01  # share of the mean second moment that every direction has besides its own


def factors(
    table: torch.Tensor, rank: int, rows: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The product A (tokens, rank) · B (rank, width) nearest to `table` E (tokens, width), and what it loses: the least
    Σ_t rows_t · d_t · columns · d_tᵀ over the rows d of E − A·B, as a share of the same of E. `rows` (tokens,) are
    weights, `columns` (width, width) is positive definite.

    With columns = L·Lᵀ these are the leading right singular vectors V of diag(rows)^½·E·L: A = E·L·V, B = Vᵀ·L⁻¹.
    Raises `LightshipError` for what is not finite or not positive definite.
    """
    import torch

    if not all(bool(each.isfinite().all()) for each in (table, rows, columns)):
        raise LightshipError("an embedding, or what it is weighed by, is not finite", hint="look at the source")
    try:
        root = torch.linalg.cholesky(columns.double())
        whole = table.double() @ root
        energies, directions = torch.linalg.eigh(whole.T @ (rows.double()[:, None] * whole))
    except torch.linalg.LinAlgError as error:
        raise LightshipError(f"an embedding cannot be factorised: {str(error).splitlines()[0]}") from error
    kept = directions[:, -rank:].flip(1)
    energies = energies.clamp(min=0)
    back = torch.linalg.solve_triangular(root, kept.T, upper=False, left=False)
    return whole @ kept, back, float(energies[:-rank].sum() / energies.sum())


def best_rank(tokens: int, width: int, keep: float, multiple: int) -> int:
    """The highest rank, a multiple, at which both factors have at most the share `keep` of the parameters. Raises
    `UnsupportedError` when there is none."""
    rank = int(keep * tokens * width / (tokens + width)) // multiple * multiple
    if rank < 1:
        raise UnsupportedError(f"no rank of a table of {tokens} × {width} keeps {keep:g} of it and is a multiple of "
                               f"{multiple}", hint="raise embedding, or lower multiple")  # fmt: skip
    return rank


def factorise_tables(
    model: Any, keep: float, multiple: int, batches: Sequence[Inputs], *, weighed: bool
) -> list[float]:
    """Put products in the place of embedding and head, in place; tables that are one stay one. Returns what each
    loses, as a share (see `factors`).

    With `weighed` a row counts as often as the calibration set has its token, and once more, so that none is
    forgotten; the columns of a head by the second moments of what it reads, of a table that is both half by those and
    half alike. Raises `UnsupportedError` where embedding and head are of low rank already.
    """
    found = tables(model)
    if not found:
        raise UnsupportedError("embedding and head are of low rank already", hint="leave embedding out")
    groups: dict[int, list[str]] = {}
    for name, module in found.items():
        groups.setdefault(id(module.weight), []).append(name)
    seen = _read(model, batches) if weighed else None
    counts = _counts(len(next(iter(found.values())).weight), batches if weighed else ())
    made: dict[str, tuple[int, torch.Tensor, torch.Tensor]] = {}
    losses = []
    for names in groups.values():
        table: Any = found[names[0]].weight.data.float()
        rank = best_rank(len(table), table.shape[1], keep, multiple)
        columns = _columns([found[name] for name in names], table.shape[1], seen)
        tall, wide, lost = factors(table, rank, counts, columns)
        losses.append(lost)
        made |= {name: (rank, tall.float(), wide.float()) for name in names}
    scales = {name: _scale(module) for name, module in found.items()}
    biases = {name: getattr(module, "bias", None) for name, module in found.items()}
    build_tables(model, {name: rank for name, (rank, _, _) in made.items()})
    for name, (_, tall, wide) in made.items():
        _fill(model.get_submodule(name), tall, wide, scales[name], biases[name])
    return losses


def _scale(module: Any) -> float:
    """What a table multiplies its rows by: that of Gemma (`scalar_embed_scale`), of mBART, M2M100 and others."""
    return float(getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0)))


def _fill(module: Any, tall: torch.Tensor, wide: torch.Tensor, scale: float, bias: Any) -> None:
    """Both factors into `module`; what an embedding multiplies its rows by goes to the narrow factor."""
    from lightship.low_rank import LowRankEmbedding

    if isinstance(module, LowRankEmbedding):
        module.reduce.weight.data.copy_(tall)
        module.expand.weight.data.copy_(wide.T * scale)
    else:
        module.reduce.weight.data.copy_(wide)
        module.expand.weight.data.copy_(tall)
        if bias is not None:
            module.expand.bias.data.copy_(bias.data)


def _read(model: Any, batches: Sequence[Inputs]) -> torch.Tensor | None:
    """Σ h·hᵀ (width, width) of what the head reads; None without a head."""
    head = model.get_output_embeddings()
    return None if head is None else second_moments(model, {"head": head}, batches)["head"]


def _columns(modules: Sequence[Any], width: int, seen: torch.Tensor | None) -> torch.Tensor:
    """What the columns of the table of `modules` count: (width, width), of trace `width`."""
    import torch

    alike = torch.eye(width, dtype=torch.float64)
    if seen is None or not any(isinstance(each, torch.nn.Linear) for each in modules):
        return alike
    damped = seen + DAMPING * seen.diagonal().mean() * alike
    asked = damped * width / damped.diagonal().sum()
    return (asked + alike) / 2 if any(isinstance(each, torch.nn.Embedding) for each in modules) else asked


def _counts(tokens: int, batches: Sequence[Inputs]) -> torch.Tensor:
    """How often `batches` have each token, and once more."""
    import numpy as np
    import torch

    counts = np.ones(tokens)
    for batch in batches:
        np.add.at(counts, batch["input_ids"][batch["attention_mask"] == 1], 1)
    return torch.from_numpy(counts)
