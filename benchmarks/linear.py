"""Matrix products of PyTorch in float32: its own choice of library, and oneDNN, which the reference of the gates uses.

Prints a table; no figure of it goes into the docs, since it only says which is faster on this processor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

SHAPES = ((3, 2048, 2048), (192, 8192, 2048), (1024, 8192, 2048), (1024, 49152, 576))


def seconds(product: Callable[[], Any], repeats: int = 5) -> float:
    """Median of `repeats` runs after one to warm up."""
    product()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        product()
        times.append(time.perf_counter() - began)
    return median(times)


def main() -> None:
    """Rows × outputs × inputs, TFLOP/s of both and their ratio."""
    print("rows outputs inputs   PyTorch    oneDNN   ratio")
    for rows, outputs, inputs in SHAPES:
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        with torch.inference_mode():
            own = seconds(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight))
            other = seconds(lambda x=x, w=weight: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""))
        work = 2 * rows * outputs * inputs / 1e12
        print(f"{rows:4} {outputs:7} {inputs:6} {work / own:8.3f}  {work / other:8.3f}  {own / other:6.2f}")


if __name__ == "__main__":
    main()
