"""ONNX Runtime, the encoder-decoders: two graphs whose weights lie in one file. `onnx.py` opens and exports them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.checkpoint import Checkpoint
from lightship.targets._seq2seq import DECODER, ENCODER, parts
from lightship.targets._tracing import tracing

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
GRAPHS = (f"{ENCODER}.onnx", f"{DECODER}.onnx")
WEIGHTS = "weights.data"  # of both graphs
ALIGNMENT = 64  # bytes
SMALL = 1024  # bytes; what is smaller stays in the graph
CROSS, PAST, PRESENT = "cross.", "input.past_key_values", "output.past_key_values"


def trace(checkpoint: Checkpoint) -> dict[str, Any]:
    """File name → `onnx_ir.Model` of encoder and decoder: batch and lengths dynamic, the decoder's cache goes in and
    out."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    with tracing(checkpoint, "ONNX"):
        graphs = [
            OnnxExporter().export(module, inputs, config=OnnxConfig(dynamic=True)).program
            for module, inputs in parts(checkpoint, "float32")
        ]
    for value in graphs[0].graph.outputs:  # as the decoder's inputs are called
        value.name = CROSS + value.name
    return dict(zip(GRAPHS, graphs, strict=True))


def save(models: dict[str, Any], folder: Path) -> None:
    """Write the graphs, their weights beside them in one file, equal ones once: encoder and decoder share their
    embedding."""
    import onnx_ir

    places: dict[tuple[str, int], int] = {}
    with (folder / WEIGHTS).open("wb") as file:
        for model in models.values():
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor.nbytes < SMALL:
                    continue
                content = tensor.tobytes()
                key = (hashlib.sha256(content).hexdigest(), len(content))
                if key not in places:
                    places[key] = file.tell() + -file.tell() % ALIGNMENT
                    file.seek(places[key])
                    file.write(content)
                value.const_value = onnx_ir.ExternalTensor(
                    WEIGHTS, places[key], len(content), tensor.dtype, shape=tensor.shape, name=value.name,
                    base_dir=folder,
                )  # fmt: skip
    for name, model in models.items():
        onnx_ir.save(model, folder / name)


class OnnxPair:
    """The graphs of a runtime folder in sessions of ONNX Runtime, a `Runtime` of encoder-decoders."""

    def __init__(self, folder: Path, session: Callable[[Path], Any]) -> None:
        import onnxruntime

        self._encoder, self._decoder = (session(folder / name) for name in GRAPHS)
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._gives = [node.name for node in self._encoder.get_outputs()]
        self._past = [node.name for node in self._decoder.get_inputs() if node.name.startswith(PAST)]
        self._outputs = ["logits", *(name.replace(PAST, PRESENT, 1) for name in self._past)]

    def encode(self, source: Ids, mask: Ids) -> None:
        """Read sources; see `Runtime`."""
        given = {"input_ids": self._array(source), "attention_mask": self._array(mask)}
        cross = self._encoder.run_with_ort_values(self._gives, given)
        rows, heads, _, width = cross[0].shape()
        self._empty = self._value(np.zeros((rows, heads, 0, width), np.float32))
        self._given = {"attention_mask": given["attention_mask"], **dict(zip(self._gives, cross, strict=True))}
        self.restart()

    def restart(self) -> None:
        """Forget what was written."""
        self._written = dict.fromkeys(self._past, self._empty)

    def decode(self, ids: Ids) -> Floats:
        """Write `ids`; see `Runtime`."""
        given = {"input_ids": self._array(ids), **self._given, **self._written}
        logits, *present = self._decoder.run_with_ort_values(self._outputs, given)
        self._written = dict(zip(self._past, present, strict=True))
        found: Floats = logits.numpy()
        return found

    def _array(self, ids: Ids) -> Any:
        return self._value(np.ascontiguousarray(ids, np.int64))
