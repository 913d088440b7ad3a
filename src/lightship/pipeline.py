"""The walk of a model through the house: read → reference → export → gate → quantise → gate → evaluate → pack.

Beside `encoder_pipeline`, the walk of an encoder, the only module that knows several stages. Everything happens in a
work folder beside the output; the bundle appears under its name in one rename at the end, so an interrupted run leaves
nothing that looks complete.
"""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lightship import costs, encoder_costs, encoder_pipeline
from lightship.bundle import MANIFEST, Bundle, pack
from lightship.calibration import Passages
from lightship.checkpoint import Checkpoint, read_json, sha256, write_json
from lightship.costs import Costs, Rates
from lightship.encoder_costs import EncoderShape
from lightship.engine import EngineSettings
from lightship.errors import LimitExceeded, UnsupportedError, UsageError
from lightship.evaluation import divergence, golden, memory, parity, perplexity, replay
from lightship.evaluation.divergence import Reference
from lightship.evaluation.text import SPEED_REPEATS, Texts, amount, cut
from lightship.find import find
from lightship.kind import kind_of
from lightship.machine import machine, versions
from lightship.output import appear, check_out, scratch
from lightship.papers import manifest_of, published, report_of, write_papers
from lightship.preflight import Plan, Seen, check_packages, first_look, plan
from lightship.recipe import KLD_LIMITS, Recipe, parse_accepts
from lightship.report import Metric, Report
from lightship.sources import look, peek
from lightship.work import DONE, NotMade, Progress, Stage, Survey, Work, digest_of

EXACT = EngineSettings(prefix_cache=False, inference_precision="f32", kv_precision="f32", dynamic_quantisation_group=0)
MADE = "bundle.json"  # in a run's folder: what its bundle was made from
TARGET = "openvino"  # of decoders, when the recipe names none
CONVERT = ("read", "original", "export", "gate export", "quantise", "gate", "served path")
STAGES = (*CONVERT, "evaluate", "pack")  # of a decoder's run


def silent(message: str) -> None:
    """A progress listener that listens to nothing."""


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


def ship(
    recipe: Recipe, out: Path, *, force: bool = False, progress: Progress = silent, ignore_shortage: bool = False
) -> Bundle:
    """Build the bundle `recipe` describes at `out` and return it, verified. Keeps nothing else.

    Raises `LimitExceeded` when a gate fails; then, and on any other error, nothing is left at `out`. What it will need
    is predicted first; too little memory or disk is an error (see `Plan.check`) unless `ignore_shortage`.
    """
    check_out(out, recipe, force, MANIFEST)
    asked = settled(recipe, progress)
    times = _tell(asked.plan(asked.stages(), out), progress, ignore_shortage)
    with scratch(out) as folder:
        work = Work(folder / "run", asked.stages(), progress, times)
        return _seal(asked.recipe, work, _built(asked, work), out, folder)


def run(
    recipe: Recipe, *, runs: Path = Path("runs"), progress: Progress = silent, ignore_shortage: bool = False
) -> Bundle:
    """As `ship`, to `recipe.out`, but keep every finished stage below `runs`/<name>: what is there is not done again.

    A changed option redoes what depends on it; other versions of the libraries redo everything. A bundle that is
    already up to date is verified and returned as it is.
    """
    out, place = Path(recipe.out or f"bundles/{recipe.label}"), runs / recipe.label
    check_out(out, recipe, True, MANIFEST)
    asked = settled(recipe, progress)
    planned = asked.plan(asked.stages(), out, place, _finished(asked, place, out))
    work = Work(place, asked.stages(), progress, _tell(planned, progress, ignore_shortage))
    work.folder.mkdir(parents=True, exist_ok=True)
    made = work.folder / MADE
    with scratch(out) as folder:
        built = _built(asked, work)
        inputs = _inputs(asked.recipe, built)
        if out.exists():
            known = read_json(made) if made.is_file() else {}
            bundle = Bundle.open(out)
            if known == {"inputs": inputs, "bundle": bundle.digest}:
                progress(f"nothing to do: {out} is up to date")
                return bundle
            if known.get("bundle") != bundle.digest:
                raise UsageError(f"{out} holds another bundle, not made by this run", hint="move it, or change `out`")
        bundle = _seal(asked.recipe, work, built, out, folder)
        write_json(made, {"inputs": inputs, "bundle": bundle.digest})
    return bundle


