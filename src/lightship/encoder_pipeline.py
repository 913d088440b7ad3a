"""The walk of an encoder: read → original → (export → gate → quantise → gate) per target → evaluate → pack.

Beside `pipeline`, which holds the verbs and the walk of a decoder, the only module that knows several stages.
"""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lightship import several
from lightship.bundle import Bundle, pack
from lightship.checkpoint import Checkpoint
from lightship.encoder import Encoder
from lightship.encoder_costs import EncoderAmount
from lightship.engine import EngineSettings
from lightship.errors import UnsupportedError
from lightship.evaluation import encoders, loss, memory
from lightship.evaluation.encoders import Distance, Rows
from lightship.evaluation.text import open_text
from lightship.find import find
from lightship.machine import machine
from lightship.output import appear
from lightship.papers import encoder_report, manifest_of, write_papers
from lightship.recipe import COSINE_LIMITS, KLD_LIMITS, Recipe, parse_accepts
from lightship.report import Metric, Report, named
from lightship.several import Passed, Runtime
from lightship.sources import look
from lightship.step import COMPRESSED, REFERENCE, Lighter
from lightship.work import Progress, Stage, Work, digest_of

TARGETS = ("openvino", "onnx")  # both are made and measured when the recipe names none
EXACT = EngineSettings(inference_precision="f32", dynamic_quantisation_group=0)
REPEATS = {"quick": 5, "full": 15}
PER_TARGET = ("export", "gate export", "quantise", "gate")


def targets_of(recipe: Recipe, progress: Progress) -> tuple[str, ...]:
    """The targets that `recipe` means: its own, else all of `TARGETS` that can do its precision, the rest said.

    Asked before any work. Raises `UnknownName`, or `UnsupportedError` for what a target named, or all, cannot do.
    """
    if recipe.golden is not None:
        raise UnsupportedError("golden cases are for models that generate", hint="leave golden out")
    kept, refusals = [], []
    for name in recipe.targets or TARGETS:
        target = find("targets", name)
        if not hasattr(target, "settle_encoder"):
            raise UnsupportedError(f"encoders are not shipped to the target {name!r}", hint="use openvino or onnx")
        try:
            target.settle_encoder(recipe.precision)
            kept.append(name)
        except UnsupportedError as error:
            refusals.append(error)
    if refusals and (recipe.targets or not kept):
        raise refusals[0]
    for refusal in refusals:
        progress(f"one target left out: {refusal.message}")
    return tuple(kept)


def stages(targets: tuple[str, ...], convert: bool = False, steps: Sequence[str] = ()) -> tuple[str, ...]:
    """Every stage of a run, in order; `steps`: those that come before, up to the checkpoint that is converted."""
    found = several.stages(dict.fromkeys(targets, PER_TARGET), () if convert else ("evaluate", "pack"))
    return (*steps, COMPRESSED, REFERENCE, *found[2:]) if steps else found


def amount(recipe: Recipe, context: int) -> EncoderAmount:
    """What a run of `recipe` computes on with an encoder of `context`."""
    return encoders.amount(context, encoders.SCORED[recipe.evaluate], REPEATS[recipe.evaluate])


# ── Stages ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Source:
    """The checkpoint to convert, the texts to compare on in its tokens, and the original that all is compared with in
    the end: the checkpoint itself, unless steps made it of another."""

    checkpoint: Checkpoint
    original: Checkpoint
    encoder: Encoder
    gate: Rows
    score: Rows
    describe: dict[str, Any]


@dataclass(frozen=True)
class Gated:
    """Runtime folders that passed every gate, by target, and what they came from."""

    source: Source
    original: Stage
    runtimes: Passed[Runtime]

    def runtime(self, target: str) -> Path:
        """The runtime folder of `target`."""
        return self.runtimes.made[target].folder


