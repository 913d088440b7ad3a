"""OpenVINO: decoders as one stateful graph, served by continuous batching (OpenVINO GenAI); encoders as one graph."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.checkpoint import Checkpoint
from lightship.engine import EngineSettings
from lightship.errors import EngineError, SourceError, UnsupportedError
from lightship.recipe import NNCF, Precision
from lightship.targets import (
    _fitting,
    _openvino_encoder,
    _openvino_grammar,
    _openvino_seq2seq,
    _openvino_weights,
    _sensitivity,
)
from lightship.targets._openvino_decoder import OpenVINOEngine
from lightship.targets._seq2seq import Seq2SeqEngine, Seq2SeqScorer
from lightship.targets._sequential import refuse_lookup
from lightship.targets._tracing import tracing

# openvino and nncf report to an analytics service as soon as they are imported, unless this package is missing; None is
# how Python itself marks a module as missing. Nothing else of theirs opens a socket.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

EXTRA = "build"
NEEDS = ("openvino", "openvino_genai", "openvino_tokenizers", "nncf")
TUNABLE = ("inference_precision", "kv_precision", "dynamic_quantisation_group", "max_batched_tokens", "max_num_seqs",
           "prefix_cache", "threads", "prompt_lookup", "draft_tokens")  # what `tune` may try  # fmt: skip
GRAPH = "openvino_model.xml"
ACTIVATION_GROUP = 32  # activations of a token that share a scale where they are rounded
# Runtime precisions at which each weight precision is served. Activations are rounded only where that is asked for: in
# bf16 arithmetic it raised the mean KLD of the demo model in int8 from 0.0049 to 0.0077 and gained no speed (AVX-512
# without AMX); in float32 it pays, which `tune` finds. For fp32 the other approximations are off too; the rest take the
# runtime's default arithmetic for this processor.
SERVED_AT: dict[str, dict[str, Any]] = {
    "fp32": {"inference_precision": "f32", "kv_precision": "f32", "dynamic_quantisation_group": 0},
    "bf16": {"dynamic_quantisation_group": 0},
    "int8": {"dynamic_quantisation_group": 0},
    "int4": {"dynamic_quantisation_group": 0},
}


# ── Checkpoint → runtime folder ─────────────────────────────────────────────


def export(checkpoint: Checkpoint, folder: Path, dtype: str | None = None) -> None:
    """Write `checkpoint` as one graph, batch and length dynamic, padding by the attention mask: a decoder's is stateful
    and padded on the left, an encoder's is neither. An encoder-decoder becomes two, see `_seq2seq`.

    `dtype` overrides the dtype of the weights (`float32`, `bfloat16`); activations are traced in float32.
    Raises `UnsupportedError` when the exporter cannot trace the architecture.
    """
    import openvino as ov

    folder.mkdir(parents=True, exist_ok=True)
    for name, graph in _traced(checkpoint, dtype).items():
        _drop_recorded_precision(graph)
        _simplify(graph)
        if checkpoint.kind == "decoder":
            _count_rows_by_ids(graph)
        ov.save_model(graph, str(folder / name), compress_to_fp16=False)
    if checkpoint.kind == "decoder":
        _write_tokenizer(checkpoint.carry(folder), folder)
    elif checkpoint.kind == "seq2seq":
        checkpoint.carry(folder)
    else:
        checkpoint.carry_files(folder)


def _traced(checkpoint: Checkpoint, dtype: str | None) -> dict[str, Any]:
    """File name → `openvino.Model`."""
    if checkpoint.kind == "seq2seq":
        return _openvino_seq2seq.trace(checkpoint, dtype)
    return {GRAPH: (_trace if checkpoint.kind == "decoder" else _openvino_encoder.trace)(checkpoint, dtype)}


def refuse(config: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` for a decoder that can be exported and not served: continuous batching takes attention
    as one operation, which caps no scores (Gemma 2)."""
    if config.get("attn_logit_softcapping"):
        raise UnsupportedError("OpenVINO GenAI cannot serve attention whose scores are capped (attn_logit_softcapping)",
                               hint="use --target onnx")  # fmt: skip


