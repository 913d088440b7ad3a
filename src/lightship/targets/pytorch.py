"""PyTorch: the original as it came, the reference of every gate and the baseline of every figure. Never served."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.checkpoint import Checkpoint
from lightship.encoder import OUTPUTS
from lightship.engine import EngineSettings, Event, GenerationParams
from lightship.errors import UnsupportedError
from lightship.seq2seq import Seq2Seq
from lightship.targets._encoder import joined, takes_types
from lightship.targets._seq2seq import Seq2SeqEngine, Seq2SeqScorer

EXTRA = "build"


class TorchScorer:
    """Logits of a checkpoint computed in float32, whatever the dtype of its weights: the reference of the gates.

    16-bit weights stay as they are; each module's are widened, which loses nothing, only while it runs: half the
    memory of a float32 copy and the same logits.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._wide = checkpoint.dtype not in ("float16", "bfloat16")
        self._model = checkpoint.load("float32" if self._wide else None)

    def logits(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return np.concatenate(list(self.blocks(ids, mask, ids.shape[1])), axis=1)

    def blocks(
        self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64], size: int
    ) -> Iterator[npt.NDArray[np.float32]]:
        """One forward pass without a cache, handed out `size` positions at a time."""
        import torch

        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        with torch.inference_mode(), _in_float32(self._model):
            logits = self._model(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                position_ids=torch.from_numpy(positions),
                use_cache=False,
            ).logits
        for start in range(0, ids.shape[1], size):
            yield logits[:, start : start + size].float().numpy()

    def steps(self, rows: npt.NDArray[np.int64], first: int, count: int) -> npt.NDArray[np.float32]:
        """The logits (rows, count, vocabulary) after each of `count` tokens read one by one, over the keys and values
        of the `first` before them. Rows without padding."""
        import torch

        ids, found = torch.from_numpy(rows), []
        with torch.inference_mode(), _in_float32(self._model):
            cache = self._model(input_ids=ids[:, :first], use_cache=True, logits_to_keep=1).past_key_values
            for at in range(first, first + count):
                out = self._model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                found.append(out.logits[:, -1].float().numpy())
        return np.stack(found, axis=1)

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The greedy continuations of prompts of one length in the checkpoint's own dtype, `new_tokens` long
        (end-of-text does not stop them)."""
        import torch

        ids = torch.tensor([list(prompt) for prompt in prompts])
        cache: Any = None
        found = []
        with torch.inference_mode(), _in_float32(self._model) if self._wide else contextlib.nullcontext():
            for _ in range(new_tokens):
                out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                ids = out.logits[:, -1:].argmax(-1)
                found.append(ids)
        continuations: list[list[int]] = torch.cat(found, 1).tolist()
        return continuations


@contextlib.contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """`model` computes in float32: the 16-bit parameters of each module are widened while it runs."""
    import torch

    linear = [module for module in model.modules() if type(module) is torch.nn.Linear]
    widest = max((module.weight.numel() for module in linear if _is_narrow(module.weight)), default=0)
    room = torch.empty(widest)  # fresh memory for each weight would cost ten times the copy
    handles = []
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.forward = functools.partial(_linear, module, room)
        elif type(module) is torch.nn.Embedding:  # a lookup is exact in any dtype: the table need not be widened
            handles.append(module.register_forward_hook(lambda module, arguments, output: output.float()))
        elif _narrow_parameters(module):
            handles.append(module.register_forward_pre_hook(_widen))
            handles.append(module.register_forward_hook(_restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in linear:
            del module.forward


def _linear(module: Any, room: Any, inputs: Any) -> Any:
    """What `module` computes, through oneDNN: PyTorch's own choice for float32, MKL, is up to three times slower on
    processors that are not Intel's (`python -m benchmarks.linear`)."""
    import torch

    weight, bias = module.weight, module.bias
    if _is_narrow(weight):
        weight = room[: weight.numel()].view_as(weight).copy_(weight)
    if not torch.backends.mkldnn.is_available():
        return torch.nn.functional.linear(inputs, weight, bias if bias is None else bias.float())
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias if bias is None else bias.float(), "none", [], "")


def _is_narrow(parameter: Any) -> bool:
    return bool(parameter.is_floating_point() and parameter.element_size() == 2)


def _narrow_parameters(module: Any) -> dict[str, Any]:
    """The module's own parameters of 16-bit floats, those of its children left out."""
    return {name: each for name, each in module.named_parameters(recurse=False) if _is_narrow(each)}


def _widen(module: Any, arguments: Any) -> None:
    module.narrow = {name: parameter.data for name, parameter in _narrow_parameters(module).items()}
    for name, data in module.narrow.items():
        getattr(module, name).data = data.float()


def _restore(module: Any, arguments: Any, output: Any) -> None:
    for name, data in module.__dict__.pop("narrow").items():
        getattr(module, name).data = data


