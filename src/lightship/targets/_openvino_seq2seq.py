"""OpenVINO, the encoder-decoders: two graphs, whose constants lie in one file. `openvino.py` opens and exports them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from lightship.checkpoint import Checkpoint
from lightship.errors import EngineError
from lightship.targets._seq2seq import DECODER, ENCODER, parts
from lightship.targets._tracing import tracing

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
WEIGHTS = "weights.bin"  # of both graphs
ALIGNMENT = 64  # bytes, as OpenVINO itself lays constants out
GRAPHS = (f"{ENCODER}.xml", f"{DECODER}.xml")
CROSS = "cross."


def trace(checkpoint: Checkpoint, dtype: str | None) -> dict[str, Any]:
    """File name → `openvino.Model` of encoder and decoder: batch and lengths dynamic, the decoder's cache its state."""
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    with tracing(checkpoint, "OpenVINO"):
        graphs = [
            OpenVINOExporter().export(module, inputs, config=OpenVINOConfig(dynamic=True)).program
            for module, inputs in parts(checkpoint, dtype)
        ]
    for port in graphs[0].outputs:  # as the decoder's inputs are called
        port.get_tensor().set_names({CROSS + name for name in port.get_names()})
    return dict(zip(GRAPHS, graphs, strict=True))


def join(folder: Path) -> None:
    """Put the constants of both graphs into one file, equal ones once: encoder and decoder share their embedding."""
    places: dict[tuple[str, int], int] = {}
    with (folder / WEIGHTS).open("wb") as file:
        for name in GRAPHS:
            tree = ElementTree.parse(folder / name)  # noqa: S314  this program has just written it
            own = (folder / name).with_suffix(".bin")
            with own.open("rb") as stored:
                for node in tree.iter("data"):
                    if "offset" in node.attrib:
                        stored.seek(int(node.attrib["offset"]))
                        node.set("offset", str(_place(stored.read(int(node.attrib["size"])), file, places)))
            tree.write(folder / name, encoding="utf-8", xml_declaration=True)
            own.unlink()


def _place(content: bytes, file: BinaryIO, places: dict[tuple[str, int], int]) -> int:
    """Where `content` lies in `file`, written there when it does not."""
    key = (hashlib.sha256(content).hexdigest(), len(content))
    if key not in places:
        places[key] = file.tell() + -file.tell() % ALIGNMENT
        file.seek(places[key])
        file.write(content)
    return places[key]


class OpenVINOPair:
    """The compiled graphs of a runtime folder, a `Runtime` of encoder-decoders."""

    def __init__(self, folder: Path, properties: dict[str, Any]) -> None:
        import openvino as ov

        core = ov.Core()
        try:
            weights = folder / WEIGHTS if (folder / WEIGHTS).is_file() else None  # not joined before it is finished
            graphs = [core.read_model(folder / name, weights or (folder / name).with_suffix(".bin")) for name in GRAPHS]
            encoder, decoder = (core.compile_model(graph, "CPU", properties) for graph in graphs)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot load {folder}: {str(error).splitlines()[-1]}") from error
        self._encoder, self._decoder = encoder.create_infer_request(), decoder.create_infer_request()
        self._cross = [name for port in encoder.outputs for name in port.get_names() if name.startswith(CROSS)]

    def encode(self, source: Ids, mask: Ids) -> None:
        """Read sources; see `Runtime`."""
        mask = np.ascontiguousarray(mask)
        self._encoder.infer({"input_ids": np.ascontiguousarray(source), "attention_mask": mask})
        for name in self._cross:  # shared, not copied, and not set again for each token
            self._decoder.set_tensor(name, self._encoder.get_tensor(name))
        self._given = {"attention_mask": mask, "beam_idx": np.arange(len(source), dtype=np.int32)}
        self.restart()

    def restart(self) -> None:
        """Forget what was written."""
        self._decoder.reset_state()

    def decode(self, ids: Ids) -> Floats:
        """Write `ids`; see `Runtime`."""
        self._decoder.infer({"input_ids": np.ascontiguousarray(ids), **self._given})
        return np.array(self._decoder.get_tensor("logits").data, np.float32)
