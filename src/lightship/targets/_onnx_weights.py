"""ONNX Runtime, the decoders' weights: rounded to 8 or 4 bits in the graph. `onnx.py` says when.

This is not onnxruntime's own quantiser (`matmul_nbits_quantizer`): that one skips a tied head, stores its table a
second time, reads embeddings in 4 bits only, leaves `Gemm` alone (GPT-2) and turns on logging at import. The layout and
the rounding are the same, held by a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.recipe import Precision

GROUPS = (16, 32, 64, 128, 256)  # sizes that MatMulNBits knows
INT8_GROUP = 64  # weights that share a scale in int8; in int4 the recipe says
CHUNK = 2**22  # weights quantised at a time
# `accuracy_level` of MatMulNBits: activations rounded to 8 bits in the same groups, or float32. `f32`
# unpacks every matrix for every token, which is much slower.
ACCURACY_LEVELS = {"auto": 4, "f32": 1}
DOMAIN = "com.microsoft"
Floats = npt.NDArray[np.float32]


def quantise(source: Path, target: Path, data: str, precision: Precision) -> None:
    """Write the decoder's graph `source` with its matrices rounded (see `rounded`) to `target`, weights in the file
    `data` beside it."""
    import onnx_ir

    onnx_ir.save(rounded(source, precision), target, external_data=data)


def rounded(source: Path, precision: Precision) -> Any:
    """The `onnx_ir.Model` of the graph `source` with its matrices rounded to nearest.

    Symmetric, one float32 scale for a group of weights along the input. Embedding and head take what
    `precision.tables` says. A matrix used twice, such as a tied table, is stored once.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = onnx_ir.load(source)
    uses = list(_matrix_uses(model.graph))
    outer = {use.weight.name for use in uses if use.gathers}  # embeddings
    if any(output.name == "logits" for output in model.graph.outputs):  # an encoder's graph has no head
        outer.add(uses[-1].weight.name)
    stored: dict[tuple[str, bool], tuple[Any, Any, int]] = {}
    for use in uses:
        key = (use.weight.name, use.rows_out)
        if key not in stored:
            bits = 4 if (precision.tables if use.weight.name in outer else precision.name) == "int4" else 8
            packed, scales = _store(model.graph, use, bits, group(precision))
            stored[key] = (packed, scales, bits)
        _replace(model.graph, use, *stored[key], precision)
    model.opset_imports[DOMAIN] = 1
    RemoveUnusedNodesPass()(model)
    return model


@dataclass(frozen=True)
class _Use:
    """A node that multiplies by, or gathers from, a constant matrix. `rows_out`: the matrix is (outputs, inputs)."""

    node: Any
    weight: Any
    rows_out: bool
    gathers: bool


def _matrix_uses(graph: Any) -> Iterator[_Use]:
    """Every use of a constant matrix, in the order of the graph: the head comes last."""
    for node in graph:
        if node.op_type == "Gather" and _is_table(node.inputs[0]) and _number(node, "axis", 0) == 0:
            yield _Use(node, node.inputs[0], True, True)
        elif node.op_type == "MatMul":
            made_by = node.inputs[1].producer()
            if made_by is not None and made_by.op_type == "Transpose" and _is_matrix(made_by.inputs[0]):
                yield _Use(node, made_by.inputs[0], True, False)
            elif _is_matrix(node.inputs[1]):
                yield _Use(node, node.inputs[1], False, False)
        elif node.op_type in ("Gemm", "FusedMatMul") and _is_matrix(node.inputs[1]) and _is_affine(node):
            yield _Use(node, node.inputs[1], _number(node, "transB", 0) == 1, False)


def _is_matrix(value: Any) -> bool:
    """Whether `value` is a constant float32 matrix."""
    tensor = value.const_value if value is not None and value.is_initializer() else None
    return tensor is not None and len(tensor.shape) == 2 and tensor.dtype.name == "FLOAT"


def _is_table(value: Any) -> bool:
    """Whether `value` is an embedding: tables that are computed, such as sines of positions, are no weights."""
    return _is_matrix(value) and value.name.endswith("weight")


def _is_affine(node: Any) -> bool:
    """Whether `node` is input · weight + bias, nothing scaled, only the weight turned perhaps."""
    turned = any(_number(node, name, 0) for name in ("transA", "transBatchA", "transBatchB"))
    return _number(node, "alpha", 1) == 1 and _number(node, "beta", 1) == 1 and not turned


def _number(node: Any, name: str, default: float) -> float:
    return node.attributes[name].value if name in node.attributes else default


