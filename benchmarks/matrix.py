"""Every architecture × target × precision through all gates, on tiny random models: what the gates measured."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.page import GATE, put, table
from lightship.errors import LightshipError
from lightship.recipe import KLD_LIMITS, PrecisionName
from tests.matrix.families import FAMILIES, make
from tests.matrix.gate import INT8_LIMIT, through_all_gates

TARGETS = {"openvino": "OpenVINO", "onnx": "ONNX Runtime"}
PRECISIONS: tuple[PrecisionName, ...] = ("fp32", "int8")


def cells(name: str) -> list[str]:
    """One architecture: its description and a figure for each target and precision."""
    family = FAMILIES[name]
    found = [name, family.tokenizer, "tied" if family.tied else "untied", str(len(family.eos))]
    with tempfile.TemporaryDirectory(prefix="lightship-") as made:
        checkpoint = make(name, Path(made) / "model")
        for target in TARGETS:
            for precision in PRECISIONS:
                try:
                    figures = through_all_gates(checkpoint, target, precision, Path(made) / target / precision)
                    found.append(f"{figures.shipped:.0e} ({figures.served:.0e})")
                except LightshipError as error:
                    print(f"{name} {target} {precision}: {error}", file=sys.stderr)
                    found.append("**fails**")
    print(" | ".join(found), file=sys.stderr, flush=True)
    return found


def main() -> None:
    """The table."""
    head = ["architecture", "tokenizer", "head", "EOS ids"]
    head += [f"{title} {precision}" for title in TARGETS.values() for precision in PRECISIONS]
    note = (
        "Mean KLD in nats per token of what is shipped (mean |Δ log p| as served). Limits on mean KLD: "
        f"{KLD_LIMITS['fp32']:g} for fp32 and for every export, {INT8_LIMIT:g} for int8 of models this small."
    )
    put("matrix", f"{table([head, *map(cells, FAMILIES)])}\n\n{note}", GATE)


if __name__ == "__main__":
    main()
