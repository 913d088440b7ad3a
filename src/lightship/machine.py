"""What a measurement depends on besides the model: the libraries and the machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("lightship", "openvino", "openvino-genai", "nncf", "torch", "transformers", "tokenizers", "numpy")
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def versions() -> dict[str, str]:
    """The libraries that shape the result, those that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # a machine that only serves has no torch
    return found


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
