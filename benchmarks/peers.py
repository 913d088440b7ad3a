"""Against llama.cpp's server and vLLM on a processor: the same model, the same load, quality stated for each.

Each has an environment of its own, made as docs/peers.md says; one that is not there is left out and the page says so.
The load is `lightship bench`: token ids, so that nobody tokenises, and `ignore_eos`. Servers are started anew for each
run, and run in turns. Quality: KL divergence from the original in float32 (PyTorch) over all positions of the same
passages, in one pass; of the engines as they compute here, not of their weights alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arms import ISAS, end, hides, masked, pieces, server, tokens_of
from benchmarks.page import DOCS, put, section, spread, table
from lightship import tuning
from lightship.bundle import Bundle
from lightship.engine import EngineSettings
from lightship.evaluation import divergence
from lightship.find import find
from lightship.machine import machine
from lightship.tune_pipeline import BF16

PAGE = DOCS / "peers.md"
IN, OUT = 200, 64  # tokens
REQUESTS = {1: 16, 16: 96}
ROWS, LENGTH = 3, 512  # of the passages that quality is measured on
PATIENCE = 300.0  # seconds until a server is ready
Found = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """A server with its weights. `start` gives its URL for a port; `logits` fills a file with those of token ids, None
    for ours with these `settings`."""

    name: str
    start: Callable[[int], AbstractContextManager[str]]
    logits: Callable[[Path, Path], None] | None
    settings: EngineSettings | None = None


def lightship(bundle: Bundle, *options: str) -> Callable[[int], AbstractContextManager[str]]:
    """Our own."""

    @contextlib.contextmanager
    def start(port: int) -> Iterator[str]:
        with server(bundle.folder, port, *options) as (url, _, _):
            yield url

    return start


def foreign(command: list[str], **environment: str) -> Callable[[int], AbstractContextManager[str]]:
    """Another server: `command` with its port put in place of PORT; ready when /health says so."""

    @contextlib.contextmanager
    def start(port: int) -> Iterator[str]:
        filled = [part.replace("PORT", str(port)) for part in command]
        outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
        process = subprocess.Popen(filled, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=outside)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(url, process)
            yield url
        finally:
            end(process)

    return start


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends:
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} ended with {process.returncode}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"{process.args!r} was not ready within {PATIENCE:.0f} s")


def theirs(python: Path, engine: str, model: Path, *options: str, **environment: str) -> Callable[[Path, Path], None]:
    """Logits by the other engine's own Python."""

    def logits(ids: Path, out: Path) -> None:
        script = Path(__file__).with_name("peer_logits.py")
        command = [str(python), str(script), engine, str(model), str(ids), str(out), *options]
        outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=outside)

    return logits


class Kept:
    """A scorer that hands out logits from a file, row by row in the order of the batches."""

    def __init__(self, path: Path) -> None:
        self._rows = iter(np.load(path, mmap_mode="r"))

    def blocks(self, ids: Any, mask: Any, size: int) -> Iterator[Any]:
        """Logits of one row, `size` positions at a time, each (1, ≤ size, vocabulary)."""
        row = next(self._rows)
        for start in range(0, len(row), size):
            yield np.array(row[None, start : start + size])


def quality(arms: list[Arm], source: Path, bundle: Bundle, folder: Path) -> dict[str, tuple[float, float, float]]:
    """Of each arm (mean KLD in nats a token, its standard error by passage, share of equal likeliest tokens)."""
    rows = pieces(tokens_of(bundle), LENGTH, ROWS)
    batches = [divergence.Batch.of(str(number), [row]) for number, row in enumerate(rows)]
    reference = divergence.record(find("targets", "pytorch").open_scorer(source), batches, folder / "original")
    np.save(folder / "ids.npy", np.array(rows))
    found = {}
    for arm in arms:
        if arm.logits is None:
            scorer: Any = find("targets", "openvino").open_scorer(bundle.target_folder("openvino"), arm.settings)
        else:
            arm.logits(folder / "ids.npy", folder / "logits.npy")
            scorer = Kept(folder / "logits.npy")
        seen = divergence.compare(reference, scorer)
        means = [float(seen.only(batch.name).kld.mean()) for batch in batches]
        found[arm.name] = (statistics.mean(means), statistics.stdev(means) / len(means) ** 0.5, float(seen.top1.mean()))
        print(arm.name, found[arm.name], file=sys.stderr)
    return found


def measured(url: str, bundle: Bundle, clients: int, seed: int) -> Found:
    """What `lightship bench` finds."""
    command = [sys.executable, "-m", "lightship", "bench", url, "--tokenizer", str(bundle.folder), "--clients",
               str(clients), "--requests", str(REQUESTS[clients]), "--in", str(IN), "--out", str(OUT), "--seed",
               str(seed), "--no-keep-alive", "--json"]  # fmt: skip
    found: Found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    if found["outcomes"] != {"whole": REQUESTS[clients]}:
        raise SystemExit(f"not every answer is whole: {found['outcomes']}, {found['reasons']}")
    return found


