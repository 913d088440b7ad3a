"""OpenVINO, the weights: int8 and int4 through NNCF, a decoder's head in groups. `openvino.py` reads and saves."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.errors import UnsupportedError
from lightship.recipe import Precision

# Weights of a decoder's head that share a scale. NNCF gives a token's whole row one: on the demo model in int8 (1536
# tokens) groups lower the mean KLD from 0.0049 to 0.0042 and raise top-1 agreement from 94.7 % to 96.0 %, for 3 % more
# bytes in the head and no loss of speed that showed. What is left to gain is that OpenVINO's CPU plugin (2026.4) rounds
# logits to bf16 where it computes in bf16: with integer weights the output has the type of the input, and the mark that
# keeps a product in float32 (DisablePrecisionConversion) is lost when the plugin makes one with such weights of it.
HEAD_GROUP = 64


def compress(graph: Any, precision: Precision, rows: list[Any], *, decodes: bool) -> Any:
    """`graph` with its weights compressed, embedding and head included; of a decoder (`decodes`) the head apart.

    int8 is symmetric per output channel. int4 is symmetric in groups along the input; embedding and head take int8
    unless `precision.all_layers`; `rows`, inputs of the graph, feed the data-aware options. A decoder's head in int8,
    with the embedding where they are one table, is symmetric in groups of `HEAD_GROUP` along the input.
    Raises `UnsupportedError` for groups that do not fit, or options that miss their rows.
    """
    import nncf

    nncf.set_log_level(logging.ERROR)
    head = _head_in_groups(graph) if decodes and not precision.all_layers else None
    if precision.name == "int8":
        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    else:
        graph = _compress_int4(graph, precision, rows)
    if head is not None:
        _head(graph).input_value(1).replace(head)
    return graph


def _head(graph: Any) -> Any:
    """The matrix product that makes a decoder's logits."""
    node = graph.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    return node


def _head_in_groups(graph: Any) -> Any:
    """The weights (vocabulary, width) of a decoder's head, computed from integers with a scale per group; None where
    there is no such table, or `HEAD_GROUP` does not divide its width into several."""
    from openvino import opset13

    head = _head(graph)
    table = head.input_value(1).get_node()
    if table.get_type_name() == "Convert":  # of a checkpoint in 16 bits
        table = table.input_value(0).get_node()
    if table.get_type_name() != "Constant" or not head.get_attributes()["transpose_b"]:
        return None
    rows, width = table.shape
    if width % HEAD_GROUP or width == HEAD_GROUP:
        return None
    integers, scales = _integers(table.get_data(dtype=np.float32).reshape(rows, -1, HEAD_GROUP))
    stored = opset13.constant(integers)
    stored.set_friendly_name(table.get_friendly_name())
    weights = opset13.multiply(opset13.convert(stored, "f16"), opset13.constant(scales))
    whole = opset13.reshape(weights, np.array([rows, width]), special_zero=False)
    return opset13.convert(whole, "f32").output(0)


def _integers(groups: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """`groups` (rows, groups, width) in int8, and the scales (rows, groups, 1); some rows at a time, for the memory."""
    integers = np.empty(groups.shape, np.int8)
    scales = np.empty((*groups.shape[:2], 1), np.float16)
    for start in range(0, len(groups), 4096):
        rows = slice(start, start + 4096)
        scales[rows] = np.abs(groups[rows]).max(axis=-1, keepdims=True) / 127
        scale = np.maximum(scales[rows], np.finfo(np.float16).smallest_subnormal).astype(np.float32)
        integers[rows] = np.clip(np.rint(groups[rows] / scale), -127, 127)
    return integers, scales


def _compress_int4(graph: Any, precision: Precision, rows: list[Any]) -> Any:
    import nncf

    if precision.data_aware and not rows:
        raise UnsupportedError("int4 with awq, scale estimation or gptq needs a calibration set")
    try:
        return nncf.compress_weights(
            graph,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=precision.group_size,
            ratio=precision.ratio,
            all_layers=precision.all_layers,
            awq=precision.awq,
            scale_estimation=precision.scale_estimation,
            gptq=precision.gptq,
            dataset=nncf.Dataset(rows) if precision.data_aware else None,
        )
    except nncf.errors.InvalidGroupSizeError as error:
        raise UnsupportedError(
            f"groups of {precision.group_size} do not divide every width of this model",
            hint="choose a --group-size that does, such as 64 or 32",
        ) from error
