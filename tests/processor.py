"""Marks of tests whose subject is only there with some instructions of the processor."""

import pytest

from lightship.machine import machine

HAS_BF16 = "avx512_bf16" in machine()["features"]
bf16 = pytest.mark.skipif(not HAS_BF16, reason="this processor has no bf16 arithmetic")
vnni = pytest.mark.skipif(
    "avx512_vnni" not in machine()["features"], reason="without VNNI OpenVINO has no integer kernels"
)
