"""Peak memory of a fresh process and its descendants, and size on disk. Memory on Linux only (`/proc`)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightship.errors import EngineError, UnsupportedError, UsageError
from lightship.evaluation import speed
from lightship.report import Metric

# A sample costs the process time (it holds its memory map), and speed is measured in the same process: a sample may
# take a tenth of the time at most, and they get rarer, since the peak comes while loading and at the first request.
INTERVAL, DUTY, RARER = 0.02, 0.1, 0.05  # seconds at least; share of the time; share of the time that has passed


@dataclass(frozen=True)
class MemoryUse:
    """What a child process used. `vm_hwm_bytes` is the peak RSS of the child itself (the kernel's own high-water mark),
    `peak_pss_bytes` the largest sum of PSS over it and its descendants among `samples`."""

    vm_hwm_bytes: int
    peak_pss_bytes: int
    exit_code: int
    stdout: str
    stderr: str = ""
    samples: int = 0
    seconds: float = 0.0


def measure_in_child(
    command: Sequence[str], *, timeout: float | None = None, environment: dict[str, str] | None = None
) -> MemoryUse:
    """Run `command` in a fresh process and watch its memory until it ends; a failing command is reported, not raised.

    Raises `UnsupportedError` where `/proc/<pid>/smaps_rollup` does not exist, `UsageError` for a command that does not
    start, `EngineError` past `timeout` seconds. VmHWM is read from outside with every sample, so growth in the last
    milliseconds of a command that does not report its own (as the probe does) can be missed.
    """
    require_proc()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.monotonic()
        try:
            process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, start_new_session=True
            )
        except OSError as error:
            raise UsageError(f"cannot start {command[0]!r}: {error.strerror}") from error
        try:
            vm_hwm, pss, samples = _watch(process, None if timeout is None else began + timeout)
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    return MemoryUse(vm_hwm, pss, process.returncode, texts[0], texts[1], samples, time.monotonic() - began)


def require_proc() -> None:
    """Raise `UnsupportedError` where memory cannot be measured."""
    if not Path("/proc/self/smaps_rollup").exists():
        raise UnsupportedError("memory is measured on Linux only (needs /proc/<pid>/smaps_rollup)",
                               hint="leave memory out here, or measure inside a Linux container")  # fmt: skip


def _watch(process: subprocess.Popen[bytes], deadline: float | None) -> tuple[int, int, int]:
    """(VmHWM, peak PSS of the tree, samples) until `process` ends. `EngineError` past `deadline`."""
    vm_hwm = peak = samples = 0
    started = time.monotonic()
    while process.poll() is None:
        began = time.monotonic()
        if deadline is not None and began > deadline:
            raise EngineError("the measured process ran past its time limit and was stopped")
        peak = max(peak, sum(pss_bytes(pid) for pid in tree(process.pid)))
        vm_hwm = max(vm_hwm, peak_rss_bytes(process.pid))
        samples += 1
        now = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(INTERVAL, (now - began) / DUTY, (now - started) * RARER))
    return vm_hwm, peak, samples


def probe(
    target: str,
    folder: Path,
    *,
    repeats: int = 5,
    prompt: int = speed.PROMPT,
    new_tokens: int = 64,
    timeout: float | None = None,
) -> list[Metric]:
    """Open `folder` with `target` in a fresh process: load time, speed, VmHWM and peak PSS of its process tree.

    Elsewhere than on Linux the memory metrics are missing. Raises `EngineError` when the child fails.
    """
    command = [sys.executable, "-m", "lightship.evaluation.probe", target, str(folder)]
    command += ["--prompt", str(prompt), "--new", str(new_tokens), "--repeats", str(repeats)]
    ours = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([ours, *filter(None, [os.environ.get("PYTHONPATH")])])}
    try:
        used = measure_in_child(command, timeout=timeout, environment=environment)
    except UnsupportedError:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
        used = MemoryUse(0, 0, done.returncode, done.stdout, done.stderr)
    if used.exit_code:
        last = " ".join(used.stderr.strip().splitlines()[-2:]) or "no word"
        raise EngineError(f"measuring {target} failed in its own process (exit {used.exit_code}): {last}")
    try:
        found = [Metric(**entry) for entry in json.loads(used.stdout.splitlines()[-1])]
    except (IndexError, ValueError, TypeError) as error:
        raise EngineError(f"measuring {target} gave no metrics: {used.stdout[-200:]!r}") from error
    # the child's own VmHWM, read at its end, is exact: ours is only the last sample's
    return found + [metric for metric in memory_metrics(used) if metric.name not in {known.name for known in found}]


def memory_metrics(used: MemoryUse) -> list[Metric]:
    """`peak_rss` and `peak_pss`, each left out where it was not measured."""
    every = used.seconds / max(used.samples, 1) * 1000
    rss = Metric("peak_rss", float(used.vm_hwm_bytes), "bytes", 1, None, "lower", None,
                 "VmHWM of a fresh process, shared pages counted whole")  # fmt: skip
    pss = Metric("peak_pss", float(used.peak_pss_bytes), "bytes", 1, None, "lower", None,
                 "largest sum of PSS over the process tree while it loads and works, sampled every "
                 f"{every:.0f} ms")  # fmt: skip
    return [metric for metric in (rss, pss) if metric.value]


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


def peak_rss_bytes(pid: int | None = None) -> int:
    """VmHWM of a process (default: this one), bytes; 0 when it has ended or the kernel does not tell."""
    return _field(Path(f"/proc/{'self' if pid is None else pid}/status"), "VmHWM:")


def forget_peak() -> bool:
    """Let `peak_rss_bytes` of this process begin anew; False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


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


def size_metric(folder: Path, baseline: int | None = None) -> Metric:
    """`artefact_bytes` as a metric; `baseline` is the size of the original's files."""
    files = sum(1 for path in folder.rglob("*") if path.is_file())
    return Metric("size", float(artefact_bytes(folder)), "bytes", files, None, "lower",
                  None if baseline is None else float(baseline),
                  "sum over all files of the folder; n is their number")  # fmt: skip


def paired(original: list[Metric], candidate: list[Metric]) -> list[Metric]:
    """The candidate's metrics with the original's values as baselines."""
    before = {metric.name: metric.value for metric in original}
    return [replace(metric, baseline=before.get(metric.name)) for metric in candidate]