def _inputs(recipe: Recipe, built: Built | encoder_pipeline.Built) -> str:
    """Digest of all that decides what is in the bundle."""
    return digest_of([published(recipe).model_dump(mode="json"), built.digests])


def _built(asked: Settled, work: Work) -> Built | encoder_pipeline.Built:
    return (
        encoder_pipeline.build(asked.recipe, work, asked.encoders)
        if asked.encoders
        else _build(Run(asked.recipe, work))
    )


def _seal(recipe: Recipe, work: Work, built: Built | encoder_pipeline.Built, out: Path, folder: Path) -> Bundle:
    """Seal the bundle beside `out`, then let it appear under its name in one rename."""
    if isinstance(built, Built):
        return _pack(Run(recipe, work), built, out, folder)
    return encoder_pipeline.seal(recipe, work, built, out, folder)


# ── Before a run ────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Settled:
    """A `recipe` as its target will carry it out; for an encoder its targets (none for a decoder); what was `seen` of
    the source."""

    recipe: Recipe
    encoders: tuple[str, ...]
    seen: Seen

    def stages(self, convert: bool = False) -> tuple[str, ...]:
        """The stages of the run; of an encoder only the first target is converted."""
        if self.encoders:
            return encoder_pipeline.stages(self.encoders[:1] if convert else self.encoders, convert)
        return CONVERT if convert else STAGES

    def plan(self, stages: Sequence[str], out: Path, work: Path | None = None, done: Sequence[str] = ()) -> Plan:
        """What the run would need."""
        return plan(self.recipe, self.seen, self._costs, stages, out, work, done)

    def _costs(self, rates: Rates) -> Costs:
        recipe, shape = self.recipe, self.seen.shape
        if isinstance(shape, EncoderShape):
            count = encoder_pipeline.amount(recipe, shape.context)
            return encoder_costs.predict(shape, recipe.precision, count, rates, self.encoders)
        assert shape is not None and recipe.target  # else nothing is asked
        return costs.predict(shape, recipe.precision, amount(recipe, shape.context), rates, recipe.target)


def settled(recipe: Recipe, progress: Progress = silent, *, fetch: bool = True) -> Settled:
    """`recipe` settled with its target, said where that differs; asked before any work. A hub model is downloaded
    first, unless not to `fetch`.

    Raises `UnknownName`, or `UnsupportedError` for what target or architecture cannot do.
    """
    name = recipe.target or TARGET
    target = find("targets", name)
    if not hasattr(target, "export"):
        raise UnsupportedError(f"the target {name!r} is not made to be shipped", hint="use openvino or onnx")
    precision, notes = target.settle(recipe.precision) if hasattr(target, "settle") else (recipe.precision, [])
    if fetch:
        log = silent if Path(recipe.source).is_dir() else progress  # it may have to be fetched, which takes its time
        look(recipe.source, revision=recipe.revision, base=recipe.base, log=log)
    seen = first_look(recipe, peek)
    if seen.config is not None and kind_of(seen.config) != "decoder":
        encoders = encoder_pipeline.targets_of(recipe, progress)
        check_packages(encoders)
        return Settled(recipe, encoders, seen)
    for note in notes:
        progress(note)
    check_packages([name])
    return Settled(recipe.model_copy(update={"precision": precision, "target": name}), (), seen)


def plan_ship(recipe: Recipe, out: Path, *, force: bool = False) -> Plan:
    """What `ship` would do with the same arguments. Loads, downloads and writes nothing; raises what can be known to
    fail, except for a shortage (`Plan.check`)."""
    check_out(out, recipe, force, MANIFEST)
    asked = settled(recipe, fetch=False)
    return asked.plan(asked.stages(), out)


