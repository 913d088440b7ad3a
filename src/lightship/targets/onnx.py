"""ONNX Runtime: decoders as one graph in 8 or 4 bits, one sequence at a time; encoders as a plain graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.checkpoint import Checkpoint
from lightship.engine import EngineSettings, Event, GenerationParams
from lightship.errors import ContextTooLong, EngineError, RequestError, SourceError, UnsupportedError
from lightship.kind import GENERATORS
from lightship.recipe import NNCF, Precision
from lightship.sampling import log_softmax
from lightship.targets import _onnx_encoder, _onnx_seq2seq, _onnx_weights
from lightship.targets._seq2seq import Seq2SeqEngine, Seq2SeqScorer
from lightship.targets._sequential import BATCHING as BATCHING
from lightship.targets._sequential import Request, Sequential, refuse_lookup
from lightship.targets._tracing import tracing

EXTRA = "build"
TUNABLE = ("threads", "max_batched_tokens")  # what `tune` may try
GRAPH = "model.onnx"
DATA = "model.onnx.data"  # protobuf ends at 2 GB, so weights always lie beside the graph
PAST, PRESENT, KEEP = "input.past_key_values", "output.past_key_values", "logits_to_keep"
CAPACITY = "capacity"
MADE = (GRAPH, DATA, *_onnx_seq2seq.GRAPHS, _onnx_seq2seq.WEIGHTS)  # by `export` and `quantise`
PLAIN = ("input_ids", "attention_mask", "position_ids", KEEP)
FIRST_ROOM = 256  # tokens that the buffers of keys and values begin with
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


# ── Checkpoint → runtime folder ─────────────────────────────────────────────


def settle(precision: Precision) -> tuple[Precision, list[str]]:
    """`precision` as this target carries it out, and what to tell about the difference. Asked before any work.

    Weights are rounded to nearest: fitting, on by default, is set to off and said to be. Raises `UnsupportedError` for
    bf16, NNCF's ways to round, mixed 4 and 8 bits in the body, groups that the kernels do not know, keys and values in
    anything but float32, and activations in integers and floats at once.
    """
    if precision.kv not in ("auto", "f32"):
        raise UnsupportedError(f"ONNX graphs keep keys and values in float32, not in {precision.kv}",
                               hint="leave kv out, or use --target openvino")  # fmt: skip
    if precision.activations == "int8" and precision.arithmetic == "f32":
        raise UnsupportedError("on ONNX Runtime the arithmetic f32 leaves activations in floats",
                               hint="leave out activations or arithmetic, or use --target openvino")  # fmt: skip
    if precision.name == "bf16":
        raise UnsupportedError("ONNX Runtime has no bf16 matrix product on CPU",
                               hint="use --precision fp32, int8 or int4, or --target openvino")  # fmt: skip
    if precision.name != "int4":
        return precision, []
    if precision.group_size not in _onnx_weights.GROUPS:
        raise UnsupportedError(f"ONNX Runtime has no kernels for groups of {precision.group_size} weights",
                               hint=f"use a --group-size of {', '.join(map(str, _onnx_weights.GROUPS))}")  # fmt: skip
    asked = [name for name in (*NNCF, "bits") if getattr(precision, name)]
    asked += ["a ratio below 1"] if precision.ratio < 1 else []
    if asked:
        raise UnsupportedError(
            f"{asked[0]} is not available for ONNX: weights are rounded to nearest, without calibration",
            hint="leave it out, or use --target openvino",
        )
    notes = ["fit off: for ONNX weights are rounded to nearest"] if precision.fit else []
    return precision.model_copy(update={"fit": False}), notes


def export(checkpoint: Checkpoint, folder: Path, dtype: str | None = None) -> None:
    """Write `checkpoint` as one float32 graph: an encoder's with batch and length dynamic, a decoder's
    for one sequence with past and new length dynamic. An encoder-decoder becomes two, see `_seq2seq`.

    A decoder's keys and values go in and out (`input.past_key_values…`, `output.past_key_values…`); an empty past is a
    prefill. Where both have the same length, `CAPACITY`, they are one buffer to which the new ones are appended.
    Raises `UnsupportedError` for another `dtype` than float32 and for architectures that cannot be traced or keep
    another state than keys and values.
    """
    import onnx_ir

    if dtype not in (None, "float32"):
        raise UnsupportedError(f"ONNX graphs are exported in float32, not {dtype}")
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint.kind == "seq2seq":
        models = _onnx_seq2seq.trace(checkpoint)
        for model in models.values():
            _forget(model)
        _onnx_seq2seq.save(models, folder)
        checkpoint.carry(folder)
        return
    if checkpoint.kind != "decoder":
        model = _onnx_encoder.trace(checkpoint)
        checkpoint.carry_files(folder)
    else:
        model = _trace(checkpoint)
        _fix_sizes(model.graph, checkpoint)
        _fuse(model)
        _append_in_place(model.graph)
        checkpoint.carry(folder)
    _forget(model)
    onnx_ir.save(model, folder / GRAPH, external_data=DATA)


def settle_seq2seq(precision: Precision) -> tuple[Precision, list[str]]:
    """As `settle`, of an encoder-decoder."""
    return settle(precision)


def settle_encoder(precision: Precision) -> None:
    """Raise `UnsupportedError` for precisions at which encoders are not shipped."""
    _onnx_encoder.refuse(precision)


def _trace(checkpoint: Checkpoint) -> Any:
    """The `onnx_ir.Model` of `checkpoint`. Traced with two rows, one left-padded, so that no axis is specialised."""
    import torch
    from transformers.exporters import utils as exporter_utils
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = checkpoint.load("float32")
    ids = torch.arange(2, 18).reshape(2, 8) % checkpoint.vocabulary
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with tracing(checkpoint, "ONNX"):
        parts = exporter_utils.decompose_for_generation(
            model, {"input_ids": ids, "attention_mask": mask, **_whole_cache(model)}, multi_token_decode=True
        )
        submodel, inputs = parts["decode"]
        # Positions whose logits are wanted: a prompt needs those of its last token only.
        inputs[KEEP] = torch.arange(2)
        return OnnxExporter().export(submodel, inputs, config=OnnxConfig(dynamic=True)).program


def _whole_cache(model: Any) -> dict[str, Any]:
    """The empty cache to trace a model with whose layers have windows: they keep all keys and values, as full ones do,
    and the mask alone applies the window. A layer that drops what has left its window would have its length counted
    outside the graph. Nothing for other models: theirs is right as they make it."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=model.config)
    windows = [isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers]
    cache.layers = [DynamicLayer() if cut else layer for cut, layer in zip(windows, cache.layers, strict=True)]
    return {"past_key_values": cache} if any(windows) else {}


