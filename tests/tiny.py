"""Tiny random models with real tokenizers, built by the tests. `initializer_range` is wide: at the usual 0.02 a wrong
RoPE base moves nothing, and a gate that cannot fail proves nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from lightship.checkpoint import Checkpoint

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def tiny_tokenizer(folder: Path, size: int = 512, kind: str = "bpe") -> int:
    """A tokenizer trained on the Python language reference; returns the vocabulary size."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(_trained(kind, size))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return tokenizer.get_vocab_size()


@cache
def _trained(kind: str, size: int) -> str:
    """The JSON of a trained tokenizer: `bpe` of bytes as GPT-2 and llama 3 have, `sentencepiece`, BPE of characters as
    llama 2 has, `unigram` of SentencePiece's shape, or `wordpiece` of BERT's."""
    from pydoc_data.topics import topics

    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    options = {"vocab_size": size, "special_tokens": SPECIAL, "show_progress": False}
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind == "sentencepiece":
        return _sentencepiece(sorted(topics.values())[:40], size)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")  # as the real ones have it
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **{**options, "special_tokens": [*SPECIAL, "<unk>"]})
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**{**options, "special_tokens": [*SPECIAL, "[UNK]"]})
    tokenizer.train_from_iterator(sorted(topics.values()), trainer)
    return tokenizer.to_str()


def _sentencepiece(texts: list[str], size: int) -> str:
    """As llama 2's `tokenizer.json` is made of SentencePiece's model: every way to make a token is a merge, in the
    order of the tokens."""
    import json

    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    first = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size - 256 - len(first), show_progress=False)
    trained.train_from_iterator(texts, trainer)
    learnt = [left + right for left, right in json.loads(trained.to_str())["model"]["merges"]]
    characters = sorted(set(trained.get_vocab()) - set(learnt))
    tokens = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(learnt), *characters]
    known = set(tokens)
    merges = [(token[:at], token[at:]) for token in dict.fromkeys(learnt) for at in range(1, len(token))
              if {token[:at], token[at:]} <= known]  # fmt: skip
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in first])
    return tokenizer.to_str()


def tiny_llama(folder: Path, **changes) -> Checkpoint:
    """A llama of two layers in `folder`; `changes` go into its LlamaConfig."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    vocabulary = tiny_tokenizer(folder)
    options = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.25, "vocab_size": vocabulary,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**options, **changes}))
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    return Checkpoint(folder)


def tiny_gpt2(folder: Path, **changes) -> Checkpoint:
    """A GPT-2 of two layers in `folder`: learned positions, fused projections, biases; `changes` go into its config."""
    import torch
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    vocabulary = tiny_tokenizer(folder)
    options = {
        "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048, "initializer_range": 0.25,
        "vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**options, **changes}))
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    return Checkpoint(folder)


def wordpiece(folder: Path, size: int = 400, *, roberta: bool = False) -> int:
    """A lower-casing WordPiece trained on the Python language reference, as BERT's or, special tokens included, as
    RoBERTa's (padding id 1, no token types); returns the vocabulary size."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    first, pad, last, unknown = ("<s>", "<pad>", "</s>", "<unk>") if roberta else ("[CLS]", "[PAD]", "[SEP]", "[UNK]")
    special = [first, pad, last, unknown] if roberta else [pad, unknown, first, last]
    tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(sorted(topics.values())[:20], trainer)
    second = 0 if roberta else 1
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} {f'{last} ' if roberta else ''}$B:{second} {last}:{second}",
        special_tokens=[(token, special.index(token)) for token in (first, last)],
    )
    tokenizer.enable_truncation(64)  # as MiniLM's own file has it: nothing may be cut off silently
    tokenizer.enable_padding(length=64, pad_id=special.index(pad), pad_token=pad)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def tiny_encoder(folder: Path, architecture: str, *, seed: int = 0, **changes) -> Checkpoint:
    """An encoder of two layers in `folder`, such as `BertForSequenceClassification`; `changes` go into its config."""
    import torch
    import transformers

    vocabulary = wordpiece(folder, roberta=architecture.startswith("Roberta"))
    options = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 160, "initializer_range": 0.25, "vocab_size": vocabulary,
    }  # fmt: skip
    if architecture.startswith("Roberta"):
        options.update(pad_token_id=1, type_vocab_size=1)
    if architecture.startswith("DistilBert"):
        options = {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 160,
                   "initializer_range": 0.25, "vocab_size": vocabulary}  # fmt: skip
    torch.manual_seed(seed)
    kind = getattr(transformers, architecture)
    kind(kind.config_class(**{**options, **changes})).save_pretrained(folder)
    return Checkpoint(folder)


def tiny_seq2seq(folder: Path, model_type: str, *, kind: str = "unigram", seed: int = 0, **changes) -> Checkpoint:
    """An encoder-decoder of two layers each, such as `t5` or `bart`; its tokenizer ends every text with its last
    special token. `changes` go into its config."""
    import torch
    from tokenizers import Tokenizer, processors
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(_trained(kind, 512))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|user|>")
    fast.save_pretrained(folder)
    begins = 2 if model_type in ("t5", "mt5", "umt5", "marian", "pegasus") else 0  # padding, or end-of-text
    ids = {"pad_token_id": 2, "eos_token_id": 0, "decoder_start_token_id": begins}
    options = {
        "vocab_size": tokenizer.get_vocab_size(), "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
        "max_position_embeddings": 512, "init_std": 0.25, "forced_eos_token_id": None, "bos_token_id": 1, **ids,
    }  # fmt: skip
    if model_type in ("t5", "mt5", "umt5"):
        options = {"vocab_size": tokenizer.get_vocab_size(), "d_model": 64, "d_kv": 16, "num_heads": 4, "num_layers": 2,
                   "d_ff": 128, "initializer_factor": 1.0, **ids}  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **{**options, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.requires_grad:  # biases start at 0 and norms at 1
                parameter += torch.empty_like(parameter).uniform_(-0.3, 0.3)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    return Checkpoint(folder)
