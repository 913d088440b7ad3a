"""PyTorch: the original as it came, the reference of every gate and the baseline of every figure. Never served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.checkpoint import Checkpoint
from lightship.engine import EngineSettings, Event, GenerationParams
from lightship.errors import UnsupportedError

EXTRA = "build"


class TorchScorer:
    """Logits of a checkpoint computed in float32, whatever the dtype of its weights: the reference of the gates."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._model = checkpoint.load("float32")

    def logits(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return np.concatenate(list(self.blocks(ids, mask, ids.shape[1])), axis=1)

    def blocks(
        self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64], size: int
    ) -> Iterator[npt.NDArray[np.float32]]:
        """One forward pass without a cache, handed out `size` positions at a time."""
        import torch

        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        with torch.inference_mode():
            hidden = self._model(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                position_ids=torch.from_numpy(positions),
                use_cache=False,
            ).logits
        for start in range(0, ids.shape[1], size):
            yield hidden[:, start : start + size].float().numpy()

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The greedy continuations of prompts of one length, `new_tokens` long (end-of-text does not stop them)."""
        import torch

        ids = torch.tensor([list(prompt) for prompt in prompts])
        cache: Any = None
        found = []
        with torch.inference_mode():
            for _ in range(new_tokens):
                out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                ids = out.logits[:, -1:].argmax(-1)
                found.append(ids)
        continuations: list[list[int]] = torch.cat(found, 1).tolist()
        return continuations


def open_scorer(folder: Path, settings: EngineSettings | None = None) -> TorchScorer:
    """Load the checkpoint in `folder` for scoring; `settings` has no effect here."""
    return TorchScorer(Checkpoint(folder))


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


def open(folder: Path, settings: EngineSettings | None = None) -> TorchEngine:
    """Load the checkpoint in `folder` to measure its speed and memory."""
    return TorchEngine(folder, settings or EngineSettings())
