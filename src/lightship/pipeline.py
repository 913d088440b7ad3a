"""The walk of a model through the house: read → reference → export → gate → quantise → gate → evaluate → pack.

The only module that knows several stages. Everything happens in a work folder beside the output; the bundle
appears under its name in one rename at the end, so an interrupted run leaves nothing that looks complete.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lightship.bundle import Bundle, pack
from lightship.calibration import Text, default_text, read_text, render_with
from lightship.checkpoint import Checkpoint
from lightship.engine import Engine, EngineSettings, GenerationParams, Scorer
from lightship.errors import LightshipError, LimitExceeded, SourceError, UsageError
from lightship.evaluation import divergence, golden, memory, parity, perplexity
from lightship.evaluation.divergence import Batch, Reference
from lightship.find import find
from lightship.recipe import KLD_LIMITS, Recipe
from lightship.report import Metric, Report
from lightship.sources import read
from lightship.template import ChatTemplate, load_template

Progress = Callable[[str], None]
EXACT = EngineSettings(prefix_cache=False, inference_precision="f32", kv_precision="f32", dynamic_quantisation_group=0)
EVALUATION_CHUNK = 512  # tokens, second half scored, as llama.cpp's perplexity tool does
EVALUATION_CHUNKS = {"quick": 6, "full": 48}
SPEED_REPEATS = {"quick": 5, "full": 15}
GOLDEN_TOP = 20
STAGES = ("read", "original", "export", "gate export", "quantise", "gate", "served path", "evaluate", "pack")


def silent(message: str) -> None:
    """A progress listener that listens to nothing."""


@dataclass
class Run:
    """One ship run on its way: what each stage hands to the next."""

    recipe: Recipe
    folder: Path
    progress: Progress
    metrics: list[Metric] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)

    def stage(self, name: str) -> None:
        """Announce that stage `name` begins."""
        self.progress(f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name}")

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
    except OSError as error:
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
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
    """Token sequences: `gate` one long run, `score` held-out chunks with marks, `calibrate` for data-aware steps."""

    gate: tuple[int, ...]
    score: list[tuple[list[int], list[bool]]]
    calibrate: tuple[tuple[int, ...], ...]
    describe: dict[str, Any]


def _build(run: Run) -> Path:
    runtime, checkpoint, texts, gate, scoring = _gated(run)
    _evaluate(run, find("targets", run.recipe.target), checkpoint, runtime, scoring, texts)
    return _content(run, runtime, checkpoint, gate, texts)


def _gated(run: Run) -> tuple[Path, Checkpoint, Texts, Reference, Reference]:
    """From the source to a runtime folder that passed every gate."""
    recipe = run.recipe
    target = find("targets", recipe.target)
    run.stage("read")
    checkpoint = read(recipe.source, run.folder / "source", revision=recipe.revision, log=run.say)
    run.say(f"{checkpoint.config.get('model_type')}, {checkpoint.weight_bytes / 1e6:.0f} MB of {checkpoint.dtype}")
    texts = _texts(run, checkpoint)
    gate, scoring = _original(run, checkpoint, texts)
    exported = _export(run, target, checkpoint, gate)
    runtime = _quantise(run, target, exported, texts)
    _gate_candidate(run, target, runtime, gate)
    return runtime, checkpoint, texts, gate, scoring


def tokeniser(checkpoint: Checkpoint) -> Callable[[str], list[int]]:
    """Plain text → token ids without special tokens, from the checkpoint's `tokenizer.json`."""
    from tokenizers import Tokenizer

    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        raise SourceError(f"{checkpoint.folder} has no tokenizer.json", hint="save a fast tokenizer with the model")
    tokenizer = Tokenizer.from_file(str(path))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _texts(run: Run, checkpoint: Checkpoint) -> Texts:
    """Cut gate, scoring and calibration tokens; calibration documents are never scored."""
    encode = tokeniser(checkpoint)
    if run.recipe.golden is not None:
        golden.read_cases(Path(run.recipe.golden))  # a mistake in it is better known now than after the work
    template = load_template(checkpoint.folder)
    calibration, scoring = calibration_text(run.recipe.text, template).split()
    length = min(EVALUATION_CHUNK, checkpoint.context_length)
    rows = scoring.chunks(encode, length, EVALUATION_CHUNKS[run.recipe.evaluate])
    gate, _ = default_text().split()[1].chunks(encode, min(parity.LONG, checkpoint.context_length), 1)[0]
    calibrating = calibration.chunks(encode, min(512, length), 32) if run.recipe.precision.name == "int4" else []
    describe = {
        "name": scoring.name,
        "default_only": scoring.default,
        "scoring_sha256": scoring.digest,
        "calibration_sha256": calibration.digest if calibrating else None,
        "tokens": length * len(rows),
    }
    return Texts(tuple(gate), rows, tuple(tuple(ids) for ids, _ in calibrating), describe)