@dataclass(frozen=True)
class Built:
    """Everything a bundle is packed from."""

    gated: Gated
    evaluated: Stage

    @property
    def targets(self) -> list[str]:
        """The faster first."""
        return list(self.evaluated.result["targets"])

    @property
    def metrics(self) -> list[Metric]:
        """Of the gates and of the evaluation."""
        runtimes = self.gated.runtimes.made
        gates = [each for name in self.targets for each in named(runtimes[name].metrics, name, self.targets)]
        return gates + several.metrics(self.evaluated.result)

    @property
    def left_out(self) -> dict[str, str]:
        """Targets that were above their limit, and where."""
        return {**self.gated.runtimes.failures, **self.evaluated.result["failures"]}

    @property
    def digests(self) -> list[str]:
        """Of the stages that decide what is in the bundle."""
        made = [self.gated.runtimes.made[target].stage.digest for target in self.targets]
        return [self.gated.original.digest, *made, self.evaluated.digest]


def _limit(recipe: Recipe, encoder: Encoder, precision: str | None = None) -> float:
    """What the mean distance must keep: at the recipe's precision, or at another as long as none was accepted."""
    embeds = encoder.kind == "embedder"
    if precision is None:
        return recipe.cosine_limit() if embeds else recipe.kld_limit()
    name, limits = ("cosine_loss", COSINE_LIMITS) if embeds else ("kld", KLD_LIMITS)
    return max(limits[precision], parse_accepts(recipe.accept).get(name, 0.0))


def build(recipe: Recipe, work: Work, targets: tuple[str, ...], lighter: Lighter | None = None) -> Built:
    """From the source, or from what steps made of it, to everything a bundle is packed from. Raises `LimitExceeded`
    when a gate fails; of several targets those that fail are left out, and said, as long as one passes."""
    found = gated(recipe, work, targets, lighter)
    runtimes = {target: each.folder for target, each in found.runtimes.made.items()}
    depends = {"runtimes": [each.stage.digest for each in found.runtimes.made.values()]}
    return Built(found, _evaluate(recipe, work, found.source, runtimes, depends, check=True))


def gated(recipe: Recipe, work: Work, targets: tuple[str, ...], lighter: Lighter | None = None) -> Gated:
    """From the source to runtime folders that passed every gate; one at least. The export must say what the checkpoint
    says, the finished folder what the original says."""
    source = read(recipe, work) if lighter is None else _source(recipe, work, lighter.checkpoint, lighter.original)
    exact = _said(work, source, source.checkpoint, "original" if lighter is None else COMPRESSED)
    original = exact if lighter is None else _said(work, source, source.original, REFERENCE)

    def make(name: str) -> Runtime:
        target = find("targets", name)
        exported = _export(recipe, work, source, name, target)
        first = _gate(recipe, work, source, exact, exported, f"gate export {name}", target, exact=True)
        runtime = _quantise(recipe, work, exported, name, target)
        return Runtime(runtime, (first, _gate(recipe, work, source, original, runtime, f"gate {name}", target)))

    return Gated(source, original, several.passed(targets, make, work.say))


def read(recipe: Recipe, work: Work) -> Source:
    """The checkpoint where it lies, and the rows to gate and to score on."""
    work.announce("read")
    found = look(recipe.source, revision=recipe.revision, base=recipe.base, log=work.say)
    checkpoint = found.read(work.folder, work.say)
    return _source(recipe, work, checkpoint, checkpoint)


def _source(recipe: Recipe, work: Work, checkpoint: Checkpoint, original: Checkpoint) -> Source:
    encoder = Encoder.load(checkpoint.folder)
    work.say(f"{checkpoint.config.get('model_type')} ({encoder.kind}), {checkpoint.weight_bytes / 1e6:.0f} MB of "
             f"{checkpoint.dtype}, context {encoder.context}")  # fmt: skip
    if encoder.kind == "embedder":
        stated = "as the model states" if encoder.pooling.stated else "the model states none (no modules.json)"
        scaled = ", scaled to length 1" if encoder.pooling.normalise else ""
        work.say(f"pooling: {encoder.pooling.mode}{scaled}; {stated}")
    text = open_text(recipe.text, None)
    gate = encoders.gate_rows(encoder, open_text(None, None))
    score = encoders.score_rows(encoder, text, encoders.SCORED[recipe.evaluate])
    describe = {"name": text.name, "default_only": text.default, "scoring_sha256": score.digest,
                "calibration_sha256": None, "tokens": sum(map(len, score.rows))}  # fmt: skip
    return Source(checkpoint, original, encoder, gate, score, describe)


