"""Run by `memory.probe` in a fresh process: open one runtime folder, measure it, print the metrics as one JSON line."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from lightship.engine import EngineSettings
from lightship.evaluation import memory, speed
from lightship.find import find
from lightship.report import Metric


def main(target: str, folder: str, repeats: str) -> None:
    """Load, measure, print."""
    began = time.perf_counter()
    engine = find("targets", target).open(Path(folder), EngineSettings(prefix_cache=False))
    loaded = time.perf_counter() - began
    metrics = [Metric("load", loaded, "s", 1, None, "lower", None, "open() in a fresh process, files in the page cache")]
    metrics += speed.measure(engine, repeats=int(repeats))
    metrics.append(Metric("peak_rss", float(memory.peak_rss_bytes()), "bytes", 1, None, "lower", None,
                          "VmHWM of a fresh process that loads the model and generates, 1 GiB KV cache"))  # fmt: skip
    print(json.dumps([asdict(metric) for metric in metrics]))


if __name__ == "__main__":
    main(*sys.argv[1:4])
