"""What a measurement depends on besides the model: the libraries and the machine."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("lightship", "openvino", "openvino-genai", "nncf", "onnxruntime", "onnxscript", "torch", "transformers",
             "tokenizers", "numpy")  # fmt: skip
FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
GB = 1e9
UNLIMITED = 2**62  # bytes: cgroup v1 writes "no limit" as the largest number of whole pages


def versions() -> dict[str, str]:
    """The libraries that shape the result, those that are installed."""
    return {name: version for name in LIBRARIES if (version := _version(name)) is not None}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None  # a machine that only serves has no torch


def machine() -> dict[str, Any]:
    """Processor, its instruction sets, usable cores, and system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = known.get("flags", "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": known.get("model name") or platform.processor(),
        "cores": cores,
        "features": [feature for feature in FEATURES if feature in flags],
        "system": platform.platform(terse=True),
    }


# ── A closer look, for `lightship doctor` ───────────────────────────────────


def examine() -> dict[str, Any]:
    """`machine()` with what limits it: cgroup quotas, NUMA nodes, memory and its bandwidth (measured, a second)."""
    import psutil

    return {
        **machine(),
        "python": platform.python_version(),
        "cpu_quota": cpu_quota(),
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or None,
        "memory_gb": round(psutil.virtual_memory().total / GB, 1),
        "memory_limit_gb": _gb(memory_limit()),
        "memory_available_gb": round(psutil.virtual_memory().available / GB, 1),
        "memory_bandwidth_gb_s": round(memory_bandwidth() / GB, 1),
        "versions": versions(),
        "missing": missing_by_extra(),
    }


def _gb(size: int | None) -> float | None:
    return None if size is None else round(size / GB, 1)


def cpu_quota(groups: Sequence[Path] | None = None) -> float | None:
    """Cores that the tightest of the control `groups` (default: this process's own) grants, by `cpu.max` of cgroup v2
    or `cpu.cfs_quota_us` of v1; None where none sets a limit."""
    return min(filter(None, map(_cores, own_groups() if groups is None else groups)), default=None)


def _cores(group: Path) -> float | None:
    granted, _, period = _content(group / "cpu.max").partition(" ")
    if not granted:
        granted, period = _content(group / "cpu.cfs_quota_us"), _content(group / "cpu.cfs_period_us")
    return int(granted) / int(period) if granted.isdigit() and period.strip().isdigit() else None


def memory_limit(groups: Sequence[Path] | None = None) -> int | None:
    """Bytes that the tightest of the control `groups` (default: this process's own) grants, by `memory.max` of cgroup
    v2 or `memory.limit_in_bytes` of v1; None where none sets a limit."""
    return min(filter(None, map(_limit, own_groups() if groups is None else groups)), default=None)


def _limit(group: Path) -> int | None:
    limit = _number(group, "memory.max", "memory.limit_in_bytes")
    return None if limit is None or limit >= UNLIMITED else limit


def memory_available(groups: Sequence[Path] | None = None) -> int:
    """Bytes that this process may still take: what the system has available, and in each of `groups` (default: its own
    control groups) the limit less what is used and cannot be dropped (file pages can)."""
    import psutil

    available = int(psutil.virtual_memory().available)
    for group in own_groups() if groups is None else groups:
        limit, used = _limit(group), _number(group, "memory.current", "memory.usage_in_bytes")
        if limit is not None and used is not None:
            kept = dict(line.split() for line in _content(group / "memory.stat").splitlines())
            files = int(kept.get("total_inactive_file", kept.get("inactive_file", 0)))  # v1 counts its children apart
            available = min(available, max(limit - used + files, 0))
    return available


def own_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """The control groups that this process is in, each hierarchy (v2; memory and cpu of v1) from its own outwards; each
    can set a limit. In a container the inner ones may not be there, the outermost is the container's own."""
    found = []
    for line in _content(own).splitlines():
        number, controllers, inside = line.split(":", 2)
        mounted = [root / name for name in ("memory", "cpu") if name in controllers.split(",")]
        for top in [root] if number == "0" else mounted:
            group = top / inside.lstrip("/")
            found += [group, *(parent for parent in group.parents if parent.is_relative_to(top))]
    return list(dict.fromkeys([*found, root]))


def _number(group: Path, *files: str) -> int | None:
    """What the first of `files` that holds a number says."""
    texts = (_content(group / name) for name in files)
    return next((int(text) for text in texts if text.isdigit()), None)


