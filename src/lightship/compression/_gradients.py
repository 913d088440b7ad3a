"""How sensitive a model's answers are to the outputs of its linear layers: the Fisher information of those."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightship.checkpoint import Checkpoint
from lightship.errors import LightshipError
from lightship.kind import GENERATORS
from lightship.step import ROW, TOGETHER, Inputs

if TYPE_CHECKING:
    import torch
    from torch import nn

ANSWERS = ("logits", "start_logits", "end_logits")  # distributions over the last axis


def fisher(
    model: Any, layers: Mapping[str, nn.Module], batches: Sequence[Inputs], seed: int
) -> dict[str, torch.Tensor]:
    """Σ g gᵀ of every layer (outputs, outputs), float64, over all tokens, divided by the tokens that the layer reads
    and by the answers: g is the gradient of log p(answers drawn from the model) with respect to its outputs.

    With Σ x xᵀ of its inputs (`second_moments`), a small change D of its weight moves the answers by
    KL ≈ ½ tr(F D (Σ x xᵀ) Dᵀ) nats each (K-FAC: Martens & Grosse 2015, arXiv:1503.05671). What a model without
    probabilities answers, an embedder or a regression, is taken for the mean of noise of variance 1.
    Raises `LightshipError` when answers are not finite.
    """
    import torch

    draw = torch.Generator().manual_seed(seed)
    sums: dict[str, torch.Tensor] = {}
    read: dict[str, int] = {}
    answered = 0
    real = torch.empty(0)
    several = getattr(model.config, "problem_type", None) == "multi_label_classification"

    def see(name: str, gradient: torch.Tensor) -> None:
        seen = gradient.reshape(-1, gradient.shape[-1])
        product = (seen.T @ seen).double()
        sums[name] = sums[name] + product if name in sums else product
        count = int(real.sum()) if gradient.shape[:2] == real.shape else len(seen)  # as `watch` tells inputs
        read[name] = read.get(name, 0) + count

    with _gradients(model, layers, see):
        for batch in batches:
            inputs = {name: torch.from_numpy(values) for name, values in batch.items()}
            real = inputs["attention_mask"] == 1
            with torch.enable_grad():
                answers = dict(_answers(model(**inputs), real, draw, several))
            torch.autograd.backward(list(answers), list(answers.values()))
            answered += sum(_count(answer, real, several) for answer in answers)
    return {name: total / (answered * read[name]) for name, total in sums.items()}


def gradient_bytes(checkpoint: Checkpoint) -> int:
    """What a gradient over the rows that are read together keeps in memory: inputs and outputs of every matrix, and the
    answers."""
    shapes = [shape for shape in checkpoint.shapes.values() if len(shape) == 2]
    sides = sum(side for shape in shapes if checkpoint.vocabulary not in shape for side in shape)
    return 4 * TOGETHER * ROW * (2 * sides + (4 * checkpoint.vocabulary if checkpoint.kind in GENERATORS else 0))


def _answers(
    out: Any, real: torch.Tensor, draw: torch.Generator, several: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What the model answers, and the gradient of −log p(what is drawn) with respect to it, 0 at padding. Of `several`
    labels each is an answer of its own."""
    import torch

    drawn_from = [name for name in ANSWERS if name in out]
    for name in drawn_from or ["last_hidden_state"]:
        answer = out[name]
        if not answer.isfinite().all():
            raise LightshipError("the model's answers to the calibration text are not finite",
                                 hint="its weights are damaged, or overflow in float32")  # fmt: skip
        if drawn_from and several:
            p = answer.detach().sigmoid()
            gradient = p - torch.bernoulli(p, generator=draw)
        elif drawn_from and answer.shape[-1] > 1:
            p = answer.detach().softmax(-1)
            drawn = torch.multinomial(p.flatten(0, -2), 1, generator=draw).reshape(*p.shape[:-1], 1)
            gradient = p.scatter_add(-1, drawn, torch.full_like(p[..., :1], -1.0))
        else:
            gradient = torch.randn(answer.shape, generator=draw)
        yield answer, gradient * real[..., None] if answer.ndim == 3 and answer.shape[:2] == real.shape else gradient


def _count(answer: torch.Tensor, real: torch.Tensor, several: bool) -> int:
    """How many answers are in it: each of `several` labels, else a distribution for each row, or for each real token.
    The start and the end of a span are two, each over all tokens."""
    if several:
        return int(answer.numel())
    of_tokens = answer.ndim == 3 and answer.shape[:2] == real.shape
    return int(real.sum() if of_tokens else answer[..., 0].numel())


@contextmanager
def _gradients(model: Any, layers: Mapping[str, nn.Module], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """While this is open, `see` is told the gradient with respect to the outputs of each layer, and no parameter gets
    one of its own."""

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, given: Any, out: Any) -> None:
            out.requires_grad_(True)  # the outputs of the first layers depend on nothing that has a gradient
            out.register_hook(lambda gradient: see(name, gradient))

        return hook

    wanted = [each for each in model.parameters() if each.requires_grad]
    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        for each in wanted:
            each.requires_grad_(False)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for each in wanted:
            each.requires_grad_(True)