def plan_convert(recipe: Recipe, out: Path, *, force: bool = False) -> Plan:
    """As `plan_ship`, of `convert`."""
    check_out(out, recipe, force, "engine.json")
    asked = settled(recipe, fetch=False)
    return asked.plan(asked.stages(convert=True), out)


def plan_run(recipe: Recipe, *, runs: Path = Path("runs")) -> Plan:
    """As `plan_ship`, of `run`, with the stages that are done. Where there are any it hashes the source to know."""
    out, folder = Path(recipe.out or f"bundles/{recipe.label}"), runs / recipe.label
    check_out(out, recipe, True, MANIFEST)
    asked = settled(recipe, fetch=False)
    return asked.plan(asked.stages(), out, folder, _finished(asked, folder, out))


def _tell(planned: Plan, progress: Progress, ignore_shortage: bool) -> dict[str, float]:
    """Say what the run will need; returns the seconds of its stages."""
    if not ignore_shortage:
        planned.check()
    progress(planned.said())
    return planned.times


def _finished(asked: Settled, folder: Path, out: Path) -> Sequence[str]:
    """The stages of an earlier run that would be found again; all of them when its bundle is up to date."""
    recipe, seen, names = asked.recipe, asked.seen, asked.stages()
    if seen.file is None or not any(folder.glob(f"*/{DONE}")):
        return ()
    survey = Survey(folder, names, silent, needed=("read",))
    here = recipe
    if seen.file is not None and seen.config is not None:  # of a hub model the copy in the cache: nothing is fetched
        here = recipe.model_copy(update={"source": str(seen.file.parent), "revision": None})
    try:
        built = encoder_pipeline.build(here, survey, asked.encoders) if asked.encoders else _stages(Run(here, survey))
    except NotMade:
        return ()
    made = folder / MADE
    packed = built.evaluated.found and made.is_file() and (out / MANIFEST).is_file()
    if packed and read_json(made) == {"inputs": _inputs(recipe, built), "bundle": Bundle.open(out).digest}:
        return names
    return survey.found


# ── Stages ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Gated:
    """A runtime folder that passed every gate, and what it came from."""

    checkpoint: Checkpoint
    texts: Texts
    original: Stage
    runtime: Stage
    gates: tuple[Stage, ...]

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


def _build(run: Run) -> Built:
    built = _stages(run)
    built.check(run.recipe.kld_limit())
    return built


def _stages(run: Run) -> Built:
    gated = _gated(run)
    runtime = gated.runtime.folder / "runtime"
    return Built(gated, _evaluate(run, gated.checkpoint, runtime, gated.texts, gated.runtime.digest))


def _gated(run: Run) -> Gated:
    """From the source to a runtime folder that passed every gate."""
    checkpoint, texts = _read(run)
    original = _original(run, checkpoint, texts)
    gate = divergence.reopen(original.folder)
    exported = _export(run, checkpoint)
    gates = [_gate_export(run, checkpoint, exported, original, gate)]
    runtime = _quantise(run, exported, texts)
    gates += [_gate_candidate(run, runtime, original, gate), _gate_served(run, runtime, original, gate)]
    return Gated(checkpoint, texts, original, runtime, tuple(gates))


def _read(run: Run) -> tuple[Checkpoint, Texts]:
    """The checkpoint, and the tokens to gate, score and calibrate with. Only what is converted is kept."""
    recipe, number = run.recipe, run.work.announce("read")
    found = look(recipe.source, revision=recipe.revision, base=recipe.base, log=run.work.say)
    if found.depends is None:
        checkpoint = found.read(run.work.folder, run.work.say)
    else:

        def make(folder: Path) -> None:
            found.read(folder / "model", run.work.say)

        checkpoint = Checkpoint(run.work.stage("read", found.depends, make, number=number).folder / "model")
    if checkpoint.kind != "decoder":
        raise UnsupportedError(f"{recipe.source} became a {checkpoint.kind}; adapters are merged into decoders only",
                               hint="merge it with PEFT and give the merged folder")  # fmt: skip
    run.work.say(f"{checkpoint.config.get('model_type')}, {checkpoint.weight_bytes / 1e6:.0f} MB of {checkpoint.dtype}")
    return checkpoint, cut(recipe, checkpoint)


