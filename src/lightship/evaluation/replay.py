"""The bundle's golden rows: written when it is made, replayed without PyTorch on the machine that will serve it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.engine import Scorer
from lightship.errors import LimitExceeded
from lightship.evaluation.divergence import BLOCK, Reference, log_softmax
from lightship.report import Metric

TOP = 20


def write(gate: Reference, folder: Path) -> None:
    """Write the gate's long row and the original's `TOP` likeliest log-probabilities at each of its positions.

    `tokens.json`: {"rows": [[id, …], …]}, of an encoder-decoder with the "sources" they are written for;
    `logprobs.npz`: `ids` and `logprobs`, (positions, k), rows in order.
    """
    folder.mkdir(parents=True)
    rows: list[list[int]] = []
    sources: list[list[int]] = []
    ids, logprobs = [], []
    for index, batch in enumerate(gate.batches):
        if batch.name != "long":
            continue
        rows.append(batch.ids[0].tolist())
        sources += [] if batch.source is None else batch.source.tolist()
        for block in range(-(-batch.ids.shape[1] // BLOCK)):
            values = gate.rows(index, block)
            top = np.argsort(values, axis=-1)[:, : -TOP - 1 : -1]
            ids.append(top.astype(np.int32))
            logprobs.append(np.take_along_axis(values, top, 1))
    said = {"rows": rows, "sources": sources} if sources else {"rows": rows}
    (folder / "tokens.json").write_text(json.dumps(said) + "\n")
    np.savez(folder / "logprobs.npz", ids=np.concatenate(ids), logprobs=np.concatenate(logprobs))


def replay(rows: Sequence[Sequence[int]], arrays: dict[str, npt.NDArray[Any]], scorers: Iterable[Scorer]) -> Metric:
    """KL divergence from what the original said, of each row by the scorer in its turn. Raises `LimitExceeded` when it
    is not finite.

    It is taken over the original's likeliest tokens plus one bucket for all others, which bounds the full KL
    divergence from below (data processing inequality).
    """
    values: list[npt.NDArray[np.float64]] = []
    start = 0
    for row, scorer in zip(rows, scorers, strict=False):
        ids = np.array([row], np.int64)
        q = log_softmax(scorer.logits(ids, np.ones_like(ids))[0])
        stop = start + len(row)
        p_top = arrays["logprobs"][start:stop].astype(np.float64)
        q_top = np.take_along_axis(q, arrays["ids"][start:stop].astype(np.int64), 1).astype(np.float64)
        values.append(bucketed(p_top, q_top))
        start = stop
    kld = np.concatenate(values)
    if not np.isfinite(kld).all():
        raise LimitExceeded("the bundle computes NaN or infinity on this machine")
    stderr = float(kld.std() / np.sqrt(len(kld)))
    return Metric("golden_kld", float(kld.mean()), "nats/token", len(kld), stderr, "lower", None,
                  f"KL over the original's {TOP} likeliest tokens and one bucket for the rest")  # fmt: skip


def bucketed(p_top: Any, q_top: Any) -> Any:
    """KL(p ‖ q) per row from the log-probabilities (rows, k) of p's top tokens; all others are one bucket."""
    p_rest = np.maximum(1 - np.exp(p_top).sum(-1), 1e-9)
    q_rest = np.maximum(1 - np.exp(q_top).sum(-1), 1e-9)
    return (np.exp(p_top) * (p_top - q_top)).sum(-1) + p_rest * np.log(p_rest / q_rest)
