"""Quality on held-out text, original against candidate: KL divergence, top-1, perplexity, bits per byte.

As llama.cpp's perplexity tool: chunks of 512 tokens without overlap, the second half of each scored.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lightship.errors import LightshipError
from lightship.evaluation.divergence import Comparison
from lightship.report import Metric


def quality(found: Comparison, text_bytes: int) -> list[Metric]:
    """The quality metrics of a comparison; `text_bytes` is the UTF-8 length of the scored tokens."""
    labelled = np.isfinite(found.original)
    original, candidate = -found.original[labelled].astype(float), -found.candidate[labelled].astype(float)
    if not np.isfinite(candidate).all() or not np.isfinite(found.kld).all():
        raise LightshipError("the candidate's loss is not finite on the held-out text", hint="it computes NaN somewhere")
    n = len(found.kld)
    share = float(found.top1.mean())
    scale = len(candidate) / math.log(2) / text_bytes
    return [
        Metric("kld", float(found.kld.mean()), "nats/token", n, _stderr(found.kld), "lower", 0.0,
               "mean KL(original ‖ candidate) over the whole vocabulary, second half of 512-token chunks"),
        Metric("kld_p99", float(np.quantile(found.kld, 0.99)), "nats/token", n, None, "lower", 0.0, "99th percentile"),
        Metric("top1", share, "share", n, math.sqrt(share * (1 - share) / n), "higher", 1.0,
               "positions where original and candidate rank the same token first"),
        Metric("perplexity", math.exp(candidate.mean()), "", len(candidate), math.exp(candidate.mean()) * _stderr(candidate),
               "lower", math.exp(original.mean()), "exp(mean negative log-likelihood per token)"),
        Metric("bits_per_byte", candidate.mean() * scale, "bits/byte", len(candidate), _stderr(candidate) * scale,
               "lower", original.mean() * scale, "negative log-likelihood / ln 2 / UTF-8 bytes of the scored text"),
    ]  # fmt: skip


def _stderr(values: npt.NDArray[np.floating]) -> float:
    """Standard error of the mean."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