def settle_seq2seq(precision: Precision) -> tuple[Precision, list[str]]:
    """`precision` as encoder-decoders are shipped at, and what to tell about the difference: no calibration.

    Raises `UnsupportedError` for what needs it, and for keys and values in another precision than the arithmetic's."""
    _refuse_kv(precision, "encoder-decoders")
    if precision.name == "int8" and precision.tables != "int8":
        raise UnsupportedError("encoder-decoders in int8 keep their tables in int8", hint="use --precision int4")
    if precision.name != "int4":
        return precision, []
    asked = [name for name in (*NNCF, "bits") if getattr(precision, name)]
    if asked:
        raise UnsupportedError(
            f"{asked[0]} is not available for encoder-decoders: they are quantised without calibration"
        )
    notes = ["fit off: encoder-decoders are quantised without calibration"] if precision.fit else []
    return precision.model_copy(update={"fit": False}), notes


def settle_encoder(precision: Precision) -> None:
    """Raise `UnsupportedError` for precisions at which encoders are not shipped."""
    if precision.name == "int4" or precision.tables == "int4":
        raise UnsupportedError("encoders are not shipped at int4", hint="use --precision fp32, bf16 or int8")
    _refuse_kv(precision, "encoders")


def _refuse_kv(precision: Precision, kind: str) -> None:
    if precision.kv != "auto":
        raise UnsupportedError(f"kv is for decoders: {kind} are not served from a paged cache", hint="leave it out")


def _trace(checkpoint: Checkpoint, dtype: str | None) -> Any:
    """The `openvino.Model` of `checkpoint`. Traced with two rows, one left-padded, so that no axis is specialised."""
    import torch
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter
    from transformers.exporters.utils import decompose_for_generation

    model = checkpoint.load(dtype)
    ids = torch.arange(2, 18).reshape(2, 8) % checkpoint.vocabulary
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with tracing(checkpoint, "OpenVINO"):
        parts = decompose_for_generation(model, {"input_ids": ids, "attention_mask": mask}, multi_token_decode=True)
        submodel, inputs = parts["decode"]
        exported = OpenVINOExporter().export(submodel, inputs, config=OpenVINOConfig(dynamic=True))
    return exported.program


def _drop_recorded_precision(graph: Any) -> None:
    """Remove the compile options recorded by the exporter: with them the continuous-batching pipeline refuses to load
    ("expect kvcache type …"). Precisions are chosen when the folder is opened."""
    rt_info = graph.rt_info
    if "runtime_options" in rt_info:
        del rt_info["runtime_options"]


def _simplify(graph: Any) -> None:
    """Apply OpenVINO's own common simplifications, as its converter does for other frameworks: the graph then
    loads faster. Constants are not folded, so weights stay as they are."""
    from openvino._offline_transformations import apply_moc_transformations

    apply_moc_transformations(graph, cf=False)


def _count_rows_by_ids(graph: Any) -> None:
    """Read the number of rows off `input_ids` where the exporter read it off `attention_mask`, as it does for GPT-2:
    continuous batching removes the mask, and refuses a graph that still needs it."""
    from openvino import opset13

    shape = opset13.shape_of(graph.input("input_ids"), output_type="i64").output(0)
    for reader in graph.input("attention_mask").get_target_inputs():
        mask_shape = reader.get_node()
        if mask_shape.get_type_name() != "ShapeOf" or mask_shape.get_output_element_type(0) != shape.get_element_type():
            continue
        for use in mask_shape.output(0).get_target_inputs():
            node = use.get_node()
            if node.get_type_name() == "Gather" and _is_zero(node.input_value(1).get_node()):
                use.replace_source_output(shape)
    graph.validate_nodes_and_infer_types()


def _is_zero(node: Any) -> bool:
    """Whether `node` is the constant 0."""
    return bool(node.get_type_name() == "Constant" and not np.any(node.get_data()))


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Put OpenVINO's tokenizer and detokenizer beside `tokenizer.json` and check that they give the same ids."""
    import openvino as ov
    import openvino_tokenizers

    with output_on_stderr():
        encoder, decoder = openvino_tokenizers.convert_tokenizer(
            tokenizer, with_detokenizer=True, skip_special_tokens=True
        )
    ov.save_model(encoder, str(folder / "openvino_tokenizer.xml"))
    ov.save_model(decoder, str(folder / "openvino_detokenizer.xml"))
    _check_tokenizer(encoder, tokenizer)


TOKENIZER_PROBES = ("Hello world", "  two  spaces\n\tand a tab", "naïve façade — 漢字 🚢", "def f(x):\n    return x**2")


