"""ONNX Runtime: decoders as one graph in 8 or 4 bits, one sequence at a time; encoders as a plain graph."""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.checkpoint import Checkpoint
from lightship.engine import EngineSettings, Event, GenerationParams
from lightship.errors import ContextTooLong, EngineError, RequestError, SourceError, UnsupportedError
from lightship.recipe import Precision
from lightship.sampling import choose, log_softmax
from lightship.targets import _onnx_encoder
from lightship.targets._tracing import tracing

EXTRA = "build"
GRAPH = "model.onnx"
BATCHING = "none"  # one request at a time
DATA = "model.onnx.data"  # protobuf ends at 2 GB, so weights always lie beside the graph
PAST, PRESENT, KEEP = "input.past_key_values", "output.past_key_values", "logits_to_keep"
CAPACITY = "capacity"
PLAIN = ("input_ids", "attention_mask", "position_ids", KEEP)
GROUPS = (16, 32, 64, 128, 256)  # sizes that MatMulNBits knows
INT8_GROUP = 64  # weights that share a scale in int8; in int4 the recipe says
ROOM = 256  # tokens that the buffers of keys and values begin with
CHUNK = 2**22  # weights quantised at a time
# `accuracy_level` of MatMulNBits: activations rounded to 8 bits in the same groups, or float32. `f32`
# unpacks every matrix for every token, which is much slower.
ACCURACY_LEVELS = {"auto": 4, "f32": 1}
DOMAIN = "com.microsoft"
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


# ── Checkpoint → runtime folder ─────────────────────────────────────────────


def settle(precision: Precision) -> tuple[Precision, list[str]]:
    """`precision` as this target carries it out, and what to tell about the difference. Asked before any work.

    Weights are rounded to nearest: AWQ and scale estimation, on by default, are set to off and said to be. Raises
    `UnsupportedError` for bf16, GPTQ, mixed 4 and 8 bits in the body, and groups that the kernels do not know.
    """
    if precision.name == "bf16":
        raise UnsupportedError("ONNX Runtime has no bf16 matrix product on CPU",
                               hint="use --precision fp32, int8 or int4, or --target openvino")  # fmt: skip
    if precision.name != "int4":
        return precision, []
    if precision.group_size not in GROUPS:
        raise UnsupportedError(f"ONNX Runtime has no kernels for groups of {precision.group_size} weights",
                               hint=f"use a --group-size of {', '.join(map(str, GROUPS))}")  # fmt: skip
    if precision.gptq or precision.ratio < 1:
        raise UnsupportedError(
            f"{'gptq' if precision.gptq else 'a ratio below 1'} is not available for ONNX: weights are rounded to "
            "nearest, without calibration", hint="leave it out, or use --target openvino")  # fmt: skip
    left_out = [name for name in ("awq", "scale_estimation") if getattr(precision, name)]
    notes = [f"{' and '.join(left_out)} off: for ONNX weights are rounded to nearest"] if left_out else []
    return precision.model_copy(update={"awq": False, "scale_estimation": False}), notes


def export(checkpoint: Checkpoint, folder: Path, dtype: str | None = None) -> None:
    """Write `checkpoint` as one float32 graph: an encoder's with batch and length dynamic, a decoder's
    for one sequence with past and new length dynamic.

    A decoder's keys and values go in and out (`input.past_key_values…`, `output.past_key_values…`); an empty past is a
    prefill. Where both have the same length, `CAPACITY`, they are one buffer to which the new ones are appended.
    Raises `UnsupportedError` for another `dtype` than float32 and for architectures that cannot be traced or keep
    another state than keys and values.
    """
    import onnx_ir

    if dtype not in (None, "float32"):
        raise UnsupportedError(f"ONNX graphs are exported in float32, not {dtype}")
    folder.mkdir(parents=True, exist_ok=True)
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
    return node.op_type == "Shape" and (_number(node, "start", 0), _number(node, "end", 4)) == (2, 3)


