"""A draft: a smaller bundle with the same tokenizer. What it proposes, the model checks several tokens at a time.

Speculative decoding (Leviathan 2023, https://arxiv.org/abs/2211.17192), but a proposal is taken only when it is the
token that the model chose itself, greedy or sampled, so that the answer stays what it is without a draft.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from lightship.bundle import Bundle
from lightship.checkpoint import context_length, read_json
from lightship.engine import EngineSettings
from lightship.errors import UnsupportedError

TARGET = "openvino"  # the only one whose engine takes a draft
DRAFT_TOKENS = 4  # proposed for each step where nothing was tuned
GRAPH = "openvino_model.xml"
STATE = re.compile(rb'variable_shape="([^"]*)"')
EXTRA = 16  # values that a quantised head stores beside its own, at most: scale and zero point


def open_draft(path: Path | str) -> Bundle:
    """Verify the bundle at `path`, which is to propose. Raises `BundleError`, or `UnsupportedError` for one that
    cannot."""
    draft = Bundle.open(Path(path).resolve())  # what a link names later is another bundle
    if draft.kind != "decoder" or TARGET not in draft.targets:
        raise UnsupportedError(
            f"{draft.name!r} cannot be a draft: it is of the kind {draft.kind}, for {', '.join(draft.targets)}",
            hint="a draft is a model that generates, shipped to OpenVINO",
        )
    return draft


def check_draft(draft: Bundle, bundle: Bundle, target: str, max_context: int | None = None) -> None:
    """Raise `UnsupportedError` unless `draft` can propose to `bundle`, served with `target`: token ids must mean the
    same to both, and the draft must have the context that is served, at most `max_context`."""
    if bundle.kind != "decoder" or target != TARGET:
        raise UnsupportedError(f"{bundle.name!r} takes no draft: it is of the kind {bundle.kind}, served with {target}",
                               hint="a draft is for models that generate, served with OpenVINO")  # fmt: skip
    small, large = draft.target_folder(TARGET), bundle.target_folder(TARGET)
    ours, theirs = read_json(large / "config.json"), read_json(small / "config.json")
    refused = f"{draft.name!r} cannot be a draft of {bundle.name!r}"
    if ours.get("vocab_size") != theirs.get("vocab_size"):
        raise UnsupportedError(f"{refused}: it has {theirs.get('vocab_size')} token ids, the model "
                               f"{ours.get('vocab_size')}", hint=SAME)  # fmt: skip
    if not _same_tokens(small, large):
        raise UnsupportedError(f"{refused}: their tokenizers differ", hint=SAME)
    context, has = context_length(ours) or 2048, context_length(theirs) or 2048
    if has < min(context, max_context or context):
        raise UnsupportedError(f"{refused}: it has a context of {has} tokens, the model one of {context}",
                               hint=f"serve with --max-context {has}, or take another draft")  # fmt: skip
    cache_gb(large, small, 1)


SAME = "take a smaller model of the same family"


def _same_tokens(small: Path, large: Path) -> bool:
    """Whether both tokenizers give every token the same id."""
    if (small / "tokenizer.json").read_bytes() == (large / "tokenizer.json").read_bytes():
        return True
    from lightship.tokenizer import load_tokenizer

    return load_tokenizer(small).get_vocab() == load_tokenizer(large).get_vocab()


# ── Its KV cache ────────────────────────────────────────────────────────────


def cache_gb(folder: Path, draft: Path, kv_cache_gb: int) -> int:
    """GiB that the cache of the runtime folder `draft` needs to hold every token that one of `kv_cache_gb` GiB holds
    for `folder`, at the same precision. Raises `UnsupportedError` for a graph that does not tell."""
    least = sum(heads * size for heads, size in _states(folder))
    most = sum(heads * (size + EXTRA) for heads, size in _states(draft))
    return max(math.ceil(kv_cache_gb * most / least), 1)


def _states(folder: Path) -> list[tuple[int, int]]:
    """Heads and values of a head, of the keys and the values of every layer."""
    shapes = (found.decode().split(",") for found in STATE.findall((folder / GRAPH).read_bytes()))
    states = [
        (int(shape[1]), int(shape[3]))
        for shape in shapes
        if len(shape) == 4 and shape[0] == shape[2] == "?" and shape[1].isdigit() and shape[3].isdigit()
    ]
    if not states:
        raise UnsupportedError(f"{folder / GRAPH} has no keys and values of the usual shape: there is no draft with it")
    return states


def total_cache_gb(folder: Path, settings: EngineSettings) -> int:
    """GiB of both caches of an engine that opens `folder` with `settings`."""
    if settings.draft is None:
        return settings.kv_cache_gb
    return settings.kv_cache_gb + cache_gb(folder, Path(settings.draft), settings.kv_cache_gb)