def _check_tokenizer(encoder: Any, tokenizer: Any) -> None:
    import openvino as ov

    compiled = ov.Core().compile_model(encoder, "CPU")
    for text in TOKENIZER_PROBES:
        got = compiled([text])["input_ids"][0].tolist()
        expected = tokenizer(text)["input_ids"]
        if got != expected:
            raise UnsupportedError(
                f"the OpenVINO tokenizer disagrees with tokenizer.json on {text!r}: "
                f"{got[:12]} instead of {expected[:12]}"
            )


def quantise(
    source: Path,
    folder: Path,
    precision: Precision,
    calibration: Sequence[Sequence[int]] = (),
    checkpoint: Checkpoint | None = None,
) -> None:
    """Compress the weights of the runtime folder `source` into `folder`, see `_openvino_weights`; `calibration` (token
    sequences) feeds the data-aware options, `checkpoint`, the original, those that measure or fit."""
    import openvino as ov

    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars would be drawn over ours
        folder.mkdir(parents=True, exist_ok=True)
        graphs = [path.name for path in sorted(source.glob("*_model.xml"))]
        rows = [_graph_inputs(np.array([ids])) for ids in calibration]
        for name in graphs:
            graph = _openvino_seq2seq.read(source, name)
            planner = None
            if precision.planned:
                planner = functools.partial(_plan, precision, calibration, checkpoint, (source / name).stat().st_size)
            decodes = Checkpoint(source).kind == "decoder"
            graph = _openvino_weights.compress(graph, precision, rows, decodes=decodes, planner=planner)
            ov.save_model(graph, str(folder / name), compress_to_fp16=False)
            del graph
            gc.collect()
    made = {name for graph in graphs for name in (graph, graph.replace(".xml", ".bin"), _openvino_seq2seq.WEIGHTS)}
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.name not in made:
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _plan(
    precision: Precision,
    calibration: Sequence[Sequence[int]],
    checkpoint: Checkpoint | None,
    text: int,
    other: float,
    matrices: int,
) -> _openvino_weights.Plan:
    """What becomes of a body of `matrices`: which stay in int8 to keep the budget, and what is fitted. The graph's
    description takes `text` bytes before, its other constants `other`."""
    if checkpoint is None or not calibration:
        raise UnsupportedError("`bits` and `fit` need the original model and a calibration set")
    model: Any = checkpoint.load("float32")
    narrow = None
    if precision.bits is not None:
        budget = precision.bits / 8 * model.num_parameters()
        budget -= text + other + _openvino_weights.MATRIX_TEXT * matrices
        measured = _sensitivity.measure(model, calibration, precision.group_size)
        narrow = _sensitivity.choose(measured, precision.group_size, budget)
    fitted = _fitting.fit(model, calibration, precision.group_size, narrow) if precision.fit else {}
    return _openvino_weights.Plan(narrow, fitted)


def finish(folder: Path, precision: Precision) -> None:
    """Record in `engine.json` the precisions at which this folder is served; of an encoder-decoder join the weights."""
    if _is_pair(folder):
        _openvino_seq2seq.join(folder)
    settings = dict(SERVED_AT[precision.name])
    if precision.arithmetic == "f32":
        settings["inference_precision"] = "f32"
    if precision.activations == "int8":
        settings["dynamic_quantisation_group"] = ACTIVATION_GROUP
    if precision.kv != "auto":
        settings["kv_precision"] = precision.kv
    recorded = {"precision": precision.name, "settings": settings}
    (folder / "engine.json").write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


@contextlib.contextmanager
def output_on_stderr() -> Iterator[None]:
    """Send what a library prints on standard output to standard error: ours carries results only."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


# ── Runtime folder → Engine, Scorer ─────────────────────────────────────────


def _graph_inputs(
    ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64] | None = None, past: int = 0
) -> dict[str, npt.NDArray[Any]]:
    """The graph's inputs for `ids` (batch, new), with `mask` (batch, past + new); positions count unmasked tokens."""
    full = np.ones((ids.shape[0], past + ids.shape[1]), np.int64) if mask is None else mask
    positions = np.maximum(np.cumsum(full, axis=1) - 1, 0)[:, past:]
    return {
        "input_ids": np.ascontiguousarray(ids, np.int64),
        "attention_mask": np.ascontiguousarray(full, np.int64),
        "position_ids": np.ascontiguousarray(positions, np.int64),
        "beam_idx": np.arange(ids.shape[0], dtype=np.int32),
    }


