"""Calibration inputs for tiny models of every kind."""

from __future__ import annotations

import numpy as np

from lightship.calibration import default_text
from lightship.checkpoint import Checkpoint
from lightship.step import Context


def context(checkpoint: Checkpoint, rows: int = 4, length: int = 32, seed: int = 0) -> Context:
    """Random token rows, the first padded as the kind pads: on the left for decoders, else on the right."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(5, checkpoint.vocabulary, (rows, length))
    mask = np.ones_like(ids)
    if checkpoint.kind == "decoder":
        mask[0, :5] = 0
    else:
        mask[0, -5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if checkpoint.kind == "seq2seq":
        batch["decoder_input_ids"] = ids[:, : length // 2]
    return Context((batch,), default_text().split()[0], seed)
