"""The walk of a model through the house: read → reference → export → gate → quantise → gate → evaluate → pack.

The only module that knows several stages. Everything happens in a work folder beside the output; the bundle
appears under its name in one rename at the end, so an interrupted run leaves nothing that looks complete.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lightship.bundle import Bundle, pack
from lightship.calibration import Encode, Passages, Text, calibration_set, default_text, read_text, render_with
from lightship.checkpoint import Checkpoint
from lightship.engine import Engine, EngineSettings, GenerationParams
from lightship.errors import LightshipError, LimitExceeded, SourceError, UsageError
from lightship.evaluation import divergence, golden, memory, parity, perplexity, replay
from lightship.evaluation.divergence import Reference
from lightship.evaluation.text import scoring_set
from lightship.find import find
from lightship.machine import machine, versions
from lightship.recipe import KLD_LIMITS, Recipe
from lightship.report import Metric, Report
from lightship.sources import read
from lightship.template import ChatTemplate, load_template

Progress = Callable[[str], None]
EXACT = EngineSettings(prefix_cache=False, inference_precision="f32", kv_precision="f32", dynamic_quantisation_group=0)
DISK_FULL = 2**20  # bytes left; less is no room for any file of a run
EVALUATION_CHUNK = 512  # tokens, second half scored, as llama.cpp's perplexity tool does
EVALUATION_CHUNKS = {"quick": 6, "full": 24}
SPEED_REPEATS = {"quick": {"repeats": 3, "new_tokens": 32}, "full": {"repeats": 7, "new_tokens": 64}}
# Every stage of a run and its usual share of the time in percent, measured on the demo model: what the ETA is made of.
STAGES = {"read": 12, "original": 4, "export": 31, "gate export": 4, "quantise": 8, "gate": 4, "served path": 3,
          "evaluate": 33, "pack": 1}  # fmt: skip
CONVERT = ("read", "original", "export", "gate export", "quantise", "gate", "served path")


def silent(message: str) -> None:
    """A progress listener that listens to nothing."""


@dataclass
class Run:
    """One ship run on its way: what each stage hands to the next."""

    recipe: Recipe
    folder: Path
    progress: Progress
    stages: Sequence[str] = tuple(STAGES)
    metrics: list[Metric] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)

    def stage(self, name: str) -> None:
        """Announce that stage `name` begins."""
        self.progress(f"[{self.stages.index(name) + 1}/{len(self.stages)}] {name}")

    def say(self, line: str) -> None:
        """Report a line of detail."""
        self.progress(f"      {line}")


def ship(recipe: Recipe, out: Path, *, force: bool = False, progress: Progress = silent) -> Bundle:
    """Build the bundle `recipe` describes at `out` and return it, verified.

    Raises `LimitExceeded` when a gate fails; then, and on any other error, nothing is left at `out`.
    """
    if out.exists() and not force:
        raise UsageError(f"{out} exists already", hint="choose another --out, or --force to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _work_folder(out) as work:
        run = Run(recipe, work, progress)
        content = _build(run)
        bundle = pack(content, _manifest(run, out.name))
        _replace(bundle.folder, out)
    return Bundle.open(out)


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` (so that the final rename is atomic), removed whatever happens."""
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        yield work
    except (OSError, RuntimeError) as error:  # compiled libraries raise their own for a full disk
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or shutil.disk_usage(work).free < DISK_FULL:
            raise LightshipError(
                f"the disk below {out.parent} is full", hint="free space or choose another --out"
            ) from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(finished: Path, out: Path) -> None:
    """Move the finished folder to `out`; an old one there is set aside first, and removed only when the new stands."""
    old = finished.parent / "replaced"
    if out.exists():
        os.rename(out, old)
    os.rename(finished, out)


# ── Stages ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Texts:
    """Token sequences: `gate` one long run, `score` held-out passages, `calibrate` for data-aware steps."""

    gate: tuple[int, ...]
    score: Passages
    calibrate: tuple[tuple[int, ...], ...]
    describe: dict[str, Any]


def _build(run: Run) -> Path:
    runtime, checkpoint, texts, gate = _gated(run)
    _evaluate(run, find("targets", run.recipe.target), checkpoint, runtime, texts)
    return _content(run, runtime, checkpoint, gate, texts)


def _gated(run: Run) -> tuple[Path, Checkpoint, Texts, Reference]:
    """From the source to a runtime folder that passed every gate."""
    target = find("targets", run.recipe.target)
    checkpoint, texts = _read(run)
    gate = _original(run, checkpoint, texts)
    exported = _export(run, target, checkpoint, gate)
    runtime = _quantise(run, target, exported, texts)
    _gate_candidate(run, target, runtime, gate)
    return runtime, checkpoint, texts, gate


