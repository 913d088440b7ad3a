"""The gate after export and after quantisation: the candidate must still be the original, on real tokens.

Short rows of different lengths in one left-padded batch show a dropped mask; one row of min(1 024, context) tokens
shows a lost RoPE base, which is invisible near position 0; the greedy row shows what a user would see.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.errors import LimitExceeded
from lightship.evaluation import divergence
from lightship.evaluation.divergence import (
    BLOCK,
    ROUNDING,
    AnyScorer,
    Batch,
    Comparison,
    Reference,
    compare,
    log_softmax,
)
from lightship.report import Metric

SHORT = (1, 5, 9, 16, 23, 32)
LONG = 1024
GREEDY_PROMPTS, GREEDY_PROMPT, GREEDY_TOKENS = 3, 16, 32
# Largest |Δ log p| (nats, where p > 1e-4) of an export that computes in float32 what the original does: a multiple of
# the original's own rounding, within bounds. A wrong norm epsilon or the other GELU shows only here, in the mean KLD
# both drown (docs/gate.md). Clean exports were at most 10 times that rounding off.
ROUNDINGS, LEAST_ERROR, EXACT_ERROR = 20, 5e-5, 1e-3
STEPS = 2  # positions at which rounding is measured


@dataclass(frozen=True)
class Parity:
    """What the gate measured. KLD in nats per token; `greedy` over positions whose margin exceeds the noise."""

    mean_kld: float
    kld_stderr: float
    p99_kld: float
    top1: float
    max_error: float
    greedy: float
    greedy_n: int
    n: int

    def lines(self) -> list[str]:
        """For people."""
        greedy = f"{self.greedy:.1%} of {self.greedy_n}" if self.greedy_n else "no position above the noise"
        return [
            f"mean KLD {self.mean_kld:.2e} ± {self.kld_stderr:.1e}   p99 {self.p99_kld:.2e}   (n = {self.n} tokens)",
            f"top-1 agreement {self.top1:.2%}   max |Δ log p| {self.max_error:.2e}   greedy agreement {greedy}",
        ]


def gate_batches(tokens: Sequence[int], context: int, greedy: Callable[..., list[list[int]]]) -> list[Batch]:
    """The gate's rows from a run of real tokens (≥ 64). `greedy` continues prompts with the original."""
    long = min(LONG, context, len(tokens))
    offsets = np.linspace(0, len(tokens) - max(SHORT) - 1, len(SHORT)).astype(int)
    short = [list(tokens[start : start + length]) for start, length in zip(offsets, SHORT, strict=True)]
    prompts = [list(tokens[start : start + GREEDY_PROMPT]) for start in offsets[:GREEDY_PROMPTS]]
    continued = [prompt + found for prompt, found in zip(prompts, greedy(prompts, GREEDY_TOKENS), strict=True)]
    return [
        Batch.of("short", short),
        Batch.of("long", [list(tokens[:long])]),
        Batch.of("greedy", continued, [len(prompt) - 1 for prompt in prompts]),
    ]


def record(original: Any, batches: Sequence[Batch], folder: Path) -> Reference:
    """Record the original on the gate's rows, and how far its own rounding moves a log p: on the greedy rows, read in
    one pass against the same tokens read one by one over a cache. `original` needs `steps` beside what it scores by."""
    reference = divergence.record(original, batches, folder)
    index = next(index for index, batch in enumerate(reference.batches) if batch.name == "greedy")
    batch = reference.batches[index]
    first = int(batch.scored[0].argmax()) + 1
    stepped = log_softmax(batch.bound(original).steps(batch.ids, first, STEPS))  # type: ignore[attr-defined]  # scorers of PyTorch have it
    whole = reference.rows(index, 0)
    whole = whole.reshape(len(batch.ids), -1, whole.shape[-1])[:, 1 : 1 + STEPS]
    rounding = float(np.abs(stepped - whole).max(where=whole > math.log(1e-4), initial=0.0))
    (folder / ROUNDING).write_text(json.dumps(rounding))
    return replace(reference, rounding=rounding)


