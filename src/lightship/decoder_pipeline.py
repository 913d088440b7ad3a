"""The walk of a model that generates: read → original → export → gate → quantise → gate → evaluate → pack.

Beside `pipeline`, which holds the verbs, and `encoder_pipeline` the only module that knows several stages.
"""

from __future__ import annotations

import gc
import itertools
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.bundle import Bundle, pack
from lightship.checkpoint import Checkpoint, sha256
from lightship.engine import EngineSettings
from lightship.errors import LimitExceeded, UnsupportedError
from lightship.evaluation import divergence, golden, memory, pairs, parity, perplexity, replay
from lightship.evaluation.divergence import Batch, Reference
from lightship.evaluation.pairs import PairTexts
from lightship.evaluation.text import SPEED_REPEATS, Texts, cut
from lightship.find import find
from lightship.kind import GENERATORS
from lightship.machine import machine
from lightship.output import appear
from lightship.papers import manifest_of, report_of, write_papers
from lightship.recipe import KLD_LIMITS, Recipe, parse_accepts
from lightship.report import Metric, Report
from lightship.serving import tools
from lightship.sources import look
from lightship.template import load_template
from lightship.work import Stage, Work, digest_of

EXACT = EngineSettings(prefix_cache=False, inference_precision="f32", kv_precision="f32", dynamic_quantisation_group=0)
CONVERT = ("read", "original", "export", "gate export", "quantise", "gate", "served path")
STAGES = (*CONVERT, "evaluate", "pack")  # of a run
TARGET = "openvino"  # when the recipe names none


@dataclass(frozen=True)
class Run:
    """A recipe on its way: where its finished stages lie, and who hears of them."""

    recipe: Recipe
    work: Work

    @property
    def target(self) -> ModuleType:
        """The module of the runtime format."""
        return find("targets", self.name)

    @property
    def name(self) -> str:
        """What the runtime format is called."""
        return self.recipe.target or TARGET


# ── Stages ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Gated:
    """A runtime folder that passed every gate, and what it came from."""

    checkpoint: Checkpoint
    texts: Texts | PairTexts
    original: Stage
    runtime: Stage
    gates: tuple[Stage, ...]

    @property
    def folder(self) -> Path:
        """The runtime folder itself."""
        return self.runtime.folder / "runtime"

    @property
    def metrics(self) -> list[Metric]:
        """What the gates measured."""
        return [metric for stage in self.gates for metric in _metrics(stage)]


@dataclass(frozen=True)
class Built:
    """Everything a bundle is packed from."""

    gated: Gated
    evaluated: Stage

    @property
    def metrics(self) -> list[Metric]:
        """Of the gates and of the evaluation."""
        return self.gated.metrics + _metrics(self.evaluated)

    def check(self, limit: float) -> None:
        """Raise `LimitExceeded` when the divergence on the scored text is above `limit`, as the gates do on theirs."""
        kld = next(metric for metric in _metrics(self.evaluated) if metric.name == "kld")
        if not kld.value <= limit:
            raise LimitExceeded(
                f"evaluate: mean KLD {kld.value:.3g} on the scored text exceeds {limit:g}; nothing is shipped",
                hint=f'raise the precision, or accept it on purpose: --accept "kld<={parity.above(kld.value)}"',
            )

    @property
    def digests(self) -> list[str]:
        """Of the stages that decide what is in the bundle."""
        return [self.gated.original.digest, self.gated.runtime.digest, self.evaluated.digest]


def _metrics(stage: Stage) -> list[Metric]:
    return [Metric(**entry) for entry in stage.result["metrics"]]


def _kept(metrics: Sequence[Metric]) -> dict[str, Any]:
    return {"metrics": [asdict(metric) for metric in metrics]}


def build(recipe: Recipe, work: Work) -> Built:
    """From the source to everything a bundle is packed from. Raises `LimitExceeded` when a gate fails."""
    built = stages(recipe, work)
    built.check(recipe.kld_limit())
    return built


