"""The walk of a model that generates: read → original → (export → gate → quantise → gate) per target → evaluate
→ pack.

Beside `pipeline`, which holds the verbs, and `encoder_pipeline` the only module that knows several stages.
"""

from __future__ import annotations

import gc
import itertools
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship import several
from lightship.bundle import Bundle, pack
from lightship.checkpoint import Checkpoint, sha256
from lightship.engine import EngineSettings
from lightship.errors import LimitExceeded, UnsupportedError
from lightship.evaluation import divergence, golden, loss, memory, pairs, parity, perplexity, replay
from lightship.evaluation.divergence import Batch, Reference
from lightship.evaluation.pairs import PairTexts
from lightship.evaluation.text import SPEED_REPEATS, Texts, cut
from lightship.find import find
from lightship.kind import GENERATORS
from lightship.machine import machine
from lightship.output import appear
from lightship.papers import manifest_of, report_of, write_papers
from lightship.recipe import KLD_LIMITS, Precision, Recipe, parse_accepts
from lightship.report import Metric, Report
from lightship.serving import tools
from lightship.several import Passed, Runtime
from lightship.sources import look
from lightship.step import COMPRESSED, REFERENCE, Lighter
from lightship.template import load_template
from lightship.work import Progress, Stage, Work, digest_of

EXACT = EngineSettings(prefix_cache=False, inference_precision="f32", kv_precision="f32", dynamic_quantisation_group=0)
PER_TARGET = ("export", "gate export", "quantise", "gate", "served path")
UNSERVED = PER_TARGET[:-1]  # of a target without an engine: what serves its files is another program
TARGET = "openvino"  # when the recipe names none


Targets = Mapping[str, Precision]  # each with the precision as it carries that out, the preferred one first


def stages(targets: Iterable[str], convert: bool = False, steps: Sequence[str] = ()) -> tuple[str, ...]:
    """Every stage of a run, in order; `steps`: those that come before, up to the checkpoint that is converted."""
    each = {name: PER_TARGET if serves(find("targets", name)) else UNSERVED for name in targets}
    found = several.stages(each, () if convert else ("evaluate", "pack"))
    return (*steps, COMPRESSED, REFERENCE, *found[2:]) if steps else found


def serves(target: ModuleType) -> bool:
    """Whether `target` has an engine here, so that what it makes can be shipped and its served path gated."""
    return hasattr(target, "open")


@dataclass(frozen=True)
class Run:
    """A recipe on its way to the target called `name`, with that target's precision: where its finished stages lie, and
    who hears of them."""

    recipe: Recipe
    work: Work
    name: str

    @property
    def target(self) -> ModuleType:
        """The module of the runtime format."""
        return find("targets", self.name)


# ── Stages ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Source:
    """The checkpoint to convert, the tokens to gate, score and calibrate with, and the original that all is compared
    with in the end: the checkpoint itself, unless steps made it of another."""

    checkpoint: Checkpoint
    texts: Texts | PairTexts
    original: Checkpoint


@dataclass(frozen=True)
class Gated:
    """Runtime folders that passed every gate, by target, what they came from, and what the original says."""

    source: Source
    original: Stage
    runtimes: Passed[Runtime]

    @property
    def folders(self) -> dict[str, Path]:
        """The runtime folders themselves."""
        return {target: runtime.folder for target, runtime in self.runtimes.made.items()}

    @property
    def digests(self) -> list[str]:
        """Of the runtime folders."""
        return [runtime.stage.digest for runtime in self.runtimes.made.values()]


@dataclass(frozen=True)
class Built:
    """Everything a bundle is packed from: the targets that kept their limits, in the order they were named."""

    gated: Gated
    evaluated: Stage

    def scored(self, limit: float, say: Progress = lambda line: None) -> Passed[list[Metric]]:
        """What was measured of each target whose divergence on the scored text is within `limit`, as the gates ask of
        theirs; the others are left out. Raises `LimitExceeded` where none is."""
        metrics = _by_target(self.evaluated)

        def check(target: str) -> list[Metric]:
            kld = next(metric for metric in metrics[target] if metric.name == "kld")
            if kld.value <= limit:
                return self.gated.runtimes.made[target].metrics + metrics[target]
            raise LimitExceeded(
                f"evaluate: mean KLD {kld.value:.3g} on the scored text exceeds {limit:g}; nothing is shipped",
                hint=f'raise the precision, or accept it on purpose: --accept "kld<={parity.above(kld.value)}"',
            )

        return several.passed(self.gated.runtimes.made, check, say)

    @property
    def digests(self) -> list[str]:
        """Of the stages that decide what is in the bundle."""
        return [self.gated.original.digest, *self.gated.digests, self.evaluated.digest]