def long_row(reference: Reference) -> tuple[Batch, npt.NDArray[np.float32]]:
    """The batch that is the long row, and log p(token[i] | tokens before i) by the original for i ≥ 1."""
    index = next(number for number, batch in enumerate(reference.batches) if batch.name == "long")
    batch = reference.batches[index]
    tokens = batch.ids[0]
    rows = np.concatenate([reference.rows(index, block) for block in range(-(-len(tokens) // BLOCK))])
    return batch, rows[np.arange(len(tokens) - 1), tokens[1:]]


def parity(reference: Reference, candidate: AnyScorer) -> Parity:
    """Compare the candidate with the recorded original."""
    return summarise(compare(reference, candidate))


def summarise(comparison: Comparison) -> Parity:
    """The figures of a comparison. The noise is the median |Δ log p| times two: below it a flip means nothing."""
    text = comparison.batch != "greedy"
    kld = comparison.kld[text].astype(np.float64)
    rows = comparison.only("greedy")
    error = comparison.error[text]
    noise = 2 * float(np.median(error)) if np.isfinite(error).all() else 0.0
    clear = rows.margin > noise
    return Parity(
        mean_kld=float(kld.mean()),
        kld_stderr=float(kld.std(ddof=1) / math.sqrt(len(kld))) if np.isfinite(kld).all() else math.inf,
        p99_kld=float(np.quantile(kld, 0.99, method="higher")),
        top1=float(comparison.top1[text].mean()),
        max_error=float(error.max()),
        greedy=float(rows.top1[clear].mean()) if clear.any() else math.nan,
        greedy_n=int(clear.sum()),
        n=len(kld),
    )


def check_parity(found: Parity, limit: float, stage: str, error_limit: float = math.inf) -> None:
    """Raise `LimitExceeded` with the figures when the mean KLD is above `limit` (nats per token) or not finite, or the
    largest |Δ log p| above `error_limit` (nats)."""
    if found.mean_kld <= limit and found.max_error <= error_limit:
        return
    if not found.mean_kld <= limit:
        problem, needed = f"mean KLD {found.mean_kld:.3g} exceeds the limit {limit:g}", found.mean_kld
    else:
        problem = f"max |Δ log p| {found.max_error:.3g} exceeds {error_limit:.3g}: this is more than rounding"
        needed = found.max_error**2 / 2  # see `exact_error`
    raise LimitExceeded(
        f"{stage}: {problem}; nothing is shipped\n  " + "\n  ".join(found.lines()),
        hint=f'raise the precision, or accept it on purpose: --accept "kld<={above(needed)}"'
        if math.isfinite(needed)
        else "the candidate computes NaN or infinity: this is a fault, not a loss of precision",
    )


def exact_error(accepted: float, rounding: float | None = None) -> float:
    """The limit on max |Δ log p| of an exact export of a model with that `rounding` (None: not measured) when a mean
    KLD of `accepted` is accepted (0: none is): errors of standard deviation σ in log p cost a KLD of σ²/2."""
    limit = EXACT_ERROR if rounding is None else min(max(ROUNDINGS * rounding, LEAST_ERROR), EXACT_ERROR)
    return max(limit, math.sqrt(2 * accepted))


def above(value: float) -> str:
    """A round figure a little above `value`, to be suggested as a limit."""
    digits = 10.0 ** (math.floor(math.log10(value)) - 1) if value > 0 else 1.0
    return f"{math.ceil(value * 1.05 / digits) * digits:.2g}"


def check_served(original: npt.NDArray[np.float32], served: npt.NDArray[np.float32], limit: float) -> Metric:
    """Log-probabilities of the same tokens by the original and by the served path, each (tokens,).

    The pipeline reveals one log-probability per token, so no KLD. For small normal errors of standard deviation σ in
    log p, KLD ≈ σ²/2 and mean |Δ log p| ≈ 0.8 σ: the limit is √(2 · KLD limit). Raises `LimitExceeded`.
    """
    delta = np.abs(original.astype(np.float64) - served.astype(np.float64))
    mean, bound = float(delta.mean()), math.sqrt(2 * limit)
    if not mean <= bound:
        raise LimitExceeded(
            f"served path: mean |Δ log p| {mean:.3g} exceeds {bound:.3g} (√(2 · KLD limit)); nothing is shipped",
            hint="the runtime's KV-cache or dynamic quantisation costs too much here; try a higher precision",
        )
    stderr = float(delta.std(ddof=1) / math.sqrt(len(delta))) if len(delta) > 1 else None
    return Metric(
        name="served_delta_logprob",
        value=mean,
        unit="nats",
        n=len(delta),
        stderr=stderr,
        direction="lower",
        baseline=0.0,
        method="mean |Δ log p| of real tokens, the engine as served against PyTorch float32",
    )


def parity_metrics(found: Parity, prefix: str = "") -> list[Metric]:
    """The gate's figures for the report."""
    where = "short, padded and long rows"
    rows: list[dict[str, Any]] = [
        {
            "name": "gate_kld",
            "value": found.mean_kld,
            "unit": "nats/token",
            "stderr": found.kld_stderr,
            "direction": "lower",
            "baseline": 0.0,
            "method": f"mean KL(original ‖ candidate), {where}",
        },
        {
            "name": "gate_kld_p99",
            "value": found.p99_kld,
            "unit": "nats/token",
            "direction": "lower",
            "baseline": 0.0,
            "method": f"99th percentile, {where}",
        },
        {
            "name": "gate_top1",
            "value": found.top1,
            "unit": "share",
            "direction": "higher",
            "baseline": 1.0,
            "method": f"same likeliest token, {where}",
        },
        {
            "name": "gate_max_error",
            "value": found.max_error,
            "unit": "nats",
            "direction": "lower",
            "baseline": 0.0,
            "method": "largest |Δ log p| where p > 1e-4",
        },
    ]
    if found.greedy_n:
        rows.append(
            {
                "name": "gate_greedy",
                "value": found.greedy,
                "unit": "share",
                "n": found.greedy_n,
                "direction": "higher",
                "baseline": 1.0,
                "method": "same greedy token where the original's top-2 margin exceeds the noise",
            }
        )
    return [Metric(**{"n": found.n, "stderr": None, **row, "name": prefix + row["name"]}) for row in rows]