def _content(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""  # not Linux, or another version of cgroups


def memory_bandwidth(size: int = 128 * 2**20, repeats: int = 5) -> float:
    """Bytes a second read and written while every core copies an array of `size` bytes; the best of `repeats`."""
    import numpy as np

    cores = machine()["cores"]
    arrays = [(np.ones(size // 8), np.empty(size // 8)) for _ in range(cores)]
    for source, target in arrays:
        np.copyto(target, source)  # maps the pages
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(repeats):
            began = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), arrays))
            best = max(best, 2 * size * cores / (time.perf_counter() - began))
    return best


# ── How fast it is, in a fraction of a second ───────────────────────────────


def matmul_rate(seconds: float = 0.15, size: int = 1024) -> float:
    """Floating-point operations a second of float32 matrix products on all cores (NumPy's BLAS), the best seen."""
    import numpy as np

    left, right = np.ones((size, size), np.float32), np.ones((size, size), np.float32)
    return _best(lambda: left @ right, seconds, 2.0 * size**3)


def interpreter_rate(seconds: float = 0.03) -> float:
    """Rounds a second of a plain loop in this Python, the best seen: what tracing a model depends on."""

    def rounds(count: int = 20_000) -> int:
        total = 0
        for number in range(count):
            total += number % 7
        return total

    return _best(rounds, seconds, 20_000)


def read_rate(path: Path, seconds: float = 0.2, chunk: int = 2**22) -> float:
    """Bytes a second at which the first `seconds` of `path` are read and hashed (SHA-256): from the page cache where it
    is there, as a run that starts now would find it."""
    read = 0
    digest = hashlib.sha256()
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while time.perf_counter() - began < seconds and (block := file.read(chunk)):
            digest.update(block)
            read += len(block)
    return read / max(time.perf_counter() - began, 1e-6) if read else float("inf")


def _best(work: Callable[[], object], seconds: float, amount: float) -> float:
    """`amount` a second of `work`, the best of as many calls as fit in `seconds` (two at least)."""
    best, ends, calls = 0.0, time.perf_counter() + seconds, 0
    while calls < 2 or time.perf_counter() < ends:
        began = time.perf_counter()
        work()
        best, calls = max(best, amount / (time.perf_counter() - began)), calls + 1
    return best


# ── What is installed ───────────────────────────────────────────────────────


def missing_by_extra() -> dict[str, list[str]]:
    """Extra → its packages that are not installed; an extra that is complete has an empty list."""
    found: dict[str, list[str]] = {}
    for requirement in metadata.requires("lightship") or ():
        if match := re.fullmatch(r"([\w.-]+).*;.*extra == ['\"](\w+)['\"]", requirement):
            package, extra = match.groups()
            found.setdefault(extra, []).extend([package] if _version(package) is None else [])
    return found


def advice(found: dict[str, Any]) -> list[str]:
    """What is slow or missing here, and why, for the findings of `examine`."""
    features, said = found["features"], []
    quota, cores = found["cpu_quota"], found["cores"]
    if quota is not None and quota < cores:
        said.append(f"the control group grants {quota:g} of {cores} cores: more of them stand still in turns; "
                    f"`lightship serve` computes with {max(1, int(quota))} threads")  # fmt: skip
    if "avx2" not in features and found["cpu"]:
        said.append("no AVX2: expect a fraction of the usual speed")
    elif "avx512f" not in features:
        said.append("no AVX-512: prefill runs at about half the speed of processors that have it")
    if "amx_bf16" not in features and "avx512_bf16" not in features:
        said.append("no bf16 arithmetic: it is computed in f32, which is exact and slower for many clients")
    elif "amx_bf16" not in features:
        said.append("bf16 without AMX: long prompts and many clients are slower than on processors that have AMX")
    if (found["numa_nodes"] or 1) > 1:
        said.append(f"{found['numa_nodes']} NUMA nodes: serve with --workers auto, one engine for each")
    bandwidth = found["memory_bandwidth_gb_s"]
    said.append(f"one client: a model of 1 GB cannot pass {bandwidth:.0f} tokens/s, since each token reads it once")
    limit = found["memory_limit_gb"]
    if limit is not None and limit < found["memory_gb"]:
        said.append(f"the control group grants {limit} of {found['memory_gb']} GB of memory")
    if found["missing"].get("build"):
        said.append(f"this machine serves but cannot build: {', '.join(found['missing']['build'])} missing "
                    '(pip install "lightship[build]")')  # fmt: skip
    return said
