"""OpenVINO, the encoders: one graph from token ids to logits or hidden states. `openvino.py` opens and exports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.checkpoint import Checkpoint
from lightship.errors import EngineError
from lightship.targets._encoder import example, feeds, joined, wanted
from lightship.targets._tracing import tracing

Ids = npt.NDArray[np.int64]


def trace(checkpoint: Checkpoint, dtype: str | None) -> Any:
    """The `openvino.Model` of an encoder: batch and length dynamic."""
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    model = checkpoint.load(dtype)
    with tracing(checkpoint, "OpenVINO"):
        inputs = example(checkpoint, model)
        return OpenVINOExporter().export(model, inputs, config=OpenVINOConfig(dynamic=True)).program


class OpenVINOEncoder:
    """The compiled graph of a runtime folder; one call at a time."""

    def __init__(self, graph: Path, properties: dict[str, Any]) -> None:
        import openvino as ov

        core = ov.Core()
        try:
            compiled = core.compile_model(core.read_model(graph), "CPU", properties)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot load {graph}: {str(error).splitlines()[-1]}") from error
        inputs = [port.get_any_name() for port in compiled.inputs]
        outputs = [name for port in compiled.outputs for name in port.get_names()]
        self._takes, self._gives = wanted(Checkpoint(graph.parent), inputs, outputs)
        self._request = compiled.create_infer_request()

    def run(self, ids: Ids, mask: Ids, types: Ids) -> npt.NDArray[np.float32]:
        self._request.infer(feeds(self._takes, ids, mask, types))
        return joined([np.array(self._request.get_tensor(name).data, np.float32) for name in self._gives])

    def close(self) -> None:
        del self._request
