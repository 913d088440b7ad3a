"""Replace linear layers, and tables where asked, by products of two smaller ones, of the ranks that lose least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from lightship.checkpoint import Checkpoint
from lightship.compression._activations import second_moments
from lightship.compression._allocation import Curve, Ranks, allocate, uniform
from lightship.compression._embedding import factorise_tables
from lightship.compression._gradients import fisher, gradient_bytes
from lightship.errors import LightshipError, UnsupportedError, UsageError
from lightship.layers import linears, weight_of
from lightship.low_rank import LowRank
from lightship.step import Context, Need, WeightStep
from lightship.structure import replace_module

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

Moments = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class Spectrum:
    """The directions of a layer's outputs in the order of what is lost with them: `energies` (min(outputs, inputs),)
    falling, float64; `left` (outputs, ·) and `right` (·, inputs) with left[:, :r] · right[:r] the best of rank r."""

    energies: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor


def spectrum(weight: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor | None = None) -> Spectrum:
    """Of `weight` W (outputs, inputs), measured by tr(O D I Dᵀ), D being what is taken away, I `inputs` (inputs,
    inputs) and O `outputs` (outputs, outputs), positive definite, None for the identity: left · right of any rank loses
    exactly the sum of the energies dropped, and nothing of that rank loses less.

    With I = XᵀX this is the truncated SVD of W·S, S Sᵀ = XᵀX, of SVD-LLM (Wang et al. 2024, arXiv:2403.07378), from
    the covariance of the outputs: W S V Vᵀ S⁻¹ = U Uᵀ W needs no inverse, and full rank gives W back whatever I is.
    Raises `LightshipError` when a matrix is not finite or `outputs` not positive definite.
    """
    import torch

    whole = weight.double()
    _check_finite("it", whole, inputs, *([] if outputs is None else [outputs]))
    root = None
    try:
        if outputs is not None:
            root = torch.linalg.cholesky(outputs)
            whole = root.T @ whole
        basis = None
        if whole.shape[0] > whole.shape[1]:  # as many directions as inputs: turn the outputs into those first
            basis, whole = torch.linalg.qr(whole)
        energies, directions = torch.linalg.eigh(whole @ inputs @ whole.T)
    except torch.linalg.LinAlgError as error:
        raise LightshipError(f"it cannot be factorised: {str(error).splitlines()[0]}") from error
    directions = directions.flip(1)
    left = directions if basis is None else basis @ directions
    if root is not None:
        left = torch.linalg.solve_triangular(root.T, left, upper=True)
    length = left.norm(dim=0)  # columns of one length lose least when rows of `left` are rounded
    return Spectrum(energies.flip(0).clamp(min=0), left / length, length[:, None] * (directions.T @ whole))


def _check_finite(what: str, *given: torch.Tensor) -> None:
    if not all(bool(each.isfinite().all()) for each in given):
        raise LightshipError(f"{what}: weight, inputs or gradients are not finite",
                             hint="look at the source: it may overflow, or be damaged")  # fmt: skip


# Ranks are even at least: OpenVINO (2026.4) computes wrongly in bf16 with int8 weights whose inner width is odd and
# above 16 (KLD 2.0 at 17 on a tiny llama, 0.007 at 16 and 18).
class Svd(WeightStep):
    """Factorise linear layers: a layer becomes two of an inner width, its rank, where that has fewer parameters, and
    stays whole elsewhere. The ranks are those that a quadratic model of the answers' KL divergence finds cheapest; its
    sum over the layers is kept as `predicted_kld` (nats an answer)."""

    serves: ClassVar[Need] = "compute"
    trial: ClassVar[Mapping[str, Any]] = {"keep": 0.9}

    keep: float = Field(
        0.9,
        gt=0.0,
        le=1.0,
        description="share of the parameters of all linear layers that is kept; 1: all, for embedding alone",
    )
    method: Literal["fisher", "whitened", "scaled", "plain"] = Field(
        "fisher",
        description="what a layer's error is measured by: inputs and outputs, by their second moments and gradients "
        "(fisher); inputs (whitened); the root mean square of each input (scaled); the weights alone (plain)",
    )
    allocation: Literal["global", "uniform"] = Field(
        "global", description="ranks where they lose least, or the same share of every layer"
    )
    multiple: int = Field(
        8,
        ge=2,
        multiple_of=2,
        description="ranks are multiples of it; 32 or 64 when rounded to 4 bits in such groups later",
    )
    embedding: float | None = Field(
        None, gt=0.0, lt=1.0, description="share of the parameters of embedding and head that is kept; None: all"
    )
    damping: float = Field(
        0.01, gt=0.0, le=1.0, description="share of the mean second moment that every direction has besides its own"
    )

    @model_validator(mode="after")
    def _something(self) -> Svd:
        if self.keep == 1 and self.embedding is None:
            raise UsageError("step svd: keep=1 leaves every linear layer whole", hint="lower keep, or give embedding")
        return self

    def predicted_bytes(self, checkpoint: Checkpoint) -> int:
        """The weights and their factors in float32; where layers are factorised the moments of both sides of every
        matrix but the embeddings, and what a gradient over 512 tokens keeps; an embedding that is, in float64."""
        shapes = [shape for shape in checkpoint.shapes.values() if len(shape) == 2]
        sides = [side for shape in shapes if checkpoint.vocabulary not in shape for side in shape]
        layers = 0 if self.keep == 1 else sum(8 * side**2 for side in sides) + gradient_bytes(checkpoint)
        tables = [prod(shape) for shape in shapes if checkpoint.vocabulary in shape] if self.embedding else []
        return super().predicted_bytes(checkpoint) + layers + 3 * 8 * max(tables, default=0)

    def change(self, model: PreTrainedModel, context: Context) -> dict[str, Any]:
        figures = {} if self.keep == 1 else self.factorise_layers(model, context)
        if self.embedding is not None:
            figures["embedding_lost"] = factorise_tables(
                model, self.embedding, self.multiple, context.batches, weighed=self.method in ("fisher", "whitened")
            )
        return figures

    def factorise_layers(self, model: PreTrainedModel, context: Context) -> dict[str, Any]:
        """Put products in the place of linear layers of `model`; how many, and what that should lose."""
        layers = linears(model)
        if not layers:
            raise UnsupportedError("it has no linear layer that is not of low rank already", hint="use the original")
        spectra = self.spectra(layers, *self.moments(model, layers, context))
        curves = {name: _curve(layers[name], found, self.multiple) for name, found in spectra.items()}
        whole = sum(curve.whole for curve in curves.values())
        ranks = self.ranks(curves)
        for name, rank in ranks.items():
            if rank is not None:
                replace_module(model, name, _cut(layers[name], spectra[name], rank))
        figures: dict[str, Any] = {
            "kept": sum(curves[name].cost(rank) for name, rank in ranks.items()) / whole,
            "factorised": sum(rank is not None for rank in ranks.values()),
            "of": len(ranks),
            "predicted_kld": sum(curves[name].loss(rank) for name, rank in ranks.items()),
        }
        context.say(f"{figures['factorised']} of {len(ranks)} linear layers factorised, {figures['kept']:.2%} of their "
                    f"parameters kept; KL divergence predicted {figures['predicted_kld']:.3g} nats")  # fmt: skip
        return figures

    def moments(self, model: Any, layers: Mapping[str, nn.Module], context: Context) -> tuple[Moments, Moments]:
        """Σ x xᵀ of the inputs of every layer, and the Fisher information of its outputs (see `fisher`)."""
        read = second_moments(model, layers, context.batches)
        for name, layer in layers.items():
            if name not in read:
                raise LightshipError(f"svd: the calibration text does not reach {name}")
            _check_finite(f"svd, {name}", weight_of(layer), read[name])
        asked = fisher(model, layers, context.batches, context.seed)
        for name in layers.keys() - asked.keys():
            raise LightshipError(f"svd: no answer of the model depends on {name}")
        return read, asked

    def ranks(self, curves: Mapping[str, Curve]) -> Ranks:
        """The rank of every layer, None where it stays whole; their parameters are at most `keep` of all."""
        if self.allocation == "uniform":
            ranks = uniform(curves, self.keep)
            if not any(ranks.values()):
                raise UsageError(f"keep={self.keep:g} leaves no layer a rank in steps of {self.multiple}",
                                 hint="raise keep, or lower multiple")  # fmt: skip
            return ranks
        return allocate(curves, int(self.keep * sum(curve.whole for curve in curves.values())))

    def spectra(self, layers: Mapping[str, nn.Module], read: Moments, asked: Moments) -> dict[str, Spectrum]:
        """Of every layer in nats (half the curvature of the KL divergence), cut to the ranks that pay, float32."""
        found = {}
        for name, layer in layers.items():
            half = asked[name] / 2
            try:
                if self.method == "fisher":
                    each = spectrum(weight_of(layer), self._inputs(read[name]), self._damped(half))
                else:
                    each = spectrum(weight_of(layer), self._inputs(read[name]))
                    each = replace(each, energies=each.energies * half.diagonal().mean())
            except LightshipError as error:
                raise LightshipError(f"svd, {name}: {error.message}", hint=error.hint) from error
            most = Curve(each.left.shape[0], each.right.shape[1], each.energies.numpy()).most
            found[name] = Spectrum(each.energies, each.left[:, :most].float(), each.right[:most].float())
        return found

    def _inputs(self, moments: torch.Tensor) -> torch.Tensor:
        """What errors of the weight are measured by on the side of the inputs, always of the same trace."""
        import torch

        total = moments.diagonal().sum()
        if self.method == "plain":
            return torch.eye(len(moments), dtype=moments.dtype) * total / len(moments)
        if self.method == "scaled":  # singular values of W · diag(rms^½), as ASVD (arXiv:2312.05821) scales them
            scale = moments.diagonal().sqrt()
            return torch.diag(scale * total / scale.sum())
        return self._damped(moments)

    def _damped(self, moments: torch.Tensor) -> torch.Tensor:
        import torch

        return moments + self.damping * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)


def _curve(layer: nn.Module, found: Spectrum, multiple: int) -> Curve:
    dropped = found.energies.flip(0).cumsum(0).flip(0).numpy()
    outputs, inputs = weight_of(layer).shape
    return Curve(outputs, inputs, np.append(dropped, 0.0), multiple)


def _cut(layer: Any, found: Spectrum, rank: int) -> LowRank:
    """`layer` as a product; its bias goes to the outputs."""
    made = LowRank.of(layer, rank)
    made.reduce.weight.data.copy_(found.right[:rank])
    made.expand.weight.data.copy_(found.left[:, :rank])
    if made.expand.bias is not None:
        made.expand.bias.data.copy_(layer.bias.data)
    return made