def _read(run: Run) -> tuple[Checkpoint, Texts]:
    """The checkpoint, and the tokens to gate, score and calibrate with."""
    run.stage("read")
    checkpoint = read(run.recipe.source, run.folder / "source", revision=run.recipe.revision, log=run.say)
    run.say(f"{checkpoint.config.get('model_type')}, {checkpoint.weight_bytes / 1e6:.0f} MB of {checkpoint.dtype}")
    return checkpoint, _texts(run, checkpoint)


def tokeniser(checkpoint: Checkpoint) -> tuple[Encode, int | None]:
    """Text → token ids without special tokens, from `tokenizer.json`; and the id it begins a text with, if any."""
    from tokenizers import Tokenizer

    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        raise SourceError(f"{checkpoint.folder} has no tokenizer.json", hint="save a fast tokenizer with the model")
    tokenizer = Tokenizer.from_file(str(path))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    whole, plain = tokenizer.encode("a").ids, encode("a")
    return encode, whole[0] if whole[:1] != plain[:1] else None


def _texts(run: Run, checkpoint: Checkpoint) -> Texts:
    """Cut gate, scoring and calibration tokens; calibration documents are never scored."""
    encode, start = tokeniser(checkpoint)
    if run.recipe.golden is not None:
        golden.read_cases(Path(run.recipe.golden))  # a mistake in it is better known now than after the work
    text = calibration_text(run.recipe.text, load_template(checkpoint.folder))
    context = checkpoint.context_length
    length = min(EVALUATION_CHUNK, context)
    score = scoring_set(text, encode, length, EVALUATION_CHUNKS[run.recipe.evaluate], start=start)
    gate = scoring_set(default_text(), encode, min(parity.LONG, context), 1, start=start).sequences[0]
    calibrate = calibration_set(text, encode, length, 32, start=start) if run.recipe.precision.name == "int4" else None
    describe = {
        "name": score.name,
        "default_only": text.default,
        "scoring_sha256": score.digest,
        "calibration_sha256": calibrate.digest if calibrate else None,
        "tokens": length * len(score.sequences),
    }
    return Texts(gate, score, calibrate.sequences if calibrate else (), describe)