def _fix_sizes(graph: Any, checkpoint: Checkpoint) -> None:
    """Write into the shapes that there is one sequence, and how many heads of which width the cache has. Raises
    `UnsupportedError` for a state that is not keys and values."""
    import onnx_ir

    outputs = {value.name: value for value in graph.outputs}
    for value in graph.inputs:
        made = outputs.get(value.name.replace(PAST, PRESENT, 1))
        if made is not None and len(made.shape) == 4 and all(isinstance(made.shape[axis], int) for axis in (1, 3)):
            for axis in (1, 3):
                value.shape[axis] = made.shape[axis]
        elif value.name not in PLAIN:
            raise UnsupportedError(
                f"the architecture {checkpoint.config.get('model_type')!r} needs the input {value.name!r} in ONNX",
                hint="supported are decoders that keep nothing but keys and values",
            )
    rows = {str(value.shape[0]) for value in graph.inputs if value.name != KEEP}  # the symbols of the batch
    for value in (*graph.inputs, *(made for node in graph for made in node.outputs)):
        if value.shape is not None:
            value.shape = onnx_ir.Shape([1 if str(size) in rows else size for size in value.shape])


def _fuse(model: Any) -> None:
    """Fuse attention, its cache and rotary embeddings, norms, and products of one input into ONNX Runtime's own
    operators. They take one sequence only where the length is dynamic."""
    import onnx_ir
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    fuse_for_onnxruntime(model, "cpu")
    for node in list(model.graph):
        # The transpose that picks positions is fused into the head's product, which takes that for batches of
        # matrices only, and fails.
        if node.op_type == "FusedMatMul" and "transBatchA" in node.attributes and len(node.inputs[1].shape) == 2:
            turned = onnx_ir.node("Transpose", [node.inputs[0]], {"perm": [1, 0, 2]})
            model.graph.insert_before(node, turned)
            node.replace_input_with(0, turned.outputs[0])
            node.attributes.pop("transBatchA")


