"""Tuning: verify a bundle, try settings of its engine in processes of their own, write the winner next to the bundle.

Like the other walks it knows several stages; the search itself is in `search/settings`, the file in `tuning`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightship import tuning
from lightship.bundle import Bundle
from lightship.checkpoint import context_length, read_json
from lightship.draft import TARGET, check_draft
from lightship.engine import MAX_CONCURRENT, EngineSettings
from lightship.errors import EngineError, LimitExceeded, UnsupportedError, UsageError
from lightship.evaluation import workload
from lightship.find import find
from lightship.machine import cpu_quota, machine
from lightship.search.settings import FINAL_SHARE, Candidate, Dimension, Failed, Judgement, Search
from lightship.serving.placement import places
from lightship.tuning import Chosen, Entry, Figures, Row, Workload

SECONDS = 8.0  # that a run should take at least, so that noise does not decide
MOST_WAVES = 24
LEAST = 4  # requests of a run that are counted, at least: one answer alone may be an odd one
PATIENCE = 4  # times the budget that a single run may take before it is given up
BF16 = ("avx512_bf16", "amx_bf16")
VNNI = ("avx_vnni", "avx512_vnni")  # without, OpenVINO (2026.4) leaves activations in floats, whatever the group


def tune(
    folder: Path,
    load: Workload,
    *,
    draft: Bundle | None = None,
    budget: float = 600.0,
    only: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> Entry:
    """Find the best settings of the bundle's engine on this machine under `load`, and write them next to the bundle.

    `draft`: what `open_draft` opened; whether it pays, and with how many tokens, is tried too. `budget`: seconds to
    search for; a run that began is ended, so it may take a little longer. `only`: the settings to try, all by default.

    Raises `UnsupportedError` for encoders and a draft that does not fit, `LimitExceeded` when the bundle breaks its own
    limit here with its defaults.
    """
    began = time.monotonic()
    bundle = Bundle.open(folder)
    if bundle.kind != "decoder":
        raise UnsupportedError(f"tune is for models that generate (decoders); {bundle.name} is of kind {bundle.kind}",
                               hint="measure it with `lightship check`")  # fmt: skip
    if load.task == "copy" and load.shared:
        raise UsageError("prompts of the task copy share their instruction only", hint="leave --shared out")
    if draft is not None:
        check_draft(draft, bundle, TARGET, load.tokens_in + load.tokens_out)
    limit = float(bundle.report.meta["limit_kld"])
    start = Candidate(bundle.targets[0], Chosen())
    trials = Processes(bundle, load, limit, began + budget, budget * PATIENCE, draft)
    search = Search(
        trials,
        budget,
        start,
        dimensions(bundle, load, draft is not None, only),
        {str(name): value for name, value in load.limits.items()},
        progress,
    )
    try:
        trials.prepare(start)
        winner, base = search.run()
    except Failed as error:
        if str(error).startswith("rejected"):
            raise LimitExceeded(f"with its defaults the bundle breaks its own limit here: {error}",
                                hint="its libraries differ from where it was shipped") from error  # fmt: skip
        raise EngineError(f"the bundle cannot be measured with its defaults: {error}") from error
    entry = _entry(trials, winner, base, list(search.rows.values()), time.monotonic() - began)
    if draft is not None and entry.draft is None:
        progress("the draft was not measured: this says nothing about serving with it")
    if skipped := sum(row.verdict.startswith("not measured") for row in entry.rows):
        minutes = math.ceil((skipped + 1) * trials.longest / (1 - FINAL_SHARE) / 60 + budget / 60)
        progress(f"{skipped} candidates are not measured, a run takes {trials.longest:.0f} s here: give about --budget "
                 f"{minutes}, or name with --only what to try")  # fmt: skip
    progress(f"written to {tuning.write(folder, entry)}")
    return entry


def _entry(trials: Processes, winner: Row, base: Row, rows: list[Row], seconds: float) -> Entry:
    # Of a draft that was never measured it is not known that it does not pay.
    measured = any(row.settings.draft_tokens and not row.verdict.startswith(("failed", "not measured")) for row in rows)
    draft = trials.draft if measured else None
    assert winner.figures is not None and base.figures is not None
    return Entry(
        bundle=trials.bundle.digest, draft=None if draft is None else draft.digest, machine=tuning.here(),
        versions=tuning.versions(), workload=trials.workload,
        target=winner.target, settings=winner.settings, figures=winner.figures, baseline=base.figures,
        kld=winner.kld, limit_kld=trials.limit, rows=rows, seconds=round(seconds, 1),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


# ── What is tried ───────────────────────────────────────────────────────────


def dimensions(bundle: Bundle, load: Workload, drafted: bool = False, only: Sequence[str] = ()) -> list[Dimension]:
    """What to change, in the order of what usually matters most. A target names in TUNABLE what it heeds. `drafted`:
    there is a draft. `only`: names of settings, or `target`; where it is empty, all that can matter on this machine."""
    recorded = {target: _recorded(bundle.target_folder(target)) for target in bundle.targets}
    features, cores = set(machine()["features"]), _cores()
    bf16, idle = not features.isdisjoint(BF16), {"dynamic_quantisation_group"} if features.isdisjoint(VNNI) else set()

    def targets(best: Candidate) -> list[Candidate]:
        return [Candidate(target, Chosen()) for target in bundle.targets if target != best.target]

    def precision(best: Candidate) -> list[Candidate]:
        now, kv = _now(best, recorded, "inference_precision"), _now(best, recorded, "kv_precision")
        now = now or ("bf16" if bf16 else "f32")
        others = [name for name in ("f32", *(["bf16"] if bf16 else [])) if name != now]
        # A cache of the other floating point type is refused.
        return [best.with_(inference_precision=name, kv_precision=name if kv in ("f32", "bf16") else None)
                for name in others]  # fmt: skip

    def kv_precision(best: Candidate) -> list[Candidate]:
        computes = _now(best, recorded, "inference_precision") or ("bf16" if bf16 else "f32")
        names = [computes, "u8", "u4"]
        return [best.with_(kv_precision=name) for name in names if name != _now(best, recorded, "kv_precision")]

    def activations(best: Candidate) -> list[Candidate]:
        groups = [group for group in (32, 64, 128) if group != _now(best, recorded, "dynamic_quantisation_group")]
        return [best.with_(dynamic_quantisation_group=group) for group in groups]

    def budget(best: Candidate) -> list[Candidate]:
        now, usual = best.settings.max_batched_tokens, Chosen().max_batched_tokens
        sizes = [2 * usual, usual // 2] if now == usual else [2 * now] if now > usual else [now // 2]
        return [best.with_(max_batched_tokens=size) for size in sizes]

    def sequences(best: Candidate) -> list[Candidate]:
        together = min(load.clients, MAX_CONCURRENT)
        return [best.with_(max_num_seqs=together // 2)] if together >= 4 else []

    def threads(best: Candidate) -> list[Candidate]:
        counts = dict.fromkeys(count for count in (cores - 1, cores // 2) if count >= 1)
        return [best.with_(threads=count) for count in counts]

    def prefix_cache(best: Candidate) -> list[Candidate]:
        return [best.with_(prefix_cache=False)]

    def lookup(best: Candidate) -> list[Candidate]:
        # Greedy answers to plain text go in circles, in which lookup shines and users do not: only tasks that copy.
        return [best.with_(prompt_lookup=count, draft_tokens=0) for count in (5, 10, 2)] if load.task == "copy" else []

    def draft(best: Candidate) -> list[Candidate]:
        return [best.with_(draft_tokens=count, prompt_lookup=0) for count in (3, 5, 8)] if drafted else []

    # Integer activations pay in float32 only, and there most of all. Other arithmetic changes the answer, and with it
    # how much of it is proposed: it is settled before.
    arithmetic: list[tuple[str, Dimension]] = [
        ("inference_precision", precision), ("dynamic_quantisation_group", activations), ("kv_precision", kv_precision),
    ]  # fmt: skip
    proposing: list[tuple[str, Dimension]] = [("prompt_lookup", lookup), ("draft_tokens", draft)]
    sizes: list[tuple[str, Dimension]] = [
        ("max_batched_tokens", budget), ("max_batched_tokens", budget), ("threads", threads),
    ]  # fmt: skip
    others: list[tuple[str, Dimension]] = [("max_num_seqs", sequences), ("prefix_cache", prefix_cache)]

    def heeded(name: str, dimension: Dimension) -> Dimension:
        return lambda best: dimension(best) if name in ("target", *_tunable(best.target)) else []

    # Another target comes when the first has its best arithmetic: compared with its defaults it would win too early.
    every = [*arithmetic, *proposing, *sizes, *others, ("target", targets), *proposing, *sizes]
    if unknown := set(only) - {name for name, _ in every}:
        raise UsageError(f"{', '.join(sorted(unknown))} is nothing that is tried",
                         hint=f"known are {', '.join(dict.fromkeys(name for name, _ in every))}")  # fmt: skip
    return [heeded(name, dimension) for name, dimension in every if (name in only if only else name not in idle)]


def _cores() -> int:
    """That may be used here."""
    cores, quota = int(machine()["cores"] or 1), cpu_quota()
    return cores if quota is None else max(min(int(quota), cores), 1)


def _tunable(target: str) -> Sequence[str]:
    return getattr(find("targets", target), "TUNABLE", ())


def _recorded(folder: Path) -> dict[str, Any]:
    """The settings in a runtime folder's `engine.json`, which hold where nothing else is asked."""
    path = folder / "engine.json"
    found: dict[str, Any] = read_json(path)["settings"] if path.is_file() else {}
    return found


