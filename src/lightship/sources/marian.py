"""A Marian translator as it is published: two SentencePiece models and `vocab.json` instead of `tokenizer.json`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lightship.checkpoint import Checkpoint, now, read_json, require, write_json
from lightship.errors import SourceError, UnsupportedError
from lightship.preflight import Seen, seen_in
from lightship.sources import huggingface

SOURCE, VOCABULARY = "source.spm", "vocab.json"
NORMAL, UNIGRAM = 1, 1  # as sentencepiece_model.proto numbers the kinds of pieces and of models
# What a piece loses that only the target's model knows: it is taken where nothing of the source's fits, and before the
# unknown token, which tokenizers puts 10 below the worst. Those that begin a word come last: the source's own model
# would cut the space off first.
FOREIGN, FOREIGN_WORD = 1000.0, 3000.0


def is_marian(folder: Path) -> bool:
    """Whether `folder` holds such a translator."""
    return (folder / SOURCE).is_file() and not (folder / "tokenizer.json").is_file()


def read(source: str, folder: Path, log: Callable[[str], None]) -> Checkpoint:
    """A copy of the checkpoint folder `source` in `folder`, with the `tokenizer.json` that its files mean.

    Raises `SourceError` or `UnsupportedError` for damaged files and for what cannot be converted.
    """
    place = Path(source)
    tokenizer = convert(place)
    before = Checkpoint(place)
    folder.mkdir(parents=True, exist_ok=True)
    log(f"converting {SOURCE} and {VOCABULARY} to tokenizer.json")
    before.carry_files(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    kept = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", {**kept, "pad_token": "<pad>"})
    for path in huggingface.weight_files(place):
        huggingface.check_safetensors(path)
        shutil.copyfile(path, folder / path.name)
    index = place / "model.safetensors.index.json"
    if index.is_file():
        shutil.copyfile(index, folder / index.name)
    entry = {"step": "tokenizer", "source": place.resolve().name, "digest": before.digest(), "time": now()}
    write_json(folder / "lineage.json", [*before.lineage, entry])
    return Checkpoint(folder)


def peek(path: Path) -> Seen:
    """What configuration and headers of the folder `path` tell. Raises as `read` does."""
    for file in huggingface.weight_files(path):
        huggingface.check_safetensors(file)
    return seen_in(Checkpoint(path))


def convert(place: Path) -> Tokenizer:
    """The tokenizer of the source language, as transformers' `MarianTokenizer` cuts text without sacremoses: the pieces
    of `source.spm` under the ids of `vocab.json`; `>>…<<` names a target language. It also decodes what is written.

    One difference: of several characters in a row that only the target's model knows, each is looked up by itself
    (there all are unknown, unless they are one piece)."""
    require("transformers", "sentencepiece")
    from transformers.convert_slow_tokenizer import import_protobuf

    vocabulary = _vocabulary(place)
    model = import_protobuf().ModelProto()
    try:
        model.ParseFromString((place / SOURCE).read_bytes())
    except Exception as error:  # protobuf's own
        raise SourceError(f"{place / SOURCE} is no SentencePiece model: {str(error)[:200]}") from error
    if model.trainer_spec.model_type != UNIGRAM:
        raise UnsupportedError(f"{place / SOURCE} is no unigram model; only those are converted")
    scores = {piece.piece: float(piece.score) for piece in model.pieces if piece.type == NORMAL}
    if not scores:
        raise SourceError(f"{place / SOURCE} holds no pieces")
    worst = min(scores.values())

    def score(piece: str) -> float:
        return scores.get(piece, worst - (FOREIGN_WORD if piece.startswith("▁") else FOREIGN))

    tokenizer = Tokenizer(models.Unigram([(each, score(each)) for each in vocabulary], vocabulary.index("<unk>")))
    folding = model.normalizer_spec.precompiled_charsmap
    whole: list[Any] = [normalizers.Precompiled(folding)] if folding else []
    whole += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(whole)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    end = vocabulary.index("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    codes = [piece for piece in vocabulary if piece.startswith(">>") and piece.endswith("<<")]
    tokenizer.add_special_tokens([AddedToken(each, normalized=False) for each in ("</s>", "<unk>", "<pad>", *codes)])
    return tokenizer


def _vocabulary(place: Path) -> list[str]:
    """The pieces in the order of their ids. Raises unless these are 0 … n − 1 and the special ones among them."""
    if (place / "target_vocab.json").is_file():
        raise UnsupportedError(f"{place} has a vocabulary for each language; only shared ones are converted")
    known = read_json(place / VOCABULARY)
    found = {number: piece for piece, number in known.items() if type(number) is int}
    if set(found) != set(range(len(known))) or not {"</s>", "<unk>", "<pad>"} <= known.keys():
        raise SourceError(f"{place / VOCABULARY} must number its pieces from 0, </s>, <unk> and <pad> among them")
    return [found[number] for number in range(len(found))]
