"""What tests must know of the processor, where their subject is only there with some instructions."""

import pytest

from lightship.machine import machine

HAS_BF16 = "avx512_bf16" in machine()["features"]
HAS_VNNI = "avx512_vnni" in machine()["features"]
bf16 = pytest.mark.skipif(not HAS_BF16, reason="this processor has no bf16 arithmetic")
vnni = pytest.mark.skipif(not HAS_VNNI, reason="without VNNI OpenVINO has no integer kernels")


def precisions(kind, target):
    """Those in which a tiny encoder with low-rank layers keeps the gate's limits on this processor."""
    inexact = kind == "bert" and target == "onnx" and not HAS_VNNI  # docs/quantisation.md
    return ("fp32",) if inexact else ("fp32", "int8")