def _served(folder: Path, settings: EngineSettings) -> EngineSettings:
    """`settings` with what it leaves open taken from the folder's `engine.json`."""
    path = folder / "engine.json"
    recorded = json.loads(path.read_text())["settings"] if path.is_file() else {}
    return replace(settings, **{name: value for name, value in recorded.items() if getattr(settings, name) is None})


def properties(folder: Path, settings: EngineSettings) -> dict[str, Any]:
    """OpenVINO compile properties for `settings` on this processor."""
    served = _served(folder, settings)
    chosen = {
        "INFERENCE_PRECISION_HINT": served.inference_precision,
        "KV_CACHE_PRECISION": served.kv_precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": served.dynamic_quantisation_group,
        "INFERENCE_NUM_THREADS": served.threads,
    }
    return {name: value for name, value in chosen.items() if value is not None}


class OpenVINOScorer:
    """The graph of a runtime folder in one SDPA pass, logits of every position."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        import openvino as ov

        core = ov.Core()
        try:
            compiled = core.compile_model(core.read_model(folder / GRAPH), "CPU", properties(folder, settings))
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot load {folder / GRAPH}: {str(error).splitlines()[-1]}") from error
        self._request = compiled.create_infer_request()

    def logits(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return np.concatenate(list(self.blocks(ids, mask, ids.shape[1])), axis=1)

    def blocks(
        self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64], size: int
    ) -> Iterator[npt.NDArray[np.float32]]:
        """The logits of `size` positions at a time, (batch, ≤ size, vocabulary); the KV cache carries over."""
        self._request.reset_state()
        for start in range(0, ids.shape[1], size):
            stop = min(start + size, ids.shape[1])
            self._request.infer(_graph_inputs(ids[:, start:stop], mask[:, :stop], past=start))
            yield np.array(self._request.get_tensor("logits").data, np.float32)


def open_scorer(folder: Path, settings: EngineSettings | None = None) -> OpenVINOScorer | Seq2SeqScorer:
    """Load `folder` for scoring at the precisions it is served at."""
    settings = settings or EngineSettings()
    if _is_pair(folder):
        return Seq2SeqScorer(_open_pair(folder, settings))
    return OpenVINOScorer(folder, settings)


def _is_pair(folder: Path) -> bool:
    """Whether `folder` holds an encoder-decoder."""
    return (folder / _openvino_seq2seq.GRAPHS[0]).is_file()


def _open_pair(folder: Path, settings: EngineSettings) -> _openvino_seq2seq.OpenVINOPair:
    return _openvino_seq2seq.OpenVINOPair(folder, properties(folder, settings))


def open_encoder(folder: Path, settings: EngineSettings | None = None) -> _openvino_encoder.OpenVINOEncoder:
    """Load an encoder's `folder`. Raises `SourceError` when it holds no graph, or one of another kind."""
    _check_graph(folder)
    return _openvino_encoder.OpenVINOEncoder(folder / GRAPH, properties(folder, settings or EngineSettings()))


def preload() -> None:
    """Import the runtime, which takes a third of a second, before there is a folder to open."""
    import openvino_genai  # noqa: F401


def open(folder: Path, settings: EngineSettings | None = None) -> OpenVINOEngine | Seq2SeqEngine:
    """Load `folder` for generation. Raises `SourceError` when it holds no graph."""
    settings = settings or EngineSettings()
    if _is_pair(folder):
        refuse_lookup(settings)
        return Seq2SeqEngine(_open_pair(folder, settings), folder)
    _check_graph(folder)
    return OpenVINOEngine(folder, settings, properties(folder, settings))


def open_compiler(folder: Path) -> _openvino_grammar.Compiler:
    """What compiles grammars as the engine of `folder` does, without its weights."""
    vocabulary: int = json.loads((folder / "config.json").read_text())["vocab_size"]
    return _openvino_grammar.Compiler(folder, vocabulary)


def _check_graph(folder: Path) -> None:
    if not (folder / GRAPH).is_file():
        raise SourceError(f"{folder} holds no {GRAPH}", hint="give a bundle's runtime folder")
