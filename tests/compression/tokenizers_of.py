"""Tokenizers of every kind in a tiny checkpoint, trained on the Python language reference."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

from lightship.checkpoint import Checkpoint
from tests.tiny import _trained, tiny_llama

KINDS = ("bpe", "bpe, words first", "bpe of characters", "unigram", "unigram with bytes", "wordpiece")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SIZE = 900


def checkpoint_with(folder: Path, kind: str) -> Checkpoint:
    """A tiny llama with a tokenizer of `kind`, whose ids have room in a vocabulary of `SIZE` + 256."""
    made = tiny_llama(folder, vocab_size=SIZE + len(BYTES))
    (folder / "tokenizer.json").write_text(json.dumps(_whole(kind)))
    return made


def _whole(kind: str) -> dict:
    if kind == "bpe of characters":
        return _characters()
    whole = json.loads(_trained(kind.split(",")[0].split()[0], SIZE))
    if kind == "bpe, words first":
        whole["model"]["ignore_merges"] = True
    if kind == "unigram with bytes":
        whole["model"]["vocab"] += [[byte, 0.0] for byte in BYTES]
        whole["model"]["byte_fallback"] = True
        whole["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, whole["decoder"]]}
    return whole


def _characters() -> dict:
    """As llama 2 has it: merges of characters, a space is ▁, and what has no token is spelled in bytes."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<unk>", *BYTES]
    trainer = trainers.BpeTrainer(vocab_size=SIZE + len(BYTES), special_tokens=special, show_progress=False,
                                  max_token_length=12)  # fmt: skip
    tokenizer.train_from_iterator((line for topic in sorted(topics.values()) for line in topic.split("\n")), trainer)
    whole = json.loads(tokenizer.to_str())
    whole["added_tokens"] = whole["added_tokens"][:5]  # bytes are tokens of the model, not special ones
    parts = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
             {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]  # fmt: skip
    whole["decoder"] = {"type": "Sequence", "decoders": parts}
    return whole
