"""What preflight predicts against what `ship` and `convert` then use: time by stage, peak memory, disk."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import models
from benchmarks.page import put, table
from lightship.evaluation.memory import artefact_bytes, tree
from lightship.pipeline import plan_convert, plan_ship
from lightship.preflight import Plan
from lightship.recipe import Precision, Recipe

KEPT = ("demo", "demo --target onnx", "llama", "minilm")  # have a section in docs/benchmarks.md
LOOSE = ("--accept", "kld<=9", "--accept", "cosine_loss<=1")  # what a run needs does not depend on what it finds
INTERVAL = 0.5  # seconds between two looks: more of them would slow down what is measured


@dataclass
class Used:
    """What a command used: seconds by stage, the largest RSS of it and its children, the most below its folder."""

    stages: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    memory: int = 0
    disk: int = 0
    result: int = 0


def measured(command: Sequence[str], out: Path) -> Used:
    """Run `python -m lightship COMMAND -o OUT` and watch it; a failure ends the benchmark."""
    used, began = Used(), time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "lightship", *command, "-o", str(out)], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    watch = threading.Thread(target=_watch, args=(process, out.parent, used), daemon=True)
    watch.start()
    opened: list[tuple[str, float]] = []
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        if match := re.match(r"\s*[\d.]+s  \[\d+/\d+[^]]*\] (.+)", line):
            opened.append((match.group(1), time.monotonic() - began))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    watch.join()
    if process.returncode:
        raise SystemExit(f"{command} failed")
    used.seconds = time.monotonic() - began
    ends = [moment for _, moment in opened[1:]] + [used.seconds]
    used.stages = {name: end - start for (name, start), end in zip(opened, ends, strict=True)}
    used.memory = max(used.memory, usage.ru_maxrss * 1024)
    used.result = artefact_bytes(out)
    return used


def _watch(process: subprocess.Popen[str], folder: Path, used: Used) -> None:
    while process.returncode is None:
        used.memory = max(used.memory, sum(map(resident, tree(process.pid))))
        used.disk = max(used.disk, _below(folder))
        time.sleep(INTERVAL)


def resident(pid: int) -> int:
    """Bytes of RSS, 0 when the process has ended: cheaper to ask for than PSS, which slows a large process down."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0  # it has ended


def _below(folder: Path) -> int:
    size = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                size += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue  # removed since it was listed
    return size


def rows(title: str, plan: Plan, used: Used) -> list[list[str]]:
    """Predicted, measured and the ratio of each figure."""
    found = [
        ("peak memory, GB", plan.memory / 1e9, used.memory / 1e9, ".2f"),
        ("disk at most, GB", plan.disk / 1e9, used.disk / 1e9, ".2f"),
        ("result, MB", plan.result / 1e6, used.result / 1e6, ".0f"),
        ("time, s", plan.seconds, used.seconds, ".0f"),
    ]
    found += [(f"· {step.name}, s", step.cost.seconds, used.stages[step.name], ".1f")
              for step in plan.steps if step.cost]  # fmt: skip
    return [[title, name, f"{predicted:{form}}", f"{real:{form}}", f"{predicted / real:.2f}"]
            for name, predicted, real, form in found]  # fmt: skip


def main() -> None:
    """One model, or a checkpoint of one's own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preflight", description=__doc__)
    parser.add_argument("model", help="demo, llama (a random llama of 1.24 B), minilm, or a folder (nothing is kept)")
    parser.add_argument("--verbs", nargs="+", choices=["ship", "convert"], default=["ship"])
    parser.add_argument("--precision", choices=["fp32", "bf16", "int8", "int4"], default="int8")
    parser.add_argument("--target", choices=["openvino", "onnx"])
    asked = parser.parse_args()
    text = [["", "", "predicted", "measured", "predicted / measured"]]
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as name:
        source = asked.model
        if asked.model == "llama":
            demo = models.demo(Path(name) / "demo")
            source = str(models.random_llama(Path(name) / "llama", demo.folder).folder)
        elif asked.model == "minilm":
            source = str(models.minilm(Path(name) / "minilm").folder)
        options = ["-p", asked.precision, *(["--target", asked.target] if asked.target else [])]
        for verb in asked.verbs:
            out = Path(name) / verb / "out"
            out.parent.mkdir()
            recipe = Recipe(source=source, precision=Precision(name=asked.precision), target=asked.target)
            plan = (plan_ship if verb == "ship" else plan_convert)(recipe, out)
            used = measured([verb, source, *options, *LOOSE], out)
            text += rows(f"`{' '.join([verb, asked.model, *options])}`", plan, used)
    section = asked.model if asked.target is None else f"{asked.model} --target {asked.target}"
    if section in KEPT:
        put(f"preflight {section}", table(text))
    else:
        print(table(text))


if __name__ == "__main__":
    main()
