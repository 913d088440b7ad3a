"""What the targets share when they export encoders: the example that is traced, and the inputs of a graph."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.checkpoint import Checkpoint
from lightship.encoder import INPUTS, OUTPUTS, Encoder
from lightship.errors import SourceError


def example(checkpoint: Checkpoint, model: Any) -> dict[str, Any]:
    """Inputs to trace `model` with: two rows, one padded on the right, so that no axis is specialised and the mask is
    kept. Token types only where the model tells several apart."""
    import torch

    pad = Encoder.load(checkpoint.folder).pad
    ids = torch.arange(2, 18).reshape(2, 8) % checkpoint.vocabulary
    ids[ids == pad] = (pad + 1) % checkpoint.vocabulary
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    ids[0, 5:] = pad
    given = {"input_ids": ids, "attention_mask": mask}
    if takes_types(model):
        given["token_type_ids"] = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]])
    return given


def takes_types(model: Any) -> bool:
    """Whether the model tells the texts of a pair apart by token types."""
    known = "token_type_ids" in inspect.signature(model.forward).parameters
    return known and int(getattr(model.config, "type_vocab_size", 0) or 0) > 1


def feeds(
    takes: list[str], ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64], types: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.int64]]:
    """The graph's inputs by name."""
    given = dict(zip(INPUTS, (ids, mask, types), strict=True))
    return {name: np.ascontiguousarray(given[name], np.int64) for name in takes}


def wanted(encoder: Checkpoint, inputs: list[str], outputs: list[str]) -> tuple[list[str], list[str]]:
    """The names of inputs and outputs that a graph of this kind is used by. Raises `SourceError` for a graph of
    another kind, or whose mask was lost."""
    names = list(OUTPUTS[encoder.kind])
    if not set(names) <= set(outputs) or not {"input_ids", "attention_mask"} <= set(inputs) <= set(INPUTS):
        raise SourceError(
            f"the graph in {encoder.folder} takes {', '.join(inputs)} and gives {', '.join(outputs)}; of a "
            f"{encoder.kind} {', '.join(INPUTS[:2])} and {', '.join(names)} are expected",
            hint="export the model again",
        )
    return inputs, names


def joined(outputs: list[npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """One array as `EncoderEngine.run` returns it: start and end stacked last."""
    return np.asarray(outputs[0] if len(outputs) == 1 else np.stack(outputs, axis=-1), np.float32)