def _said(work: Work, source: Source, model: Checkpoint, name: str) -> Stage:
    """Record what the gate's rows mean to `model`, then free it."""

    def make(folder: Path) -> None:
        loss.record_rows(model, source.checkpoint, source.gate, folder / "gate")

    depends = {"checkpoint": model.digest(), "tokens": digest_of(source.gate.tokens)}
    return work.stage(name, depends, make)


def _export(recipe: Recipe, work: Work, source: Source, name: str, target: ModuleType) -> Stage:
    dtype = {"fp32": "float32", "bf16": "bfloat16"}.get(recipe.precision.name)
    depends = {"checkpoint": source.checkpoint.digest(), "target": name, "dtype": dtype}
    return work.stage(f"export {name}", depends,
                      lambda folder: target.export(source.checkpoint, folder / "runtime", dtype))  # fmt: skip


def _quantise(recipe: Recipe, work: Work, exported: Stage, name: str, target: ModuleType) -> Stage:
    """The runtime folder at the precision asked for, as it will be served."""
    precision = recipe.precision

    def make(folder: Path) -> None:
        if precision.name == "int8":
            target.quantise(exported.folder / "runtime", folder / "runtime", precision, ())
        else:
            work.say(f"{precision.name}: nothing to do")
            shutil.copytree(exported.folder / "runtime", folder / "runtime")
        target.finish(folder / "runtime", precision)

    depends = {"export": exported.digest, "precision": precision.model_dump(mode="json")}
    return work.stage(f"quantise {name}", depends, make)


def _gate(
    recipe: Recipe, work: Work, source: Source, original: Stage, made: Stage, stage: str, target: ModuleType,
    *, exact: bool = False,
) -> Stage:  # fmt: skip
    """Compare what was made with the original: `exact`, the export before it is quantised, else as it is served."""
    rounded = recipe.precision.name == "bf16" and source.checkpoint.dtype != "bfloat16"
    limit = _limit(recipe, source.encoder, ("bf16" if rounded else "fp32") if exact else None)

    def make(folder: Path) -> dict[str, Any]:
        engine = target.open_encoder(made.folder / "runtime", EXACT if exact else EngineSettings())
        found = encoders.distance(source.encoder, engine, source.gate, original.folder / "gate")
        engine.close()
        _judge(work, found, limit, stage)
        return several.kept(found.metrics("export_gate_" if exact else "gate_"))

    return work.stage(stage, {"made": made.digest, "original": original.digest, "limit": limit}, make)


def _judge(work: Work, found: Distance, limit: float, stage: str) -> None:
    for line in found.lines():
        work.say(line)
    work.say(f"limit on {'1 − mean cosine' if found.embeds else 'mean KLD'} {limit:g}")
    encoders.check_distance(found, limit, stage)
    gc.collect()


