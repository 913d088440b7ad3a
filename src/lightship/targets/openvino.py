"""OpenVINO: decoders as one stateful graph, served by continuous batching (OpenVINO GenAI); encoders as one graph."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.checkpoint import Checkpoint, context_length
from lightship.engine import EngineSettings, Event, FinishReason, GenerationParams
from lightship.errors import ContextTooLong, EngineError, RequestError, SourceError, UnsupportedError
from lightship.recipe import Precision
from lightship.targets import _openvino_encoder, _openvino_grammar, _openvino_seq2seq, _openvino_weights
from lightship.targets._seq2seq import Seq2SeqEngine, Seq2SeqScorer
from lightship.targets._tracing import tracing

# openvino and nncf report to an analytics service as soon as they are imported, unless this package is missing; None is
# how Python itself marks a module as missing. Nothing else of theirs opens a socket.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

EXTRA = "build"
NEEDS = ("openvino", "openvino_genai", "openvino_tokenizers", "nncf")
GRAPH = "openvino_model.xml"
BATCHING = "continuous"
BLOCK_TOKENS = 32  # of one block of the paged KV cache on a processor
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

    Raises `UnsupportedError` for GPTQ, which needs it."""
    if precision.name != "int4":
        return precision, []
    if precision.gptq:
        raise UnsupportedError("gptq is not available for encoder-decoders: they are quantised without calibration")
    left_out = [name for name in ("awq", "scale_estimation") if precision.data_aware and getattr(precision, name)]
    notes = [f"{' and '.join(left_out)} off: encoder-decoders are quantised without calibration"] if left_out else []
    return precision.model_copy(update={"awq": False, "scale_estimation": False}), notes


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


def quantise(source: Path, folder: Path, precision: Precision, calibration: Sequence[Sequence[int]] = ()) -> None:
    """Compress the weights of the runtime folder `source` into `folder`, see `_openvino_weights`; `calibration` (token
    sequences) feeds the data-aware options."""
    import openvino as ov

    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars would be drawn over ours
        folder.mkdir(parents=True, exist_ok=True)
        graphs = [path.name for path in sorted(source.glob("*_model.xml"))]
        rows = [_graph_inputs(np.array([ids])) for ids in calibration]
        for name in graphs:
            graph = _openvino_seq2seq.read(source, name)
            graph = _openvino_weights.compress(graph, precision, rows, decodes=Checkpoint(source).kind == "decoder")
            ov.save_model(graph, str(folder / name), compress_to_fp16=False)
            del graph
            gc.collect()
    made = {name for graph in graphs for name in (graph, graph.replace(".xml", ".bin"), _openvino_seq2seq.WEIGHTS)}
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.name not in made:
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def finish(folder: Path, precision: Precision) -> None:
    """Record in `engine.json` the precisions at which this folder is served; of an encoder-decoder join the weights."""
    if _is_pair(folder):
        _openvino_seq2seq.join(folder)
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
        self._most = settings.max_num_seqs  # the runtime's own bound does not hold where prefill and decode are mixed
        self._waiting: deque[tuple[int, Sequence[int], Any, tuple[int, ...]]] = deque()
        self._running: dict[int, tuple[Any, tuple[int, ...]]] = {}
        self._next_id = 0
        self._blocks = self._count_blocks()

    def submit(self, tokens: Sequence[int], params: GenerationParams) -> int:
        self._check(tokens, params)
        self._next_id += 1
        stops = () if params.ignore_eos else self._stops(params)
        self._waiting.append((self._next_id, tokens, self._config(params), stops))
        return self._next_id

    def _add(self, request_id: int, tokens: Sequence[int], config: Any, stops: tuple[int, ...]) -> None:
        import openvino as ov

        ids = ov.Tensor(np.array([tokens], dtype=np.int64))
        self._running[request_id] = (self._pipeline.add_request(request_id, ids, config), stops)

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
        if params.grammar is not None:
            config.structured_output_config = _openvino_grammar.config(params.grammar)
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
        while self._waiting and len(self._running) < self._most:
            self._add(*self._waiting.popleft())
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
        return bool(self._running or self._waiting)

    def cancel(self, request_id: int) -> None:
        self._waiting = deque(waiting for waiting in self._waiting if waiting[0] != request_id)
        if request_id in self._running:
            handle, _ = self._running.pop(request_id)
            handle.cancel()

    def _count_blocks(self) -> int:
        """Blocks of the KV cache: one step of a short prompt takes one of them, and the pipeline tells its share."""
        request_id = self.submit([0], GenerationParams(max_tokens=2, ignore_eos=True))
        self.step()
        share: float = self._pipeline.get_metrics().cache_usage
        self.cancel(request_id)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return round(100 / share)

    def stats(self) -> dict[str, Any]:
        usage = self._pipeline.get_metrics().cache_usage / 100 if self._running else 0.0  # it is stale when idle
        return {"running": len(self._running), "waiting": len(self._waiting), "context": self.context,
                "vocabulary": self.vocabulary, "batching": BATCHING, "blocks": self._blocks,
                "block_tokens": BLOCK_TOKENS, "cache_usage": usage}  # fmt: skip

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


def open(folder: Path, settings: EngineSettings | None = None) -> OpenVINOEngine | Seq2SeqEngine:
    """Load `folder` for generation. Raises `SourceError` when it holds no graph."""
    if _is_pair(folder):
        return Seq2SeqEngine(_open_pair(folder, settings or EngineSettings()), folder)
    _check_graph(folder)
    return OpenVINOEngine(folder, settings or EngineSettings())


def open_compiler(folder: Path) -> _openvino_grammar.Compiler:
    """What compiles grammars as the engine of `folder` does, without its weights."""
    vocabulary: int = json.loads((folder / "config.json").read_text())["vocab_size"]
    return _openvino_grammar.Compiler(folder, vocabulary)


def _check_graph(folder: Path) -> None:
    if not (folder / GRAPH).is_file():
        raise SourceError(f"{folder} holds no {GRAPH}", hint="give a bundle's runtime folder")
