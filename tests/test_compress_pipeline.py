"""A checkpoint through several steps: what is measured, kept, found again, and refused."""

from __future__ import annotations

import json

import pytest
import torch

from lightship.calibration import default_text
from lightship.checkpoint import Checkpoint, save
from lightship.compress_pipeline import compress
from lightship.compression.magnitude import Magnitude
from lightship.encoder import Encoder, read_pooling
from lightship.errors import LightshipError, LimitExceeded, SourceError, UnknownName, UnsupportedError, UsageError
from lightship.evaluation import calibrating
from lightship.evaluation.encoders import SCORED, score_rows
from lightship.recipe import Recipe
from tests.tiny import tiny_encoder, tiny_llama, tiny_seq2seq

LIGHT, HEAVY = {"magnitude": {"sparsity": 0.01}}, {"magnitude": {"sparsity": 0.6}}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A llama with a short context: its passages are short."""
    return tiny_llama(tmp_path_factory.mktemp("small") / "llama", max_position_embeddings=128)


def made(source, folder, *steps, **given):
    return compress(Recipe(source=str(source), steps=steps, **given), folder / "out", runs=folder / "runs", force=True)


def test_two_steps(small, tmp_path):
    found = made(small.folder, tmp_path, LIGHT, HEAVY)
    first, second = found.made
    losses = [next(each.value for each in made.metrics if each.name == "kld") for made in found.made]
    assert 0 < losses[0] < 0.01 < losses[1]
    assert {"kld", "top1", "flips", "perplexity"} <= {metric.name for metric in second.metrics}
    assert found.checkpoint == Checkpoint(tmp_path / "out") and found.original == small
    weights = found.checkpoint.load().model.layers[0].mlp.up_proj.weight
    assert (weights == 0).float().mean() == pytest.approx(0.6, abs=0.01)
    one, two = found.checkpoint.lineage
    assert (one["step"], one["options"]["sparsity"], two["options"]["sparsity"]) == ("magnitude", 0.01, 0.6)
    assert two["digest"] == first.checkpoint.digest() != one["digest"] == small.digest()
    assert two["seconds"] > 0 and two["tokens"] == 32 * 128 and two["seed"] == 0 and len(two["calibration"]) == 64
    assert two["peak_bytes"] is None or two["peak_bytes"] > 10**8


def test_finished_steps_are_found_again(small, tmp_path, monkeypatch):
    digest = made(small.folder, tmp_path, LIGHT, HEAVY).checkpoint.digest()
    applied = []
    real = Magnitude.change
    monkeypatch.setattr(Magnitude, "change", lambda self, *given: applied.append(self.sparsity) or real(self, *given))
    assert made(small.folder, tmp_path, LIGHT, HEAVY).checkpoint.digest() == digest
    assert applied == []
    made(small.folder, tmp_path, LIGHT, {"magnitude": {"sparsity": 0.2}})
    assert applied == [0.2], "only the step that changed is done"
    made(small.folder, tmp_path, LIGHT, HEAVY, seed=1)
    assert applied == [0.2, 0.01, 0.6]


def test_another_corpus_at_the_same_path_is_another_step(small, tmp_path):
    corpus = tmp_path / "corpus.txt"
    steps = [{"vocabulary": {"corpus": str(corpus)}}]
    corpus.write_text("the statement")
    first = made(small.folder, tmp_path, *steps).checkpoint.kept_tokens
    corpus.write_text("an expression of another kind, with other words in it")
    assert len(made(small.folder, tmp_path, *steps).checkpoint.kept_tokens) != len(first)


def test_bits_per_byte_are_compared_with_those_of_the_whole_vocabulary(small, tmp_path):
    """What the original says in its own tokens, not among those that were kept."""
    bits = []
    for step in (LIGHT, {"vocabulary": {"keep": 300}}):
        metrics = made(small.folder, tmp_path, step).made[0].metrics
        bits.append(next(each for each in metrics if each.name == "bits_per_byte"))
    whole, fewer = bits
    assert fewer.baseline == pytest.approx(whole.baseline, rel=1e-6)
    assert fewer.baseline != pytest.approx(fewer.value, rel=1e-3)


def test_bits_per_byte_of_an_encoder_decoder_are_compared_so_too(tmp_path):
    model, text = tiny_seq2seq(tmp_path / "t5", "t5"), tmp_path / "pairs.jsonl"
    pairs = [{"source": f"A line about ships, number {n}", "target": f"Ships and harbours {n} times"} for n in range(8)]
    text.write_text("\n".join(map(json.dumps, pairs)))
    bits = []
    for step in (LIGHT, {"vocabulary": {"keep": 0.8}}):
        metrics = made(model.folder, tmp_path, step, text=str(text)).made[0].metrics
        bits.append(next(each for each in metrics if each.name == "bits_per_byte"))
    assert bits[1].baseline == pytest.approx(bits[0].baseline, rel=1e-6)


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "BertModel"])
def test_an_encoder_with_fewer_tokens_is_compared_on_the_same_texts(tmp_path, architecture):
    """Each model with its own tokenizer, in plain transformers, one text at a time."""
    encoder = tiny_encoder(tmp_path / "bert", architecture)
    found = made(encoder.folder, tmp_path, {"vocabulary": {"keep": 0.5}})
    said = []
    for checkpoint in (encoder, found.checkpoint):
        about, model = Encoder.load(checkpoint.folder), checkpoint.load("float32")
        texts = score_rows(Encoder.load(found.checkpoint.folder), default_text(), SCORED["quick"]).texts
        rows = []
        for text in texts:
            ids = torch.tensor([about.tokenizer.encode(text.lower() if about.lower else text).ids])
            with torch.inference_mode():
                output = model(input_ids=ids)
            rows.append(output.logits[0] if "logits" in output else output.last_hidden_state[0].mean(0))
        said.append(torch.stack(rows).double())
    if architecture == "BertModel":
        expected = 1 - torch.nn.functional.cosine_similarity(*said).mean()
    else:
        p, q = (each.log_softmax(-1) for each in said)
        expected = (p.exp() * (p - q)).sum(-1).mean()
    name = "cosine_loss" if architecture == "BertModel" else "kld"
    figure = next(each.value for each in found.made[0].metrics if each.name == name)
    assert figure == pytest.approx(float(expected), rel=1e-3) and figure > 1e-3


def test_a_limit_stops_the_step_that_breaks_it_and_keeps_what_was_made(small, tmp_path):
    with pytest.raises(LimitExceeded, match=r"step 2 magnitude: kld .* exceeds the limit 0\.01 by") as error:
        made(small.folder, tmp_path, LIGHT, HEAVY, LIGHT, limits={"kld": 0.01})
    assert not (tmp_path / "out").exists()
    kept = sorted(path.name[:2] for path in (tmp_path / "runs").glob("*/*") if not path.name.startswith("."))
    assert kept == ["02", "03", "04", "05", "06"] and str(tmp_path / "runs") in error.value.hint
    with pytest.raises(LimitExceeded, match=r"top1 .* is below the limit 0\.99"):
        made(small.folder, tmp_path, HEAVY, limits={"top1": 0.99})
    made(small.folder, tmp_path, LIGHT, HEAVY, LIGHT, limits={"kld": 100})


def test_a_weight_that_is_not_finite_is_an_error(small, tmp_path, monkeypatch):
    def spoil(self, model, context):
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
        return {}

    monkeypatch.setattr(Magnitude, "change", spoil)
    with pytest.raises(LightshipError, match=r"not finite: model\.layers\.0\.mlp\.up_proj"):
        made(small.folder, tmp_path, LIGHT)


@pytest.mark.parametrize("kind", ["bert", "embedder", "t5"])
def test_other_kinds(kind, tmp_path):
    make = {
        "bert": lambda folder: tiny_encoder(folder, "BertForSequenceClassification"),
        "embedder": lambda folder: tiny_encoder(folder, "BertModel"),
        "t5": lambda folder: tiny_seq2seq(folder, "t5"),
    }
    source = make[kind](tmp_path / "model").folder
    if kind == "embedder":
        (source / "1_Pooling").mkdir()
        (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
        pooling = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
        (source / "modules.json").write_text(json.dumps([{"path": "", "type": "x.Transformer"}, pooling]))
    found = made(source, tmp_path, HEAVY)
    assert read_pooling(found.checkpoint.folder) == read_pooling(source)
    name = "cosine_loss" if kind == "embedder" else "kld"
    assert next(each.value for each in found.made[0].metrics if each.name == name) > 1e-3
    assert (found.checkpoint.lineage[-1]["tokens"]) > 100


def test_what_calibrates_must_not_score(small, tmp_path):
    prose = [f"Paragraph {number} tells of ships, harbours and the weather at sea, {number % 7} times." * 3
             for number in range(300)]  # fmt: skip
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("\n\n".join(prose))
    other.write_text("\n\n".join(prose[100:200]))
    with pytest.raises(UsageError, match=r"shares \d+ paragraphs with the text that is scored"):
        made(small.folder, tmp_path, LIGHT, text=str(text), calibrate=str(other))
    with pytest.raises(UsageError, match=r"shares \d+ paragraphs with the text that is scored"):
        made(small.folder, tmp_path, {"vocabulary": {"corpus": str(other)}}, text=str(text))
    other.write_text("Too short.")
    with pytest.raises(UsageError, match="too short"):
        made(small.folder, tmp_path, LIGHT, text=str(text), calibrate=str(other))
    other.write_text("\n\n".join(each.replace("ships", "trains") for each in prose))
    made(small.folder, tmp_path, LIGHT, text=str(text), calibrate=str(other))
    made(small.folder, tmp_path, {"vocabulary": {"corpus": str(other)}}, text=str(text))


def test_pairs_that_are_scored_must_not_calibrate(tmp_path):
    model = tiny_seq2seq(tmp_path / "t5", "t5")
    sentences = [f"Sentence {n} tells of ships, harbours and the weather at sea, more than once." for n in range(300)]
    text, other = tmp_path / "pairs.jsonl", tmp_path / "other.txt"
    text.write_text("\n".join(json.dumps({"source": each, "target": each.upper()}) for each in sentences[:40]))
    other.write_text("\n\n".join(sentences))
    with pytest.raises(UsageError, match="shares 40 paragraphs"):
        made(model.folder, tmp_path, LIGHT, text=str(text), calibrate=str(other))


def test_what_an_encoder_decoder_calibrates_on_ends_where_it_ends(tmp_path):
    model = tiny_seq2seq(tmp_path / "bart", "bart", forced_bos_token_id=None)
    loaded = model.load("float32")
    loaded.final_logits_bias[0, 0] = 50.0  # the token that ends a text
    recipe = Recipe(source=str(tmp_path / "ended"))
    ended = save(loaded, model.folder, tmp_path / "ended", {"step": "ended"})
    batches = calibrating.batches(ended, calibrating.text(recipe, ended))
    assert batches and {batch["decoder_input_ids"].shape[1] for batch in batches} == {2}, "the start, and the end"


def test_an_encoder_that_overflows_is_an_error(tmp_path, monkeypatch):
    def spoil(self, model, context):
        model.classifier.weight.data.fill_(3e38)
        return {}

    monkeypatch.setattr(Magnitude, "change", spoil)
    encoder = tiny_encoder(tmp_path / "bert", "BertForSequenceClassification")
    with pytest.raises(LightshipError, match="not finite"):
        made(encoder.folder, tmp_path, LIGHT)


def test_a_limit_on_what_is_not_measured_is_refused(small, tmp_path):
    with pytest.raises(UsageError, match="cosine_loss: it is not measured of a decoder"):
        made(small.folder, tmp_path, LIGHT, limits={"cosine_loss": 0.1})
    embedder = tiny_encoder(tmp_path / "bert", "BertModel")
    with pytest.raises(UsageError, match="kld: it is not measured of an embedder"):
        made(embedder.folder, tmp_path, LIGHT, limits={"kld": 0.1})


def test_what_cannot_be_is_refused_before_any_work(small, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no step is given"):
        made(small.folder, tmp_path)
    with pytest.raises(UnknownName, match="'magnitud'"):
        made(small.folder, tmp_path, "magnitud")
    with pytest.raises(UsageError, match="sparsity"):
        made(small.folder, tmp_path, {"magnitude": {"sparsity": 1.0}})
    with pytest.raises(SourceError):
        made(tmp_path / "nowhere", tmp_path, LIGHT)
    monkeypatch.setattr("lightship.step.memory_available", lambda: 10)
    with pytest.raises(UnsupportedError, match=r"the step magnitude needs about .* of memory"):
        made(small.folder, tmp_path, LIGHT)
    assert not (tmp_path / "out").exists()


def test_limits_and_steps_of_a_recipe():
    recipe = Recipe(source="x", steps=["magnitude", {"magnitude": {"sparsity": 0.2}}], limits={"kld": 0.3})
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe
    assert [spec.options for spec in recipe.steps] == [{}, {"sparsity": 0.2}] and recipe.kld_limit() == 0.3
    with pytest.raises(ValueError, match="kdl"):
        Recipe(source="x", limits={"kdl": 0.3})
