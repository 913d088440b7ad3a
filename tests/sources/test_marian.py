"""A Marian translator with SentencePiece files: cut as transformers cuts it, shipped, damaged files refused."""

import json
import shutil

import pytest

from lightship import sources
from lightship.checkpoint import Checkpoint
from lightship.errors import SourceError, UnsupportedError
from lightship.pipeline import convert, plan_ship
from lightship.recipe import Precision, Recipe
from lightship.sources.marian import convert as converted
from tests.tiny import tiny_seq2seq

TEXTS = (
    "The try statement specifies exception handlers.", "  two  spaces\tand a tab \n", "a", "UPPER and lower, 3.14!",
    "naïve façade — “quoted” … ﬁnal", "Unknown: 漢 🚢🚢 end", ">>fra<< The class statement.", "", "x" * 50,
    "an_identifier()",
)  # fmt: skip


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    """Source and target models trained on different texts, one vocabulary over both, as opus-mt has it."""
    from pydoc_data.topics import topics

    import sentencepiece

    folder = tmp_path_factory.mktemp("marian") / "model"
    tiny_seq2seq(folder, "marian", vocab_size=1200)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    english = "\n".join(topics.values())
    written = {
        "source": english[: len(english) // 2],
        "target": english[len(english) // 2 :].upper() + "\n漢字漢字 ещё",
    }
    pieces = ["</s>", "<unk>"]
    for name, text in written.items():
        raw = folder.parent / f"{name}.txt"
        raw.write_text(text)
        sentencepiece.SentencePieceTrainer.train(
            input=str(raw), model_prefix=str(folder.parent / name), vocab_size=600, model_type="unigram",
            character_coverage=1.0, bos_id=-1, minloglevel=2,
        )  # fmt: skip
        (folder.parent / f"{name}.model").rename(folder / f"{name}.spm")
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{name}.spm"))
        pieces += [piece for piece in map(model.id_to_piece, range(len(model))) if piece not in pieces]
    pieces += [">>fra<<", "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"source_lang": "en", "target_lang": "fr"}))
    return folder


def test_it_cuts_as_transformers_does(marian):
    from transformers import MarianTokenizer

    with pytest.warns(UserWarning, match="sacremoses"):  # which would fold punctuation before
        theirs = MarianTokenizer.from_pretrained(marian)
    ours = converted(marian)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text).input_ids, text
    ids = ours.encode("The try statement specifies exception handlers.").ids
    assert ours.decode(ids) == "The try statement specifies exception handlers."


def test_it_converts(marian, tmp_path):
    assert "not predicted" in plan_ship(Recipe(source=str(marian)), tmp_path / "out").said()
    runtime = convert(Recipe(source=str(marian), precision=Precision(name="fp32")), tmp_path / "runtime")
    assert (runtime / "tokenizer.json").is_file() and (runtime / "decoder_model.xml").is_file()
    assert not (marian / "tokenizer.json").exists()  # the source is never written to
    checkpoint = sources.read(str(marian), tmp_path / "read")
    assert checkpoint.kind == "seq2seq" and checkpoint.lineage[-1]["step"] == "tokenizer"


@pytest.mark.parametrize(("file", "content", "match"), [
    ("source.spm", b"\xff\xff", "no SentencePiece model"),
    ("source.spm", b"", "unigram|no pieces"),
    ("vocab.json", b"[]", "JSON object"),
    ("vocab.json", b'{"</s>": 0, "<unk>": 5, "<pad>": 1}', "number its pieces"),
    ("vocab.json", b'{"</s>": 0, "<unk>": 1}', "number its pieces"),
    ("target_vocab.json", b"{}", "for each language"),
])  # fmt: skip
def test_damaged_files_are_refused(marian, tmp_path, file, content, match):
    folder = shutil.copytree(marian, tmp_path / "model")
    (folder / file).write_bytes(content)
    with pytest.raises((SourceError, UnsupportedError), match=match):
        sources.read(str(folder), tmp_path / "read")
    assert not (tmp_path / "read").exists()


def test_the_models_decide_the_digest(marian, tmp_path):
    folder = shutil.copytree(marian, tmp_path / "model")
    (folder / "source.spm").write_bytes((folder / "target.spm").read_bytes())
    assert Checkpoint(folder).digest() != Checkpoint(marian).digest()