def stages(recipe: Recipe, work: Work) -> Built:
    """As `build`, but a divergence above its limit on the scored text is no error."""
    run, found = Run(recipe, work), gated(recipe, work)
    return Built(found, _evaluate(run, found.checkpoint, found.folder, found.texts, found.runtime.digest))


def gated(recipe: Recipe, work: Work) -> Gated:
    """From the source to a runtime folder that passed every gate."""
    run = Run(recipe, work)
    checkpoint, texts = _read(run)
    original = _original(run, checkpoint, texts)
    gate = divergence.reopen(original.folder)
    exported = _export(run, checkpoint)
    gates = [_gate_export(run, checkpoint, exported, original, gate)]
    runtime = _quantise(run, exported, texts)
    gates += [_gate_candidate(run, runtime, original, gate), _gate_served(run, runtime, original, gate)]
    return Gated(checkpoint, texts, original, runtime, tuple(gates))


def _read(run: Run) -> tuple[Checkpoint, Texts | PairTexts]:
    """The checkpoint, and the tokens to gate, score and calibrate with. Only what is converted is kept."""
    recipe, number = run.recipe, run.work.announce("read")
    found = look(recipe.source, revision=recipe.revision, base=recipe.base, log=run.work.say)
    if found.depends is None:
        checkpoint = found.read(run.work.folder, run.work.say)
    else:

        def make(folder: Path) -> None:
            found.read(folder / "model", run.work.say)

        checkpoint = Checkpoint(run.work.stage("read", found.depends, make, number=number).folder / "model")
    if checkpoint.kind not in GENERATORS:
        raise UnsupportedError(f"{recipe.source} became a {checkpoint.kind}; adapters are merged into decoders only",
                               hint="merge it with PEFT and give the merged folder")  # fmt: skip
    run.work.say(f"{checkpoint.config.get('model_type')}, {checkpoint.weight_bytes / 1e6:.0f} MB of {checkpoint.dtype}")
    texts = pairs.cut(recipe, checkpoint) if checkpoint.kind == "seq2seq" else cut(recipe, checkpoint)
    return checkpoint, texts


def _original(run: Run, checkpoint: Checkpoint, texts: Texts | PairTexts) -> Stage:
    """Record the original's log-probabilities on the gate's rows, then free it."""

    def make(folder: Path) -> None:
        original = find("targets", "pytorch").open_scorer(checkpoint.folder)
        found = parity.record(original, texts.gate_batches(original), folder)
        run.work.say(f"its own rounding moves log p by up to {found.rounding:.1e}")

    return run.work.stage("original", {"checkpoint": checkpoint.digest(), "tokens": digest_of(texts.gate)}, make)


def _export(run: Run, checkpoint: Checkpoint) -> Stage:
    """Export at the dtype that the precision asks for."""
    dtype = {"fp32": "float32", "bf16": "bfloat16"}.get(run.recipe.precision.name)
    depends = {"checkpoint": checkpoint.digest(), "target": run.name, "dtype": dtype}
    return run.work.stage("export", depends, lambda folder: run.target.export(checkpoint, folder / "runtime", dtype))


def _gate_export(run: Run, checkpoint: Checkpoint, exported: Stage, original: Stage, gate: Reference) -> Stage:
    """Compare the export with the original, both computed exactly."""
    name = run.recipe.precision.name
    rounded = name == "bf16" and checkpoint.dtype != "bfloat16"
    accepted = parse_accepts(run.recipe.accept).get("kld", 0.0)
    limit = max(KLD_LIMITS["bf16" if rounded else "fp32"], accepted)
    error_limit = math.inf if rounded else parity.exact_error(accepted, gate.rounding)

    def make(folder: Path) -> dict[str, Any]:
        found = parity.parity(gate, run.target.open_scorer(exported.folder / "runtime", EXACT))
        return _judged(run, found, limit, "gate export", "export_", error_limit)

    depends = {"export": exported.digest, "original": original.digest, "limit": limit, "error limit": str(error_limit)}
    return run.work.stage("gate export", depends, make)