def _by_target(evaluated: Stage) -> dict[str, list[Metric]]:
    """What was measured of each target, in any order."""
    return {target: several.metrics(found) for target, found in evaluated.result["targets"].items()}


def build(recipe: Recipe, work: Work, targets: Targets, lighter: Lighter | None = None) -> Built:
    """From the source, or from what steps made of it, to all that a bundle is packed from. Raises `LimitExceeded` when
    a gate fails; of several targets those that fail are left out, and said, as long as one passes."""
    built = walk(recipe, work, targets, lighter)
    built.scored(recipe.kld_limit(), work.say)
    return built


def walk(recipe: Recipe, work: Work, targets: Targets, lighter: Lighter | None = None) -> Built:
    """As `build`, but a divergence above its limit on the scored text is no error."""
    found = gated(recipe, work, targets, lighter)
    return Built(found, _evaluate(recipe, work, found.source, found.folders, found.digests))


def gated(recipe: Recipe, work: Work, targets: Targets, lighter: Lighter | None = None) -> Gated:
    """From the source to runtime folders that passed every gate; one at least. The export must say what the checkpoint
    says, the finished folder what the original says."""
    source = _read(recipe, work) if lighter is None else _source(recipe, lighter.checkpoint, lighter.original)
    exact = _original(work, source, "original" if lighter is None else COMPRESSED)
    original = exact if lighter is None else _reference(work, source, exact)
    same, gate = divergence.reopen(exact.folder), divergence.reopen(original.folder)

    def make(name: str) -> Runtime:
        run = Run(recipe.model_copy(update={"precision": targets[name]}), work, name)
        exported = _export(run, source.checkpoint)
        first = _gate_export(run, source.checkpoint, exported, exact, same)
        runtime = _quantise(run, exported, source)
        gates = [first, _gate_candidate(run, runtime, original, gate)]
        if serves(run.target):
            gates.append(_gate_served(run, runtime, original, gate))
        else:
            work.say(f"no engine for {name} here: the path that serves it is not gated")
        return Runtime(runtime, tuple(gates))

    return Gated(source, original, several.passed(targets, make, work.say))


def _read(recipe: Recipe, work: Work) -> Source:
    """The checkpoint and its texts. Only what is converted is kept."""
    checkpoint = look(recipe.source, revision=recipe.revision, base=recipe.base, log=work.say).kept(work)
    if checkpoint.kind not in GENERATORS:
        raise UnsupportedError(f"{recipe.source} became a {checkpoint.kind}; adapters are merged into decoders only",
                               hint="merge it with PEFT and give the merged folder")  # fmt: skip
    work.say(f"{checkpoint.config.get('model_type')}, {checkpoint.weight_bytes / 1e6:.0f} MB of {checkpoint.dtype}")
    return _source(recipe, checkpoint, checkpoint)


def _source(recipe: Recipe, checkpoint: Checkpoint, original: Checkpoint) -> Source:
    texts = pairs.cut(recipe, checkpoint) if checkpoint.kind == "seq2seq" else cut(recipe, checkpoint)
    return Source(checkpoint, texts, original)


def _original(work: Work, source: Source, name: str = "original") -> Stage:
    """Record the log-probabilities of the checkpoint that is converted on the gate's rows, then free it."""

    def make(folder: Path) -> None:
        original = find("targets", "pytorch").open_scorer(source.checkpoint.folder)
        found = parity.record(original, source.texts.gate_batches(original), folder)
        work.say(f"its own rounding moves log p by up to {found.rounding:.1e}")

    depends = {"checkpoint": source.checkpoint.digest(), "tokens": digest_of(source.texts.gate)}
    return work.stage(name, depends, make)


def _reference(work: Work, source: Source, exact: Stage) -> Stage:
    """Record the original's own on the same rows, in the vocabulary that was kept."""

    def make(folder: Path) -> None:
        rows = divergence.reopen(exact.folder).batches
        divergence.record(loss.original_scorer(source.original, source.checkpoint), rows, folder)
        gc.collect()

    return work.stage(REFERENCE, {"rows": exact.digest, "original": source.original.digest()}, make)


def _export(run: Run, checkpoint: Checkpoint) -> Stage:
    """Export at the dtype that the precision asks for."""
    dtype = {"fp32": "float32", "bf16": "bfloat16"}.get(run.recipe.precision.name)
    depends = {"checkpoint": checkpoint.digest(), "target": run.name, "dtype": dtype}
    return run.work.stage(f"export {run.name}", depends,
                          lambda folder: run.target.export(checkpoint, folder / "runtime", dtype))  # fmt: skip