def _append_in_place(graph: Any) -> None:
    """Let past and present be one buffer, longer than what has been read: `GroupQueryAttention` then writes behind what
    is there and copies nothing. How much has been read must come from the mask then. Graphs in which anything else
    looks into the cache are left alone."""
    import onnx_ir
    from onnx_ir.convenience import replace_nodes_and_values

    pasts = [value for value in graph.inputs if value.name.startswith(PAST)]
    presents = [value for value in graph.outputs if value.name.startswith(PRESENT)]
    readers = {node for value in pasts for node, _ in value.uses()}
    measures = [node for node in readers if _measures_length(node)]
    fused = {node for node in readers if node.op_type == "GroupQueryAttention"}
    if len(fused) + len(measures) < len(readers) or any(value.uses() for value in presents):
        return
    inputs = {value.name: value for value in graph.inputs}
    for node in measures:
        lengths = [onnx_ir.node("Shape", [inputs[name]], {"start": 1, "end": 2}) for name in PLAIN[1::-1]]
        read = onnx_ir.node("Sub", [length.outputs[0] for length in lengths])  # of the mask, without the new ids
        replace_nodes_and_values(graph, node, [node], [*lengths, read], node.outputs, read.outputs)
    for value in (*pasts, *presents):
        value.shape = onnx_ir.Shape([*value.shape[:2], CAPACITY, value.shape[3]])


def _measures_length(node: Any) -> bool:
    """Whether `node` gives how many tokens a cache (1, heads, tokens, width) holds."""
    start, end = (node.attributes.get_int(name, None) for name in ("start", "end"))
    return node.op_type == "Shape" and (start, end) == (2, 3)


def _forget(model: Any) -> None:
    """Drop what the exporter recorded of this machine (stack traces)."""
    for each in (model, model.graph, *model.graph, *model.graph.inputs, *model.graph.initializers.values()):
        each.metadata_props.clear()
    for node in model.graph:
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def quantise(
    source: Path,
    folder: Path,
    precision: Precision,
    calibration: Sequence[Sequence[int]] = (),
    checkpoint: Checkpoint | None = None,
) -> None:
    """Round the weights of the runtime folder `source` to 8 or 4 bits into `folder`: `_onnx_weights` says how for
    models that generate and where activations are rounded for each token, else `_onnx_encoder` for encoders.
    `calibration` and `checkpoint` are not used."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = Checkpoint(source).kind
    if kind == "seq2seq":
        pair = {name: _onnx_weights.rounded(source / name, precision) for name in _onnx_seq2seq.GRAPHS}
        _onnx_seq2seq.save(pair, folder)
    elif kind != "decoder" and precision.activations == "auto":
        _onnx_encoder.quantise(source / GRAPH, folder / GRAPH, DATA)
    else:
        _onnx_weights.quantise(source / GRAPH, folder / GRAPH, DATA, precision)
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.name not in MADE:
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def finish(folder: Path, precision: Precision) -> None:
    """Record in `engine.json` how the weights were made; there is nothing to choose when the folder is opened."""
    recorded: dict[str, Any] = {"precision": precision.name, "settings": {}, "weights": "float32"}
    if precision.name != "fp32":
        group = _onnx_weights.group(precision)
        recorded["weights"] = f"rounded to nearest, symmetric, one scale for {group}, no calibration"
        recorded["activations"] = "8 bits" if precision.arithmetic == "auto" else "float32"
    if precision.name == "int8" and precision.activations == "auto" and Checkpoint(folder).kind not in GENERATORS:
        recorded["weights"] = "int8, symmetric, one scale per output channel"
        recorded["activations"] = "quantised as they come"
    (folder / "engine.json").write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


# ── Runtime folder → Engine, Scorer ─────────────────────────────────────────


def _session(path: Path, settings: EngineSettings) -> Any:
    """The graph `path` in ONNX Runtime. Raises `SourceError` when there is none."""
    import onnxruntime

    if not path.is_file():
        raise SourceError(f"{path.parent} holds no {path.name}", hint="give a bundle's runtime folder")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    # Its threads wait for one another by spinning, but not for the next token: they would keep every core busy.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # x64 without VNNI adds two products of u8 and s8 in 16 bits, which saturate: there the weights become u8. Elsewhere
    # ONNX Runtime ignores this.
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        raise EngineError(f"ONNX Runtime cannot load {path}: {str(error)[:300]}") from error


def open_encoder(folder: Path, settings: EngineSettings | None = None) -> _onnx_encoder.OnnxEncoder:
    """Load an encoder's `folder`. Raises `SourceError` when it holds no graph, or one of another kind."""
    return _onnx_encoder.OnnxEncoder(_session(folder / GRAPH, settings or EngineSettings()), folder)


