"""Where the time of `lightship ship demo` goes, stage by stage; leaves the bundle in bundles/demo-int8 for `serve`."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.page import put, table
from lightship.pipeline import ship
from lightship.recipe import Recipe


def main() -> None:
    """One run."""
    began: list[tuple[str, float]] = []

    def listen(line: str) -> None:
        print(line)
        if line.startswith("["):
            began.append((line.split("] ")[1], time.monotonic()))

    bundle = ship(Recipe(source="demo"), Path("bundles/demo-int8"), force=True, progress=listen)
    ends = [moment for _, moment in began[1:]] + [time.monotonic()]
    rows = [[name, f"{end - start:.1f}"] for (name, start), end in zip(began, ends, strict=True)]
    put("stages", table([["stage", "seconds"], *rows]) + f"\n\n{bundle.report.meta['verdict']}")


if __name__ == "__main__":
    main()
