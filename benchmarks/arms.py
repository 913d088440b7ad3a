"""The two arms of a comparison: a load through `lightship serve`, and on the bare pipeline in one process.

The baseline runs while the same generator drains an identical stream from a stub: client and server share the cores in
both arms. Each arm is started anew for each run.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import Load, Run
from lightship import tuning
from lightship.bundle import Bundle
from lightship.calibration import default_text
from lightship.engine import EngineSettings
from lightship.evaluation.memory import pss_bytes, tree
from lightship.machine import machine
from lightship.serving.server import wait_ready
from lightship.tokenizer import load_tokenizer

ISAS = ("AVX2", "AVX512_CORE_BF16")  # of oneDNN; the second is all but AMX


@dataclass(frozen=True)
class Served:
    """A run through the server, the seconds until it was ready, and bytes of PSS of its processes after the warm-up."""

    run: Run
    ready: float
    memory: int


def tokens_of(bundle: Bundle) -> list[int]:
    """English prose as token ids of the bundle."""
    tokenizer = load_tokenizer(bundle.target_folder("openvino"))
    text = "".join(document.text for document in default_text().documents)
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def pieces(ids: Sequence[int], length: int, count: int) -> list[list[int]]:
    """`count` different pieces of `ids`, each of `length` tokens."""
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return [list(ids[start : start + length]) for start in starts]


def masked(isa: str | None) -> str:
    """Hide newer instructions than `isa` from oneDNN in this process and all that it starts; what to add to the name of
    the benchmark's section."""
    if isa is None:
        return ""
    os.environ["ONEDNN_MAX_CPU_ISA"] = isa
    return f" --isa {isa}"


def hides(isa: str | None) -> bool:
    """Whether this processor has instructions that the mask `isa` hides."""
    newer = ("amx",) if isa == "AVX512_CORE_BF16" else ("amx", "avx512")
    return isa is not None and any(feature.startswith(newer) for feature in machine()["features"])


def arithmetic(isa: str | None) -> str:
    """What a bundle must be shipped to compute in, so that it loads under the mask `isa`: see docs/benchmarks.md."""
    return "f32" if isa == "AVX2" and hides(isa) else "auto"


def tuned(bundle: Bundle) -> tuple[EngineSettings, str]:
    """The settings that `lightship serve` will take from the file beside the bundle, and what to say of them."""
    found = tuning.choose(bundle.folder, bundle.digest, bundle.targets, None, None)
    if found.entry is None or found.entry.target != "openvino":
        raise SystemExit(f"nothing was tuned here for {bundle.folder} on openvino: run `lightship tune` first")
    entry = found.entry
    said = f"{tuning.label(entry.target, entry.settings)}, tuned for {entry.workload.said()}"
    return entry.settings.on(EngineSettings()), said


@contextlib.contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A child process, ended afterwards."""
    process = subprocess.Popen([sys.executable, "-m", *command], text=True, **options)
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[Any]) -> None:
    """Ask it to end, then see to it."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def server(bundle: Path, port: int, *options: str) -> Iterator[tuple[str, int, float]]:
    """(URL, process id, seconds from the start of the process to readiness)."""
    began = time.perf_counter()
    command = ["lightship", "serve", str(bundle), "--port", str(port), *options]
    with started(command, stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, alive=lambda: process.poll() is None)
        yield url, process.pid, time.perf_counter() - began


def generate(url: str, load: Path, *options: str) -> Run:
    """One run of the load generator, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.load", url, str(load), *options]
    return Run(**json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


class Arms:
    """Both arms with one load; their files lie in `folder`. `settings`: what was `tuned` for the bundle here; None for
    the defaults."""

    def __init__(self, bundle: Bundle, folder: Path, load: Load, settings: EngineSettings | None = None) -> None:
        self.bundle, self.load, self._settings = bundle, load, settings
        self._file, self._recorded = load.write(folder / "load.json"), folder / "recorded"

    def served(self, port: int, *options: str) -> Served:
        """Through `lightship serve`."""
        options = options if self._settings else ("--untuned", *options)
        with server(self.bundle.folder, port, *options) as (url, pid, ready):
            generate(url, self._file, "--warm")
            size = sum(map(pss_bytes, tree(pid)))
            run = generate(url, self._file, "--record", str(self._recorded))
            return Served(run, ready, size)

    def in_process(self, like: Run) -> Run:
        """The bare pipeline, while the generator drains a stub at the pace of the run `like`."""
        pace = ["--first", str(like.middle("ttft")), "--each", str(like.middle("tpot"))]
        bare = ["benchmarks.inprocess", str(self.bundle.target_folder("openvino")), str(self._file)]
        bare += ["--settings", json.dumps(asdict(self._settings))] if self._settings else []
        with (
            started(["benchmarks.stub", str(self._recorded), *pace], stdout=subprocess.PIPE) as replaying,
            started(bare, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as pipeline,
        ):
            assert replaying.stdout and pipeline.stdin and pipeline.stdout
            port = replaying.stdout.readline().strip()
            assert pipeline.stdout.readline() == "ready\n"
            drain = ["benchmarks.load", f"http://127.0.0.1:{port}", str(self._file), "--told"]
            with started(drain, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as draining:
                assert draining.stdin and draining.stdout and draining.stdout.readline() == "ready\n"
                draining.stdin.write("\n")
                draining.stdin.flush()
                pipeline.stdin.write("\n")
                pipeline.stdin.flush()
                return Run(**json.loads(pipeline.stdout.readline()))