def _store(graph: Any, use: _Use, bits: int, block: int) -> tuple[Any, Any]:
    """Register the quantised matrix of `use` and its scales as initializers."""
    matrix = use.weight.const_value.numpy()
    packed, scales = pack(matrix if use.rows_out else matrix.T, bits, block)
    name = use.weight.name if use.rows_out else f"{use.weight.name}.turned"
    return _register(graph, f"{name}.q{bits}", packed), _register(graph, f"{name}.scales", scales)


def _register(graph: Any, name: str, array: npt.NDArray[Any]) -> Any:
    """The initializer `name`, made of `array` when the graph has none of that name."""
    import onnx_ir

    if name not in graph.initializers:
        tensor = onnx_ir.tensor(array, name=name)
        kind = onnx_ir.TensorType(tensor.dtype)
        graph.register_initializer(onnx_ir.Value(name=name, shape=tensor.shape, type=kind, const_value=tensor))
    return graph.initializers[name]


def pack(matrix: Floats, bits: int, block: int) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Round `matrix` (outputs, inputs) to nearest in blocks of `block` inputs.

    Returns the weights as MatMulNBits takes them, (outputs, blocks, block · bits / 8), two of 4 bits a byte, low half
    first, offset by 2^(bits − 1); and the scales (outputs, blocks). A scale maps the value furthest from zero onto the
    end of the range that has one more step. The last block is filled with zeros.
    """
    outputs, inputs = matrix.shape
    blocks, half = -(-inputs // block), 2 ** (bits - 1)
    packed = np.empty((outputs, blocks, block * bits // 8), np.uint8)
    scales = np.empty((outputs, blocks), np.float32)
    step = max(1, CHUNK // (blocks * block))
    for start in range(0, outputs, step):
        rows = np.zeros((min(step, outputs - start), blocks * block), np.float32)
        rows[:, :inputs] = matrix[start : start + step]
        rows = rows.reshape(-1, blocks, block)
        furthest = np.take_along_axis(rows, np.abs(rows).argmax(-1)[..., None], -1)
        scale = furthest / np.float32(-half)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
        levels = np.clip(np.floor(rows * inverse + np.float32(half + 0.5)), 0, 2 * half - 1).astype(np.uint8)
        packed[start : start + step] = levels if bits == 8 else levels[..., 0::2] | (levels[..., 1::2] << 4)
        scales[start : start + step] = scale[..., 0]
    return packed, scales


def _replace(graph: Any, use: _Use, packed: Any, scales: Any, bits: int, precision: Precision) -> None:
    """Put the quantised product, or look-up, in the place of the node of `use`."""
    import onnx_ir
    from onnx_ir.convenience import replace_nodes_and_values

    block = group(precision)
    outputs, inputs = use.weight.shape if use.rows_out else reversed(use.weight.shape)
    if use.gathers:
        nodes = _look_up(graph, use, packed, scales, bits, block)
    else:
        attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": block}
        attributes["accuracy_level"] = ACCURACY_LEVELS[precision.arithmetic]
        nodes = [onnx_ir.node("MatMulNBits", [use.node.inputs[0], packed, scales], attributes, domain=DOMAIN)]
        if len(use.node.inputs) > 2 and use.node.inputs[2] is not None:  # the bias of a Gemm
            nodes.append(onnx_ir.node("Add", [nodes[-1].outputs[0], use.node.inputs[2]]))
    replace_nodes_and_values(graph, use.node, [use.node], nodes, use.node.outputs, nodes[-1].outputs)


def _look_up(graph: Any, use: _Use, packed: Any, scales: Any, bits: int, block: int) -> list[Any]:
    """Nodes that gather rows from the table in the layout of MatMulNBits; what fills its last block is cut off."""
    import onnx_ir

    outputs, blocks, size = packed.shape
    width = use.weight.shape[1]
    flat = _register(graph, f"{packed.name}.flat", np.array([outputs, blocks * size]))
    nodes = [onnx_ir.node("Reshape", [packed, flat])]
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": bits}
    inputs = [nodes[-1].outputs[0], use.node.inputs[1], scales]
    nodes.append(onnx_ir.node("GatherBlockQuantized", inputs, attributes, domain=DOMAIN))
    if blocks * block > width:
        ends = {"start": 0, "end": width, "axis": -1}
        bounds = [_register(graph, f"{packed.name}.{name}", np.array([number])) for name, number in ends.items()]
        nodes.append(onnx_ir.node("Slice", [nodes[-1].outputs[0], *bounds]))
    return nodes


def group(precision: Precision) -> int:
    """Weights that share a scale."""
    return precision.group_size if precision.name == "int4" else INT8_GROUP
