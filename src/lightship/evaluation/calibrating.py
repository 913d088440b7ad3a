"""What a step may look at: inputs of the model of its kind, from text that is never scored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from lightship.calibration import Text
from lightship.checkpoint import Checkpoint
from lightship.encoder import Encoder
from lightship.evaluation import encoders
from lightship.evaluation.pairs import read_pairs, written
from lightship.evaluation.text import CHUNK, calibration_text, check_apart, open_text, tokeniser
from lightship.find import find
from lightship.recipe import Recipe
from lightship.seq2seq import Seq2Seq
from lightship.step import TOGETHER, Context, Inputs
from lightship.template import load_template

ROWS = 32  # of the calibration set
SOURCE, WRITTEN = 128, 32  # tokens of a source that an encoder-decoder calibrates on, and of what it writes for it


def text(recipe: Recipe, checkpoint: Checkpoint) -> Text:
    """The text to calibrate on, see `calibration_text`."""
    template = load_template(checkpoint.folder)
    found = calibration_text(recipe, scoring_text(recipe, checkpoint), template)
    if recipe.calibrate is not None:
        _check_pairs(recipe, checkpoint, found)
    return found


def check_text(recipe: Recipe, checkpoint: Checkpoint, given: Text) -> None:
    """Raise `UsageError` where `given`, which a step reads, shares paragraphs with what is scored."""
    check_apart(given, scoring_text(recipe, checkpoint))
    _check_pairs(recipe, checkpoint, given)


def _check_pairs(recipe: Recipe, checkpoint: Checkpoint, given: Text) -> None:
    if _scores_pairs(recipe, checkpoint):
        given.check_apart(words for *pair, _ in read_pairs(Path(str(recipe.text))) for words in pair)


def scoring_text(recipe: Recipe, checkpoint: Checkpoint) -> Text:
    """The text of `recipe`, of which a part is scored."""
    pairs = _scores_pairs(recipe, checkpoint)  # their targets are scored whole, and calibrate nothing
    return open_text(None if pairs else recipe.text, load_template(checkpoint.folder))


def _scores_pairs(recipe: Recipe, checkpoint: Checkpoint) -> bool:
    return recipe.text is not None and checkpoint.kind == "seq2seq" and Path(recipe.text).suffix == ".jsonl"


def context(recipe: Recipe, checkpoint: Checkpoint, text: Text, say: Callable[[str], None]) -> Context:
    """What a step on `checkpoint` may look at."""
    return Context(tuple(batches(checkpoint, text)), text, recipe.seed, say)


def batches(checkpoint: Checkpoint, text: Text) -> list[Inputs]:
    """Inputs of the model from `text`, `ROWS` rows at most. Raises `UsageError` where it is too short for one."""
    if checkpoint.kind == "decoder":
        return _decoder_batches(checkpoint, text)
    if checkpoint.kind == "seq2seq":
        return _pair_batches(checkpoint, text)
    encoder = Encoder.load(checkpoint.folder)
    rows = encoders.rows_from(encoder, text, ROWS * TOGETHER)
    typed = "type_vocab_size" in checkpoint.config and checkpoint.config["type_vocab_size"] > 0
    return [
        {"input_ids": each.ids, "attention_mask": each.mask, **({"token_type_ids": each.types} if typed else {})}
        for each in rows.batches(encoder)
    ]


def _decoder_batches(checkpoint: Checkpoint, text: Text) -> list[Inputs]:
    encode, start = tokeniser(checkpoint)
    found = text.encode(encode, min(CHUNK, checkpoint.context_length), ROWS, start=start)
    rows = np.array(found.sequences, np.int64)
    parts = (rows[at : at + TOGETHER] for at in range(0, len(rows), TOGETHER))
    return [{"input_ids": each, "attention_mask": np.ones_like(each)} for each in parts]


def _pair_batches(checkpoint: Checkpoint, text: Text) -> list[Inputs]:
    """Sources, and what the model itself writes for them, to its end: one a batch, since they end where they like."""
    about = Seq2Seq.load(checkpoint.folder)
    ids = text.encode(lambda words: about.tokenizer.encode(words, add_special_tokens=False).ids,
                      min(SOURCE, about.context - len(about.frame([]))), ROWS).sequences  # fmt: skip
    writer = find("targets", "pytorch").open_scorer(checkpoint.folder)
    found: list[Inputs] = []
    for at in range(0, len(ids), TOGETHER):
        sources = [about.frame(list(row)) for row in ids[at : at + TOGETHER]]
        for source, row in zip(sources, writer.greedy(sources, WRITTEN), strict=True):
            given, mask = about.padded([source])
            answer = np.array([[*about.start, *written(list(row), about)]], np.int64)
            found.append({"input_ids": given, "attention_mask": mask, "decoder_input_ids": answer})
    return found