def _forget(model: Any) -> None:
    """Drop what the exporter recorded of this machine (stack traces)."""
    for each in (model, model.graph, *model.graph, *model.graph.inputs, *model.graph.initializers.values()):
        each.metadata_props.clear()
    for node in model.graph:
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def quantise(source: Path, folder: Path, precision: Precision, calibration: Sequence[Sequence[int]] = ()) -> None:
    """Round the weights of the runtime folder `source` to 8 or 4 bits into `folder`; `calibration` is not used. For
    encoders see `_onnx_encoder.quantise`; of decoders:

    Symmetric, one float32 scale for a group of weights along the input. In int4, embedding and head take 8 bits unless
    `precision.all_layers`. A matrix used twice, such as a tied table, is stored once.

    This is not onnxruntime's own quantiser (`matmul_nbits_quantizer`): that one skips a tied head, stores its table a
    second time, reads embeddings in 4 bits only, leaves `Gemm` alone (GPT-2) and turns on logging at import. The layout
    and the rounding are the same, held by a test.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if Checkpoint(source).kind != "decoder":
        _onnx_encoder.quantise(source / GRAPH, folder / GRAPH, DATA)
    else:
        _round(source, folder, precision)
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.name not in (GRAPH, DATA):
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _round(source: Path, folder: Path, precision: Precision) -> None:
    """The matrices of a decoder's graph, to nearest."""
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = onnx_ir.load(source / GRAPH)
    uses = list(_matrix_uses(model.graph))
    outer = {use.weight.name for use in uses if use.gathers} | {uses[-1].weight.name}  # embeddings, and the head
    stored: dict[tuple[str, bool], tuple[Any, Any, int]] = {}
    for use in uses:
        key = (use.weight.name, use.rows_out)
        if key not in stored:
            bits = 4 if precision.name == "int4" and (precision.all_layers or use.weight.name not in outer) else 8
            packed, scales = _store(model.graph, use, bits, _group(precision))
            stored[key] = (packed, scales, bits)
        _replace(model.graph, use, *stored[key], precision)
    model.opset_imports[DOMAIN] = 1
    RemoveUnusedNodesPass()(model)
    onnx_ir.save(model, folder / GRAPH, external_data=DATA)


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

    block = _group(precision)
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


def _group(precision: Precision) -> int:
    """Weights that share a scale."""
    return precision.group_size if precision.name == "int4" else INT8_GROUP


def finish(folder: Path, precision: Precision) -> None:
    """Record in `engine.json` how the weights were made; there is nothing to choose when the folder is opened."""
    recorded: dict[str, Any] = {"precision": precision.name, "settings": {}, "weights": "float32"}
    if precision.name != "fp32":
        recorded["weights"] = f"rounded to nearest, symmetric, one scale for {_group(precision)}, no calibration"
        recorded["activations"] = "8 bits" if precision.arithmetic == "auto" else "float32"
    if precision.name == "int8" and Checkpoint(folder).kind != "decoder":
        recorded["weights"] = "int8, symmetric, one scale per output channel"
        recorded["activations"] = "quantised as they come"
    (folder / "engine.json").write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


# ── Runtime folder → Engine, Scorer ─────────────────────────────────────────


def _session(folder: Path, settings: EngineSettings) -> Any:
    """The graph of `folder` in ONNX Runtime. Raises `SourceError` when there is none."""
    import onnxruntime

    if not (folder / GRAPH).is_file():
        raise SourceError(f"{folder} holds no {GRAPH}", hint="give a bundle's runtime folder")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    # Its threads wait for one another by spinning, but not for the next token: they would keep every core busy.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        raise EngineError(f"ONNX Runtime cannot load {folder / GRAPH}: {str(error)[:300]}") from error


def open_encoder(folder: Path, settings: EngineSettings | None = None) -> _onnx_encoder.OnnxEncoder:
    """Load an encoder's `folder`. Raises `SourceError` when it holds no graph, or one of another kind."""
    return _onnx_encoder.OnnxEncoder(_session(folder, settings or EngineSettings()), folder)


@dataclass
class _Past:
    """What a sequence has read: how many tokens, and keys and values of every layer, (1, heads, ≥ length, width)."""

    values: dict[str, Any]  # input → OrtValue
    length: int = 0


