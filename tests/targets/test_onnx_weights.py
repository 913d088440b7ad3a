"""Rounding of decoders' weights for ONNX Runtime, against a slow reference and the runtime's own."""

import numpy as np
import pytest

from lightship.recipe import Precision
from lightship.targets import _onnx_seq2seq, _onnx_weights, onnx
from tests.tiny import tiny_seq2seq


def slow_pack(matrix, bits, block):
    """One block, one weight at a time: the weights as they are read back, and the scales."""
    outputs, inputs = matrix.shape
    blocks, half = -(-inputs // block), 2 ** (bits - 1)
    back, scales = np.zeros_like(matrix), np.zeros((outputs, blocks), np.float32)
    for row in range(outputs):
        for number in range(blocks):
            weights = matrix[row, number * block : (number + 1) * block]
            furthest = max(weights, key=abs)
            scales[row, number] = furthest / np.float32(-half)
            for column, weight in enumerate(weights):
                level = 0 if furthest == 0 else min(half - 1, int(np.floor(weight / scales[row, number] + 0.5)))
                back[row, number * block + column] = level * scales[row, number]
    return back, scales


def unpacked(packed, scales, bits, inputs):
    levels = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1)
    wide = (levels.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    return wide.reshape(len(packed), -1)[:, :inputs]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("outputs", "inputs", "block"), [(7, 64, 16), (5, 80, 64), (3, 16, 32)])
def test_rounding_against_a_slow_reference(bits, outputs, inputs, block, monkeypatch):
    matrix = np.random.default_rng(0).normal(size=(outputs, inputs)).astype(np.float32)
    matrix[1] = 0
    monkeypatch.setattr(_onnx_weights, "CHUNK", 2 * block)  # several slices of rows
    packed, scales = _onnx_weights.pack(matrix, bits, block)
    back, expected = slow_pack(matrix, bits, block)
    np.testing.assert_array_equal(scales, expected)
    read = unpacked(packed, scales, bits, inputs)
    step = np.abs(np.repeat(scales, block, 1)[:, :inputs])
    assert (np.abs(read - back) <= step * 1.001).all() and (read == back).mean() > 0.99  # ties may round either way


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_onnxruntimes_own(bits):
    from onnxruntime.capi import _pybind_state as kernels

    matrix = np.random.default_rng(0).normal(size=(48, 128)).astype(np.float32)
    packed, scales = _onnx_weights.pack(matrix, bits, 32)
    theirs = np.zeros_like(packed), np.zeros_like(scales), np.zeros((48, 4), np.uint8)
    kernel = kernels.quantize_matmul_4bits if bits == 4 else kernels.quantize_matmul_8bits
    kernel(theirs[0], np.ascontiguousarray(matrix.T), theirs[1], theirs[2], 32, 48, 128, True)
    np.testing.assert_array_equal(packed, theirs[0])
    np.testing.assert_array_equal(scales, theirs[1])


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_the_graph_of_an_encoder_has_no_head(tmp_path, kind):
    """All of its matrices are of the body: in four bits, tables apart."""
    onnx.export(tiny_seq2seq(tmp_path / "model", kind), tmp_path / "graph", "float32")
    for name in _onnx_seq2seq.GRAPHS:
        asked = Precision(name="int4", group_size=32, fit=False)
        stored = _onnx_weights.rounded(tmp_path / "graph" / name, asked).graph.initializers
        eight = [key for key in stored if key.endswith("q8")]
        assert all("embed" in key or "shared" in key or "lm_head" in key or "relative" in key for key in eight), eight
