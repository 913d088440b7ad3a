"""An encoder without its weights: tokenizer, bounds, labels, pooling, and what its outputs mean. Needs no PyTorch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from lightship.checkpoint import Checkpoint, module_configs, read_json
from lightship.errors import SourceError, UnsupportedError
from lightship.kind import Kind
from lightship.tokenizer import check_ids, check_vocabulary, load_tokenizer

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Mode = Literal["mean", "cls", "max", "mean_sqrt_len", "lasttoken"]
MODES: dict[str, Mode] = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len", "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip
# They count positions from their padding id on, so that this many of `max_position_embeddings` are not for tokens.
OFFSET = ("camembert", "data2vec-text", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl")
# What the graphs give, by kind: see `EncoderEngine.run`.
OUTPUTS: dict[Kind, tuple[str, ...]] = {
    "classifier": ("logits",), "embedder": ("last_hidden_state",), "qa": ("start_logits", "end_logits"),
}  # fmt: skip
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
NEVER = np.float32(-1e9)  # log-probability of what is masked: its probability is 0, and no difference of two is NaN


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one: by `mode`, then scaled to length 1 when `normalise`. `stated` by the model."""

    mode: Mode = "mean"
    normalise: bool = False
    stated: bool = False

    def apply(self, hidden: Floats, mask: Ids) -> Floats:
        """(batch, length, width), padding on the right → (batch, width)."""
        real = mask[..., None].astype(np.float32)
        if self.mode == "cls":
            found = hidden[:, 0]
        elif self.mode == "lasttoken":
            found = hidden[np.arange(len(hidden)), mask.sum(1) - 1]
        elif self.mode == "max":
            found = np.where(real > 0, hidden, -np.inf).max(1)
        else:
            count = real.sum(1)
            found = np.where(real > 0, hidden, 0).sum(1) / (np.sqrt(count) if self.mode == "mean_sqrt_len" else count)
        if self.normalise:
            found = found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)
        return np.asarray(found, np.float32)


@dataclass(frozen=True)
class Row:
    """The tokens of one input and, beside each, which of a pair of texts it belongs to."""

    ids: tuple[int, ...]
    types: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Padded:
    """Rows of one batch, padded on the right: each (batch, length), int64; `mask` is 1 at real tokens."""

    ids: Ids
    mask: Ids
    types: Ids


