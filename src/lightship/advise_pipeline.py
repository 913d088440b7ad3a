"""Advice for one model on this machine: each technique is tried once, lightly, and what it loses is measured.

Weights in fewer bits are simulated here (rounded to nearest, computed in float32): `ship` quantises better than that.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from lightship.checkpoint import Checkpoint
from lightship.errors import LightshipError
from lightship.evaluation import calibrating, loss
from lightship.find import names
from lightship.kind import GENERATORS
from lightship.layers import linears, weight_of
from lightship.machine import matmul_rate, memory_bandwidth
from lightship.recipe import STEP_LIMITS, Recipe
from lightship.sources import look
from lightship.step import Context, Need, Step, WeightStep, make_step, step_class
from lightship.targets._integers import nearest
from lightship.work import Progress, Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TABLES = ("embed", "wte", "wpe", "shared", "lm_head")  # parts of the names of what is looked up, and of heads
DOMINATES = 0.3  # share of the weights from which on the vocabulary is worth a thought first
LONGER = "bits_per_byte_ratio"  # of a cut vocabulary: what its other figures, over the kept tokens, do not show


class Rounded(WeightStep):
    """Weights as integers of few bits would have them: rounded to nearest, a scale for each group."""

    bits: int = Field(8, ge=2, le=8, description="of the weights of linear layers; tables take 8")
    group: int = Field(0, ge=0, description="weights along the input that share a scale; 0: the whole row")
    serves: ClassVar[Need] = "memory"

    def change(self, model: PreTrainedModel, context: Context) -> dict[str, Any]:
        head = model.get_output_embeddings()
        tables = {id(each.weight): each.weight for each in (model.get_input_embeddings(), head) if each is not None}
        for layer in linears(model).values():
            _round(weight_of(layer), self.bits, self.group)
        for table in tables.values():
            _round(table.data, 8, 0)
        return {}

    @classmethod
    def name(cls) -> str:
        return "quantise"


def _round(weight: Any, bits: int, group: int) -> None:
    import torch

    width = weight.shape[1]
    size = group if group and width % group == 0 else width
    weight.copy_(torch.from_numpy(nearest(weight.numpy(), bits, size).weights()))


@dataclass(frozen=True)
class Trial:
    """What one technique would leave of the original's bytes and of its multiplications a token, as shares, and what
    it would lose; `refused`: why it could not be tried."""

    name: str
    options: Mapping[str, Any]
    serves: Need
    bytes: float = 1.0
    compute: float = 1.0
    losses: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    refused: str | None = None

    @property
    def label(self) -> str:
        """Name and options."""
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.options.items())])

    @property
    def loss(self) -> float:
        """The first figure of its losses: mean KLD, or 1 − mean cosine."""
        return next(iter(self.losses.values()))


@dataclass(frozen=True)
class Advice:
    """Where the weights are, what binds this machine, what each technique would bring, and words about it."""

    source: str
    parameters: int
    tables: float  # share of the parameters in embeddings and head
    balance: float  # rows that are computed together until computing, not reading weights, takes the time
    trials: tuple[Trial, ...]
    words: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def advise(source: str, *, text: str | None = None, progress: Progress = lambda line: None) -> Advice:
    """Try each technique on `source` and measure what it loses on `text` (default: English prose).

    Takes minutes, and disk for two copies of the model. Raises as `compress` for a source that cannot be read.
    """
    tried: list[tuple[type[Step], dict[str, Any]]] = [(Rounded, {"bits": 8}), (Rounded, {"bits": 4, "group": 64})]
    tried += [(kind, dict(kind.trial)) for kind in map(step_class, names("compression")) if kind.trial]
    stages = ("read", "original", *(f"{number} {kind.name()}" for number, (kind, _) in enumerate(tried, 1)))
    with tempfile.TemporaryDirectory(prefix="lightship-") as name:
        work = Work(Path(name), stages, progress)
        recipe = Recipe(source=source, text=text)
        original = look(source, log=work.say).kept(work)
        work.announce("original")
        loss.record(recipe, original, original, Path(name) / "said")
        context = calibrating.context(recipe, original, calibrating.text(recipe, original), work.say)
        trials = []
        for stage, (kind, options) in zip(stages[2:], tried, strict=True):
            work.announce(stage)
            trials.append(_try(recipe, original, context, kind, options, Path(name)))
            work.say(_said(trials[-1]))
        return _advice(original, tuple(trials), source)


def _try(
    recipe: Recipe, original: Checkpoint, context: Context, kind: type[Step], options: Mapping[str, Any], folder: Path
) -> Trial:
    began = time.monotonic()
    place = folder / "tried"
    try:
        step = kind(**options) if kind is Rounded else make_step(kind.name(), options)
        step.refuse(original.config)
        step.check_memory(original)
        made = step.apply(original, place, context)
        said = folder / "said"
        if made.kept_tokens is not None:
            loss.record(recipe, original, made, said := folder / "restricted")
        metrics = loss.measure(recipe, made, said)
        losses = {each.name: each.value for each in metrics if each.name in STEP_LIMITS}
        bits = next((each.ratio() for each in metrics if each.name == "bits_per_byte"), None)
        if bits is not None and made.kept_tokens is not None:
            losses[LONGER] = bits
        size = rounded_bytes(original, step.bits, step.group) if isinstance(step, Rounded) else made.weight_bytes
        shares = size / original.weight_bytes, compute(made) / compute(original)
        found = Trial(kind.name(), options, kind.serves, *shares, losses, round(time.monotonic() - began, 1))
    except LightshipError as error:
        found = Trial(kind.name(), options, kind.serves, refused=error.message)
    for name in ("tried", "restricted"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return found


# ── Sizes, from the headers ─────────────────────────────────────────────────


def _is_table(name: str) -> bool:
    return any(part in name for part in TABLES)


def compute(checkpoint: Checkpoint) -> int:
    """Multiplications for a token, attention's own left out: the matrices of the body, and the head where it writes."""
    shapes = checkpoint.shapes
    body = sum(prod(shape) for name, shape in shapes.items() if len(shape) == 2 and not _is_table(name))
    tables = [shape for name, shape in shapes.items() if len(shape) == 2 and checkpoint.vocabulary in shape]
    return body + (prod(tables[0]) if checkpoint.kind in GENERATORS and tables else 0)