def _pair(folder: Path, settings: EngineSettings) -> _onnx_seq2seq.OnnxPair | None:
    """The graphs of an encoder-decoder, where `folder` holds one."""
    if not (folder / _onnx_seq2seq.GRAPHS[0]).is_file():
        return None
    return _onnx_seq2seq.OnnxPair(folder, lambda path: _session(path, settings))


@dataclass
class _Past:
    """What a sequence has read: how many tokens, and keys and values of every layer, (1, heads, ≥ length, width)."""

    values: dict[str, Any]  # input → OrtValue
    length: int = 0


class _Decoder:
    """The graph of a runtime folder. What a sequence has read lies with the caller."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        import onnxruntime

        self._session = _session(folder / GRAPH, settings)
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        inputs = {node.name: node for node in self._session.get_inputs()}
        self._sizes = {name: node.shape for name, node in inputs.items() if name.startswith(PAST)}
        self._takes = [name for name in PLAIN if name in inputs]
        self._appends = all(size[2] == CAPACITY for size in self._sizes.values())
        bytes_per_token = sum(4 * size[1] * size[3] for size in self._sizes.values())
        self.room = int(settings.kv_cache_gb * 2**30 / max(bytes_per_token, 1))  # tokens
        self.vocabulary: int = next(made.shape[-1] for made in self._session.get_outputs() if made.name == "logits")

    def empty(self) -> _Past:
        """Nothing read yet."""
        sizes = self._sizes.items()
        return _Past({name: self._value(np.zeros((1, size[1], 0, size[3]), np.float32)) for name, size in sizes})

    def read(self, ids: Ids, past: _Past, last: bool = False) -> Floats:
        """Logits (new, vocabulary) after each of `ids` (new,), or after the last only. They then belong to `past`."""
        start, new, total = past.length, len(ids), past.length + len(ids)
        given = (ids, np.ones(total), np.arange(start, total), np.arange(new - 1 if last else 0, new))
        feeds = {name: np.ascontiguousarray(array, np.int64) for name, array in zip(PLAIN, given, strict=True)}
        values = {name: self._value(feeds[name] if name == KEEP else feeds[name][None]) for name in self._takes}
        if self._appends:
            self._make_room(past, total)
        binding = self._session.io_binding()
        for name, value in (values | past.values).items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        for name, value in past.values.items():
            present = name.replace(PAST, PRESENT, 1)
            if self._appends:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present)
        self._session.run_with_iobinding(binding)
        logits, *presents = binding.get_outputs()
        if not self._appends:
            past.values = dict(zip(past.values, presents, strict=True))
        past.length = total
        found: Floats = logits.numpy()[0]
        return found

    def _make_room(self, past: _Past, total: int) -> None:
        """Move `past` into buffers of twice the size, at most of the whole `room`, when `total` tokens do not fit into
        those that it has."""
        for name, value in past.values.items():
            _, heads, capacity, width = value.shape()
            if capacity < total:
                capacity = max(total, min(max(2 * capacity, FIRST_ROOM), self.room))
                buffer = np.zeros((1, heads, capacity, width), np.float32)
                buffer[:, :, : past.length] = value.numpy()[:, :, : past.length]
                past.values[name] = self._value(buffer)


class OnnxScorer:
    """The graph of a runtime folder, logits of every position. Rows are read one by one, without their padding, whose
    logits are 0."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        self._decoder = _Decoder(folder, settings)

    def logits(self, ids: Ids, mask: Ids) -> Floats:
        return np.concatenate(list(self.blocks(ids, mask, ids.shape[1])), axis=1)

    def blocks(self, ids: Ids, mask: Ids, size: int) -> Iterator[Floats]:
        """The logits of `size` positions at a time, (batch, ≤ size, vocabulary); the KV cache carries over."""
        pasts = [self._decoder.empty() for _ in ids]
        for start in range(0, ids.shape[1], size):
            part = ids[:, start : start + size]
            logits = np.zeros((*part.shape, self._decoder.vocabulary), np.float32)
            for row, real in enumerate(mask[:, start : start + size] == 1):
                if real.any():
                    logits[row, real] = self._decoder.read(part[row, real], pasts[row])
            yield logits


