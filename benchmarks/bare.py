"""The bare export and compression calls, as one would write them by hand: the baseline of `benchmarks.ship`.

No tokenizer, no gate, no check: checkpoint folder in, one int8 graph out, in a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(source: str, out: Path) -> None:
    """Load, export, save, compress, save."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # no report home
    import nncf
    import openvino as ov
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter
    from transformers.exporters.utils import decompose_for_generation

    out.mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    ids = torch.arange(2, 18).reshape(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        parts = decompose_for_generation(model, {"input_ids": ids, "attention_mask": mask}, multi_token_decode=True)
        submodel, inputs = parts["decode"]
        graph = OpenVINOExporter().export(submodel, inputs, config=OpenVINOConfig(dynamic=True)).program
    ov.save_model(graph, str(out / "exported.xml"), compress_to_fp16=False)
    del graph, model, submodel, parts
    graph = nncf.compress_weights(ov.Core().read_model(out / "exported.xml"), mode=nncf.CompressWeightsMode.INT8_SYM)
    ov.save_model(graph, str(out / "int8.xml"), compress_to_fp16=False)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