def _gate_export(run: Run, checkpoint: Checkpoint, exported: Stage, original: Stage, gate: Reference) -> Stage:
    """Compare the export with the checkpoint, both computed exactly."""
    name = run.recipe.precision.name
    rounded = name == "bf16" and checkpoint.dtype != "bfloat16"
    accepted = parse_accepts(run.recipe.accept).get("kld", 0.0)
    limit = max(KLD_LIMITS["bf16" if rounded else "fp32"], accepted)
    error_limit = math.inf if rounded else parity.exact_error(accepted, gate.rounding)

    def make(folder: Path) -> dict[str, Any]:
        found = parity.parity(gate, run.target.open_scorer(exported.folder / "runtime", EXACT))
        return _judged(run, found, limit, f"gate export {run.name}", "export_", error_limit)

    depends = {"export": exported.digest, "original": original.digest, "limit": limit, "error limit": str(error_limit)}
    return run.work.stage(f"gate export {run.name}", depends, make)


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
    return several.kept(parity.parity_metrics(found, prefix))


def _quantise(run: Run, exported: Stage, source: Source) -> Stage:
    """The runtime folder at the precision asked for, as it will be served."""
    precision, calibrate = run.recipe.precision, source.texts.calibrate

    def make(folder: Path) -> None:
        if precision.name not in ("fp32", "bf16"):
            exact, runtime = exported.folder / "runtime", folder / "runtime"
            run.target.quantise(exact, runtime, precision, calibrate, source.checkpoint)
        else:
            run.work.say(f"{precision.name}: nothing to do")
            shutil.copytree(exported.folder / "runtime", folder / "runtime")
        run.target.finish(folder / "runtime", precision)
        for line in run.target.remarks(folder / "runtime") if hasattr(run.target, "remarks") else ():
            run.work.say(line)

    depends = {"export": exported.digest, "precision": precision.model_dump(mode="json"),
               "calibration": digest_of(calibrate)}  # fmt: skip
    return run.work.stage(f"quantise {run.name}", depends, make)


def _gate_candidate(run: Run, runtime: Stage, original: Stage, gate: Reference) -> Stage:
    """Gate the finished folder at the precisions at which it is served, the graph in one pass."""
    limit = run.recipe.kld_limit()

    def make(folder: Path) -> dict[str, Any]:
        found = parity.parity(gate, run.target.open_scorer(runtime.folder / "runtime"))
        return _judged(run, found, limit, f"gate {run.name}")

    depends = {"runtime": runtime.digest, "original": original.digest, "limit": limit}
    return run.work.stage(f"gate {run.name}", depends, make)


def _gate_served(run: Run, runtime: Stage, original: Stage, gate: Reference) -> Stage:
    """Gate the path that serves, such as continuous batching over a paged cache."""
    limit = run.recipe.kld_limit()

    def make(folder: Path) -> dict[str, Any]:
        engine = run.target.open(runtime.folder / "runtime", EngineSettings(prefix_cache=False))
        try:
            row, expected = parity.long_row(gate)
            metric = parity.check_served(expected, _served_logprobs(engine, row), limit)
        finally:  # another target may follow
            engine.close()
        run.work.say(f"mean |Δ log p| {metric.value:.2e} over {metric.n} tokens")
        return several.kept([metric])

    depends = {"runtime": runtime.digest, "original": original.digest, "limit": limit}
    return run.work.stage(f"served path {run.name}", depends, make)


def _served_logprobs(engine: Any, row: Batch) -> npt.NDArray[np.float32]:
    """log p of each token of `row` but the first, as `engine` serves it."""
    tokens = row.ids[0].tolist()
    given = () if row.source is None else (row.source[0].tolist(),)
    found: npt.NDArray[np.float32] = engine.prompt_logprobs(tokens, *given)
    return found


