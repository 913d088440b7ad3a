"""OpenVINO: decoders as one stateful graph, served by continuous batching (OpenVINO GenAI); encoders as one graph."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.checkpoint import Checkpoint, context_length
from lightship.engine import EngineSettings, Event, FinishReason, GenerationParams
from lightship.errors import ContextTooLong, EngineError, RequestError, SourceError, UnsupportedError
from lightship.recipe import Precision
from lightship.targets import _openvino_encoder
from lightship.targets._tracing import tracing

# openvino and nncf report to an analytics service as soon as they are imported, unless this package is missing; None is
# how Python itself marks a module as missing. Nothing else of theirs opens a socket.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

EXTRA = "build"
NEEDS = ("openvino", "openvino_genai", "openvino_tokenizers", "nncf")
GRAPH = "openvino_model.xml"
BATCHING = "continuous"
# Runtime precisions at which each weight precision is served. Dynamic quantisation of activations is off everywhere:
# on the demo model in int8 it raised the mean KLD from 0.0049 to 0.0077 and gained no speed (AVX-512 without AMX). For
# fp32 the other approximations are off too; the rest take the runtime's default arithmetic for this processor.
SERVED_AT: dict[str, dict[str, Any]] = {
    "fp32": {"inference_precision": "f32", "kv_precision": "f32", "dynamic_quantisation_group": 0},
    "bf16": {"dynamic_quantisation_group": 0},
    "int8": {"dynamic_quantisation_group": 0},
    "int4": {"dynamic_quantisation_group": 0},
}


# ── Checkpoint → runtime folder ─────────────────────────────────────────────


def export(checkpoint: Checkpoint, folder: Path, dtype: str | None = None) -> None:
    """Write `checkpoint` as one graph, batch and length dynamic, padding by the attention mask: a decoder's is stateful
    and padded on the left, an encoder's is neither.

    `dtype` overrides the dtype of the weights (`float32`, `bfloat16`); activations are traced in float32.
    Raises `UnsupportedError` when the exporter cannot trace the architecture.
    """
    import openvino as ov

    folder.mkdir(parents=True, exist_ok=True)
    encodes = checkpoint.kind != "decoder"
    graph = _openvino_encoder.trace(checkpoint, dtype) if encodes else _trace(checkpoint, dtype)
    _drop_recorded_precision(graph)
    _simplify(graph)
    _count_rows_by_ids(graph)
    ov.save_model(graph, str(folder / GRAPH), compress_to_fp16=False)
    if encodes:
        checkpoint.carry_files(folder)
    else:
        _write_tokenizer(checkpoint.carry(folder), folder)


def settle_encoder(precision: Precision) -> None:
    """Raise `UnsupportedError` for precisions at which encoders are not shipped."""
    if precision.name == "int4":
        raise UnsupportedError("encoders are not shipped at int4", hint="use --precision fp32, bf16 or int8")


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


# Weights of a decoder's head that share a scale. NNCF gives a token's whole row one: on the demo model in int8 (1536
# tokens) groups lower the mean KLD from 0.0049 to 0.0042 and raise top-1 agreement from 94.7 % to 96.0 %, for 3 % more
# bytes in the head and 5 % more of its time, about 1 % of decoding. What is left to gain: OpenVINO's CPU plugin
# (2026.4) rounds logits to bf16 where it computes in bf16, since with integer weights the output has the input's type;
# and the mark that keeps a product in float32 (DisablePrecisionConversion) is lost where it takes such weights.
HEAD_GROUP = 64


def quantise(source: Path, folder: Path, precision: Precision, calibration: Sequence[Sequence[int]] = ()) -> None:
    """Compress the weights of the runtime folder `source` into `folder` (NNCF), embedding and head included.

    int8 is symmetric per output channel. int4 is symmetric in groups along the input; embedding and head take
    int8 unless `precision.all_layers`; `calibration` (token sequences) feeds the data-aware options. A decoder's head
    in int8, with the embedding where they are one table, is symmetric in groups of `HEAD_GROUP` along the input.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars would be drawn over ours
        import nncf
        import openvino as ov

        nncf.set_log_level(logging.ERROR)
        graph = ov.Core().read_model(source / GRAPH)
        head = None if precision.all_layers else _head_in_groups(graph)
        if precision.name == "int8":
            graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
        else:
            graph = _compress_int4(graph, precision, calibration)
        if head is not None:
            _head(graph).input_value(1).replace(head)
        folder.mkdir(parents=True, exist_ok=True)
        ov.save_model(graph, str(folder / GRAPH), compress_to_fp16=False)
    del graph, head
    gc.collect()
    for path in sorted(source.rglob("*")):
        if path.is_file() and not path.name.startswith("openvino_model"):
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _head(graph: Any) -> Any:
    """The matrix product that makes a decoder's logits: all the others lead to it."""
    return [node for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul"][-1]


def _head_in_groups(graph: Any) -> Any:
    """The weights (vocabulary, width) of a decoder's head, computed from integers with a scale per group; None where
    there is no such table, or `HEAD_GROUP` does not divide its width into several."""
    from openvino import opset13

    if not graph.get_sinks():  # an encoder keeps no state
        return None
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


def _compress_int4(graph: Any, precision: Precision, calibration: Sequence[Sequence[int]]) -> Any:
    import nncf

    if precision.data_aware and not calibration:
        raise UnsupportedError("int4 with awq, scale estimation or gptq needs a calibration set")
    rows = [_graph_inputs(np.array([ids])) for ids in calibration]
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


def finish(folder: Path, precision: Precision) -> None:
    """Record in `engine.json` the precisions at which this folder is served."""
    settings = dict(SERVED_AT[precision.name])
    if precision.arithmetic == "f32":
        settings["inference_precision"] = "f32"
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


def open_scorer(folder: Path, settings: EngineSettings | None = None) -> OpenVINOScorer:
    """Load `folder` for scoring at the precisions it is served at."""
    return OpenVINOScorer(folder, settings or EngineSettings())


def open_encoder(folder: Path, settings: EngineSettings | None = None) -> _openvino_encoder.OpenVINOEncoder:
    """Load an encoder's `folder`. Raises `SourceError` when it holds no graph, or one of another kind."""
    _check_graph(folder)
    return _openvino_encoder.OpenVINOEncoder(folder / GRAPH, properties(folder, settings or EngineSettings()))


class OpenVINOEngine:
    """Continuous batching over the paged KV cache of OpenVINO GenAI. Bounds every request before the runtime sees it:
    it would accept foreign ids and prompts beyond the context, and answer garbage."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        import openvino_genai as genai

        config = json.loads((folder / "config.json").read_text())
        self.context = context_length(config) or 2048
        self.vocabulary: int = config["vocab_size"]
        generation = folder / "generation_config.json"
        eos = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
        eos = config.get("eos_token_id") if eos is None else eos
        self.eos_token_ids: tuple[int, ...] = () if eos is None else ((eos,) if isinstance(eos, int) else tuple(eos))
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = settings.kv_cache_gb
        scheduler.max_num_seqs = settings.max_num_seqs
        scheduler.max_num_batched_tokens = settings.max_batched_tokens
        scheduler.enable_prefix_caching = settings.prefix_cache
        self._genai = genai
        try:
            self._pipeline = genai.ContinuousBatchingPipeline(
                str(folder), scheduler, "CPU", properties(folder, settings)
            )
        except RuntimeError as error:
            raise EngineError(
                f"OpenVINO GenAI cannot serve {folder} by continuous batching: {str(error).strip().splitlines()[-1]}",
                hint="try --target onnx",
            ) from error
        self._running: dict[int, tuple[Any, tuple[int, ...]]] = {}
        self._next_id = 0

    def submit(self, tokens: Sequence[int], params: GenerationParams) -> int:
        self._check(tokens, params)
        self._next_id += 1
        return self._add(self._next_id, tokens, self._config(params), () if params.ignore_eos else self._stops(params))

    def _add(self, request_id: int, tokens: Sequence[int], config: Any, stops: tuple[int, ...]) -> int:
        import openvino as ov

        ids = ov.Tensor(np.array([tokens], dtype=np.int64))
        self._running[request_id] = (self._pipeline.add_request(request_id, ids, config), stops)
        return request_id

    def _check(self, tokens: Sequence[int], params: GenerationParams) -> None:
        if not tokens:
            raise RequestError("the prompt is empty", "prompt")
        if min(tokens) < 0 or max(tokens) >= self.vocabulary:
            raise RequestError(f"token ids must lie in 0 … {self.vocabulary - 1}", "prompt", "invalid_token_id")
        if len(tokens) + params.max_tokens > self.context:
            raise ContextTooLong(
                f"{len(tokens)} prompt tokens and {params.max_tokens} new ones exceed the context of {self.context}"
            )

    def _stops(self, params: GenerationParams) -> tuple[int, ...]:
        return (*self.eos_token_ids, *params.stop_token_ids)

    def _config(self, params: GenerationParams) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = params.max_tokens
        config.ignore_eos = params.ignore_eos
        if not params.ignore_eos and self._stops(params):
            stops = self._stops(params)
            config.set_eos_token_id(stops[0])  # without it the pipeline does not stop at stop_token_ids either
            config.stop_token_ids = set(stops)
        config.logprobs = 1 if params.logprobs else 0
        config.presence_penalty = params.presence_penalty
        config.frequency_penalty = params.frequency_penalty
        config.repetition_penalty = params.repetition_penalty
        if params.temperature > 0:
            config.do_sample = True
            config.temperature = params.temperature
            config.top_p = params.top_p
            config.top_k = params.top_k or self.vocabulary
            if params.min_p > 0:
                config.min_p = params.min_p
            config.rng_seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(4), "little")
        return config

    def prompt_logprobs(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """log p(token[i] | tokens before i) for i ≥ 1 on the served path, shape (len(tokens) − 1,).

        Only right with the prefix cache off: with a hit the runtime leaves positions out.
        """
        config = self._config(GenerationParams(max_tokens=1, ignore_eos=True, logprobs=True))
        config.echo = True
        self._next_id += 1
        self._add(self._next_id, tokens, config, ())
        values: list[float] = []
        while self.busy():
            for event in self.step():
                values.extend(event.logprobs)
        if len(values) != len(tokens) + 1:
            raise EngineError(
                f"{len(values)} prompt log-probabilities for {len(tokens)} tokens: is the prefix cache on?"
            )
        return np.array(values[1 : len(tokens)], np.float32)

    def step(self) -> list[Event]:
        if self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return [event for request_id in list(self._running) if (event := self._read(request_id)) is not None]

    def _read(self, request_id: int) -> Event | None:
        handle, stops = self._running[request_id]
        tokens: list[int] = []
        logprobs: list[float] = []
        while handle.can_read():
            for output in handle.read().values():
                tokens.extend(output.generated_ids)
                logprobs.extend(output.generated_log_probs)
        reason = self._reason(handle, tokens, stops)
        if reason is not None:
            del self._running[request_id]
        if reason == "stop" and tokens and tokens[-1] in stops:
            tokens, logprobs = tokens[:-1], logprobs[: len(tokens) - 1]
        if not tokens and not logprobs and reason is None:
            return None
        error = "the KV cache is exhausted" if reason == "error" else None
        return Event(request_id, tuple(tokens), tuple(logprobs), reason, error)

    def _reason(self, handle: Any, tokens: list[int], stops: tuple[int, ...]) -> FinishReason | None:
        status = handle.get_status()
        kinds = self._genai.GenerationStatus
        if status == kinds.RUNNING:
            return None
        if status == kinds.FINISHED:
            return "stop" if tokens and tokens[-1] in stops else "length"
        return "cancelled" if status in (kinds.CANCEL, kinds.STOP) else "error"

    def busy(self) -> bool:
        return bool(self._running)

    def cancel(self, request_id: int) -> None:
        if request_id in self._running:
            handle, _ = self._running.pop(request_id)
            handle.cancel()

    def stats(self) -> dict[str, Any]:
        return {"running": len(self._running), "context": self.context, "vocabulary": self.vocabulary,
                "batching": BATCHING}  # fmt: skip

    def close(self) -> None:
        for request_id in list(self._running):
            self.cancel(request_id)
        del self._pipeline
        _drop_signal_stack()


class _SignalStack(ctypes.Structure):
    """`stack_t` of sigaltstack(2) on Linux."""

    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


def _drop_signal_stack() -> None:
    """Let this thread take signals on its ordinary stack.

    Each instance of OpenVINO's CPU plugin (2026.4) gives its thread a signal stack and puts back the one before when it
    ends. A pipeline's instances end in another order than they began, which leaves the thread with a stack that is
    freed: the next signal, such as Ctrl-C, is then a segmentation fault.
    """
    if sys.platform == "linux":
        disable = 2  # SS_DISABLE
        ctypes.CDLL(None).sigaltstack(ctypes.byref(_SignalStack(None, disable, 0)), None)


def preload() -> None:
    """Import the runtime, which takes a third of a second, before there is a folder to open."""
    import openvino_genai  # noqa: F401


def open(folder: Path, settings: EngineSettings | None = None) -> OpenVINOEngine:
    """Load `folder` for generation. Raises `SourceError` when it holds no graph."""
    _check_graph(folder)
    return OpenVINOEngine(folder, settings or EngineSettings())


def _check_graph(folder: Path) -> None:
    if not (folder / GRAPH).is_file():
        raise SourceError(f"{folder} holds no {GRAPH}", hint="give a bundle's runtime folder")
