"""The architectures of the matrix as tiny random models: two layers of 64 channels, of decoders a context of 2 048.

Whatever a fault could hide behind is off its neutral value: RoPE bases are not 10 000, windows are shorter than the
gate's long row, biases are not 0 and norms not 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightship.checkpoint import Checkpoint
from tests.tiny import tiny_encoder, tiny_seq2seq, tiny_tokenizer

WINDOW = 128
BASE = 500_000.0
SPREAD = 0.25  # initializer_range
ROPE = {"rope_type": "default", "rope_theta": BASE}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {"rope_type": "llama3", "rope_theta": BASE, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 256}  # fmt: skip
LOCAL = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Family:
    """One row of the matrix: `model_type` of transformers, what its configuration changes, and its tokenizer."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "bpe"
    tied: bool = False
    eos: tuple[int, ...] = (0,)


FAMILIES = {
    "llama": Family("llama", {"rope_parameters": LLAMA3}, eos=(0, 2, 3), tied=True),
    "qwen2": Family("qwen2", {"rope_parameters": YARN}, eos=(0, 2), tied=True),
    "qwen3": Family("qwen3", {"rope_parameters": ROPE, "head_dim": 32}, eos=(0, 2), tied=True),
    "mistral": Family("mistral", {"rope_parameters": ROPE, "sliding_window": WINDOW}, tokenizer="unigram"),
    "gemma2": Family(
        "gemma2",
        {"rope_parameters": ROPE, "sliding_window": WINDOW, "layer_types": LOCAL, "head_dim": 16,
         "query_pre_attn_scalar": 24, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        tokenizer="unigram", tied=True, eos=(0, 3),
    ),
    "gemma3": Family(
        "gemma3_text",
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0}},
         "sliding_window": WINDOW, "layer_types": LOCAL, "head_dim": 16, "query_pre_attn_scalar": 24},
        tokenizer="unigram", tied=True, eos=(0, 3),
    ),
    "phi3": Family("phi3", {"rope_parameters": ROPE, "sliding_window": WINDOW}, tokenizer="unigram", eos=(0, 2, 3)),
    "gpt2": Family("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048}, tied=True),
    "opt": Family(
        "opt",
        {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": SPREAD}, tokenizer="wordpiece", tied=True,
    ),
    "gpt-neox": Family("gpt_neox", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}}),
    "olmo2": Family("olmo2", {"rope_parameters": ROPE}),
    "granite": Family(
        "granite",
        {"rope_parameters": ROPE, "embedding_multiplier": 3.0, "attention_multiplier": 0.2,
         "residual_multiplier": 0.7, "logits_scaling": 2.0}, tied=True,
    ),
    "smollm3": Family("smollm3", {"rope_parameters": ROPE, "no_rope_layers": [1, 0]}, tied=True),
    "starcoder2": Family("starcoder2", {"rope_parameters": ROPE, "sliding_window": WINDOW, "use_bias": True}),
}  # fmt: skip


# Encoders: the class of transformers, and what its configuration changes.
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {}),
    "distilbert": ("DistilBertForSequenceClassification",
                   {"num_labels": 4, "problem_type": "multi_label_classification"}),
    "roberta": ("RobertaForQuestionAnswering", {}),
    "deberta-v2": ("DebertaV2ForSequenceClassification",
                   {"num_labels": 3, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                    "position_biased_input": False}),
    "modernbert": ("ModernBertModel",
                   {"local_attention": 32, "global_attn_every_n_layers": 2, "pad_token_id": 0, "bos_token_id": 2,
                    "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}),
}  # fmt: skip
SEQ2SEQ = ("t5", "marian", "bart", "m2m_100")
EVERY = (*FAMILIES, *ENCODERS, *SEQ2SEQ)


def make(name: str, folder: Path, seed: int = 0) -> Checkpoint:
    """The tiny model of `name` in `folder`, its weights drawn with `seed`."""
    if name in ENCODERS:
        architecture, changes = ENCODERS[name]
        return tiny_encoder(folder, architecture, seed=seed, **changes)
    if name in SEQ2SEQ:
        return tiny_seq2seq(folder, name, seed=seed)
    return _make_decoder(name, folder, seed)


def _make_decoder(name: str, folder: Path, seed: int) -> Checkpoint:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    family = FAMILIES[name]
    options = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "max_position_embeddings": 2048, "initializer_range": SPREAD,
        "vocab_size": tiny_tokenizer(folder, kind=family.tokenizer), "tie_word_embeddings": family.tied,
        "bos_token_id": 0, "eos_token_id": list(family.eos), "pad_token_id": 0, **family.config,
    }  # fmt: skip
    default = AutoConfig.for_model(family.model_type)
    known = {name for name in options if hasattr(default, name)} - set(default.attribute_map)
    config = AutoConfig.for_model(family.model_type, **{name: options[name] for name in options if name in known})
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases start at 0 and norms at 1: dropped, they would not be missed
                parameter += torch.empty_like(parameter).uniform_(-0.3, 0.3)
    model.generation_config = GenerationConfig(eos_token_id=list(family.eos), pad_token_id=0)
    model.save_pretrained(folder)
    return Checkpoint(folder)
