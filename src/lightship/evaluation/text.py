"""The tokens of a run: to gate, to score on and to calibrate with. What calibrates never scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightship.calibration import Encode, Passages, Text, default_text, paragraph_keys, read_text, render_with
from lightship.checkpoint import Checkpoint
from lightship.costs import Amount
from lightship.errors import SourceError, UsageError
from lightship.evaluation import golden, parity, speed
from lightship.evaluation.divergence import Batch, passage_batches
from lightship.recipe import Recipe
from lightship.template import ChatTemplate, load_template
from lightship.tokenizer import load_tokenizer

CHUNK = 512  # tokens, second half scored, as llama.cpp's perplexity tool does
CHUNKS = {"quick": 6, "full": 24}
CALIBRATION_ROWS = 32
SPEED_REPEATS = {"quick": {"repeats": 3, "new_tokens": 32}, "full": {"repeats": 7, "new_tokens": 64}}


@dataclass(frozen=True)
class Texts:
    """Token sequences for a model of `context`: `gate` one long run, `score` held-out passages, `calibrate` for
    data-aware steps. `scored` says which positions count."""

    context: int
    gate: tuple[int, ...]
    score: Passages
    calibrate: tuple[tuple[int, ...], ...]
    describe: dict[str, Any]
    scored = "second half of each passage"

    @property
    def digest(self) -> str:
        """Of the text that is scored."""
        return self.score.digest

    def gate_batches(self, original: Any) -> list[Batch]:
        """The gate's rows; `original` (with a method `greedy`) continues some of them."""
        return parity.gate_batches(self.gate, self.context, original.greedy)

    def score_batches(self, original: Any) -> tuple[list[Batch], float | None]:
        """The held-out passages, and the UTF-8 bytes of what is scored."""
        return passage_batches(self.score), self.score.bytes_per_token * self.score.scored


def amount(recipe: Recipe, context: int) -> Amount:
    """How many tokens a run of `recipe` computes with a model of `context`, where the text is long enough."""
    passage, longest = min(CHUNK, context), min(parity.LONG, context)
    measured = SPEED_REPEATS[recipe.evaluate]
    greedy = parity.GREEDY_PROMPTS * (parity.GREEDY_PROMPT + parity.GREEDY_TOKENS)
    return Amount(
        gate=len(parity.SHORT) * max(parity.SHORT) + longest + greedy,
        gate_kept=sum(parity.SHORT) + longest + parity.GREEDY_PROMPTS * (parity.GREEDY_TOKENS + 1),
        longest=longest,
        greedy=parity.GREEDY_TOKENS,
        passages=CHUNKS[recipe.evaluate],
        passage=passage,
        score_kept=CHUNKS[recipe.evaluate] * (passage - passage // 2),
        calibrate=CALIBRATION_ROWS * passage if recipe.precision.data_aware else 0,
        speed_runs=measured["repeats"] + 1,
        prompt=max(min(speed.PROMPT, context - measured["new_tokens"]), 1),
        new_tokens=measured["new_tokens"],
    )


def cut(recipe: Recipe, checkpoint: Checkpoint) -> Texts:
    """The tokens that `recipe` needs. Mistakes in the user's files are raised here, before any work is done."""
    encode, start = tokeniser(checkpoint)
    if recipe.golden is not None:
        golden.read_cases(Path(recipe.golden))
    template = load_template(checkpoint.folder)
    text = open_text(recipe.text, template)
    context = checkpoint.context_length
    length = min(CHUNK, context)
    score = scoring_set(text, encode, length, CHUNKS[recipe.evaluate], start=start)
    gate = scoring_set(default_text(), encode, min(parity.LONG, context), 1, start=start).sequences[0]
    calibrate = None
    if recipe.precision.data_aware:
        calibrate = calibration_text(recipe, text, template).encode(encode, length, CALIBRATION_ROWS, start=start)
    describe = {
        "name": score.name,
        "default_only": text.default,
        "scoring_sha256": score.digest,
        "calibration_sha256": calibrate.digest if calibrate else None,
        "tokens": length * len(score.sequences),
    }
    return Texts(context, gate, score, calibrate.sequences if calibrate else (), describe)


def tokeniser(checkpoint: Checkpoint) -> tuple[Encode, int | None]:
    """Text → token ids without special tokens, from `tokenizer.json`; and the id it begins a text with, if any. The
    first raises `SourceError` for a token that the model has no embedding of."""
    tokenizer = load_tokenizer(checkpoint.folder)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= checkpoint.vocabulary:
            raise SourceError(
                f"the text has the token {tokenizer.id_to_token(max(ids))!r} with id {max(ids)}, the model in "
                f"{checkpoint.folder} embeddings for 0 … {checkpoint.vocabulary - 1}",
                hint="give the tokenizer that the model was trained with",
            )
        return ids

    whole, plain = tokenizer.encode("a").ids, encode("a")
    return encode, whole[0] if whole[:1] != plain[:1] else None


def open_text(path: str | None, template: ChatTemplate | None) -> Text:
    """The default text, or the user's file read through the model's chat template."""
    if path is None:
        return default_text()

    def render(messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
        if template is None:
            raise UsageError(f"{path} is a chat, and the model has no chat template", hint="give a plain text file")
        return render_with(template.render)(messages)

    return read_text(Path(path), render)


def calibration_text(recipe: Recipe, text: Text, template: ChatTemplate | None) -> Text:
    """What may be calibrated on: the file that `recipe` names, else the part of `text` that is not scored. Raises
    `UsageError` where that file shares paragraphs with what is scored."""
    if recipe.calibrate is None:
        return text.split()[0]
    given = open_text(recipe.calibrate, template)
    check_apart(given, text)
    return given


def check_apart(given: Text, text: Text) -> None:
    """Raise `UsageError` where `given` shares paragraphs with what of `text` is scored."""
    scored = text.split()[1].documents
    given.check_apart(key for document in scored for key in paragraph_keys(document.text) | document.answers())


def scoring_set(text: Text, tokenize: Encode, length: int, count: int, *, start: int | None = None) -> Passages:
    """Sequences to score on: from the documents that never calibrate. Raises `UsageError` for too short a text."""
    return text.split()[1].encode(tokenize, length, count, start=start)