def calibration_text(path: str | None, template: ChatTemplate | None) -> Text:
    """The default text, or the user's file read through the model's chat template."""
    if path is None:
        return default_text()

    def render(messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
        if template is None:
            raise UsageError(f"{path} is a chat, and the model has no chat template", hint="give a plain text file")
        return render_with(template.render)(messages)

    return read_text(Path(path), render)


def _original(run: Run, checkpoint: Checkpoint, texts: Texts) -> Reference:
    """Record the original's log-probabilities on the gate's rows, then free it."""
    run.stage("original")
    original = find("targets", "pytorch").open_scorer(checkpoint.folder)
    batches = parity.gate_batches(texts.gate, checkpoint.context_length, original.greedy)
    return divergence.record(original, batches, run.folder / "reference-gate")


def _export(run: Run, target: ModuleType, checkpoint: Checkpoint, gate: Reference) -> Path:
    """Export at the dtype that the precision asks for, and compare with the original, computed exactly."""
    run.stage("export")
    name = run.recipe.precision.name
    dtype = {"fp32": "float32", "bf16": "bfloat16"}.get(name)
    folder = run.folder / "exported"
    target.export(checkpoint, folder, dtype)
    run.stage("gate export")
    limit = KLD_LIMITS["bf16" if name == "bf16" and checkpoint.dtype != "bfloat16" else "fp32"]
    found = parity.parity(gate, target.open_scorer(folder, EXACT))
    _tell(run, found, limit)
    parity.check_parity(found, limit if name != "bf16" else max(limit, run.recipe.kld_limit()), "gate export")
    run.metrics += parity.parity_metrics(found, "export_")
    gc.collect()
    return folder


def _tell(run: Run, found: parity.Parity, limit: float) -> None:
    for line in found.lines():
        run.say(line)
    run.say(f"limit on mean KLD {limit:g}")


def _quantise(run: Run, target: ModuleType, exported: Path, texts: Texts) -> Path:
    run.stage("quantise")
    precision = run.recipe.precision
    folder = exported
    if precision.name in ("int8", "int4"):
        folder = run.folder / "quantised"
        target.quantise(exported, folder, precision, texts.calibrate)
        shutil.rmtree(exported)
    else:
        run.say(f"{precision.name}: nothing to do")
    target.finish(folder, precision)
    return folder


def _gate_candidate(run: Run, target: ModuleType, runtime: Path, gate: Reference) -> None:
    """Gate the finished folder as it will be served: the graph in one pass, then the continuous-batching path."""
    run.stage("gate")
    limit = run.recipe.kld_limit()
    found = parity.parity(gate, target.open_scorer(runtime))
    _tell(run, found, limit)
    parity.check_parity(found, limit, "gate")
    run.metrics += parity.parity_metrics(found)
    run.stage("served path")
    engine = target.open(runtime, EngineSettings(prefix_cache=False))
    index = next(i for i, batch in enumerate(gate.batches) if batch.name == "long")
    tokens = gate.batches[index].ids[0]
    rows = [gate.rows(index, block) for block in range(-(-len(tokens) // divergence.BLOCK))]
    original = np.concatenate(rows)[np.arange(len(tokens) - 1), tokens[1:]]
    metric = parity.check_served(original, engine.prompt_logprobs(tokens.tolist()), limit)
    engine.close()
    run.say(f"mean |Δ log p| {metric.value:.2e} over {metric.n} tokens")
    run.metrics.append(metric)


def _evaluate(run: Run, target: ModuleType, checkpoint: Checkpoint, runtime: Path, texts: Texts) -> None:
    """Quality on held-out text; then speed and memory of original and candidate, a fresh process each."""
    run.stage("evaluate")
    run.metrics += _quality(run, target, checkpoint, runtime, texts.score)
    repeats = SPEED_REPEATS[run.recipe.evaluate]
    original = memory.probe("pytorch", checkpoint.folder, **repeats)
    candidate = memory.probe(run.recipe.target, runtime, **repeats)
    run.metrics += memory.paired(original, candidate)
    run.metrics.append(memory.size_metric(runtime, memory.artefact_bytes(checkpoint.folder)))
    if run.recipe.golden is not None:
        run.metrics += _golden_cases(run, Path(run.recipe.golden), checkpoint, target, runtime)


def _quality(run: Run, target: ModuleType, checkpoint: Checkpoint, runtime: Path, score: Passages) -> list[Metric]:
    """Both models on the held-out passages, one after the other: they are never in memory together."""
    original = find("targets", "pytorch").open_scorer(checkpoint.folder)
    scoring = divergence.record(original, divergence.passage_batches(score), run.folder / "reference-text")
    del original
    gc.collect()
    found = divergence.compare(scoring, target.open_scorer(runtime))
    gc.collect()
    return perplexity.quality(found, score.bytes_per_token * score.scored)


def _golden_cases(run: Run, path: Path, checkpoint: Checkpoint, target: ModuleType, runtime: Path) -> list[Metric]:
    """Answer the golden cases with original and candidate, greedily, and compare case by case."""
    cases = golden.read_cases(path)
    answers = []
    for opened in (find("targets", "pytorch").open(checkpoint.folder, EngineSettings()),
                   target.open(runtime, EngineSettings(prefix_cache=False))):  # fmt: skip
        answers.append(golden.run(cases, answerer(opened, checkpoint)))
        opened.close()
        gc.collect()
    result = golden.compare(cases, *answers)
    for outcome in result.lost:
        run.say(f"golden case {outcome.case.id} lost: {outcome.candidate[:80]!r}")
    return result.metrics()


def answerer(engine: Engine, checkpoint: Checkpoint) -> golden.Generate:
    """A function that answers a prompt or messages greedily with `engine`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    template = load_template(checkpoint.folder)

    def generate(prompt: str | Sequence[dict[str, Any]], max_tokens: int) -> str:
        if isinstance(prompt, str):
            tokens = tokenizer.encode(prompt).ids
        elif template is None:
            raise UsageError("golden cases with messages need a model with a chat template", hint="use prompt instead")
        else:
            tokens = tokenizer.encode(template.render(prompt), add_special_tokens=False).ids
        engine.submit(tokens, GenerationParams(max_tokens=max_tokens))
        found: list[int] = []
        while engine.busy():
            for event in engine.step():
                found.extend(event.token_ids)
        return str(tokenizer.decode(found))

    return generate


# ── Packing ─────────────────────────────────────────────────────────────────


def _content(run: Run, runtime: Path, checkpoint: Checkpoint, gate: Reference, texts: Texts) -> Path:
    """Lay out everything that goes into the bundle but its manifest."""
    run.stage("pack")
    content = run.folder / "content"
    (content / "targets").mkdir(parents=True)
    shutil.move(runtime, content / "targets" / run.recipe.target)
    replay.write(gate, content / "golden")
    report = Report(tuple(run.metrics), _meta(run, checkpoint, texts))
    (content / "report.json").write_text(report.to_json(), encoding="utf-8")
    (content / "report.md").write_text(report.to_markdown(), encoding="utf-8")
    (content / "report.html").write_text(report.to_html(), encoding="utf-8")
    (content / "recipe.json").write_text(published(run.recipe).model_dump_json(indent=1) + "\n", encoding="utf-8")
    run.source = {
        "name": published(run.recipe).source,
        "revision": run.recipe.revision,
        "digest": checkpoint.digest(),
        "dtype": checkpoint.dtype,
        "precision_history": [entry.get("precision") for entry in checkpoint.lineage if entry.get("precision")],
        "lineage": checkpoint.lineage,
    }
    return content


def published(recipe: Recipe) -> Recipe:
    """`recipe` without paths of this machine: a bundle travels."""
    paths = {name: value and Path(value).name for name, value in (("text", recipe.text), ("golden", recipe.golden))}
    local = Path(recipe.source).expanduser().exists()
    return recipe.model_copy(update={**paths, "source": Path(recipe.source).name if local else recipe.source})


def _verdict(run: Run, texts: Texts) -> str:
    by_name = {metric.name: metric for metric in run.metrics}

    def ratio(name: str) -> float:
        return by_name[name].ratio() or float("nan")

    kld, limit = by_name["kld"], run.recipe.kld_limit()
    text = "scored on default text only (give --text for yours)" if texts.describe["default_only"] else "on your text"
    return (
        f"{run.recipe.precision.name}: {1 / ratio('size'):.1f}× smaller, decode {ratio('decode'):.1f}× and prefill "
        f"{ratio('prefill'):.1f}× the original's speed, mean KLD {kld.value:.2g} (limit {limit:g}), "
        f"top-1 {by_name['top1'].value:.1%}; {text}"
    )


def _meta(run: Run, checkpoint: Checkpoint, texts: Texts) -> dict[str, Any]:
    return {
        "title": f"{Path(run.recipe.source).name} → {run.recipe.precision.name}",
        "verdict": _verdict(run, texts),
        "precision": run.recipe.precision.model_dump(),
        "limit_kld": run.recipe.kld_limit(),
        "accepted": list(run.recipe.accept),
        "text": texts.describe,
        "machine": machine(),
        "versions": versions(),
        "precision_history": [entry.get("precision") for entry in checkpoint.lineage if entry.get("precision")],
    }


def _manifest(run: Run, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "targets": [run.recipe.target],
        "source": run.source,
        "recipe": published(run.recipe).model_dump(mode="json"),
        "versions": versions(),
        "machine": machine(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


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
    kld = replay.replay(*bundle.golden(), find("targets", target).open_scorer(runtime))
    progress("[3/3] speed and memory")
    shipped = {metric.name: metric for metric in bundle.report.metrics}
    measured = [kld, *memory.probe(target, runtime, repeats=repeats)]
    metrics = [replace(m, baseline=shipped[m.name].value if m.name in shipped else m.baseline) for m in measured]
    limit = float(bundle.report.meta["limit_kld"])
    if not kld.value <= limit:
        raise LimitExceeded(f"on this machine mean KLD is {kld.value:.3g}, above the bundle's limit {limit:g}",
                            hint="its settings or libraries differ from where it was shipped")  # fmt: skip
    meta = {"title": f"{bundle.name} on this machine", "bundle": bundle.digest, "machine": machine(),
            "versions": versions(), "verdict": f"intact; mean KLD {kld.value:.2g} here (limit {limit:g})"}  # fmt: skip
    return Report(tuple(metrics), meta)


# ── Parts of the walk ───────────────────────────────────────────────────────


def convert(recipe: Recipe, out: Path, *, force: bool = False, progress: Progress = silent) -> Path:
    """As `ship`, but stop after the gates: a runtime folder at `out`, no evaluation, no bundle."""
    if out.exists() and not force:
        raise UsageError(f"{out} exists already", hint="choose another --out, or --force to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _work_folder(out) as work:
        run = Run(recipe, work, progress, CONVERT)
        runtime, *_ = _gated(run)
        _replace(runtime, out)
    return out


def evaluate(bundle: Path, source: str, text: str | None = None, level: str = "quick",
             progress: Progress = silent) -> Report:  # fmt: skip
    """Measure the bundle against the original named by `source`, on `text`. Writes nothing into the bundle."""
    opened = Bundle.open(bundle)
    recipe = Recipe.model_validate(
        {**opened.manifest["recipe"], "source": source, "text": text, "golden": None, "evaluate": level}
    )
    with tempfile.TemporaryDirectory(prefix="lightship-") as work:
        run = Run(recipe, Path(work), progress, ("read", "evaluate"))
        checkpoint, texts = _read(run)
        target = find("targets", opened.targets[0])
        _evaluate(run, target, checkpoint, opened.target_folder(opened.targets[0]), texts)
        return Report(tuple(run.metrics), _meta(run, checkpoint, texts))