def _original(run: Run, checkpoint: Checkpoint, texts: Texts) -> Stage:
    """Record the original's log-probabilities on the gate's rows, then free it."""

    def make(folder: Path) -> None:
        original = find("targets", "pytorch").open_scorer(checkpoint.folder)
        batches = parity.gate_batches(texts.gate, checkpoint.context_length, original.greedy)
        divergence.record(original, batches, folder)

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
    error_limit = math.inf if rounded else parity.exact_error(accepted)

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


def _quantise(run: Run, exported: Stage, texts: Texts) -> Stage:
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
        tokens, expected = parity.long_row(gate)
        metric = parity.check_served(expected, engine.prompt_logprobs(tokens), limit)
        engine.close()
        run.work.say(f"mean |Δ log p| {metric.value:.2e} over {metric.n} tokens")
        return _kept([metric])

    depends = {"runtime": runtime.digest, "original": original.digest, "limit": limit}
    return run.work.stage("served path", depends, make)


def _evaluate(run: Run, checkpoint: Checkpoint, runtime: Path, texts: Texts, digest: str) -> Stage:
    """Quality on held-out text; then speed and memory of original and candidate, a fresh process each."""
    recipe = run.recipe

    def make(folder: Path) -> dict[str, Any]:
        metrics = _quality(run, checkpoint, runtime, texts.score, folder / "reference")
        repeats = SPEED_REPEATS[recipe.evaluate]
        original = memory.probe("pytorch", checkpoint.folder, **repeats)
        candidate = memory.probe(run.name, runtime, **repeats)
        metrics += memory.paired(original, candidate)
        metrics.append(memory.size_metric(runtime, checkpoint.size_bytes))
        if recipe.golden is not None:
            metrics += _golden_cases(run, Path(recipe.golden), checkpoint, runtime)
        return _kept(metrics)

    depends = {"runtime": digest, "checkpoint": checkpoint.digest(), "text": texts.score.digest, "machine": machine(),
               "level": recipe.evaluate, "golden": recipe.golden and sha256(Path(recipe.golden))}  # fmt: skip
    return run.work.stage("evaluate", depends, make)


def _quality(run: Run, checkpoint: Checkpoint, runtime: Path, score: Passages, folder: Path) -> list[Metric]:
    """Both models on the held-out passages, one after the other: they are never in memory together. What the original
    says lies in `folder` meanwhile."""
    original = find("targets", "pytorch").open_scorer(checkpoint.folder)
    scoring = divergence.record(original, divergence.passage_batches(score), folder)
    del original
    gc.collect()
    found = divergence.compare(scoring, run.target.open_scorer(runtime))
    shutil.rmtree(folder)
    gc.collect()
    return perplexity.quality(found, score.bytes_per_token * score.scored)


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


# ── Packing ─────────────────────────────────────────────────────────────────


def _pack(run: Run, built: Built, out: Path, folder: Path) -> Bundle:
    run.work.announce("pack")
    gated, content = built.gated, folder / "content"
    shutil.copytree(gated.runtime.folder / "runtime", content / "targets" / run.name)
    replay.write(divergence.reopen(gated.original.folder), content / "golden")
    write_papers(content, run.recipe, report_of(run.recipe, gated.checkpoint, gated.texts.describe, built.metrics))
    bundle = pack(content, manifest_of(run.recipe, gated.checkpoint, out.name, [run.name]))
    appear(bundle.folder, out)
    return Bundle.open(out)


# ── A bundle on the machine that serves it ──────────────────────────────────