def _judged(
    run: Run, found: parity.Parity, limit: float, stage: str, prefix: str = "", error_limit: float = math.inf
) -> dict[str, Any]:
    """Tell the figures; raise when they are above the limits."""
    for line in found.lines():
        run.work.say(line)
    other = f", on max |Δ log p| {error_limit:.2g}" if math.isfinite(error_limit) else ""
    run.work.say(f"limit on mean KLD {limit:g}{other}")
    parity.check_parity(found, limit, stage, error_limit)
    gc.collect()
    return _kept(parity.parity_metrics(found, prefix))


def _quantise(run: Run, exported: Stage, texts: Texts | PairTexts) -> Stage:
    """The runtime folder at the precision asked for, as it will be served."""
    precision = run.recipe.precision

    def make(folder: Path) -> None:
        if precision.name in ("int8", "int4"):
            run.target.quantise(exported.folder / "runtime", folder / "runtime", precision, texts.calibrate)
        else:
            run.work.say(f"{precision.name}: nothing to do")
            shutil.copytree(exported.folder / "runtime", folder / "runtime")
        run.target.finish(folder / "runtime", precision)

    depends = {"export": exported.digest, "precision": precision.model_dump(mode="json"),
               "calibration": digest_of(texts.calibrate)}  # fmt: skip
    return run.work.stage("quantise", depends, make)


def _gate_candidate(run: Run, runtime: Stage, original: Stage, gate: Reference) -> Stage:
    """Gate the finished folder at the precisions at which it is served, the graph in one pass."""
    limit = run.recipe.kld_limit()

    def make(folder: Path) -> dict[str, Any]:
        return _judged(run, parity.parity(gate, run.target.open_scorer(runtime.folder / "runtime")), limit, "gate")

    depends = {"runtime": runtime.digest, "original": original.digest, "limit": limit}
    return run.work.stage("gate", depends, make)


def _gate_served(run: Run, runtime: Stage, original: Stage, gate: Reference) -> Stage:
    """Gate the path that serves, such as continuous batching over a paged cache."""
    limit = run.recipe.kld_limit()

    def make(folder: Path) -> dict[str, Any]:
        engine = run.target.open(runtime.folder / "runtime", EngineSettings(prefix_cache=False))
        row, expected = parity.long_row(gate)
        metric = parity.check_served(expected, _served_logprobs(engine, row), limit)
        engine.close()
        run.work.say(f"mean |Δ log p| {metric.value:.2e} over {metric.n} tokens")
        return _kept([metric])

    depends = {"runtime": runtime.digest, "original": original.digest, "limit": limit}
    return run.work.stage("served path", depends, make)


def _served_logprobs(engine: Any, row: Batch) -> npt.NDArray[np.float32]:
    """log p of each token of `row` but the first, as `engine` serves it."""
    tokens = row.ids[0].tolist()
    given = () if row.source is None else (row.source[0].tolist(),)
    found: npt.NDArray[np.float32] = engine.prompt_logprobs(tokens, *given)
    return found


def _evaluate(run: Run, checkpoint: Checkpoint, runtime: Path, texts: Texts | PairTexts, digest: str) -> Stage:
    """Quality on held-out text; then speed and memory of original and candidate, a fresh process each."""
    recipe = run.recipe

    def make(folder: Path) -> dict[str, Any]:
        metrics = _quality(run, checkpoint, runtime, texts, folder / "reference")
        repeats = SPEED_REPEATS[recipe.evaluate]
        original = memory.probe("pytorch", checkpoint.folder, **repeats)
        candidate = memory.probe(run.name, runtime, **repeats)
        metrics += memory.paired(original, candidate)
        metrics.append(memory.size_metric(runtime, checkpoint.size_bytes))
        if recipe.golden is not None:
            metrics += _golden_cases(run, Path(recipe.golden), checkpoint, runtime)
        return _kept(metrics)

    depends = {"runtime": digest, "checkpoint": checkpoint.digest(), "text": texts.digest, "machine": machine(),
               "level": recipe.evaluate, "golden": recipe.golden and sha256(Path(recipe.golden))}  # fmt: skip
    return run.work.stage("evaluate", depends, make)


