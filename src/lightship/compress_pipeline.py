"""The walk of a checkpoint through steps: read → original → (step → gate) for each → a lighter checkpoint.

Every finished step stays in the work folder, so that a run which was stopped, by a limit or otherwise, goes on from
there. Nothing that is scored calibrates.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightship import several
from lightship.calibration import Text
from lightship.checkpoint import Checkpoint, sha256, write_json
from lightship.errors import UsageError
from lightship.evaluation import calibrating, loss, memory
from lightship.output import appear, check_out, scratch
from lightship.preflight import check_files
from lightship.recipe import STEP_LIMITS, Recipe
from lightship.report import Metric
from lightship.sources import look
from lightship.step import Step, make_step
from lightship.work import Progress, Stage, Work

MARK = "lineage.json"  # a checkpoint of ours has it


@dataclass(frozen=True)
class Made:
    """What a step made, and what it had lost against the original by then."""

    step: Step
    checkpoint: Checkpoint
    size: int  # bytes of its weights
    metrics: list[Metric]
    entry: dict[str, Any]  # of its lineage


@dataclass(frozen=True)
class Compressed:
    """The original and what every step made of it, in order."""

    original: Checkpoint
    made: tuple[Made, ...]

    @property
    def checkpoint(self) -> Checkpoint:
        """The last one."""
        return self.made[-1].checkpoint if self.made else self.original


def steps_of(recipe: Recipe) -> list[Step]:
    """The steps of `recipe`, their options checked. Raises `UnknownName` or `UsageError`."""
    return [make_step(spec.name, spec.options) for spec in recipe.steps]


def stages(steps: Sequence[Step]) -> tuple[str, ...]:
    """Every stage, in order."""
    numbered = (f"{word}step {number} {step.name()}" for number, step in enumerate(steps, 1) for word in ("", "gate "))
    return ("read", "original", *numbered)


def compress(
    recipe: Recipe,
    out: Path,
    *,
    runs: Path = Path("runs"),
    force: bool = False,
    progress: Progress = lambda line: None,
    ignore_shortage: bool = False,
) -> Compressed:
    """Take the source of `recipe` through its steps and put the checkpoint at `out`; the stages stay below `runs`.

    Raises `LimitExceeded` where a step loses more than `recipe.limits`, naming it: what was made so far stays, and a
    rerun goes on from there.
    """
    steps = steps_of(recipe)
    if not steps:
        raise UsageError("no step is given", hint="for example --step svd --set keep=0.9; see `lightship list`")
    check_files(recipe)
    check_out(out, recipe, force, MARK)
    place = runs / f"{Path(recipe.source.rstrip('/')).name}-{'-'.join(step.name() for step in steps)}"
    work = Work(place, stages(steps), progress)
    work.folder.mkdir(parents=True, exist_ok=True)
    found = walk(recipe, steps, work, ignore_shortage=ignore_shortage)
    with scratch(out) as folder:
        finished = folder / "checkpoint"
        shutil.copytree(found.checkpoint.folder, finished)
        appear(finished, out)
    return Compressed(found.original, (*found.made[:-1], replace(found.made[-1], checkpoint=Checkpoint(out))))


def walk(recipe: Recipe, steps: Sequence[Step], work: Work, *, ignore_shortage: bool = False) -> Compressed:
    """All stages in `work`."""
    found = look(recipe.source, revision=recipe.revision, base=recipe.base, log=work.say)
    original = found.kept(work)
    loss.check_names(recipe.limits, original.kind)
    for step in steps:
        step.refuse(original.config)
        if not ignore_shortage:
            step.check_memory(original)
        for text in step.texts(original):
            calibrating.check_text(recipe, original, text)
    calibration = calibrating.text(recipe, original)
    recorded = _record(recipe, original, work)
    made: list[Made] = []
    current = original
    for number, step in enumerate(steps, 1):
        stage = _step(recipe, step, number, current, calibration, work)
        current = Checkpoint(stage.folder / "checkpoint")
        metrics = _gate(Gate(recipe, original, recorded, work), f"step {number} {step.name()}", stage, current)
        made.append(Made(step, current, current.weight_bytes, metrics, current.lineage[-1]))
    return Compressed(original, tuple(made))


# ── Stages ──────────────────────────────────────────────────────────────────


def _record(recipe: Recipe, original: Checkpoint, work: Work) -> Stage:
    """What the original says, once for all steps."""
    depends = {"checkpoint": original.digest(), "text": calibrating.scoring_text(recipe, original).digest,
               "file": recipe.text and sha256(Path(recipe.text)), "level": recipe.evaluate}  # fmt: skip
    return work.stage("original", depends, lambda folder: loss.record(recipe, original, original, folder / "said"))


def _step(recipe: Recipe, step: Step, number: int, current: Checkpoint, text: Text, work: Work) -> Stage:
    """What `step` makes of `current`; time and memory go into its lineage."""
    name = f"step {number} {step.name()}"

    def make(folder: Path) -> None:
        context = calibrating.context(recipe, current, text, work.say)
        fresh, began = memory.forget_peak(), time.monotonic()
        made = step.apply(current, folder / "checkpoint", context)
        seconds = time.monotonic() - began
        entries = made.lineage
        entries[-1]["seconds"] = round(seconds, 2)
        entries[-1]["peak_bytes"] = memory.peak_rss_bytes() if fresh else None
        write_json(made.folder / "lineage.json", entries)
        work.say(
            f"{made.weight_bytes / 1e6:.1f} MB of weights, {made.weight_bytes / current.weight_bytes:.1%} of before"
        )
        gc.collect()

    depends = {"checkpoint": current.digest(), "step": step.name(), "options": step.model_dump(mode="json"),
               "seed": recipe.seed, "calibration": text.digest,
               "files": [sha256(path) for path in step.files()]}  # fmt: skip
    return work.stage(name, depends, make)


@dataclass(frozen=True)
class Gate:
    """What every step is measured against: the original, and what it said."""

    recipe: Recipe
    original: Checkpoint
    recorded: Stage
    work: Work


def _gate(gate: Gate, name: str, made: Stage, current: Checkpoint) -> list[Metric]:
    """What is lost by now. The limits are looked at outside the stage: who changes them need not measure again."""
    recipe, work = gate.recipe, gate.work

    def measure(folder: Path) -> dict[str, Any]:
        said = gate.recorded.folder / "said"
        if current.kept_tokens is not None:  # it reads the text in other tokens
            loss.record(recipe, gate.original, current, said := folder / "said")
        metrics = loss.measure(recipe, current, said)
        shutil.rmtree(folder / "said", ignore_errors=True)
        return several.kept(metrics)

    stage = work.stage(f"gate {name}", {"made": made.digest, "original": gate.recorded.digest}, measure)
    metrics = several.metrics(stage.result)
    for metric in metrics:
        if metric.name in STEP_LIMITS:
            error = "" if metric.stderr is None else f" ± {metric.stderr:.1g}"
            work.say(f"{metric.name} {metric.value:.4g}{error}")
    hint = f"ask less of it, or allow more; what it made is in {current.folder}, the steps before it are kept"
    loss.check(metrics, recipe.limits, name, hint)
    return metrics