@dataclass(frozen=True)
class Encoder:
    """A checkpoint or runtime folder as everybody but the runtime sees it.

    `context` in tokens, special ones included; `labels` of a classifier; with `several` each of them is a yes or no of
    its own, else they exclude one another; `pooling` of an embedder; `lower`: a text is lower-cased first.
    """

    kind: Kind
    context: int
    vocabulary: int
    pad: int
    tokenizer: Tokenizer
    labels: tuple[str, ...] = ()
    several: bool = False
    pooling: Pooling = Pooling()
    lower: bool = False

    @staticmethod
    def load(folder: Path) -> Encoder:
        """Read and check the folder's files. Raises `SourceError` or `UnsupportedError` for what does not fit."""
        checkpoint = Checkpoint(folder)
        config = checkpoint.config
        kind = checkpoint.kind
        found = Encoder(
            kind=kind,
            context=context_of(checkpoint),
            vocabulary=checkpoint.vocabulary,
            pad=_pad(config),
            tokenizer=load_tokenizer(folder),
            labels=_labels(config, folder) if kind == "classifier" else (),
            several=config.get("problem_type") == "multi_label_classification",
            pooling=read_pooling(folder) if kind == "embedder" else Pooling(),
            lower=bool(_sentence(folder).get("do_lower_case")),
        )
        check_vocabulary(found.tokenizer, found.vocabulary, folder)
        return found

    def encode(self, text: str, second: str | None = None, param: str | None = "input") -> Encoding:
        """The tokens of a text or a pair, special ones included. Raises `RequestError` for none or too many: nothing is
        ever cut off."""
        encoding = self.tokenizer.encode(text.lower() if self.lower else text, second)
        self.check(encoding.ids, param)
        return encoding

    def check(self, ids: Sequence[int], param: str | None = "input") -> None:
        """Raise `RequestError` for no tokens, foreign ids or more than the context."""
        check_ids(ids, self.vocabulary, self.context, param)

    def pad_rows(self, rows: Iterable[Row]) -> Padded:
        """One batch of `rows`."""
        kept = list(rows)
        shape = (len(kept), max(map(len, kept)))
        ids, mask, types = np.full(shape, self.pad, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for number, row in enumerate(kept):
            ids[number, : len(row)], types[number, : len(row)], mask[number, : len(row)] = row.ids, row.types, 1
        return Padded(ids, mask, types)

    def meaning(self, outputs: Floats, mask: Ids) -> Floats:
        """What the raw outputs of a batch say: embeddings (batch, width), or log-probabilities: of labels
        (batch, labels), with `several` of (yes, no) for each (batch, labels, 2), of start and end at each position
        (batch, 2, length), `NEVER` at padding. Where a real token's outputs are infinite, they say NaN."""
        outputs = np.where(np.isfinite(outputs), outputs, np.float32(np.nan))  # infinity less infinity would warn
        if self.kind == "embedder":
            return self.pooling.apply(outputs, mask)
        if self.kind == "qa":
            masked = np.where(mask[..., None] > 0, outputs, NEVER)
            return log_softmax(np.moveaxis(masked, -1, 1))
        if self.several:
            return log_softmax(np.stack([outputs, np.zeros_like(outputs)], axis=-1))
        return log_softmax(outputs)


def row_of(encoding: Encoding) -> Row:
    """The ids and types of an `Encoding`."""
    return Row(tuple(encoding.ids), tuple(encoding.type_ids))


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities along the last axis, in float32, summed in float64; never below `NEVER`."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64))
    found: Floats = np.maximum(shifted - total.astype(np.float32), NEVER)
    return found


def read_pooling(folder: Path) -> Pooling:
    """The pooling that `modules.json` states (sentence-transformers); without that file the mean over all tokens.

    Raises `UnsupportedError` for modules or modes that would change the embedding and are not known here.
    """
    if not (folder / "modules.json").is_file():
        return Pooling()
    found = Pooling()
    for name, config in module_configs(folder):
        if name == "Pooling":
            found = replace(found, mode=_mode(config, folder), stated=True)
        elif name == "Normalize":
            found = replace(found, normalise=True)
        elif name != "Transformer":
            raise UnsupportedError(f"{folder / 'modules.json'} has a module {name[:60]!r}, which is not supported",
                                   hint="supported are Transformer, Pooling and Normalize")  # fmt: skip
    if not found.stated:
        raise UnsupportedError(f"{folder / 'modules.json'} has no Pooling module", hint="its output is no embedding")
    return found


def _mode(config: dict[str, Any], folder: Path) -> Mode:
    chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    if isinstance(config.get("pooling_mode"), str):
        chosen = [key for key, mode in MODES.items() if mode == config["pooling_mode"]]
    if len(chosen) != 1 or chosen[0] not in MODES:
        raise UnsupportedError(f"{folder} pools by {', '.join(chosen) or config.get('pooling_mode')!r}",
                               hint=f"supported is one of {', '.join(MODES.values())}")  # fmt: skip
    return MODES[chosen[0]]


def _sentence(folder: Path) -> dict[str, Any]:
    """What sentence-transformers says of the texts it takes; empty where it says nothing."""
    path = folder / "sentence_bert_config.json"
    return read_json(path) if path.is_file() else {}


def context_of(checkpoint: Checkpoint) -> int:
    """Tokens that an encoder takes, special ones included: those that its positions leave room for, or fewer where
    sentence-transformers says so. Raises `SourceError` for what cannot be."""
    config, sentence = checkpoint.config, _sentence(checkpoint.folder)
    context = checkpoint.context_length - (_pad(config) + 1 if config.get("model_type") in OFFSET else 0)
    stated = sentence.get("max_seq_length")
    if stated is not None and (type(stated) is not int or stated < 1):
        raise SourceError(f"{checkpoint.folder / 'sentence_bert_config.json'}: max_seq_length is {stated!r}")
    if context < 1:
        raise SourceError(f"{checkpoint.folder / 'config.json'} leaves no room for tokens: {context}")
    return min(context, stated or context)


def _pad(config: dict[str, Any]) -> int:
    """The padding id; in the models of `OFFSET` it decides the positions, and transformers' default is 1 there."""
    pad = config.get("pad_token_id")
    if pad is None:
        return 1 if config.get("model_type") in OFFSET else 0
    if type(pad) is not int or pad < 0:
        raise SourceError(f"config.json: pad_token_id is {pad!r}, expected an id")
    return pad


def _labels(config: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """The names of the labels in the order of the head's rows; the head itself is compared when it is loaded."""
    named, count = config.get("id2label"), config.get("num_labels")
    if named is None:
        named = {str(index): f"LABEL_{index}" for index in range(2 if count is None else count)}
    if not isinstance(named, dict) or {str(key) for key in named} != {str(index) for index in range(len(named))}:
        raise SourceError(f"{folder / 'config.json'}: id2label must name the labels 0 to n − 1",
                          hint=f"received {json.dumps(named)[:200]}")  # fmt: skip
    if count is not None and count != len(named):
        raise SourceError(f"{folder / 'config.json'}: num_labels is {count}, id2label names {len(named)}")
    if len(named) < 2 or config.get("problem_type") == "regression":
        raise UnsupportedError(
            f"{folder} has one label or is a regression; its output is a number and no class",
            hint="supported are classifiers of two labels or more",
        )
    return tuple(str(named[str(index)]) for index in range(len(named)))