class TorchPair:
    """An encoder-decoder as `dtype` (default: its own), a `Runtime`."""

    def __init__(self, checkpoint: Checkpoint, dtype: str | None = None) -> None:
        self._model: Any = checkpoint.load(dtype)

    def encode(self, source: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> None:
        import torch

        self._mask = torch.from_numpy(mask)
        with torch.inference_mode():
            self._read = self._model.get_encoder()(input_ids=torch.from_numpy(source), attention_mask=self._mask)
        self.restart()

    def restart(self) -> None:
        self._cache: Any = None

    def decode(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            out = self._model(
                decoder_input_ids=torch.from_numpy(np.ascontiguousarray(ids)), encoder_outputs=self._read,
                attention_mask=self._mask, past_key_values=self._cache, use_cache=True,
            )  # fmt: skip
        self._cache = out.past_key_values
        found: npt.NDArray[np.float32] = out.logits.float().numpy()
        return found


class TorchPairScorer(Seq2SeqScorer):
    """An encoder-decoder computed in float32, its weights widened once: T5's own code would round what it computes to
    the dtype of its weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(TorchPair(checkpoint, "float32"))
        self.about = Seq2Seq.load(checkpoint.folder)

    def greedy(self, sources: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """What is written for each of `sources`, greedily, `new_tokens` long (end-of-text does not stop them)."""
        ids, mask = self.about.padded(sources)
        self.runtime.encode(ids, mask)
        new, found = np.tile(np.array(self.about.start, np.int64), (len(ids), 1)), []
        for _ in range(new_tokens):
            logits = self.runtime.decode(new)[:, -1]
            logits[:, list(self.about.never)] = -np.inf
            new = logits.argmax(-1)[:, None]
            found.append(new)
        written: list[list[int]] = np.concatenate(found, 1).tolist()
        return written


def open_scorer(folder: Path, settings: EngineSettings | None = None) -> TorchScorer | TorchPairScorer:
    """Load the checkpoint in `folder` for scoring; `settings` has no effect here."""
    checkpoint = Checkpoint(folder)
    return TorchPairScorer(checkpoint) if checkpoint.kind == "seq2seq" else TorchScorer(checkpoint)


class TorchEngine:
    """One sequence at a time, greedy, in the checkpoint's own dtype: the speed and memory of the original."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        import torch

        if settings.threads:
            torch.set_num_threads(settings.threads)
        checkpoint = Checkpoint(folder)
        self._model = checkpoint.load()
        self.context = checkpoint.context_length
        self.vocabulary = checkpoint.vocabulary
        self._eos = checkpoint.eos_token_ids
        self._waiting: list[tuple[int, list[int], GenerationParams]] = []
        self._state: tuple[int, Any, Any, int, GenerationParams] | None = None
        self._next_id = 0

    def submit(self, tokens: Sequence[int], params: GenerationParams) -> int:
        if params.temperature > 0:
            raise UnsupportedError("the PyTorch engine is a greedy baseline; it does not sample")
        self._next_id += 1
        self._waiting.append((self._next_id, list(tokens), params))
        return self._next_id

    def step(self) -> list[Event]:
        import torch

        if self._state is None:
            if not self._waiting:
                return []
            request_id, tokens, params = self._waiting.pop(0)
            self._state = (request_id, torch.tensor([tokens]), None, 0, params)
        request_id, ids, cache, produced, params = self._state
        with torch.inference_mode():
            out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = int(out.logits[0, -1].argmax())
            logprob = float(out.logits[0, -1].float().log_softmax(-1)[token]) if params.logprobs else 0.0
        if token in (*self._eos, *params.stop_token_ids) and not params.ignore_eos:
            self._state = None
            return [Event(request_id, finish_reason="stop")]
        produced += 1
        done = produced >= params.max_tokens
        self._state = None if done else (request_id, torch.tensor([[token]]), out.past_key_values, produced, params)
        return [Event(request_id, (token,), (logprob,) if params.logprobs else (), "length" if done else None)]

    def busy(self) -> bool:
        return self._state is not None or bool(self._waiting)

    def cancel(self, request_id: int) -> None:
        self._waiting = [entry for entry in self._waiting if entry[0] != request_id]
        if self._state is not None and self._state[0] == request_id:
            self._state = None

    def stats(self) -> dict[str, Any]:
        return {"running": int(self.busy()), "context": self.context, "vocabulary": self.vocabulary}

    def close(self) -> None:
        del self._model


def open(folder: Path, settings: EngineSettings | None = None) -> TorchEngine | Seq2SeqEngine:
    """Load the checkpoint in `folder` to measure its speed and memory."""
    checkpoint = Checkpoint(folder)
    if checkpoint.kind == "seq2seq":
        return Seq2SeqEngine(TorchPair(checkpoint), folder)
    return TorchEngine(folder, settings or EngineSettings())


class TorchEncoder:
    """An encoder's checkpoint, in float32 when `inference_precision` is `f32`, else in its own dtype: the reference of
    the gates and the baseline of every figure."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        import torch

        if settings.threads:
            torch.set_num_threads(settings.threads)
        checkpoint = Checkpoint(folder)
        self._model = checkpoint.load("float32" if settings.inference_precision == "f32" else None)
        self._gives = OUTPUTS[checkpoint.kind]
        self._typed = takes_types(self._model)

    def run(
        self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64], types: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """See `EncoderEngine`."""
        import torch

        given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if self._typed:
            given["token_type_ids"] = torch.from_numpy(types)
        with torch.inference_mode():
            out = self._model(**given)
        return joined([out[name].float().numpy() for name in self._gives])

    def close(self) -> None:
        del self._model


def open_encoder(folder: Path, settings: EngineSettings | None = None) -> TorchEncoder:
    """Load an encoder's checkpoint in `folder`. Raises `SourceError` or `UnsupportedError` as `Checkpoint.load`."""
    return TorchEncoder(folder, settings or EngineSettings())