def open_scorer(folder: Path, settings: EngineSettings | None = None) -> OnnxScorer | Seq2SeqScorer:
    """Load `folder` for scoring. Raises `SourceError` when it holds no graph."""
    pair = _pair(folder, settings or EngineSettings())
    return OnnxScorer(folder, settings or EngineSettings()) if pair is None else Seq2SeqScorer(pair)


@dataclass
class _Reading:
    """How many tokens of a request the decoder has read, and what it keeps of them."""

    past: _Past
    read: int = 0


class OnnxEngine(Sequential):
    """One sequence at a time, first come, first served, no batching: a simple engine for machines where OpenVINO does
    not run."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        checkpoint = Checkpoint(folder)
        super().__init__(checkpoint.context_length, checkpoint.vocabulary, checkpoint.eos_token_ids)
        self._decoder = _Decoder(folder, settings)
        self._chunk = settings.max_batched_tokens

    def submit(self, tokens: Sequence[int], params: GenerationParams) -> int:
        self._check(tokens, params.max_tokens)
        return self._queue(tokens, params, _Reading(self._decoder.empty()))

    def _check(self, tokens: Sequence[int], new: int) -> None:
        if not tokens:
            raise RequestError("the prompt is empty", "prompt")
        if min(tokens) < 0 or max(tokens) >= self.vocabulary:
            raise RequestError(f"token ids must lie in 0 … {self.vocabulary - 1}", "prompt", "invalid_token_id")
        if len(tokens) + new > self.context:
            raise ContextTooLong(f"{len(tokens)} prompt tokens and {new} new ones exceed the context of {self.context}")
        if len(tokens) > self._decoder.room:
            raise ContextTooLong(f"{len(tokens)} prompt tokens exceed the KV cache of {self._decoder.room}")

    def step(self) -> list[Event]:
        if self._running is None:
            if not self._waiting:
                return []
            self._running = self._waiting.popleft()
        request = self._running
        if len(request.prompt) + len(request.produced) > self._decoder.room:
            return self._end(Event(request.id, finish_reason="error", error="the KV cache is exhausted"))
        logits = self._advance(request)
        return [] if logits is None else self._produce(request, logits, request.prompt)

    def _advance(self, request: Request) -> Floats | None:
        """Read the next chunk; the logits (vocabulary,) after the last token, None while the prompt is unfinished."""
        tokens, kept = request.prompt + request.produced, request.kept
        chunk = tokens[kept.read : kept.read + self._chunk]
        kept.read += len(chunk)
        logits = self._decoder.read(np.array(chunk), kept.past, last=True)
        return logits[-1] if kept.read == len(tokens) else None

    def prompt_logprobs(self, tokens: Sequence[int]) -> Floats:
        """log p(token[i] | tokens before i) for i ≥ 1 in the chunks that serving reads, shape (len(tokens) − 1,).

        Raises `RequestError` for foreign ids or too many.
        """
        self._check(tokens, 0)
        past = self._decoder.empty()
        values: list[float] = []
        for start in range(0, len(tokens), self._chunk):
            chunk = np.array(tokens[start : start + self._chunk])
            rows = self._decoder.read(chunk, past)
            following = tokens[start + 1 : start + 1 + len(chunk)]
            values.extend(float(log_softmax(row)[token]) for row, token in zip(rows, following, strict=False))
        return np.array(values, np.float32)

    def close(self) -> None:
        super().close()
        del self._decoder


def preload() -> None:
    """Import the runtime before there is a folder to open."""
    import onnxruntime  # noqa: F401


def open(folder: Path, settings: EngineSettings | None = None) -> OnnxEngine | Seq2SeqEngine:
    """Load `folder` for generation. Raises `SourceError` when it holds no graph."""
    settings = settings or EngineSettings()
    refuse_lookup(settings)
    pair = _pair(folder, settings)
    return OnnxEngine(folder, settings) if pair is None else Seq2SeqEngine(pair, folder)
