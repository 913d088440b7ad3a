"""Peak memory, load time and speed of a runtime folder, each in a fresh process. Linux only (`/proc`)."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from lightship.errors import LightshipError
from lightship.report import Metric


def probe(target: str, folder: Path, *, repeats: int) -> list[Metric]:
    """Open `folder` with `target` in a fresh process; load time, speed, VmHWM and peak PSS of its process tree."""
    command = [sys.executable, "-m", "lightship.evaluation.probe", target, str(folder), str(repeats)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak), daemon=True)
    watcher.start()
    out, err = process.communicate()
    watcher.join()
    if process.returncode:
        raise LightshipError(f"measuring {target} failed in its own process: {err.strip().splitlines()[-1:] or 'no word'}")
    found = [Metric(**entry) for entry in json.loads(out.splitlines()[-1])]
    pss = Metric("peak_pss", float(peak[0]), "bytes", 1, None, "lower", None,
                 "largest sum of PSS over the process tree, sampled every 20 ms while loading and generating")  # fmt: skip
    return [*found, pss] if peak[0] else found


def _watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(pss_bytes(pid) for pid in tree(process.pid)))
        time.sleep(0.02)


def tree(pid: int) -> list[int]:
    """`pid` and its living descendants."""
    found = [pid]
    for parent in found:
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in path.read_text().split()]
            except OSError:
                continue  # it ended between listing and reading
    return found


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process, bytes; 0 when it has ended or the kernel does not tell."""
    return _field(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")


def peak_rss_bytes() -> int:
    """VmHWM of this process, bytes."""
    return _field(Path("/proc/self/status"), "VmHWM:")


def _field(path: Path, name: str) -> int:
    try:
        for line in path.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


def artefact_bytes(folder: Path) -> int:
    """All files below `folder`, bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def paired(original: list[Metric], candidate: list[Metric]) -> list[Metric]:
    """The candidate's metrics with the original's values as baselines."""
    before = {metric.name: metric.value for metric in original}
    return [replace(metric, baseline=before.get(metric.name)) for metric in candidate]
