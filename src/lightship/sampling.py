"""Choosing the next token from logits: penalties, temperature, top-k, top-p, min-p. Pure functions of one position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lightship.engine import GenerationParams

Floats = npt.NDArray[np.float64]


def log_softmax(logits: npt.NDArray[np.floating]) -> Floats:
    """Log-probabilities over the last axis, in float64."""
    shifted: Floats = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normalised: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


def penalised(logits: Floats, prompt: Sequence[int], produced: Sequence[int], params: GenerationParams) -> Floats:
    """`logits` (vocabulary,) after the penalties.

    Repetition (Keskar et al. 2019, arXiv:1909.05858) divides positive and multiplies negative logits of every token of
    `prompt` and `produced`; presence and frequency (OpenAI's API) concern `produced` only: a token that came
    `count` times loses presence + frequency · count.
    """
    logits = logits.copy()
    seen = np.unique(np.array([*prompt, *produced], np.int64))
    logits[seen] = np.where(
        logits[seen] > 0, logits[seen] / params.repetition_penalty, logits[seen] * params.repetition_penalty
    )
    tokens, counts = np.unique(np.array(produced, np.int64), return_counts=True)
    logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


def distribution(logits: Floats, params: GenerationParams) -> Floats:
    """The probabilities (vocabulary,) to draw from: temperature (> 0), then top-k, top-p and min-p, each on what the
    one before left (as transformers does); the likeliest token always stays.

    Top-p (Holtzman et al. 2020, arXiv:1904.09751) keeps the likeliest tokens until their sum reaches `top_p`; min-p
    (arXiv:2407.01082) those of at least `min_p` times the likeliest.
    """
    order = np.argsort(-logits, kind="stable")[: params.top_k or None]
    kept = np.exp(log_softmax(logits[order] / params.temperature))
    before = np.cumsum(kept) - kept
    stays = (before < params.top_p) & (kept >= params.min_p * kept[0])
    stays[0] = True
    probabilities = np.zeros(len(logits))
    probabilities[order[stays]] = kept[stays] / kept[stays].sum()
    return probabilities


def choose(
    logits: npt.NDArray[np.floating],
    prompt: Sequence[int],
    produced: Sequence[int],
    params: GenerationParams,
    random: np.random.Generator,
) -> int:
    """The next token: the likeliest after penalties when `temperature` is 0, else drawn with `random`."""
    wide = penalised(logits.astype(np.float64), prompt, produced, params)
    if params.temperature <= 0:
        return int(wide.argmax())
    cumulated = np.cumsum(distribution(wide, params))
    return int(np.searchsorted(cumulated, random.random() * cumulated[-1], side="right"))
