"""What a changed checkpoint has lost: the original against it in PyTorch, both in float32, on text that nothing was
calibrated on. Of models that generate KL divergence, top-1, flips and perplexity; of encoders as in `encoders`."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.checkpoint import Checkpoint, read_json, write_json
from lightship.encoder import Encoder
from lightship.engine import EngineSettings
from lightship.errors import LightshipError, LimitExceeded, UsageError
from lightship.evaluation import divergence, encoders, pairs, perplexity
from lightship.evaluation.encoders import Rows
from lightship.evaluation.pairs import PairTexts
from lightship.evaluation.text import Texts, cut, open_text
from lightship.evaluation.vocabulary_view import Restricted, RestrictedEngine, RestrictedPair
from lightship.find import find
from lightship.kind import GENERATORS, Kind
from lightship.recipe import Recipe
from lightship.report import Metric
from lightship.seq2seq import Seq2Seq

BYTES = "bytes.json"
# What is measured of each kind, of that what a limit may be on.
LIMITS: dict[Kind, tuple[str, ...]] = {
    **dict.fromkeys(GENERATORS, ("kld", "top1", "flips", "perplexity_ratio")),
    **dict.fromkeys(("classifier", "qa"), ("kld", "top1")), "embedder": ("cosine_loss",),
}  # fmt: skip
NOUNS: dict[Kind, str] = {
    "decoder": "a decoder", "seq2seq": "an encoder-decoder", "classifier": "a classifier", "qa": "an answerer",
    "embedder": "an embedder",
}  # fmt: skip


def record(recipe: Recipe, original: Checkpoint, through: Checkpoint, folder: Path) -> None:
    """Keep in `folder` what `original` says on the text of `recipe` as `through` reads it: a checkpoint with the same
    vocabulary, or with a part of it, to which what the original says is then restricted."""
    folder.mkdir(parents=True, exist_ok=True)
    if original.kind not in GENERATORS:
        record_rows(original, through, _rows(recipe, through), folder)
    else:
        scorer = original_scorer(original, through)
        batches, text_bytes = _texts(recipe, through).score_batches(scorer)
        divergence.record(scorer, batches, folder)
        write_json(folder / BYTES, {"bytes": text_bytes, "original_bits": original_bits(recipe, original, scorer)})
    gc.collect()


def record_rows(original: Checkpoint, through: Checkpoint, rows: Rows, folder: Path) -> None:
    """As `record`, of an encoder on `rows` of tokens of `through`. Labels and embeddings know no vocabulary, so that of
    rows that are texts the original reads these in its own tokens; answers are spans of tokens, read in those of
    `through`, as the rows of gates are, which compare what was exported with what it was exported from."""
    engine, kept = _engine(original), _kept(original, through)
    if kept is None:
        encoders.record(Encoder.load(through.folder), engine, rows, folder)
    elif original.kind == "qa" or not rows.texts:
        encoders.record(Encoder.load(through.folder), RestrictedEngine(engine, kept), rows, folder)
    else:
        own = Encoder.load(original.folder)
        encoders.record(own, engine, encoders.reread(own, rows), folder)
    engine.close()
    gc.collect()


def original_scorer(original: Checkpoint, through: Checkpoint) -> Any:
    """What scores `original` in the vocabulary of `through`."""
    scorer, kept = find("targets", "pytorch").open_scorer(original.folder), _kept(original, through)
    if kept is None:
        return scorer
    if original.kind == "seq2seq":
        return RestrictedPair(scorer, kept, Seq2Seq.load(through.folder))
    return Restricted(scorer, kept)


def original_bits(recipe: Recipe, original: Checkpoint, scorer: Any) -> float | None:
    """Bits per byte of `original` on the text of `recipe` in its own tokens, where its `scorer` (see `original_scorer`)
    reads it in those of a cut vocabulary; None where both are the same, or no text of known length is scored."""
    if not isinstance(scorer, (Restricted, RestrictedPair)):
        return None
    batches, text_bytes = _texts(recipe, original).score_batches(scorer.scorer)
    if text_bytes is None:
        return None
    return perplexity.bits_per_byte(divergence.log_probabilities(scorer.scorer, batches), text_bytes)


def _kept(original: Checkpoint, through: Checkpoint) -> npt.NDArray[np.int64] | None:
    """The ids that the tokens of `through` have in `original`; None where both have the same."""
    before, after = original.kept_tokens, through.kept_tokens
    if after is None or (before is not None and len(before) == len(after)):
        return None
    return after if before is None else np.searchsorted(before, after)


def measure(recipe: Recipe, changed: Checkpoint, recorded: Path) -> list[Metric]:
    """What `changed` has lost against the original that `record` left in `recorded`. Raises `LightshipError` for a loss
    that is not finite."""
    if changed.kind not in GENERATORS:
        engine = _engine(changed)
        distance = encoders.distance(Encoder.load(changed.folder), engine, _rows(recipe, changed), recorded)
        engine.close()
        if not np.isfinite(distance.values).all():
            raise LightshipError("what it says of the held-out text is not finite",
                                 hint="the step made weights that overflow; ask less of it")  # fmt: skip
        found = distance.metrics()
    else:
        scorer = find("targets", "pytorch").open_scorer(changed.folder)
        reference = divergence.reopen(recorded)
        about = read_json(recorded / BYTES)
        compared = divergence.compare(reference, scorer)
        scored = _texts(recipe, changed).scored
        found = perplexity.quality(compared, about["bytes"], scored, about["original_bits"])
    gc.collect()
    return found


def check(metrics: list[Metric], limits: dict[str, float], what: str, hint: str) -> None:
    """Raise `LimitExceeded` naming `what`, the figure, its limit and by how much it is missed."""
    figures = {metric.name: metric for metric in metrics}
    for name, limit in limits.items():
        value, lower = figures[name].value, figures[name].direction == "lower"
        over = value - limit if lower else limit - value
        if not over <= 0:
            side = "exceeds" if lower else "is below"
            raise LimitExceeded(f"{what}: {name} {value:.4g} {side} the limit {limit:g} by {over:.3g}", hint=hint)


def check_names(limits: Iterable[str], kind: Kind) -> None:
    """Raise `UsageError` for a limit on what is not measured of a model of `kind`."""
    for name in limits:
        if name not in LIMITS[kind]:
            raise UsageError(f"the limit {name}: it is not measured of {NOUNS[kind]}",
                             hint=f"limits are possible on {', '.join(LIMITS[kind])}")  # fmt: skip


def _texts(recipe: Recipe, checkpoint: Checkpoint) -> Texts | PairTexts:
    return pairs.cut(recipe, checkpoint) if checkpoint.kind == "seq2seq" else cut(recipe, checkpoint)


def _rows(recipe: Recipe, checkpoint: Checkpoint) -> Rows:
    encoder = Encoder.load(checkpoint.folder)
    return encoders.score_rows(encoder, open_text(recipe.text, None), encoders.SCORED[recipe.evaluate])


def _engine(checkpoint: Checkpoint) -> Any:
    return find("targets", "pytorch").open_encoder(checkpoint.folder, EngineSettings(inference_precision="f32"))
