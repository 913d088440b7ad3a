"""`lightship tune` on one bundle under four loads: every candidate with its figures, and why it was taken or not.

(a) 16 clients, 200 tokens in, 64 out: a server that is busy. (b) One client with the same: its time to each token.
(c) One client whose answers copy from their prompts: where prompt lookup is tried too. (d) One client as in (b), with
the same model in int4 as a draft; only that is tried.

The bundle is copied first, so that nothing is left beside it that `serve` would use.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.page import DOCS, put
from lightship.bundle import Bundle
from lightship.draft import open_draft
from lightship.tune_pipeline import tune
from lightship.tuning import Workload, to_markdown

PAGE = DOCS / "tuning.md"
BUNDLE = Path("bundles/demo-int8-openvino-onnx")  # `ship demo --target openvino --target onnx -o` this
DRAFT = Path("bundles/demo-int4")  # `ship demo -p int4 -o` this
MINUTES = 10.0  # of each, as `tune` has it
LOADS = {
    "a": Workload(clients=16, tokens_in=200, tokens_out=64),
    "b": Workload(clients=1, tokens_in=200, tokens_out=64),
    "c": Workload(clients=1, tokens_in=200, tokens_out=64, task="copy"),
    "d": Workload(clients=1, tokens_in=200, tokens_out=64),
}


def measure(bundle: Path, load: Workload, minutes: float, draft: Path | None = None) -> str:
    """The section of one load; with a `draft`, whether and with how many tokens it pays."""
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as name:
        opened = Bundle.open(shutil.copytree(bundle, Path(name) / bundle.name))
        entry = tune(
            opened.folder, load, budget=60 * minutes, progress=lambda line: print(line, file=sys.stderr),
            draft=open_draft(draft) if draft else None, only=("draft_tokens",) if draft else (),
        )  # fmt: skip
        precision = opened.manifest["recipe"]["precision"]["name"]
        of = f"{opened.manifest['source']['name']} at {precision}, in the bundle for {' and '.join(opened.targets)}"
    return f"{to_markdown(entry)}\n- {of}; {minutes:g} minutes to search"


def main() -> None:
    """Put the sections into docs/tuning.md, one after the other as they are measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuned", description=__doc__)
    parser.add_argument("--only", choices=sorted(LOADS), help="this load (default: all of them)")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help=f"default: {BUNDLE}")
    parser.add_argument("--draft", type=Path, default=DRAFT, help=f"of load d; default: {DRAFT}")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of each load (default: {MINUTES:g})")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the sections are (default: docs/tuning.md)")
    asked = parser.parse_args()
    for name in [asked.only] if asked.only else sorted(LOADS):
        draft = asked.draft if name == "d" else None
        put(f"tuned --only {name}", measure(asked.bundle, LOADS[name], asked.minutes, draft), asked.page)


if __name__ == "__main__":
    main()