def _now(candidate: Candidate, recorded: dict[str, dict[str, Any]], name: str) -> Any:
    """What a setting is for a candidate: its own, or what the folder records."""
    own = getattr(candidate.settings, name)
    return recorded[candidate.target].get(name) if own is None else own


# ── A fresh process for each run ────────────────────────────────────────────


@dataclass
class Processes:
    """`Trials` on this machine: every run in a process of its own, which opens the engine, warms it up and works.

    `ends`: when the budget is used up (`time.monotonic`); `timeout`: seconds after which a process is given up.
    """

    bundle: Bundle
    workload: Workload
    limit: float
    ends: float
    timeout: float
    draft: Bundle | None = None
    waves: int = 1
    longest: float = 0.0
    _prompts: list[list[int]] = field(default_factory=list)

    def prepare(self, start: Candidate) -> None:
        """Make the prompts, and find out how many requests of each client make a run that is long enough. Raises
        `UsageError` for a load that the model cannot bear, `Failed` when `start` cannot be measured."""
        load, folder = self.workload, self.bundle.target_folder(start.target)
        context = context_length(read_json(folder / "config.json")) or 2048
        if load.tokens_in + load.tokens_out > context:
            raise UsageError(f"{load.tokens_in} tokens in and {load.tokens_out} out exceed the context of {context}",
                             hint="use smaller --in and --out")  # fmt: skip
        self._prompts = self._made(folder)
        found = self._run(start, None)
        wanted = min(SECONDS, (self.ends - time.monotonic()) / 50)
        least = math.ceil(LEAST / load.clients)
        self.waves = min(max(round(wanted / max(found["seconds"], 1e-3)), least), MOST_WAVES)
        self._prompts = self._made(folder)

    def _made(self, folder: Path) -> list[list[int]]:
        """The prompts of a run, and before them one of each client to warm up with."""
        load, count = self.workload, self.workload.clients * (2 + self.waves)
        if load.task == "copy":
            return workload.copy_prompts(folder, count, load.tokens_in)
        return workload.text_prompts(folder, count, load.tokens_in, load.shared)

    def load(self, candidate: Candidate, slowest: float | None = None) -> Figures | None:
        found = self._run(candidate, slowest)
        if not found["finished"]:
            return None
        return _figures(found)

    def _run(self, candidate: Candidate, slowest: float | None) -> dict[str, Any]:
        load = self.workload
        work = load.tokens_out * ((load.clients + 1) / 2 + load.clients * self.waves)  # where no answer ends early
        return self._child(candidate, {
            "what": "load", "prompts": self._prompts[load.clients :],
            "warm": self._prompts[: load.clients], "clients": load.clients, "new": load.tokens_out,
            "deadline": None if slowest is None else work / max(slowest, 1e-9), "ignore_eos": load.task != "copy",
        })  # fmt: skip

    def judge(self, candidate: Candidate) -> Judgement:
        order = {"what": "quality", "bundle": str(self.bundle.folder), "limit": self.limit}
        found = self._child(candidate, order)
        if "broken" in found:
            return Judgement(None, None, found["broken"])
        return Judgement(found["kld"], found["served"], found["problem"])

    def left(self) -> float:
        return self.ends - time.monotonic()

    def seconds(self) -> float:
        return self.longest

    def _child(self, candidate: Candidate, order: dict[str, Any]) -> dict[str, Any]:
        settings = candidate.settings.on(EngineSettings(kv_cache_gb=self.workload.kv_cache_gb))
        settings = places()[0].on(settings)  # as `serve` has them under a quota
        if self.draft is not None and settings.draft_tokens:
            settings = replace(settings, draft=str(self.draft.target_folder(TARGET)))
        folder = self.bundle.target_folder(candidate.target)
        order |= {"target": candidate.target, "folder": str(folder), "settings": asdict(settings)}
        ours = str(Path(__file__).parents[1])
        above = os.environ.get("PYTHONPATH")
        began = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "lightship.evaluation.load_probe"], input=json.dumps(order), text=True,
                capture_output=True, timeout=self.timeout, check=False,
                env=os.environ | {"PYTHONPATH": os.pathsep.join([ours, above] if above else [ours])},
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise Failed(f"gave no result within {self.timeout:.0f} s") from error
        if order["what"] == "load":
            self.longest = max(self.longest, time.monotonic() - began)
        if done.returncode:
            last = " ".join(done.stderr.strip().splitlines()[-1:])[:200] or "no word"
            raise Failed(f"its process ended (exit {done.returncode}): {last}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if "failed" in found:
            raise Failed(found["failed"].splitlines()[0])
        return found


def _figures(found: dict[str, Any]) -> Figures:
    speed = found["tokens"] / max(found["seconds"], 1e-9)
    ends = {
        f"{name}_p{share}": _percentile(found[name], share / 100) for name in ("ttft", "tpot") for share in (50, 90)
    }
    return Figures(tokens_per_second=speed, least=speed, most=speed, n=1, **ends)


def _percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed; 0 for none."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else 0.0
