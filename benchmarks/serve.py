"""Served against in-process: tokens/s at 1 and 16 clients, time until ready, steady memory.

The baseline is the bare pipeline with the same settings and requests, measured while the same load generator drains an
identical stream from a stub: client and server share the cores in both arms.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.page import put, spread, table
from lightship.bundle import Bundle
from lightship.calibration import default_text
from lightship.evaluation.memory import pss_bytes, tree
from lightship.serving.server import wait_ready
from lightship.tokenizer import load_tokenizer

IN, OUT = 200, 64
Run = dict[str, Any]


def prompts(bundle: Bundle, count: int) -> list[list[int]]:
    """`count` different pieces of English prose, `IN` tokens each."""
    tokenizer = load_tokenizer(bundle.target_folder("openvino"))
    text = "".join(document.text for document in default_text().documents)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    starts = np.linspace(0, len(ids) - IN, count).astype(int)
    return [ids[start : start + IN] for start in starts]


@contextlib.contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A child process, ended afterwards."""
    process = subprocess.Popen([sys.executable, "-m", *command], text=True, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def server(bundle: Path, port: int) -> Iterator[tuple[str, int, float]]:
    """(URL, process id, seconds from the start of the process to readiness)."""
    began = time.perf_counter()
    with started(["lightship", "serve", str(bundle), "--port", str(port)], stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, alive=lambda: process.poll() is None)
        yield url, process.pid, time.perf_counter() - began


def load(url: str, rows: Path, clients: int, record: Path | None = None) -> Run:
    """One run of the load generator, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.load", url, str(rows), "--clients", str(clients), "--new", str(OUT)]
    command += ["--record", str(record)] if record else []
    found: Run = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


class Work:
    """The files that the arms share."""

    def __init__(self, bundle: Bundle, folder: Path, clients: int, requests: int) -> None:
        self.bundle, self.clients = bundle, clients
        rows = prompts(bundle, clients + requests)
        self.warm, self.rows, self.all = folder / "warm.json", folder / "rows.json", folder / "all.json"
        self.recorded = folder / "recorded"
        for path, part in ((self.warm, rows[:clients]), (self.rows, rows[clients:]), (self.all, rows)):
            path.write_text(json.dumps(part))

    def served(self, port: int) -> tuple[Run, float, int]:
        """The run, seconds until ready, bytes of PSS over the process tree after one request a client."""
        with server(self.bundle.folder, port) as (url, pid, ready):
            load(url, self.warm, self.clients)
            size = sum(map(pss_bytes, tree(pid)))
            found = load(url, self.rows, self.clients, self.recorded)
            return found, ready, size

    def in_process(self, like: Run) -> Run:
        """The bare pipeline, while the generator drains a stub at the pace of the run `like`."""
        first, each = statistics.median(like["ttft"]), statistics.median(like["tpot"])
        stub = ["benchmarks.stub", str(self.recorded), "--first", str(first), "--each", str(each)]
        bare = ["benchmarks.inprocess", str(self.bundle.target_folder("openvino")), str(self.all)]
        bare += ["--clients", str(self.clients), "--new", str(OUT)]
        with (
            started(stub, stdout=subprocess.PIPE) as replaying,
            started(bare, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as pipeline,
        ):
            assert replaying.stdout and pipeline.stdin and pipeline.stdout
            port = replaying.stdout.readline().strip()
            assert pipeline.stdout.readline() == "ready\n"
            drain = ["benchmarks.load", f"http://127.0.0.1:{port}", str(self.all), "--clients", str(self.clients)]
            with started(drain, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
                pipeline.stdin.write("\n")
                pipeline.stdin.flush()
                found: Run = json.loads(pipeline.stdout.readline())
        return found


def rate(run: Run) -> float:
    """Output tokens a second."""
    return float(run["tokens"] / run["seconds"])


def compared(
    bundle: Bundle, clients: int, requests: int, repeats: int, port: int
) -> tuple[list[str], list[float], list[int]]:
    """A row of the table, the times until ready, and the memory figures."""
    served, bare, ready, memory = [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        work = Work(bundle, Path(name), clients, requests)
        for repeat in range(repeats):
            found, seconds, size = work.served(port + repeat)
            served.append(found)
            ready.append(seconds)
            memory.append(size)
            bare.append(work.in_process(found))
            print(f"{clients} clients: {rate(served[-1]):.1f} served, {rate(bare[-1]):.1f} bare", file=sys.stderr)
    ratios = [rate(one) / rate(other) for one, other in zip(served, bare, strict=True)]
    first = [1000 * statistics.median(run["ttft"]) for run in served]
    bare_first = [1000 * statistics.median(run["ttft"]) for run in bare]
    row = [str(clients), spread([rate(run) for run in served], ".1f"), spread([rate(run) for run in bare], ".1f"),
           spread(ratios, ".3f"), spread(first, ".0f"), spread(bare_first, ".0f")]  # fmt: skip
    return row, ready, memory


def main() -> None:
    """Both loads."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", default=Path("bundles/demo-int8"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=18_100)
    asked = parser.parse_args()
    bundle = Bundle.open(asked.bundle)
    rows = [
        ["clients", "served tokens/s", "in-process tokens/s", "ratio", "TTFT p50 served, ms", "TTFT p50 in-process, ms"]
    ]
    ready, memory = [], []
    for clients, requests in ((1, 16), (16, 96)):
        row, seconds, sizes = compared(bundle, clients, requests, asked.repeats, asked.port + 100 * clients)
        rows.append(row)
        ready += seconds
        memory += sizes if clients == 1 else []  # many requests fill the KV cache up to its own limit
    over = [(size - bundle.size_bytes) / 1e6 for size in memory]
    put(
        "serve",
        f"{table(rows)}\n\n{IN} tokens in, {OUT} out, greedy; median (range) of {asked.repeats} pairs. Ready after "
        f"{spread(ready)} s (n = {len(ready)}). Memory of all processes after one request (PSS): "
        f"{spread([size / 1e6 for size in memory], '.0f')} MB, that is the bundle's {bundle.size_bytes / 1e6:.0f} MB + "
        f"{spread(over, '.0f')} MB; the KV cache then grows with use up to its limit (1 GiB by default).",
    )


if __name__ == "__main__":
    main()
