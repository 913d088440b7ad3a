"""What the targets share about encoder-decoders: the two parts that are traced, and how they score and generate.

The encoder's graph reads a source once and gives the keys and values that every layer of the decoder attends to; the
decoder's graph takes those with the tokens written so far. So nothing of the source is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lightship.checkpoint import Checkpoint
from lightship.engine import Event, GenerationParams
from lightship.errors import ContextTooLong
from lightship.sampling import log_softmax
from lightship.seq2seq import Seq2Seq
from lightship.targets._sequential import Sequential

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
ENCODER, DECODER = "encoder_model", "decoder_model"  # the files of the two graphs, as Optimum calls them


# ── What is traced ──────────────────────────────────────────────────────────


def parts(checkpoint: Checkpoint, dtype: str | None) -> tuple[tuple[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]:
    """(encoder, example inputs), (decoder, example inputs) to trace. Two rows, one padded on the right, so that no axis
    is specialised and the mask is kept.

    encoder: `input_ids`, `attention_mask` (batch, source) → `cross.<layer>.keys` and `.values`
    (batch, heads, source, width). decoder: `input_ids` (batch, new), `attention_mask` of the source, the `cross` and
    the cache → `logits` (batch, new, vocabulary) and the cache.
    """
    import torch
    from transformers.cache_utils import DynamicCache

    model: Any = checkpoint.load(dtype)
    about = Seq2Seq.load(checkpoint.folder)
    ids = _plain_ids(2, 8, about)
    mask = torch.ones_like(ids)
    mask[0, 5:], ids[0, 5:] = 0, about.pad
    encoder, decoder = _modules(model)
    with torch.no_grad():
        cross = encoder(ids, mask)
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        decoder(_plain_ids(2, 3, about), mask, cross, cache)
    new = {"input_ids": _plain_ids(2, 2, about), "attention_mask": mask, "cross": cross, "past_key_values": cache}
    return (encoder, {"input_ids": ids, "attention_mask": mask}), (decoder, new)


def _plain_ids(rows: int, length: int, about: Seq2Seq) -> Any:
    """Ids that are not the padding."""
    import torch

    ids = torch.arange(2, 2 + rows * length).reshape(rows, length) % about.vocabulary
    ids[ids == about.pad] = (about.pad + 1) % about.vocabulary
    return ids


def _modules(model: Any) -> tuple[Any, Any]:
    import torch
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    class Encoder(torch.nn.Module):  # type: ignore[misc]
        """Runs one step of the decoder for the keys and values it takes from the source; what else that step computes
        is left out of the graph, since nothing depends on it."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, input_ids: Any, attention_mask: Any) -> dict[str, Any]:
            read = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            model.get_decoder()(
                input_ids=input_ids[:, :1], encoder_hidden_states=read, encoder_attention_mask=attention_mask,
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            layers = cache.cross_attention_cache.layers
            return {
                f"{n}.{name}": getattr(layer, name) for n, layer in enumerate(layers) for name in ("keys", "values")
            }

    class Decoder(torch.nn.Module):  # type: ignore[misc]
        """Writes: the keys and values of the source are given, its own are kept in the cache."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, input_ids: Any, attention_mask: Any, cross: dict[str, Any], past_key_values: Any) -> Any:
            source = DynamicCache()
            for layer in range(len(cross) // 2):
                source.update(cross[f"{layer}.keys"], cross[f"{layer}.values"], layer)
            cache = EncoderDecoderCache(past_key_values, source)
            cache.is_updated = dict.fromkeys(range(len(cross) // 2), True)
            width = getattr(model.config, "d_model", 1)
            unread = torch.zeros(input_ids.shape[0], attention_mask.shape[1], width, dtype=cross["0.keys"].dtype)
            out = model(
                decoder_input_ids=input_ids, encoder_outputs=BaseModelOutput(last_hidden_state=unread),
                attention_mask=attention_mask, past_key_values=cache, use_cache=True,
            )  # fmt: skip
            return {"logits": out.logits, "past_key_values": cache.self_attention_cache}

    return Encoder().eval(), Decoder().eval()


# ── How they score and generate ─────────────────────────────────────────────


class Runtime(Protocol):
    """Both graphs of a folder, loaded. One source, or batch of sources, at a time."""

    def encode(self, source: Ids, mask: Ids) -> None:
        """Read sources (batch, length), padded on the right; what was written before is forgotten."""
        ...

    def restart(self) -> None:
        """Forget what was written, not the source."""
        ...

    def decode(self, ids: Ids) -> Floats:
        """Write `ids` (batch, new) after what was written; the logits (batch, new, vocabulary)."""
        ...


@dataclass(frozen=True)
class Seq2SeqScorer:
    """Scores what is written for a source."""

    runtime: Runtime

    def given(self, source: Ids, mask: Ids) -> Given:
        """The scorer of rows that are written for `source` (batch, length)."""
        self.runtime.encode(source, mask)
        return Given(self.runtime)


@dataclass(frozen=True)
class Given:
    """A `BlockScorer` and `Scorer` whose source is read. Rows are padded on the right, so their mask changes nothing:
    no position sees those after it."""

    runtime: Runtime

    def logits(self, ids: Ids, mask: Ids) -> Floats:
        """See `Scorer`."""
        return np.concatenate(list(self.blocks(ids, mask, ids.shape[1])), axis=1)

    def blocks(self, ids: Ids, mask: Ids, size: int) -> Iterator[Floats]:
        """The logits of `size` positions at a time, (batch, ≤ size, vocabulary)."""
        self.runtime.restart()
        for start in range(0, ids.shape[1], size):
            yield self.runtime.decode(ids[:, start : start + size])

    def steps(self, rows: Ids, first: int, count: int) -> Floats:
        """The logits (rows, count, vocabulary) after each of `count` tokens written one by one after `first`."""
        self.runtime.restart()
        self.runtime.decode(rows[:, :first])
        return np.concatenate([self.runtime.decode(rows[:, at : at + 1]) for at in range(first, first + count)], 1)


class Seq2SeqEngine(Sequential):
    """One source at a time."""

    def __init__(self, runtime: Runtime, folder: Path) -> None:
        self._runtime = runtime
        self._about = Seq2Seq.load(folder)
        super().__init__(self._about.context, self._about.vocabulary, self._about.eos)

    def submit(self, tokens: Sequence[int], params: GenerationParams) -> int:
        """Queue a source. Raises `RequestError` for foreign ids, too long a source or too much to write."""
        about = self._about
        about.check(tokens, "prompt")
        if len(about.start) + params.max_tokens > about.context:
            raise ContextTooLong(f"{params.max_tokens} new tokens exceed the context of {about.context}")
        return self._queue(tokens, params)

    def step(self) -> list[Event]:
        """One token of the source in turn."""
        if self._running is None:
            if not self._waiting:
                return []
            self._running = self._waiting.popleft()
            source = np.array([self._running.prompt], np.int64)
            self._runtime.encode(source, np.ones_like(source))
        new = self._running.produced[-1:] or list(self._about.start)
        logits = self._runtime.decode(np.array([new], np.int64))[0, -1]
        if self._about.never:
            logits = logits.copy()
            logits[list(self._about.never)] = -np.inf
        return self._produce(self._running, logits, ())

    def prompt_logprobs(self, tokens: Sequence[int], source: Sequence[int]) -> Floats:
        """log p(token[i] | source, tokens before i) for i ≥ 1, one token at a time as it is served,
        shape (len(tokens) − 1,)."""
        read = np.array([source], np.int64)
        self._runtime.encode(read, np.ones_like(read))
        rows = [self._runtime.decode(np.array([[token]], np.int64))[0, 0] for token in tokens[:-1]]
        values = [log_softmax(row)[token] for row, token in zip(rows, tokens[1:], strict=True)]
        return np.array(values, np.float32)

    def close(self) -> None:
        """Release the model."""
        super().close()
        del self._runtime
