"""OpenVINO GenAI's grammars, and their compiler without a model: a pipeline over a graph of a vocabulary only."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lightship.engine import Grammar

FIELDS = {"json_schema": "json_schema", "json_object": "json_schema", "regex": "regex", "ebnf": "grammar",
          "tags": "structural_tags_config"}  # fmt: skip


def config(grammar: Grammar) -> Any:
    """The `StructuredOutputConfig` of a grammar."""
    import openvino_genai as genai

    made = genai.StructuredOutputConfig()
    setattr(made, FIELDS[grammar.kind], '{"type": "object"}' if grammar.kind == "json_object" else grammar.text)
    return made


class Compiler:
    """Compiles a grammar as the engine that serves `folder` would, with its tokenizer and `vocabulary`, and no weights.

    There is no call for it, so it lets a pipeline write one token: a refusal comes as the exception that would end the
    engine.
    """

    def __init__(self, folder: Path, vocabulary: int) -> None:
        import openvino as ov
        import openvino_genai as genai

        self._genai, self._ov = genai, ov
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "vocabulary.xml"
            ov.save_model(_vocabulary_graph(vocabulary), str(path))
            graph, weights = path.read_text(), np.fromfile(path.with_suffix(".bin"), np.uint8)
        self._pipeline = genai.LLMPipeline(
            graph, ov.Tensor(weights), genai.Tokenizer(str(folder)), "CPU", genai.GenerationConfig(),
            ATTENTION_BACKEND="SDPA",
        )  # fmt: skip

    def compile(self, grammar: Grammar) -> None:
        """Raises `RuntimeError` with the reason for a grammar that cannot be compiled."""
        once = self._genai.GenerationConfig()
        once.max_new_tokens = 1
        once.apply_chat_template = False
        once.structured_output_config = config(grammar)
        self._pipeline.generate(self._ov.Tensor(np.zeros((1, 1), np.int64)), once)


def _vocabulary_graph(vocabulary: int) -> Any:
    """A stateful graph in the shape of a decoder that gives every token of `vocabulary` the same logit."""
    import openvino as ov
    from openvino import opset13
    from openvino.op.util import Variable, VariableInfo

    def constant(values: Any, dtype: Any) -> Any:
        return opset13.constant(np.array(values, dtype))

    ids = opset13.parameter([-1, -1], np.int64, name="input_ids")
    mask = opset13.parameter([-1, -1], np.int64, name="attention_mask")
    rows = opset13.parameter([-1], np.int32, name="beam_idx")
    for node in (ids, mask, rows):
        node.output(0).set_names({node.get_friendly_name()})
    read = opset13.convert(ids, "f32")
    logits = opset13.multiply(
        opset13.unsqueeze(read, constant([2], np.int64)), constant(np.zeros((1, 1, vocabulary)), np.float32)
    )
    logits.output(0).set_names({"logits"})
    about = VariableInfo()
    about.data_shape, about.data_type = ov.PartialShape([-1, 1, -1, 1]), ov.Type.f32
    about.variable_id = "past_key_values.0.keypresent.0.key"  # named as the exporters name a cache
    kept = Variable(about)
    past = opset13.gather(opset13.read_value(constant(np.zeros((1, 1, 0, 1)), np.float32), kept), rows,
                          constant(0, np.int64))  # fmt: skip
    new = opset13.unsqueeze(opset13.unsqueeze(read, constant([1], np.int64)), constant([3], np.int64))
    keep = opset13.assign(opset13.concat([past, new], 2), kept)
    return ov.Model([opset13.result(logits, name="logits")], [keep], [ids, mask, rows], "vocabulary")