def calibration_text(path: str | None, template: ChatTemplate | None) -> Text:
    """The default text, or the user's file read through the model's chat template."""
    if path is None:
        return default_text()

    def render(messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
        if template is None:
            raise UsageError(f"{path} is a chat, and the model has no chat template", hint="give a plain text file")
        return render_with(template.render)(messages)

    return read_text(Path(path), render)


def _original(run: Run, checkpoint: Checkpoint, texts: Texts) -> tuple[Reference, Reference]:
    """Record the original's log-probabilities on the gate's rows and on the held-out text, then free it."""
    run.stage("original")
    original = find("targets", "pytorch").open_scorer(checkpoint.folder)
    batches = parity.gate_batches(texts.gate, checkpoint.context_length, original.greedy)
    gate = divergence.record(original, batches, run.folder / "reference-gate")
    scoring = divergence.record(original, _scoring_batches(texts), run.folder / "reference-text")
    del original
    gc.collect()
    return gate, scoring


def _scoring_batches(texts: Texts) -> list[Batch]:
    """One row a chunk; position i is scored when token i + 1 lies in the second half and is marked to count."""
    batches = []
    for ids, marks in texts.score:
        batch = Batch.of("text", [ids])
        counts = np.array([*marks[1:], False])
        counts[: len(ids) // 2 - 1] = False
        batches.append(replace(batch, scored=counts[None]))
    if not any(batch.scored.any() for batch in batches):
        raise UsageError("the text has no token to score", hint="a chat needs assistant messages in it")
    return [batch for batch in batches if batch.scored.any()]


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
    target.finish(folder, precision.name)
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


def _evaluate(
    run: Run, target: ModuleType, checkpoint: Checkpoint, runtime: Path, scoring: Reference, texts: Texts
) -> None:
    """Quality on held-out text; then speed and memory of original and candidate, a fresh process each."""
    run.stage("evaluate")
    found = divergence.compare(scoring, target.open_scorer(runtime))
    run.metrics += perplexity.quality(found, _scored_bytes(checkpoint, scoring))
    gc.collect()
    repeats = SPEED_REPEATS[run.recipe.evaluate]
    original = memory.probe("pytorch", checkpoint.folder, repeats=repeats)
    candidate = memory.probe(run.recipe.target, runtime, repeats=repeats)
    run.metrics += memory.paired(original, candidate)
    size = Metric("size", float(memory.artefact_bytes(runtime)), "bytes", 1, None, "lower",
                  float(memory.artefact_bytes(checkpoint.folder)), "all files of the runtime folder")  # fmt: skip
    run.metrics.append(size)
    if run.recipe.golden is not None:
        run.metrics += _golden_cases(run, Path(run.recipe.golden), checkpoint, target, runtime)


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


def _scored_bytes(checkpoint: Checkpoint, scoring: Reference) -> int:
    """UTF-8 bytes of the tokens that are predicted and scored."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    total = 0
    for batch in scoring.batches:
        predicted = batch.ids[0, 1:][batch.scored[0, :-1]]
        total += len(tokenizer.decode(predicted.tolist(), skip_special_tokens=False).encode())
    return total


# ── Packing ─────────────────────────────────────────────────────────────────


def _content(run: Run, runtime: Path, checkpoint: Checkpoint, gate: Reference, texts: Texts) -> Path:
    """Lay out everything that goes into the bundle but its manifest."""
    run.stage("pack")
    content = run.folder / "content"
    (content / "targets").mkdir(parents=True)
    shutil.move(runtime, content / "targets" / run.recipe.target)
    golden_rows(gate, content / "golden")
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


def golden_rows(gate: Reference, folder: Path) -> None:
    """Write token rows and the original's `GOLDEN_TOP` likeliest log-probabilities at each position.

    `tokens.json`: {"rows": [[id, …], …]}; `logprobs.npz`: `ids` and `logprobs`, (positions, k), rows in order.
    """
    folder.mkdir(parents=True)
    rows: list[list[int]] = []
    ids, logprobs = [], []
    for index, batch in enumerate(gate.batches):
        if batch.name != "long":
            continue
        rows.append(batch.ids[0].tolist())
        for block in range(-(-batch.ids.shape[1] // divergence.BLOCK)):
            values = gate.rows(index, block)
            top = np.argsort(values, axis=-1)[:, : -GOLDEN_TOP - 1 : -1]
            ids.append(top.astype(np.int32))
            logprobs.append(np.take_along_axis(values, top, 1))
    (folder / "tokens.json").write_text(json.dumps({"rows": rows}) + "\n")
    np.savez(folder / "logprobs.npz", ids=np.concatenate(ids), logprobs=np.concatenate(logprobs))


def versions() -> dict[str, str]:
    """The libraries that shape the result."""
    wanted = ("lightship", "openvino", "openvino-genai", "nncf", "torch", "transformers", "tokenizers", "numpy")
    return {name: metadata.version(name) for name in wanted if _installed(name)}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory and system."""
    name, flags = platform.processor(), ""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        key, _, value = line.partition(":")
        name = value.strip() if key.strip() == "model name" else name
        flags = value if key.strip() == "flags" else flags
    features = [
        flag
        for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
        if flag in flags.split()
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": name, "cores": cores, "features": features, "system": platform.platform(terse=True)}


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

    The divergence is taken over the original's likeliest tokens plus one bucket for all others, which bounds the
    full KLD from below. Raises `LimitExceeded` when it is above the limit the bundle was shipped with.
    """
    progress("[1/3] verify")
    bundle = Bundle.open(folder)
    target = bundle.targets[0]
    runtime = bundle.target_folder(target)
    progress("[2/3] divergence")
    kld = _golden_divergence(bundle, find("targets", target).open_scorer(runtime))
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


def _golden_divergence(bundle: Bundle, scorer: Scorer) -> Metric:
    rows, arrays = bundle.golden()
    values: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    start = 0
    for row in rows:
        ids = np.array([row], np.int64)
        q = divergence.log_softmax(scorer.logits(ids, np.ones_like(ids))[0])
        stop = start + len(row)
        p_top = arrays["logprobs"][start:stop].astype(np.float64)
        q_top = np.take_along_axis(q, arrays["ids"][start:stop].astype(np.int64), 1).astype(np.float64)
        values.append(bucketed(p_top, q_top))
        start = stop
    kld = np.concatenate(values)
    if not np.isfinite(kld).all():
        raise LimitExceeded("the bundle computes NaN or infinity on this machine")
    stderr = float(kld.std() / np.sqrt(len(kld)))
    return Metric("gate_kld", float(kld.mean()), "nats/token", len(kld), stderr, "lower", 0.0,
                  f"KL over the original's {GOLDEN_TOP} likeliest tokens and one bucket for the rest")  # fmt: skip


def bucketed(p_top: Any, q_top: Any) -> Any:
    """KL(p ‖ q) per row from the log-probabilities (rows, k) of p's top tokens; all others are one bucket."""
    p_rest = np.maximum(1 - np.exp(p_top).sum(-1), 1e-9)
    q_rest = np.maximum(1 - np.exp(q_top).sum(-1), 1e-9)
    return (np.exp(p_top) * (p_top - q_top)).sum(-1) + p_rest * np.log(p_rest / q_rest)


# ── Parts of the walk ───────────────────────────────────────────────────────


def convert(recipe: Recipe, out: Path, *, force: bool = False, progress: Progress = silent) -> Path:
    """As `ship`, but stop after the gates: a runtime folder at `out`, no evaluation, no bundle."""
    if out.exists() and not force:
        raise UsageError(f"{out} exists already", hint="choose another --out, or --force to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _work_folder(out) as work:
        run = Run(recipe, work, progress)
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
        run = Run(recipe, Path(work), progress)
        run.stage("read")
        checkpoint = read(source, run.folder / "source", revision=recipe.revision, log=run.say)
        texts = _texts(run, checkpoint)
        _, scoring = _original(run, checkpoint, texts)
        target = find("targets", opened.targets[0])
        _evaluate(run, target, checkpoint, opened.target_folder(opened.targets[0]), scoring, texts)
        return Report(tuple(run.metrics), _meta(run, checkpoint, texts))