def _quality(run: Run, checkpoint: Checkpoint, runtime: Path, texts: Texts | PairTexts, folder: Path) -> list[Metric]:
    """Both models on held-out text, one after the other: they are never in memory together. What the original says
    lies in `folder` meanwhile."""
    original = find("targets", "pytorch").open_scorer(checkpoint.folder)
    batches, text_bytes = texts.score_batches(original)
    scoring = divergence.record(original, batches, folder)
    del original
    gc.collect()
    found = divergence.compare(scoring, run.target.open_scorer(runtime))
    shutil.rmtree(folder)
    gc.collect()
    return perplexity.quality(found, text_bytes, texts.scored)


def _golden_cases(run: Run, path: Path, checkpoint: Checkpoint, runtime: Path) -> list[Metric]:
    """Answer the golden cases with original and candidate, greedily, and compare case by case."""
    cases = golden.read_cases(path)
    answers = []
    for opened in (find("targets", "pytorch").open(checkpoint.folder, EngineSettings()),
                   run.target.open(runtime, EngineSettings(prefix_cache=False))):  # fmt: skip
        answers.append(golden.run(cases, golden.answerer(opened, checkpoint)))
        opened.close()
        gc.collect()
    result = golden.compare(cases, *answers)
    for outcome in result.lost:
        run.work.say(f"golden case {outcome.case.id} lost: {outcome.candidate[:80]!r}")
    return result.metrics()


# ── Packing, and a bundle on the machine that serves it ──────────────────────


def seal(recipe: Recipe, work: Work, built: Built, out: Path, folder: Path) -> Bundle:
    """Seal the bundle beside `out`, then let it appear under its name in one rename."""
    work.announce("pack")
    gated, content, target = built.gated, folder / "content", Run(recipe, work).name
    runtime = shutil.copytree(gated.folder, content / "targets" / target)
    if family := tools.record(load_template(runtime), runtime):
        work.say(f"its chat template calls functions as {family} does")
    replay.write(divergence.reopen(gated.original.folder), content / "golden")
    write_papers(content, recipe, report_of(recipe, gated.checkpoint, gated.texts.describe, built.metrics))
    bundle = pack(content, manifest_of(recipe, gated.checkpoint, out.name, [target]))
    appear(bundle.folder, out)
    return Bundle.open(out)


def evaluate(recipe: Recipe, bundle: Bundle, work: Work) -> tuple[Checkpoint, Report]:
    """Measure `bundle` against the source that `recipe` names; returns that source too."""
    run = Run(recipe, work)
    checkpoint, texts = _read(run)
    measured = _metrics(_evaluate(run, checkpoint, bundle.target_folder(run.name), texts, bundle.digest))
    return checkpoint, report_of(recipe, checkpoint, texts.describe, measured)


def replayed(bundle: Bundle, target: str) -> Metric:
    """The golden rows of `bundle` on its `target` here, against what the original said; with its limit."""
    scorer = find("targets", target).open_scorer(bundle.target_folder(target))
    if bundle.kind == "seq2seq":
        sources = (np.array([source], np.int64) for source in bundle.golden_sources())
        scorers = (scorer.given(source, np.ones_like(source)) for source in sources)
    else:
        scorers = (scorer for _ in itertools.count())
    found = replay.replay(*bundle.golden(), scorers)
    return replace(found, limit=float(bundle.report.meta["limit_kld"]))
