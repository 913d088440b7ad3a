"""The demo model at every precision: size, speed, memory and quality against the original, one bundle each."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks import models
from benchmarks.page import put
from lightship.pipeline import run
from lightship.recipe import Precision, Recipe
from lightship.report import Report, compare_table

SHOWN = ("size", "prefill", "decode", "load", "peak_rss", "peak_pss", "kld", "kld_p99", "top1", "perplexity",
         "bits_per_byte", "served_delta_logprob")  # fmt: skip
ARMS = {
    "bf16": Precision(name="bf16"),
    "int8": Precision(name="int8"),
    "int8, f32 arithmetic": Precision(name="int8", arithmetic="f32"),
    "int4, group 64": Precision(name="int4"),
}


def main() -> None:
    """Every arm."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precisions", description=__doc__)
    parser.add_argument("--keep", type=Path, help="Keep the bundles in this folder.")
    parser.add_argument("--evaluate", choices=["quick", "full"], default="quick")
    asked = parser.parse_args()
    reports = []
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as name:
        work = asked.keep or Path(name)
        source = models.demo(Path(name) / "demo")
        for label, precision in ARMS.items():
            out = work / label.replace(", ", "-").replace(" ", "")
            recipe = Recipe(name="demo", out=str(out), source=str(source.folder), precision=precision,
                            evaluate=asked.evaluate, accept=("kld<=1",))  # fmt: skip
            bundle = run(recipe, runs=work / "runs", progress=print)  # one export serves all but bf16
            kept = [metric for name in SHOWN if (metric := bundle.report.get(name)) is not None]
            reports.append((label, Report(tuple(kept), bundle.report.meta)))
    put("precisions", compare_table(reports))


if __name__ == "__main__":
    main()
