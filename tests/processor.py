"""Marks of tests whose subject is only there with some instructions of the processor."""

import pytest

from lightship.machine import machine
from lightship.tune_pipeline import BF16, VNNI

FEATURES = set(machine()["features"])
HAS_BF16 = not FEATURES.isdisjoint(BF16)
bf16 = pytest.mark.skipif(not HAS_BF16, reason="this processor has no bf16 arithmetic")
vnni = pytest.mark.skipif(FEATURES.isdisjoint(VNNI), reason="without VNNI OpenVINO has no integer kernels")
