"""ONNX Runtime, the encoders: one graph from token ids to logits or hidden states. `onnx.py` opens and exports it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.checkpoint import Checkpoint
from lightship.errors import UnsupportedError
from lightship.recipe import Precision
from lightship.targets._encoder import example, feeds, joined, wanted
from lightship.targets._tracing import tracing

Ids = npt.NDArray[np.int64]
QUANTISED = ["MatMul", "Gemm", "Gather"]


def trace(checkpoint: Checkpoint) -> Any:
    """The `onnx_ir.Model` of an encoder: batch and length dynamic, nothing recorded of this machine."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = checkpoint.load("float32")
    with tracing(checkpoint, "ONNX"):
        inputs = example(checkpoint, model)
        return OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True)).program


def quantise(source: Path, target: Path, data: str) -> None:
    """Write the graph `source` with 8-bit weights, symmetric with one scale per output channel, to `target`; its
    products are taken in integers, activations rounded as they come, with one scale for all tokens of a call
    (onnxruntime's `quantize_dynamic`): what is said of a text depends a little on those beside it."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises to pre-process, which the exporter has done
    try:
        quantize_dynamic(source, target, QUANTISED, per_channel=True, weight_type=QuantType.QInt8)
    finally:
        root.setLevel(level)
    graph = onnx.load(target)
    onnx.save_model(graph, target, save_as_external_data=True, location=data, size_threshold=1024)


class OnnxEncoder:
    """The graph of a runtime folder in a session of ONNX Runtime; one call at a time."""

    def __init__(self, session: Any, folder: Path) -> None:
        self._session = session
        inputs = [node.name for node in session.get_inputs()]
        outputs = [node.name for node in session.get_outputs()]
        self._takes, self._gives = wanted(Checkpoint(folder), inputs, outputs)

    def run(self, ids: Ids, mask: Ids, types: Ids) -> npt.NDArray[np.float32]:
        return joined(self._session.run(self._gives, feeds(self._takes, ids, mask, types)))

    def close(self) -> None:
        del self._session


def refuse(precision: Precision) -> None:
    """Raise `UnsupportedError` for what encoders cannot be shipped at."""
    if precision.kv != "auto" or precision.tables == "int4":
        raise UnsupportedError("kv and tables in int4 are for models that generate", hint="leave them out")
    if precision.name not in ("fp32", "int8"):
        raise UnsupportedError(f"encoders are not shipped to ONNX at {precision.name}",
                               hint="use --precision fp32 or int8")  # fmt: skip
    if precision.name == "int8" and precision.arithmetic == "f32":
        raise UnsupportedError("encoders in int8 compute in integers on ONNX Runtime, not in f32",
                               hint="use --arithmetic auto, --precision fp32, or --target openvino")  # fmt: skip
