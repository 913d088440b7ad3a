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
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lightship.bundle import Bundle, pack
from lightship.calibration import Text
from lightship.checkpoint import Checkpoint
from lightship.engine import EngineSettings
from lightship.errors import LightshipError, SourceError, UsageError
from lightship.evaluation import divergence, golden, memory, parity, perplexity, speed
from lightship.evaluation.divergence import Batch, Reference
from lightship.find import find
from lightship.recipe import KLD_LIMITS, Recipe
from lightship.report import Metric, Report
from lightship.sources import read

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
    notes: list[str] = field(default_factory=list)

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
            raise LightshipError(f"the disk below {out.parent} is full", hint="free space or choose another --out") from error
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
    """Token sequences: `gate` one long run, `score` the held-out chunks with masks, `calibrate` for data-aware steps."""

    gate: tuple[int, ...]
    score: Any
    calibrate: tuple[tuple[int, ...], ...]
    describe: dict[str, Any]


def _build(run: Run) -> Path:
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
    _evaluate(run, target, checkpoint, runtime, scoring, texts)
    return _content(run, runtime, checkpoint, gate, texts)


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
    raise NotImplementedError


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
    return [Batch.of("text", [row], [len(row) // 2 - 1]) for row in texts.score.sequences]


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