def check(folder: Path, *, repeats: int = 5, progress: Progress = silent) -> Report:
    """Verify the bundle at `folder` and measure it again on this machine, without PyTorch.

    Raises `LimitExceeded` when the divergence (a lower bound, see `replay`) is above the limit it was shipped with.
    """
    progress("[1/3] verify")
    bundle = Bundle.open(folder)
    target = bundle.targets[0]
    runtime = bundle.target_folder(target)
    progress("[2/3] divergence")
    if bundle.kind == "decoder":
        found = replay.replay(*bundle.golden(), find("targets", target).open_scorer(runtime))
        found = replace(found, limit=float(bundle.report.meta["limit_kld"]))
    else:
        found = encoder_pipeline.replayed(bundle, target)
    progress("[3/3] speed and memory")
    shipped = {metric.name: metric for metric in bundle.report.metrics}
    measured = [found, *memory.probe(target, runtime, repeats=repeats)]
    metrics = [replace(m, baseline=shipped[m.name].value if m.name in shipped else m.baseline) for m in measured]
    what = "1 − mean cosine" if bundle.kind == "embedder" else "mean KLD"
    if not found.passed:
        raise LimitExceeded(f"on this machine {what} is {found.value:.3g}, above the bundle's limit {found.limit:g}",
                            hint="its settings or libraries differ from where it was shipped")  # fmt: skip
    meta = {
        "title": f"{bundle.name} on this machine",
        "baseline": "as shipped",
        "bundle": bundle.digest,
        "machine": machine(),
        "versions": versions(),
        "verdict": f"intact; {what} {found.value:.2g} here (limit {found.limit:g})",
    }
    return Report(tuple(metrics), meta)


# ── Parts of the walk ───────────────────────────────────────────────────────


def convert(
    recipe: Recipe, out: Path, *, force: bool = False, progress: Progress = silent, ignore_shortage: bool = False
) -> Path:
    """As `ship`, but stop after the gates: a runtime folder at `out`, no evaluation, no bundle. Of an encoder only for
    the first of its targets."""
    check_out(out, recipe, force, "engine.json")
    asked = settled(recipe, progress)
    recipe, encoders, names = asked.recipe, asked.encoders, asked.stages(convert=True)
    times = _tell(asked.plan(names, out), progress, ignore_shortage)
    with scratch(out) as folder:
        work = Work(folder / "run", names, progress, times)
        if encoders:
            runtime = encoder_pipeline.gated(recipe, work, encoders[:1]).runtime(encoders[0])
        else:
            runtime = _gated(Run(recipe, work)).runtime.folder / "runtime"
        appear(runtime, out)
    return out


def evaluate(
    bundle: Path,
    source: str,
    *,
    base: str | None = None,
    text: str | None = None,
    golden: str | None = None,
    level: str = "quick",
    progress: Progress = silent,
) -> Report:
    """Measure the bundle against the original named by `source` (for an adapter on `base`), on `text` and on the cases
    in `golden`.

    Writes nothing into the bundle. What is above its limit is marked, not raised.
    """
    opened = Bundle.open(bundle)
    given = {"source": source, "base": base, "text": text, "golden": golden, "evaluate": level}
    if source != opened.manifest["recipe"]["source"]:
        given["revision"] = None
    recipe = Recipe.model_validate({**opened.manifest["recipe"], **given})
    with tempfile.TemporaryDirectory(prefix="lightship-") as folder:
        work = Work(Path(folder), ("read", "evaluate"), progress)
        if opened.kind == "decoder":
            run = Run(recipe, work)
            checkpoint, texts = _read(run)
            runtime = opened.target_folder(run.name)
            measured = _metrics(_evaluate(run, checkpoint, runtime, texts, opened.digest))
            report = report_of(recipe, checkpoint, texts.describe, measured)
        else:
            checkpoint, report = encoder_pipeline.evaluate(recipe, opened, work)
        if checkpoint.digest() != opened.manifest["source"]["digest"]:
            report.meta["verdict"] += f"; {source} is not the model this bundle was made from"
        return report
