"""`lightship bench` against guidellm: the same prompts and clients on the same server, started anew for each run.

guidellm wants an environment of its own: `python -m venv guide`, then `guide/bin/pip install guidellm==0.8.1` (and a
CPU-only PyTorch, see the README), then `python -m benchmarks.agreement --guidellm guide/bin/python`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.arms import server
from benchmarks.page import DOCS, put, spread, table
from lightship.bench.prompts import Prose

PAGE = DOCS / "bench.md"
WORDS, OUT = 150, 64  # of a prompt; tokens of an answer
WARM = 4  # requests
# Greedy, and as the lines of our trace are asked: guidellm would ask for `ignore_eos`.
ASKED = {"temperature": 0, "ignore_eos": False}
Figures = dict[str, float]
NAMES = ("ttft", "tpot", "e2e")


def write_prompts(folder: Path, count: int, seed: int) -> tuple[Path, Path]:
    """The same prompts as a trace of ours and as a data set of theirs."""
    prose, chance = Prose.of_words(), random.Random(seed)
    texts = [" ".join(prose.piece(WORDS, chance)) for _ in range(count)]
    ours, theirs = folder / "ours.jsonl", folder / "theirs.jsonl"
    ours.write_text("".join(json.dumps({"prompt": text, "max_tokens": OUT}) + "\n" for text in texts))
    theirs.write_text("".join(json.dumps({"prompt": text, "output_tokens_count": OUT}) + "\n" for text in texts))
    return ours, theirs


def lightship(url: str, trace: Path, clients: int, folder: Path) -> Figures:
    """As a user calls it."""
    command = [sys.executable, "-m", "lightship", "bench", url, "--trace", str(trace), "--clients", str(clients),
               "--warmup", "0", "--json"]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    figures = {"requests": found["outcomes"]["whole"], "tokens": found["output_tokens"],
               "throughput": found["tokens_per_second"]}  # fmt: skip
    for name in NAMES:
        figures |= {f"{name} mean": found[name]["mean"]}
        figures |= {f"{name} {place}": found[name]["quantiles"][place]["value"] for place in ("p50", "p90")}
    return figures


def guidellm(python: Path, tokenizer: Path) -> Callable[[str, Path, int, Path], Figures]:
    """Its own figures of each request, put together as ours are: its own means of TPOT weigh requests by tokens."""

    def run(url: str, data: Path, clients: int, folder: Path) -> Figures:
        out = folder / "guidellm.json"
        backend = {"kind": "openai_http", "target": url, "request_format": "/v1/completions", "extras": {"body": ASKED}}
        command = [str(python), "-m", "guidellm", "run",
                   "--backend", json.dumps(backend),
                   "--profile", f"kind=concurrent,streams={clients}",
                   "--constraint", f"kind=max_requests,count={len(data.read_text().splitlines())}",
                   "--data", f"kind=json_file,path={data}",
                   "--tokenizer", f"kind=huggingface_auto,model={tokenizer}",
                   "--output", f"kind=json,path={out}", "--disable-console"]  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "GUIDELLM__MAX_WORKER_PROCESSES": "1"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment, cwd=folder)
        (found,) = json.loads(out.read_text())["benchmarks"]
        requests = found["requests"]["successful"]
        tokens = sum(each["output_tokens"] for each in requests)
        span = max(each["request_end_time"] for each in requests) - min(each["request_start_time"] for each in requests)
        figures: Figures = {"requests": len(requests), "tokens": tokens, "throughput": tokens / span}
        theirs = (("time_to_first_token_ms", 1e-3), ("inter_token_latency_ms", 1e-3), ("request_latency", 1.0))
        for name, (key, scale) in zip(NAMES, theirs, strict=True):
            values = [scale * each[key] for each in requests if each[key] is not None]
            p50, p90 = np.percentile(values, (50, 90))
            figures |= {f"{name} mean": float(np.mean(values)), f"{name} p50": float(p50), f"{name} p90": float(p90)}
        return figures

    return run


def warm(url: str, folder: Path) -> None:
    """A few requests that no one counts."""
    trace, _ = write_prompts(folder, WARM, seed=-1)
    command = [sys.executable, "-m", "lightship", "bench", url, "--trace", str(trace), "--clients", "1"]
    subprocess.run(command, check=True, capture_output=True)


def rows(ours: Sequence[Figures], theirs: Sequence[Figures]) -> list[list[str]]:
    """The table: medians and ranges over the runs, and the ratio of each pair."""
    shown = [("requests answered", "requests", 1.0, ".0f"), ("output tokens", "tokens", 1.0, ".0f"),
             ("tokens/s", "throughput", 1.0, ".1f")]  # fmt: skip
    for name, title, scale, form in (("ttft", "TTFT", 1e3, ".0f"), ("tpot", "TPOT", 1e3, ".2f"),
                                     ("e2e", "end-to-end", 1e3, ".0f")):  # fmt: skip
        shown += [(f"{title} {place}, ms", f"{name} {place}", scale, form) for place in ("mean", "p50", "p90")]
    found = [["", "lightship bench", "guidellm", "ratio"]]
    for title, key, scale, form in shown:
        pairs = [(mine[key], other[key]) for mine, other in zip(ours, theirs, strict=True)]
        found.append([title, spread([scale * mine for mine, _ in pairs], form),
                      spread([scale * other for _, other in pairs], form),
                      spread([mine / other for mine, other in pairs], ".3f")])  # fmt: skip
    return found


def main() -> None:
    """Pairs of runs, whose order alternates."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", default=Path("bundles/demo-int8"))
    parser.add_argument("--guidellm", type=Path, default=Path("guide/bin/python"), help="the python that has it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--port", type=int, default=18_700)
    asked = parser.parse_args()
    if not asked.guidellm.is_file():
        raise SystemExit(f"skipped: there is no {asked.guidellm}.\n{__doc__}")
    version = [str(asked.guidellm), "-c", "from importlib.metadata import version; print(version('guidellm'))"]
    named = subprocess.run(version, check=True, capture_output=True, text=True).stdout.strip()
    bundle = asked.bundle.resolve()
    other = guidellm(asked.guidellm.absolute(), bundle / "targets" / "openvino")
    found: dict[str, list[Figures]] = {"ours": [], "theirs": []}
    for repeat in range(asked.repeats):
        order = ["ours", "theirs"] if repeat % 2 == 0 else ["theirs", "ours"]
        for place, arm in enumerate(order):
            with tempfile.TemporaryDirectory() as name, server(bundle, asked.port + 2 * repeat + place) as (url, _, _):
                folder = Path(name)
                warm(url, folder)
                mine, its = write_prompts(folder, asked.requests, seed=repeat)
                run, data = (lightship, mine) if arm == "ours" else (other, its)
                found[arm].append(run(url, data, asked.clients, folder))
                print(arm, found[arm][-1], file=sys.stderr, flush=True)
    shown = table(rows(found["ours"], found["theirs"]))
    put(
        "agreement",
        f"{shown}\n\nguidellm {named}; {asked.requests} prompts of {WORDS} words, "
        f"at most {OUT} tokens out, greedy, {asked.clients} clients, closed loop; median (range) of {asked.repeats} "
        "pairs with the same prompts, their order alternating, the server started anew for each run. TPOT is what "
        "guidellm calls inter-token latency. Both ask greedily and without `ignore_eos`; guidellm, which is as it is "
        "installed, also asks for `continuous_usage_stats`: the usage in every chunk.",
        PAGE,
    )


if __name__ == "__main__":
    main()
