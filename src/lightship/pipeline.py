"""The verbs: ship, run, convert, evaluate, check; and what a run would need, before it.

How a model walks through the house is in `decoder_pipeline` and `encoder_pipeline`. Everything happens in a work folder
beside the output; the bundle appears under its name in one rename at the end, so an interrupted run leaves nothing that
looks complete.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from lightship import compress_pipeline, costs, decoder_pipeline, encoder_costs, encoder_pipeline
from lightship.bundle import MANIFEST, Bundle
from lightship.checkpoint import read_json, write_json
from lightship.costs import Costs, Rates
from lightship.decoder_pipeline import TARGET, Targets
from lightship.encoder_costs import EncoderShape
from lightship.errors import LimitExceeded, UnsupportedError, UsageError
from lightship.evaluation import memory
from lightship.evaluation.text import amount
from lightship.find import find
from lightship.kind import GENERATORS, kind_of
from lightship.machine import machine, versions
from lightship.output import appear, check_out, scratch
from lightship.papers import published
from lightship.preflight import Plan, Seen, check_files, check_packages, first_look, plan
from lightship.recipe import NEAREST, SHIPPED, Precision, PrecisionName, Recipe
from lightship.report import Report
from lightship.sources import look, peek
from lightship.step import Lighter
from lightship.work import DONE, NotMade, Progress, Survey, Work, digest_of

Built = decoder_pipeline.Built | encoder_pipeline.Built
MADE = "bundle.json"  # in a run's folder: what its bundle was made from


def silent(message: str) -> None:
    """A progress listener that listens to nothing."""


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
        return _seal(asked, work, _built(asked, work, ignore_shortage), out, folder)


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
        built = _built(asked, work, ignore_shortage)
        inputs = _inputs(asked.recipe, built)
        if out.exists():
            known = read_json(made) if made.is_file() else {}
            bundle = Bundle.open(out)
            if known == {"inputs": inputs, "bundle": bundle.digest}:
                progress(f"nothing to do: {out} is up to date")
                return bundle
            if known.get("bundle") != bundle.digest:
                raise UsageError(f"{out} holds another bundle, not made by this run", hint="move it, or change `out`")
        bundle = _seal(asked, work, built, out, folder)
        write_json(made, {"inputs": inputs, "bundle": bundle.digest})
    return bundle


def _inputs(recipe: Recipe, built: Built) -> str:
    """Digest of all that decides what is in the bundle."""
    return digest_of([published(recipe).model_dump(mode="json"), built.digests])


def _built(asked: Settled, work: Work, ignore_shortage: bool) -> Built:
    lighter = _lighter(asked.recipe, work, ignore_shortage)
    if asked.encoder:
        return encoder_pipeline.build(asked.recipe, work, tuple(asked.targets), lighter)
    return decoder_pipeline.build(asked.recipe, work, asked.targets, lighter)


def _lighter(recipe: Recipe, work: Work, ignore_shortage: bool) -> Lighter | None:
    """What the steps of `recipe` make of its source; None where it has none."""
    steps = compress_pipeline.steps_of(recipe)
    if not steps:
        return None
    found = compress_pipeline.walk(recipe, steps, work, ignore_shortage=ignore_shortage)
    return Lighter(found.original, found.checkpoint)


def _seal(asked: Settled, work: Work, built: Built, out: Path, folder: Path) -> Bundle:
    """Seal the bundle beside `out`, then let it appear under its name in one rename."""
    if isinstance(built, encoder_pipeline.Built):
        return encoder_pipeline.seal(asked.recipe, work, built, out, folder)
    return decoder_pipeline.seal(asked.recipe, work, built, asked.targets, out, folder)


# ── Before a run ────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Settled:
    """A `recipe` as its `targets` will carry it out, each with its precision; whether the model is an encoder; what was
    `seen` of the source. Where there is one target, the recipe has its name and precision."""

    recipe: Recipe
    targets: Targets
    encoder: bool
    seen: Seen

    def stages(self, convert: bool = False) -> tuple[str, ...]:
        """The stages of the run; only the first target is converted."""
        targets = tuple(self.targets)[: 1 if convert else None]
        if self.encoder:
            return encoder_pipeline.stages(targets, convert, self.steps)
        return decoder_pipeline.stages(targets, convert, self.steps)

    @property
    def steps(self) -> tuple[str, ...]:
        """The stages that its steps have; none without any."""
        steps = compress_pipeline.steps_of(self.recipe)
        return compress_pipeline.stages(steps) if steps else ()

    def plan(self, stages: Sequence[str], out: Path, work: Path | None = None, done: Sequence[str] = ()) -> Plan:
        """What the run would need."""
        return plan(self.recipe, self.seen, self._costs, stages, out, work, done)

    def _costs(self, rates: Rates) -> Costs:
        recipe, shape = self.recipe, self.seen.shape
        if isinstance(shape, EncoderShape):
            count = encoder_pipeline.amount(recipe, shape.context)
            return encoder_costs.predict(shape, recipe.precision, count, rates, tuple(self.targets))
        assert shape is not None  # else nothing is asked
        return costs.predict(shape, amount(recipe, shape.context), rates, self.targets)


def settled(recipe: Recipe, progress: Progress = silent, *, fetch: bool = True, convert: bool = False) -> Settled:
    """`recipe` settled with its targets, said where that differs; asked before any work. A hub model is downloaded
    first, unless not to `fetch`. Only to `convert`, a target needs no engine.

    Raises `UnknownName`, or `UnsupportedError` for what a target or architecture cannot do.
    """
    check_files(recipe)
    modules = {name: _shippable(name, convert, recipe.precision) for name in recipe.targets or (TARGET,)}
    found = {name: _settle(recipe.precision, target) for name, target in modules.items()}
    if fetch:
        log = silent if Path(recipe.source).is_dir() else progress  # it may have to be fetched, which takes its time
        look(recipe.source, revision=recipe.revision, base=recipe.base, log=log)
    seen = first_look(recipe, peek)
    kind = "decoder" if seen.config is None else kind_of(seen.config)
    if kind not in GENERATORS:
        encoders = encoder_pipeline.targets_of(recipe, progress)
        check_packages(encoders)
        return Settled(recipe, dict.fromkeys(encoders, recipe.precision), True, seen)
    for target in modules.values():
        if seen.config is not None and hasattr(target, "refuse"):
            target.refuse(seen.config)
        if seen.config is not None and seen.file is not None and hasattr(target, "refuse_files"):
            target.refuse_files(seen.file.parent)
    if kind == "seq2seq":
        found = {name: _settle_seq2seq(recipe.precision, name, target) for name, target in modules.items()}
    for note in [note for _, notes in found.values() for note in notes]:
        progress(note)
    check_packages(tuple(modules))
    targets = {name: precision for name, (precision, _) in found.items()}
    if len(targets) == 1:
        ((name, precision),) = targets.items()
        recipe = recipe.model_copy(update={"precision": precision, "target": name})
    return Settled(recipe, targets, False, seen)


def _shippable(name: str, convert: bool, precision: Precision) -> ModuleType:
    target = find("targets", name)
    if not hasattr(target, "export"):
        raise UnsupportedError(f"the target {name!r} is not made to be shipped", hint="use openvino or onnx")
    if not convert and not decoder_pipeline.serves(target):
        asked = precision.name if precision.name in _taken(target) else NEAREST.get(precision.name, _taken(target)[0])
        raise UnsupportedError(
            f"lightship does not serve {name}, so it ships no bundle of it",
            hint=f"use `lightship convert --target {name} -p {asked}`: the same gates, one folder",
        )
    return target


def _taken(target: ModuleType) -> tuple[PrecisionName, ...]:
    """The precisions that `target` has."""
    found: tuple[PrecisionName, ...] = getattr(target, "PRECISIONS", SHIPPED)
    return found


def _settle(precision: Precision, target: ModuleType) -> tuple[Precision, list[str]]:
    taken, name = _taken(target), target.__name__.rpartition(".")[2]
    if precision.name not in taken:
        nearest = NEAREST.get(precision.name)
        other = "" if name == "gguf" or precision.name in SHIPPED else "; `lightship convert --target gguf` has it"
        raise UnsupportedError(
            f"the target {name!r} has no precision {precision.name}",
            hint=f"use --precision {nearest if nearest in taken else ', '.join(taken)}{other}",
        )
    found: tuple[Precision, list[str]] = target.settle(precision) if hasattr(target, "settle") else (precision, [])
    return found


def _settle_seq2seq(precision: Precision, name: str, target: ModuleType) -> tuple[Precision, list[str]]:
    """`precision` as `target` carries it out for an encoder-decoder, and what to tell about the difference."""
    if not hasattr(target, "settle_seq2seq"):
        raise UnsupportedError(f"encoder-decoders are not shipped to the target {name!r}", hint="use openvino or onnx")
    found: tuple[Precision, list[str]] = target.settle_seq2seq(precision)
    return found


def plan_ship(recipe: Recipe, out: Path, *, force: bool = False) -> Plan:
    """What `ship` would do with the same arguments. Loads, downloads and writes nothing; raises what can be known to
    fail, except for a shortage (`Plan.check`)."""
    check_out(out, recipe, force, MANIFEST)
    asked = settled(recipe, fetch=False)
    return asked.plan(asked.stages(), out)


def plan_convert(recipe: Recipe, out: Path, *, force: bool = False) -> Plan:
    """As `plan_ship`, of `convert`."""
    _check_single(recipe)
    check_out(out, recipe, force, "engine.json")
    asked = settled(recipe, fetch=False, convert=True)
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
    survey = Survey(folder, names, silent, needed=("read", *asked.steps))
    here = recipe
    if seen.file is not None and seen.config is not None:  # of a hub model the copy in the cache: nothing is fetched
        here = recipe.model_copy(update={"source": str(seen.file.parent), "revision": None})
    try:
        lighter = _lighter(here, survey, True)
        if asked.encoder:
            built: Built = encoder_pipeline.build(here, survey, tuple(asked.targets), lighter)
        else:
            built = decoder_pipeline.walk(here, survey, asked.targets, lighter)
    except NotMade:
        return tuple(survey.found)
    made = folder / MADE
    packed = built.evaluated.found and made.is_file() and (out / MANIFEST).is_file()
    if packed and read_json(made) == {"inputs": _inputs(recipe, built), "bundle": Bundle.open(out).digest}:
        return names
    return survey.found


# ── A bundle on the machine that serves it ──────────────────────────────────


def check(folder: Path, *, target: str | None = None, repeats: int = 5, progress: Progress = silent) -> Report:
    """Verify the bundle at `folder` and measure its `target` (default: the first) again on this machine, without
    PyTorch.

    Raises `BundleError` for a target that it does not have, `LimitExceeded` when the divergence (a lower bound, see
    `replay`) is above the limit it was shipped with.
    """
    progress("[1/3] verify")
    bundle = Bundle.open(folder)
    target = target or bundle.targets[0]
    runtime = bundle.target_folder(target)
    progress("[2/3] divergence")
    replayed = decoder_pipeline.replayed if bundle.kind in GENERATORS else encoder_pipeline.replayed
    found = replayed(bundle, target)
    progress("[3/3] speed and memory")
    shipped = {metric.name: metric for metric in bundle.measured(target).metrics}
    measured = [found, *memory.probe(target, runtime, repeats=repeats)]
    metrics = [replace(m, baseline=shipped[m.name].value if m.name in shipped else m.baseline) for m in measured]
    what = "1 − mean cosine" if bundle.kind == "embedder" else "mean KLD"
    if not found.passed:
        raise LimitExceeded(f"on this machine {what} is {found.value:.3g}, above the bundle's limit {found.limit:g}",
                            hint="its settings or libraries differ from where it was shipped")  # fmt: skip
    meta = {
        "title": f"{bundle.name} on this machine" + (f", {target}" if len(bundle.targets) > 1 else ""),
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
    """As `ship`, but stop after the gates: a runtime folder at `out`, no evaluation, no bundle. Of an encoder for the
    first of its targets. Raises `UsageError` for a recipe that names several."""
    _check_single(recipe)
    check_out(out, recipe, force, "engine.json")
    asked = settled(recipe, progress, convert=True)
    names, first = asked.stages(convert=True), next(iter(asked.targets))
    times = _tell(asked.plan(names, out), progress, ignore_shortage)
    with scratch(out) as folder:
        work = Work(folder / "run", names, progress, times)
        lighter = _lighter(asked.recipe, work, ignore_shortage)
        if asked.encoder:
            runtime = encoder_pipeline.gated(asked.recipe, work, (first,), lighter).runtime(first)
        else:
            runtime = decoder_pipeline.gated(asked.recipe, work, asked.targets, lighter).folders[first]
        appear(runtime, out)
    return out


def _check_single(recipe: Recipe) -> None:
    if len(recipe.targets) > 1:
        raise UsageError("convert makes one runtime folder", hint="give one --target, or `ship` a bundle with several")


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
        walked = decoder_pipeline.evaluate if opened.kind in GENERATORS else encoder_pipeline.evaluate
        checkpoint, report = walked(recipe, opened, work)
        if checkpoint.digest() != opened.manifest["source"]["digest"]:
            report.meta["verdict"] += f"; {source} is not the model this bundle was made from"
        return report
