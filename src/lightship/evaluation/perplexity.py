"""Quality on held-out text, original against candidate: KL divergence, top-1, perplexity, bits per byte.

As llama.cpp's perplexity tool: chunks of 512 tokens without overlap, the second half of each scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lightship.errors import LightshipError
from lightship.evaluation.divergence import Comparison
from lightship.report import Metric

Values = npt.NDArray[np.floating]


def quality(
    found: Comparison, text_bytes: float | None, scored: str, original_bits: float | None = None
) -> list[Metric]:
    """The quality metrics of a comparison whose batches are passages; `text_bytes` is the UTF-8 length of the scored
    tokens (None where a model wrote them: then without bits per byte), `scored` says in words which they are.
    `original_bits`: the original's bits per byte, where it reads the text in other tokens than the candidate. Standard
    errors treat each passage as one draw."""
    if not np.isfinite(found.kld).all():
        raise LightshipError("the candidate's divergence is not finite on the held-out text",
                             hint="it computes NaN or infinity somewhere")  # fmt: skip
    passages = [found.only(name) for name in dict.fromkeys(found.batch.tolist())]
    n = len(found.kld)
    drawn = "s.e. over passages" if len(passages) > 1 else "s.e. over tokens"
    return [
        Metric("kld", float(found.kld.mean()), "nats/token", n, mean_stderr([each.kld for each in passages]), "lower",
               0.0, f"mean KL(original ‖ candidate) over the candidate's vocabulary, {scored}; {drawn}"),
        Metric("kld_p99", float(np.quantile(found.kld, 0.99)), "nats/token", n, None, "lower", 0.0, "99th percentile"),
        Metric("top1", float(found.top1.mean()), "share", n,
               mean_stderr([each.top1.astype(np.float64) for each in passages]), "higher", 1.0,
               f"positions where original and candidate rank the same token first; {drawn}"),
        Metric("flips", float(found.flip.mean()), "share", n,
               mean_stderr([each.flip.astype(np.float64) for each in passages]), "lower", 0.0,
               f"positions where exactly one of both ranks the token that follows first (arXiv:2407.09141); {drawn}"),
        *(metric if original_bits is None or metric.name != "bits_per_byte"
          else replace(metric, baseline=original_bits, method=f"{metric.method}; the original in its own tokens")
          for metric in perplexity([each.original for each in passages], [each.candidate for each in passages],
                                   text_bytes)),
    ]  # fmt: skip


def perplexity(original: Sequence[Values], candidate: Sequence[Values], text_bytes: float | None) -> list[Metric]:
    """Perplexity, bits per byte and the paired perplexity ratio, from log-probabilities (nats) of the scored tokens.

    One array per passage, the same tokens for both models; `text_bytes` is the UTF-8 length of those tokens. With two
    or more passages the standard errors treat each passage as one draw (its tokens are correlated), else each token;
    exp and ratio by the delta method. Raises `LightshipError` for a value that is not finite or above 0.
    """
    _check(original, candidate, text_bytes)
    before, after = _mean(original), _mean(candidate)
    error = mean_stderr(candidate)
    n = sum(map(len, candidate))
    drawn = "passages" if len(candidate) > 1 else "tokens"
    shift = mean_stderr([c - o for o, c in zip(original, candidate, strict=True)])
    metrics = [
        Metric("perplexity", _exp(-after), "", n, _times(_exp(-after), error), "lower", _exp(-before),
               f"exp(mean negative log-likelihood per token); s.e. over {drawn}, delta method"),
        Metric("perplexity_ratio", _exp(before - after), "×", n, _times(_exp(before - after), shift), "lower", 1.0,
               f"exp(mean log p(original) − log p(this)) on the same tokens; paired s.e. over {drawn}, delta method"),
    ]  # fmt: skip
    if text_bytes is not None:
        method = f"negative log-likelihood / ln 2 / UTF-8 bytes of the scored text; s.e. over {drawn}"
        bits, whole = bits_per_byte(candidate, text_bytes), bits_per_byte(original, text_bytes)
        error = _times(n / math.log(2) / text_bytes, error)
        metrics.insert(1, Metric("bits_per_byte", bits, "bits/byte", n, error, "lower", whole, method))
    return metrics


def bits_per_byte(log_probabilities: Sequence[Values], text_bytes: float) -> float:
    """Of tokens with these log-probabilities (nats) that are `text_bytes` of UTF-8 together."""
    return -float(np.concatenate(log_probabilities).sum(dtype=np.float64)) / math.log(2) / text_bytes


def mean_stderr(passages: Sequence[Values]) -> float | None:
    """Standard error of the mean over all values: clustered by passage when there are two or more.

    Cluster-robust: √(C/(C−1) · Σ_c (Σ_{i∈c} (x_i − x̄))²) / n (Cameron & Miller 2015). None for a single value.
    """
    values = np.concatenate(passages).astype(np.float64)
    clusters = [passage for passage in passages if len(passage)]
    if len(clusters) < 2:
        return _stderr(values)
    mean = values.mean()
    residuals = np.array([(np.asarray(passage, np.float64) - mean).sum() for passage in clusters])
    return float(math.sqrt(len(clusters) / (len(clusters) - 1) * float((residuals**2).sum())) / len(values))


def _check(original: Sequence[Values], candidate: Sequence[Values], text_bytes: float | None) -> None:
    if [len(passage) for passage in original] != [len(passage) for passage in candidate]:
        raise LightshipError("original and candidate were not scored on the same tokens")
    if not sum(map(len, candidate)) or not (text_bytes is None or text_bytes > 0):
        raise LightshipError("no token was scored: there is nothing to compute perplexity from")
    for whose, passages in (("original", original), ("candidate", candidate)):
        values = np.concatenate(passages)
        if not np.isfinite(values).all():
            raise LightshipError(
                f"the {whose}'s loss is not finite on {int((~np.isfinite(values)).sum())} of {len(values)} tokens of "
                "the held-out text",
                hint="it computes NaN or infinity somewhere",
            )
        if values.max() > 1e-3:
            raise LightshipError(f"the {whose} gave a log-probability above 0: {float(values.max()):.4g}")


def _mean(passages: Sequence[Values]) -> float:
    return float(np.concatenate(passages).mean(dtype=np.float64))


def _exp(value: float) -> float:
    """exp, or a `LightshipError` where it leaves float64: a report holds no infinity."""
    try:
        return math.exp(value)
    except OverflowError as error:
        raise LightshipError(f"the mean loss differs by {value:.4g} nats per token: perplexity overflows") from error


def _times(factor: float, error: float | None) -> float | None:
    return None if error is None else factor * error


def _stderr(values: Values) -> float | None:
    """Standard error of the mean."""
    return float(np.std(values, ddof=1, dtype=np.float64) / math.sqrt(len(values))) if len(values) > 1 else None
