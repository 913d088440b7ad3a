"""Run by `memory.probe` in a fresh process: open one runtime folder, measure it, print the metrics as one JSON line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lightship.checkpoint import Checkpoint
from lightship.encoder import Encoder
from lightship.engine import EngineSettings
from lightship.evaluation import memory, speed
from lightship.find import find
from lightship.kind import GENERATORS
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
    target, encodes = find("targets", asked.target), _encodes(asked.folder)
    if encodes:
        about = Encoder.load(asked.folder)
        metrics = speed.measure_encoder(
            lambda: target.open_encoder(asked.folder, settings), about.vocabulary, about.context, repeats=asked.repeats
        )
    else:
        metrics = speed.measure_speed(
            lambda: target.open(asked.folder, settings),
            prompt=asked.prompt,
            new_tokens=asked.new,
            repeats=asked.repeats,
        )
    peak = memory.peak_rss_bytes()
    if peak:
        metrics.append(
            Metric(
                "peak_rss",
                float(peak),
                "bytes",
                1,
                None,
                "lower",
                None,
                "VmHWM of a fresh process that loads the model and "
                + ("encodes" if encodes else f"generates, {settings.kv_cache_gb:g} GiB allowed for a KV cache"),
            )
        )
    print(json.dumps([asdict(metric) for metric in metrics]))


def _encodes(folder: Path) -> bool:
    """Whether an encoder lies in `folder`; a folder without a configuration is for a target's own tests."""
    return (folder / "config.json").is_file() and Checkpoint(folder).kind not in GENERATORS


if __name__ == "__main__":
    main()
