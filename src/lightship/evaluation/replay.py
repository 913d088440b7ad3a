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


def replay_served(
    rows: Sequence[Sequence[int]], arrays: dict[str, npt.NDArray[Any]], served: Sequence[npt.NDArray[np.float32]]
) -> Metric:
    """Mean |Δ log p| between the original and the engine as it serves: of the tokens of the golden rows that are among
    the original's likeliest, since of others its log-probability is not kept. `served[row][i]`: of token i + 1.

    The pipeline reveals no distribution, so no KLD; see `parity.check_served` for how the two limits belong together.
    """
    deltas: list[npt.NDArray[np.float64]] = []
    start = 0
    for row, found in zip(rows, served, strict=True):
        positions = slice(start, start + len(row) - 1)  # nothing is known to follow the last
        known = arrays["ids"][positions] == np.array(row[1:])[:, None]
        likely = known.any(axis=1)
        expected = arrays["logprobs"][positions][known].astype(np.float64)  # ids of a position differ: one a row
        deltas.append(np.abs(expected - found[likely].astype(np.float64)))
        start += len(row)
    delta = np.concatenate(deltas)
    if not len(delta) or not np.isfinite(delta).all():
        raise LimitExceeded("the engine computes NaN or infinity on this machine")
    stderr = float(delta.std() / np.sqrt(len(delta)))
    return Metric("golden_served_delta_logprob", float(delta.mean()), "nats", len(delta), stderr, "lower", 0.0,
                  f"mean |Δ log p| of the golden rows' tokens that are among the original's {TOP} likeliest, "
                  "the engine as served")  # fmt: skip
