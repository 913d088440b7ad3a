"""What flows into linear layers while a model reads the calibration set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightship.step import Inputs

if TYPE_CHECKING:
    import torch
    from torch import nn


def read(model: Any, batches: Sequence[Inputs]) -> Iterator[tuple[Any, torch.Tensor]]:
    """Run `model` over `batches`; gives its output and which positions are real (rows, tokens) of each."""
    import torch

    for batch in batches:
        inputs = {name: torch.from_numpy(values) for name, values in batch.items()}
        with torch.inference_mode():
            yield model(**inputs, use_cache=False) if _caches(model) else model(**inputs), inputs["attention_mask"] == 1


def _caches(model: Any) -> bool:
    return hasattr(model.config, "use_cache")


def watch(
    model: Any,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Inputs],
    see: Callable[[tuple[str, ...], torch.Tensor], None],
) -> None:
    """Run `model` over `batches` and call `see` with the inputs (tokens, width) of `layers`, padding left out. Layers
    that read the same tensor, as q, k and v do, are told together, by their names.

    Of an encoder-decoder the rows of the decoder are told whole: they have no padding of the encoder's length.
    """
    import torch

    held: list[tuple[list[str], torch.Tensor]] = []
    mask: torch.Tensor | None = None

    def flush() -> None:
        for names, seen in held:
            if mask is not None and seen.shape[:2] == mask.shape:
                seen = seen[mask]
            see(tuple(names), seen.reshape(-1, seen.shape[-1]))
        held.clear()

    def hook(name: str) -> Callable[..., None]:
        def note(module: Any, arguments: tuple[Any, ...]) -> None:
            seen = arguments[0]
            if held and held[-1][1] is seen:
                held[-1][0].append(name)
                return
            flush()
            held.append(([name], seen))

        return note

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            mask = torch.from_numpy(batch["attention_mask"]) == 1
            for _ in read(model, [batch]):
                flush()
    finally:
        for handle in handles:
            handle.remove()


def norms(model: Any, layers: Mapping[str, nn.Module], batches: Sequence[Inputs]) -> dict[str, torch.Tensor]:
    """‖X_j‖₂ of every input j of each layer over all tokens, float64 (width)."""

    sums: dict[str, torch.Tensor] = {}

    def see(names: tuple[str, ...], seen: torch.Tensor) -> None:
        squares = seen.double().square().sum(0)
        for name in names:
            sums[name] = sums[name] + squares if name in sums else squares

    watch(model, layers, batches, see)
    return {name: total.sqrt() for name, total in sums.items()}


def second_moments(model: Any, layers: Mapping[str, nn.Module], batches: Sequence[Inputs]) -> dict[str, torch.Tensor]:
    """XᵀX of every layer's inputs over all tokens, float64 (width, width). Layers that read the same inputs share one
    tensor."""

    sums: dict[tuple[str, ...], torch.Tensor] = {}

    def see(names: tuple[str, ...], seen: torch.Tensor) -> None:
        product = (seen.T @ seen).double()
        if names in sums:
            sums[names] += product
        else:
            sums[names] = product

    watch(model, layers, batches, see)
    return {name: total for names, total in sums.items() for name in names}