def _evaluate(
    recipe: Recipe, work: Work, source: Source, runtimes: Mapping[str, Path], digests: Sequence[str]
) -> Stage:
    """Quality on held-out text; then speed and memory of original and candidates, a fresh process each."""
    checkpoint, texts = source.original, source.texts

    def make(folder: Path) -> dict[str, Any]:
        metrics = _scored(recipe, source, runtimes, folder / "reference")
        repeats = SPEED_REPEATS[recipe.evaluate]
        original = memory.probe("pytorch", checkpoint.folder, **repeats)
        for name, runtime in runtimes.items():
            metrics[name] += memory.paired(original, memory.probe(name, runtime, **repeats))
            metrics[name].append(memory.size_metric(runtime, checkpoint.size_bytes))
        if recipe.golden is not None:
            for name, found in _golden_cases(work, Path(recipe.golden), checkpoint, runtimes).items():
                metrics[name] += found
        return {"targets": {name: several.kept(found) for name, found in metrics.items()}}

    depends = {"runtimes": digests, "checkpoint": checkpoint.digest(), "text": texts.digest, "machine": machine(),
               "level": recipe.evaluate, "golden": recipe.golden and sha256(Path(recipe.golden))}  # fmt: skip
    return work.stage("evaluate", depends, make)


def _scored(recipe: Recipe, source: Source, runtimes: Mapping[str, Path], folder: Path) -> dict[str, list[Metric]]:
    """All models on held-out text, one after the other: no two are in memory together. What the original says lies in
    `folder` meanwhile."""
    original = loss.original_scorer(source.original, source.checkpoint)
    batches, text_bytes = source.texts.score_batches(original)
    scoring = divergence.record(original, batches, folder)
    bits = loss.original_bits(recipe, source.original, original)
    del original
    gc.collect()
    found = {name: _quality(name, each, scoring, text_bytes, source.texts, bits) for name, each in runtimes.items()}
    shutil.rmtree(folder)
    return found


def _quality(
    name: str, runtime: Path, scoring: Reference, text_bytes: float | None, texts: Texts | PairTexts, bits: float | None
) -> list[Metric]:
    found = divergence.compare(scoring, find("targets", name).open_scorer(runtime))
    gc.collect()
    return perplexity.quality(found, text_bytes, texts.scored, bits)


def _golden_cases(
    work: Work, path: Path, checkpoint: Checkpoint, runtimes: Mapping[str, Path]
) -> dict[str, list[Metric]]:
    """Answer the golden cases with original and candidates, greedily, and compare case by case."""
    cases = golden.read_cases(path)

    def answers(name: str, folder: Path, settings: EngineSettings) -> Any:
        opened = find("targets", name).open(folder, settings)
        said = golden.run(cases, golden.answerer(opened, Checkpoint(folder)))
        opened.close()
        gc.collect()
        return said

    original, found = answers("pytorch", checkpoint.folder, EngineSettings()), {}
    for name, runtime in runtimes.items():
        result = golden.compare(cases, original, answers(name, runtime, EngineSettings(prefix_cache=False)))
        for outcome in result.lost:
            work.say(f"golden case {outcome.case.id} lost with {name}: {outcome.candidate[:80]!r}")
        found[name] = result.metrics()
    return found


# ── Packing, and a bundle on the machine that serves it ──────────────────────


def seal(recipe: Recipe, work: Work, built: Built, targets: Targets, out: Path, folder: Path) -> Bundle:
    """Seal the bundle beside `out`, then let it appear under its name in one rename."""
    work.announce("pack")
    gated, content, families = built.gated, folder / "content", set[str]()
    scored = built.scored(recipe.kld_limit())
    for target in scored.made:
        runtime = shutil.copytree(gated.folders[target], content / "targets" / target)
        if family := tools.record(load_template(runtime), runtime):
            families.add(family)
    for family in families:
        work.say(f"its chat template calls functions as {family} does")
    replay.write(divergence.reopen(gated.original.folder), content / "golden")
    left_out = {**gated.runtimes.failures, **scored.failures}
    precisions = {target: targets[target] for target in scored.made}
    report = report_of(recipe, gated.source.original, gated.source.texts.describe, scored.made, left_out, precisions)
    write_papers(content, recipe, report)
    bundle = pack(content, manifest_of(recipe, gated.source.original, out.name, list(scored.made)))
    appear(bundle.folder, out)
    return Bundle.open(out)


def evaluate(recipe: Recipe, bundle: Bundle, work: Work) -> tuple[Checkpoint, Report]:
    """Measure the targets of `bundle` against the source that `recipe` names; returns that source too."""
    source = _read(recipe, work)
    runtimes = {target: bundle.target_folder(target) for target in bundle.targets}
    runtime = Checkpoint(runtimes[bundle.targets[0]])
    if runtime.kept_tokens is not None:  # it reads the text in its own tokens
        source = _source(recipe, runtime, source.original)
    found = _by_target(_evaluate(recipe, work, source, runtimes, [bundle.digest]))
    measured = {target: found[target] for target in runtimes}
    return source.original, report_of(recipe, source.original, source.texts.describe, measured)


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