def _evaluate(
    recipe: Recipe, work: Work, source: Source, runtimes: Mapping[str, Path], depends: dict[str, Any], *, check: bool
) -> Stage:
    """Quality on held-out text; then speed and memory of original and candidates, a fresh process each. With `check`
    a distance above the limit is an error. The result names the targets, the faster first."""
    limit = _limit(recipe, source.encoder)

    def make(folder: Path) -> dict[str, Any]:
        loss.record_rows(source.original, source.checkpoint, source.score, folder / "reference")

        def quality(name: str) -> list[Metric]:
            engine = find("targets", name).open_encoder(runtimes[name])
            found = encoders.distance(source.encoder, engine, source.score, folder / "reference")
            engine.close()
            if check:
                _judge(work, found, limit, f"evaluate {name}")
            return found.metrics()

        found = several.passed(runtimes, quality, work.say)
        metrics = dict(found.made)
        shutil.rmtree(folder / "reference")
        gc.collect()
        original = memory.probe("pytorch", source.original.folder, repeats=REPEATS[recipe.evaluate])
        for name in metrics:
            runtime = runtimes[name]
            metrics[name] += memory.paired(original, memory.probe(name, runtime, repeats=REPEATS[recipe.evaluate]))
            metrics[name].append(memory.size_metric(runtime, source.original.size_bytes))
        order = sorted(metrics, key=lambda name: -_speed(metrics[name]))
        for name in order:
            work.say(f"{name}: {_speed(metrics[name]):.1f} sequences/s (geometric mean of batches of 1 and 32)")
        ordered = [metric for name in order for metric in named(metrics[name], name, order)]
        return {"targets": order, "failures": dict(found.failures), **several.kept(ordered)}

    every = {"checkpoint": source.original.digest(), "text": source.score.digest, "machine": machine(),
             "level": recipe.evaluate, "targets": list(runtimes), "limit": limit, **depends}  # fmt: skip
    return work.stage("evaluate", every, make)


def _speed(metrics: list[Metric]) -> float:
    """Sequences/s: the geometric mean of single sequences and batches of 32."""
    found = {metric.name: metric.value for metric in metrics}
    return math.sqrt(found["batch1"] * found["batch32"])


# ── Packing, and a bundle on the machine that serves it ─────────────────────


def seal(recipe: Recipe, work: Work, built: Built, out: Path, folder: Path) -> Bundle:
    """Seal the bundle beside `out`, then let it appear under its name in one rename."""
    work.announce("pack")
    content, source = folder / "content", built.gated.source
    for target in built.targets:
        shutil.copytree(built.gated.runtime(target), content / "targets" / target)
    encoders.write_golden(source.encoder, source.gate, built.gated.original.folder / "gate", content / "golden")
    write_papers(content, recipe, report(recipe, source, built.metrics, built.left_out))
    sealed = pack(content, manifest_of(recipe, source.original, out.name, built.targets))
    appear(sealed.folder, out)
    return Bundle.open(out)


def report(recipe: Recipe, source: Source, metrics: list[Metric], left_out: Mapping[str, str]) -> Report:
    """What was measured, with its limits; `left_out`: targets above them, and where."""
    name = "cosine_loss" if source.encoder.kind == "embedder" else "kld"
    limit = (name, _limit(recipe, source.encoder))
    return encoder_report(recipe, source.original, source.describe, metrics, limit, left_out)


def evaluate(recipe: Recipe, bundle: Bundle, work: Work) -> tuple[Checkpoint, Report]:
    """Measure the targets of `bundle` against the source that `recipe` names; returns that source too."""
    source = read(recipe, work)
    runtimes = {target: bundle.target_folder(target) for target in bundle.targets}
    runtime = Checkpoint(runtimes[bundle.targets[0]])
    if runtime.kept_tokens is not None:  # it reads the text in its own tokens
        source = _source(recipe, work, runtime, source.original)
    found = _evaluate(recipe, work, source, runtimes, {"bundle": bundle.digest}, check=False)
    return source.original, report(recipe, source, several.metrics(found.result), {})


def replayed(bundle: Bundle, target: str) -> Metric:
    """The golden rows of `bundle` on its `target` here, against what they mean to the original; with its limit."""
    runtime = bundle.target_folder(target)
    engine = find("targets", target).open_encoder(runtime)
    found = encoders.replay(Encoder.load(runtime), engine, *bundle.golden_outputs())
    engine.close()
    metric = found.metrics("golden_")[0]
    return replace(metric, baseline=None, limit=float(bundle.report.meta[f"limit_{found.name}"]))