class _Decoder:
    """The graph of a runtime folder. What a sequence has read lies with the caller."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        import onnxruntime

        self._session = _session(folder, settings)
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        inputs = {node.name: node for node in self._session.get_inputs()}
        self._sizes = {name: node.shape for name, node in inputs.items() if name.startswith(PAST)}
        self._takes = [name for name in PLAIN if name in inputs]
        self._appends = all(size[2] == CAPACITY for size in self._sizes.values())
        self.bytes_per_token = sum(4 * size[1] * size[3] for size in self._sizes.values())
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
        """Move `past` into buffers of twice the size when `total` tokens do not fit into those that it has."""
        for name, value in past.values.items():
            _, heads, capacity, width = value.shape()
            if capacity < total:
                buffer = np.zeros((1, heads, max(total, 2 * capacity, ROOM), width), np.float32)
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


def open_scorer(folder: Path, settings: EngineSettings | None = None) -> OnnxScorer:
    """Load `folder` for scoring. Raises `SourceError` when it holds no graph."""
    return OnnxScorer(folder, settings or EngineSettings())


@dataclass
class _Request:
    """A prompt, what it has produced, how many of both the decoder has read, and what it keeps of them."""

    id: int
    prompt: list[int]
    params: GenerationParams
    random: np.random.Generator
    past: _Past
    produced: list[int] = field(default_factory=list)
    read: int = 0


class OnnxEngine:
    """One sequence at a time, first come, first served, no batching: a simple engine for machines where OpenVINO does
    not run. Log-probabilities are the model's own, before penalties and temperature."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        checkpoint = Checkpoint(folder)
        self.context = checkpoint.context_length
        self.vocabulary = checkpoint.vocabulary
        self.eos_token_ids = checkpoint.eos_token_ids
        self._decoder = _Decoder(folder, settings)
        self._chunk = settings.max_batched_tokens
        self._room = int(settings.kv_cache_gb * 2**30 / max(self._decoder.bytes_per_token, 1))
        self._waiting: deque[_Request] = deque()
        self._running: _Request | None = None
        self._next_id = 0

    def submit(self, tokens: Sequence[int], params: GenerationParams) -> int:
        self._check(tokens, params.max_tokens)
        self._next_id += 1
        random = np.random.default_rng(params.seed)
        self._waiting.append(_Request(self._next_id, list(tokens), params, random, self._decoder.empty()))
        return self._next_id

    def _check(self, tokens: Sequence[int], new: int) -> None:
        if not tokens:
            raise RequestError("the prompt is empty", "prompt")
        if min(tokens) < 0 or max(tokens) >= self.vocabulary:
            raise RequestError(f"token ids must lie in 0 … {self.vocabulary - 1}", "prompt", "invalid_token_id")
        if len(tokens) + new > self.context:
            raise ContextTooLong(f"{len(tokens)} prompt tokens and {new} new ones exceed the context of {self.context}")
        if len(tokens) > self._room:
            raise ContextTooLong(f"{len(tokens)} prompt tokens exceed the KV cache of {self._room}")

    def step(self) -> list[Event]:
        if self._running is None:
            if not self._waiting:
                return []
            self._running = self._waiting.popleft()
        request = self._running
        if len(request.prompt) + len(request.produced) > self._room:
            self._running = None
            return [Event(request.id, finish_reason="error", error="the KV cache is exhausted")]
        logits = self._advance(request)
        if logits is None:
            return []
        params = request.params
        token = choose(logits, request.prompt, request.produced, params, request.random)
        if not params.ignore_eos and token in (*self.eos_token_ids, *params.stop_token_ids):
            self._running = None
            return [Event(request.id, finish_reason="stop")]
        request.produced.append(token)
        done = len(request.produced) >= params.max_tokens
        if done:
            self._running = None
        logprobs = (float(log_softmax(logits)[token]),) if params.logprobs else ()
        return [Event(request.id, (token,), logprobs, "length" if done else None)]

    def _advance(self, request: _Request) -> Floats | None:
        """Read the next chunk; the logits (vocabulary,) after the last token, None while the prompt is unfinished."""
        tokens = request.prompt + request.produced
        chunk = tokens[request.read : request.read + self._chunk]
        request.read += len(chunk)
        logits = self._decoder.read(np.array(chunk), request.past, last=True)
        return logits[-1] if request.read == len(tokens) else None

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

    def busy(self) -> bool:
        return self._running is not None or bool(self._waiting)

    def cancel(self, request_id: int) -> None:
        self._waiting = deque(request for request in self._waiting if request.id != request_id)
        if self._running is not None and self._running.id == request_id:
            self._running = None

    def stats(self) -> dict[str, Any]:
        running = self._running is not None
        return {"running": int(running), "waiting": len(self._waiting), "context": self.context,
                "vocabulary": self.vocabulary, "batching": BATCHING}  # fmt: skip

    def close(self) -> None:
        self._waiting.clear()
        self._running = None
        del self._decoder


def preload() -> None:
    """Import the runtime before there is a folder to open."""
    import onnxruntime  # noqa: F401


def open(folder: Path, settings: EngineSettings | None = None) -> OnnxEngine:
    """Load `folder` for generation. Raises `SourceError` when it holds no graph."""
    return OnnxEngine(folder, settings or EngineSettings())
