"""Decoding for one client against what the memory can deliver: each token reads every weight once.

A random llama of 1.24 B parameters, in process, with the precisions that `lightship tune` tries; llama.cpp beside it
where it is there (docs/peers.md). The runs take turns, each in a process of its own. The bandwidth is the best of
reading and of copying with all cores, measured before each round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.arms import ISAS, hides, masked, pieces, tokens_of
from benchmarks.headline import made
from benchmarks.page import put, section, spread, table
from lightship.bundle import Bundle
from lightship.engine import EngineSettings
from lightship.machine import machine, memory_bandwidth
from lightship.search.settings import Failed

IN, OUT = 200, 64  # tokens
Arm = Callable[[], float]  # gives tokens a second


def ours(bundle: Bundle, settings: EngineSettings) -> Arm:
    """One client in process."""
    folder = bundle.target_folder("openvino")
    prompts = pieces(tokens_of(bundle), IN, 4)

    def run() -> float:
        order = {"what": "load", "target": "openvino", "folder": str(folder), "settings": asdict(settings),
                 "clients": 1, "warm": prompts[:1], "prompts": prompts[1:], "new": OUT, "deadline": None,
                 "ignore_eos": True}  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "lightship.evaluation.load_probe"], input=json.dumps(order),
                              text=True, check=True, stdout=subprocess.PIPE)  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        if "failed" in found:
            raise Failed(found["failed"].splitlines()[0])
        return 1 / float(np.median(found["tpot"]))

    return run


def llama(program: Path, model: Path) -> Arm:
    """llama.cpp's own benchmark, behind as long a prompt."""

    def run() -> float:
        command = [str(program), "-m", str(model), "-p", "0", "-n", str(OUT), "-d", str(IN), "-r", "3", "-o", "json"]
        command += ["-t", str(machine()["cores"])]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return float(json.loads(done.stdout)[0]["avg_ts"])

    return run


def read_bandwidth(size: int = 256 * 2**20, repeats: int = 5) -> float:
    """Bytes a second that all cores read, each from an array of `size` bytes; the best of `repeats`."""
    arrays = [np.ones(size // 8, np.int64) for _ in range(machine()["cores"])]
    best = 0.0
    with ThreadPoolExecutor(len(arrays)) as pool:
        for _ in range(repeats):
            began = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, arrays))
            best = max(best, size * len(arrays) / (time.perf_counter() - began))
    return best


def main() -> None:
    """All arms in turns."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.single", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("bundles"), help="where the bundles are, or are made")
    parser.add_argument("--llama", type=Path, default=Path("peers/llama"), help="the folder of llama.cpp's build")
    parser.add_argument("--gguf", type=Path, default=Path("peers/llama-Q8_0.gguf"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--isa", choices=ISAS, help="the newest instructions that oneDNN may use")
    asked = parser.parse_args()
    here = section("single" + masked(asked.isa))
    arms: dict[str, tuple[Arm, int]] = {}
    for weights in ("int8", "bf16"):
        bundle = made(asked.folder, weights)
        size = (bundle.target_folder("openvino") / "openvino_model.bin").stat().st_size
        for arithmetic, group in ((None, None), ("f32", None), ("f32", 32), ("f32", 128), ("bf16", None)):
            if weights == "int8" or (group is None and arithmetic != "bf16"):
                settings = EngineSettings(inference_precision=arithmetic, dynamic_quantisation_group=group)
                said = f"{arithmetic or 'default'} arithmetic" + (f", activations in int8 by {group}" if group else "")
                arms[f"lightship {weights}, {said}"] = ours(bundle, settings), size
    program = asked.llama / "bin" / "llama-bench"
    missing = ""
    if hides(asked.isa):
        missing = " llama.cpp is left out: its instructions are chosen when it is built."
    elif not (program.is_file() and asked.gguf.is_file()):
        missing = f" llama.cpp is left out: no {program} or no {asked.gguf} (docs/peers.md)."
    else:
        arms["llama.cpp Q8_0"] = llama(program, asked.gguf), asked.gguf.stat().st_size
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    bandwidth: list[float] = []
    for repeat in range(asked.repeats):
        bandwidth.append(max(read_bandwidth(), memory_bandwidth()))
        for name in list(arms) if repeat % 2 == 0 else list(arms)[::-1]:
            try:
                speeds[name].append(arms[name][0]())
            except Failed as error:
                missing += f" {name}: {error}."
                del arms[name]
                continue
            print(name, f"{speeds[name][-1]:.1f} tokens/s", file=sys.stderr, flush=True)
    rows = [["", "weights, GB", "tokens/s", "GB/s", "share of the bandwidth"]]
    for name, (_, size) in arms.items():
        read = [size * speed / 1e9 for speed in speeds[name]]
        shares = [1e9 * each / best for each, best in zip(read, bandwidth, strict=True)]
        rows.append([name, f"{size / 1e9:.2f}", spread(speeds[name], ".1f"), spread(read, ".1f"), spread(shares)])
    put(
        here,
        f"{table(rows)}\n\n{OUT} tokens after {IN}; median (range) of {asked.repeats} rounds. Memory bandwidth "
        f"{spread([each / 1e9 for each in bandwidth], '.1f')} GB/s.{missing}",
    )


if __name__ == "__main__":
    main()