def rows(arms: list[Arm], runs: dict[tuple[str, int], list[Found]], quality: dict[str, Any]) -> list[list[str]]:
    """The table; ratios are those of the first arm to each, run by run."""
    head = ["server", "mean KLD (± s.e.)", "same top-1"]
    clients = sorted({count for _, count in runs})
    for count in clients:
        many = "1 client" if count == 1 else f"{count} clients"
        head += [f"{many}: tokens/s", "lightship / this", "TTFT p50, ms", "TPOT p50, ms"]
    found = [head]
    for arm in arms:
        mean, error, top1 = quality[arm.name]
        row = [arm.name, f"{mean:.4f} ± {error:.4f}", f"{top1:.1%}"]
        for count in clients:
            mine, other = runs[arms[0].name, count], runs[arm.name, count]
            speeds = [run["tokens_per_second"] for run in other]
            row += [spread(speeds, ".1f"),
                    spread([a["tokens_per_second"] / b for a, b in zip(mine, speeds, strict=True)], ".2f")]  # fmt: skip
            row += [spread([1000 * run[name]["quantiles"]["p50"]["value"] for run in other], form)
                    for name, form in (("ttft", ".0f"), ("tpot", ".1f"))]  # fmt: skip
        found.append(row)
    return found


def arms_of(asked: argparse.Namespace, bundle: Bundle) -> tuple[list[Arm], list[str]]:
    """The servers that are there, and a line for each that is not."""
    arms, missing = [Arm("lightship, defaults", lightship(bundle, "--untuned"), None)], []
    entry = tuning.choose(bundle.folder, bundle.digest, bundle.targets, "openvino").entry
    if entry is None:
        missing.append("lightship, tuned: nothing was tuned here")
    else:
        name = f"lightship, {tuning.label(entry.target, entry.settings)} (tuned for {entry.workload.said()})"
        arms.append(Arm(name, lightship(bundle), None, entry.settings.on(EngineSettings())))
    program, model = asked.llama / "bin" / "llama-server", asked.gguf
    cores = str(os.cpu_count())
    if hides(asked.isa):
        missing.append("llama.cpp: its instructions are chosen when it is built")
    elif program.is_file() and model.is_file():
        command = [str(program), "-m", str(model), "--port", "PORT", "-np", "16", "-c", str(16 * 512), "-t", cores,
                   "-tb", cores, "--no-webui"]  # fmt: skip
        path = {"LLAMA_CPP_LIB_PATH": str(asked.llama / "bin"), "PYTHONPATH": str(asked.bindings)}
        arms.append(Arm(f"llama.cpp, {model.stem}", foreign(command),
                        theirs(asked.python, "llama.cpp", model, **path)))  # fmt: skip
    else:
        missing.append(f"llama.cpp: no {program} or no {model}")
    if asked.vllm.is_file():
        # Where bf16 is only emulated it is far slower than float32 for many clients (docs/peers.md).
        has_bf16 = asked.isa != "AVX2" and not set(BF16).isdisjoint(machine()["features"])
        dtype = "bfloat16" if has_bf16 else "float32"
        command = [str(asked.vllm), "-m", "vllm.entrypoints.openai.api_server", "--model", str(asked.source), "--port",
                   "PORT", "--dtype", dtype, "--max-model-len", "2048", "--max-num-seqs", "64"]  # fmt: skip
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
                 "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # fmt: skip
        arms.append(Arm(f"vLLM, {dtype}", foreign(command, **quiet),
                        theirs(asked.vllm, "vllm", asked.source, dtype, **quiet)))  # fmt: skip
    else:
        missing.append(f"vLLM: no {asked.vllm}")
    return arms, missing


def main() -> None:
    """All arms in turns."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", default=Path("bundles/demo-int8"))
    parser.add_argument("--source", type=Path, default=Path("peers/model"), help="the checkpoint, safetensors")
    parser.add_argument("--llama", type=Path, default=Path("peers/llama"), help="the folder of its build")
    parser.add_argument("--gguf", type=Path, default=Path("peers/model-Q8_0.gguf"))
    parser.add_argument("--bindings", type=Path, default=Path("peers/llama_cpp_python-0.3.36"))
    parser.add_argument("--python", type=Path, default=Path("peers/python/bin/python"), help="what the bindings need")
    parser.add_argument("--vllm", type=Path, default=Path("peers/vllm/bin/python"), help="the python that has it")
    parser.add_argument("--clients", type=int, nargs="+", choices=REQUESTS, default=list(REQUESTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--isa", choices=ISAS, help="the newest instructions that oneDNN may use")
    parser.add_argument("--port", type=int, default=19_500)
    asked = parser.parse_args()
    name = section("peers" + masked(asked.isa), PAGE)
    bundle = Bundle.open(asked.bundle)
    arms, missing = arms_of(asked, bundle)
    runs: dict[tuple[str, int], list[Found]] = {}
    with tempfile.TemporaryDirectory() as folder:
        exact = quality(arms, asked.source, bundle, Path(folder))
    notes = "".join(f" Left out: {line}." for line in missing)
    port = asked.port
    for repeat in range(asked.repeats):
        for arm in arms if repeat % 2 == 0 else arms[::-1]:
            port += 1
            with arm.start(port) as url:
                for clients in asked.clients:
                    run = measured(url, bundle, clients, seed=10 * repeat + clients)
                    runs.setdefault((arm.name, clients), []).append(run)
                    print(
                        f"{arm.name}, {clients}: {run['tokens_per_second']:.1f} tokens/s", file=sys.stderr, flush=True
                    )
        put(  # after each turn: who ends a long run by hand keeps what it found
            name,
            f"{table(rows(arms, runs, exact))}\n\n{IN} tokens in, {OUT} out, greedy; median (range) of {repeat + 1} "
            f"runs in turns, {', '.join(f'{REQUESTS[n]} requests of {n}' for n in asked.clients)} clients after a "
            f"warm-up. Quality over {ROWS} × {LENGTH} positions; of lightship without the rounding of the KV cache, "
            f"which does not come into one pass. llama.cpp is built without AMX.{notes}",
            PAGE,
        )


if __name__ == "__main__":
    main()
