"""Run by `memory.probe` in a fresh process: open one runtime folder, measure it, print the metrics as one JSON line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lightship.engine import EngineSettings
from lightship.evaluation import memory, speed
from lightship.find import find
from lightship.report import Metric


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m lightship.evaluation.probe")
    parser.add_argument("target")
    parser.add_argument("folder", type=Path)
    for option, default in (("--prompt", speed.PROMPT), ("--new", 64), ("--repeats", 5)):
        parser.add_argument(option, type=int, default=default)
    asked = parser.parse_args(arguments)
    settings = EngineSettings(prefix_cache=False)
    metrics = speed.measure_speed(
        lambda: find("targets", asked.target).open(asked.folder, settings),
        prompt=asked.prompt,
        new_tokens=asked.new,
        repeats=asked.repeats,
    )
    peak = memory.peak_rss_bytes()
    if peak:
        metrics.append(Metric("peak_rss", float(peak), "bytes", 1, None, "lower", None,
                              "VmHWM of a fresh process that loads the model and generates, KV cache up to "
                              f"{settings.kv_cache_gb:g} GiB"))  # fmt: skip
    print(json.dumps([asdict(metric) for metric in metrics]))


if __name__ == "__main__":
    main()