def rounded_bytes(checkpoint: Checkpoint, bits: int, group: int) -> int:
    """Bytes of the weights with matrices in `bits` (tables in 8) and scales of 16 bits, the rest in 16."""
    size = 0
    for name, shape in checkpoint.shapes.items():
        count = prod(shape)
        if len(shape) != 2:
            size += 2 * count
        elif _is_table(name):
            size += count + 2 * max(shape)
        else:
            size += count * bits // 8 + 2 * (count // group if group else shape[0])
    return size


# ── Words ───────────────────────────────────────────────────────────────────


def _advice(original: Checkpoint, trials: tuple[Trial, ...], source: str) -> Advice:
    shapes = original.shapes
    parameters = sum(map(prod, shapes.values()))
    tables = sum(prod(shape) for name, shape in shapes.items() if _is_table(name)) / parameters
    balance = matmul_rate() / 2 * 4 / memory_bandwidth()  # float32: two operations and four bytes a weight
    words = tuple(_words(original, trials, tables, balance, source))
    return Advice(source, parameters, tables, balance, trials, words)


def _words(original: Checkpoint, trials: tuple[Trial, ...], tables: float, balance: float, source: str) -> list[str]:
    measured = [each for each in trials if each.refused is None]
    alike = [each for each in measured if LONGER not in each.losses]  # a loss over the kept tokens is of another kind
    smaller = sorted((each for each in alike if each.serves == "memory" and each.bytes < 1), key=lambda each: each.loss)
    faster = sorted((each for each in alike if each.compute < 1), key=lambda each: each.loss / (1 - each.compute))
    found = [
        f"This machine reads a float32 weight in the time of {balance:.0f} multiplications with it: what fewer than "
        f"about {balance:.0f} rows together compute (decoding for few clients) follows the bytes of the weights, "
        "the rest (prompts, encoders, many clients) follows the computing."
    ]
    if smaller:
        best, others = smaller[0], " and ".join(each.label for each in smaller[1:3]) or "nothing"
        found.append(f"Memory and decoding: {best.label} leaves {best.bytes:.0%} of the bytes at a loss of "
                     f"{best.loss:.2g}; next would be {others}. Here all weights are rounded to nearest: in int4 "
                     "`ship` fits them to what the model computes, and loses less.")  # fmt: skip
    if faster:
        best = faster[0]
        found.append(f"Computing: {best.label} saves {1 - best.compute:.0%} of it at a loss of {best.loss:.2g}, the "
                     "least for what it saves.")  # fmt: skip
    for cut in (each for each in measured if LONGER in each.losses):
        found.append(f"Vocabulary: {cut.label} leaves {cut.bytes:.0%} of the bytes and {cut.compute:.0%} of the "
                     f"computing. Text takes {cut.losses[LONGER]:.3f} times the bits a byte, and more tokens; the "
                     "other losses are over the tokens that stay.")  # fmt: skip
    if tables >= DOMINATES:
        found.append(f"Embedding and head are {tables:.0%} of the weights: cut the vocabulary to what your text needs.")
    found.append("Zeros alone (magnitude, wanda) save neither bytes nor time in the runtimes here.")
    first = smaller[0] if smaller else faster[0] if faster else None
    if first is not None:
        found.append(f"Try first: lightship {_command(first, source)}")
    return found


def _command(trial: Trial, source: str) -> str:
    """What does it."""
    if trial.name == "quantise":
        return f"ship {source} -p int{trial.options['bits']}"
    return " ".join([f"compress {source} --step {trial.name}",
                     *(f"--set {name}={value}" for name, value in trial.options.items())])  # fmt: skip


def _said(trial: Trial) -> str:
    if trial.refused is not None:
        return f"not tried: {trial.refused}"
    losses = ", ".join(f"{name} {value:.3g}" for name, value in trial.losses.items())
    return f"{trial.label}: {trial.bytes:.0%} of the bytes, {trial.compute:.0%} of the computing; {losses}"
