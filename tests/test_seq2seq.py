"""Encoder-decoders, the whole way: both graphs agree with PyTorch, the gate stops what is wrong, serving refuses."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from lightship.bundle import Bundle
from lightship.checkpoint import Checkpoint
from lightship.cli import cli
from lightship.decoder_pipeline import EXACT
from lightship.engine import GenerationParams
from lightship.errors import ContextTooLong, LimitExceeded, RequestError, SourceError, UnsupportedError, UsageError
from lightship.evaluation import divergence, pairs, parity
from lightship.find import find
from lightship.pipeline import check, evaluate, ship
from lightship.recipe import Precision, Recipe
from lightship.seq2seq import Seq2Seq
from tests.tiny import tiny_seq2seq

TARGETS = ("openvino", "onnx")


def recipe(checkpoint, precision="fp32", **given):
    return Recipe(source=str(checkpoint.folder), precision=Precision(name=precision), **given)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return tiny_seq2seq(tmp_path_factory.mktemp("t5") / "model", "t5")


@pytest.fixture(scope="module")
def reference(t5, tmp_path_factory):
    original = find("targets", "pytorch").open_scorer(t5.folder)
    texts = pairs.cut(recipe(t5), t5)
    return parity.record(original, texts.gate_batches(original), tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module", params=TARGETS)
def runtime(request, t5, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runtime") / request.param
    target = find("targets", request.param)
    target.export(t5, folder, "float32")
    target.finish(folder, Precision(name="fp32"))
    return target, folder


GATED = {"is_gated_act": True, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SEVERAL = ("t5", "bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "mt5", "pegasus", "umt5")


@pytest.mark.parametrize(("model_type", "target"), [
    pytest.param(name, target, marks=pytest.mark.slow)
    for name in SEVERAL for target in TARGETS
])  # fmt: skip
def test_encoder_decoders_ship(tmp_path, model_type, target):
    checkpoint = tiny_seq2seq(tmp_path / "model", model_type, **(GATED if model_type == "mt5" else {}))
    bundle = ship(recipe(checkpoint, "int8", target=target, accept=("kld<=0.1",)), tmp_path / "out")
    assert bundle.kind == "seq2seq" and bundle.targets == [target]
    metrics = {metric.name: metric for metric in bundle.report.metrics}
    assert metrics["export_gate_kld"].value < 1e-6 and metrics["export_gate_max_error"].value < 1e-3
    assert metrics["kld"].n > 100 and "what the original writes" in metrics["kld"].method
    assert all(metrics[name].baseline for name in ("load", "prefill", "decode", "peak_rss", "size"))
    assert "bits_per_byte" not in metrics
    report = check(tmp_path / "out", repeats=1)
    assert report.get("golden_kld").value <= report.get("golden_kld").limit


def test_both_graphs_are_the_model(runtime, reference):
    target, folder = runtime
    found = parity.parity(reference, target.open_scorer(folder, EXACT))
    assert found.mean_kld < 1e-6 and found.greedy == 1.0 and found.n > 300
    parity.check_parity(found, 1e-4, "gate", parity.exact_error(0.0, reference.rounding))
    assert 0 < reference.rounding < 1e-4
    row, expected = parity.long_row(reference)
    served = target.open(folder, EXACT).prompt_logprobs(row.ids[0][:50].tolist(), row.source[0].tolist())
    assert np.abs(served - expected[:49]).max() < 1e-3


@pytest.mark.parametrize("fault", ["decoder layers", "encoder layers", "mask", "distances", "NaN", "start"])
def test_the_gate_stops_what_is_wrong(runtime, reference, t5, tmp_path, fault):
    """Seeded into the recorded original, against a right export: the same two models, the sides exchanged."""
    import torch

    target, folder = runtime
    candidate = target.open_scorer(folder, EXACT)
    batches = reference.batches
    wrong = find("targets", "pytorch").open_scorer(t5.folder)
    model = wrong.runtime._model
    with torch.no_grad():
        if fault.endswith("layers"):
            blocks = getattr(model, fault.split()[0]).block  # the first holds the distances of all
            for name, value in blocks[0].layer[-1].state_dict().items():
                other = blocks[1].layer[-1].get_parameter(name)
                kept = other.clone()
                other.copy_(value)
                blocks[0].layer[-1].get_parameter(name).copy_(kept)
        elif fault == "mask":
            encode = wrong.runtime.encode
            wrong.runtime.encode = lambda source, mask: encode(source, np.ones_like(mask))
        elif fault == "distances":
            model.decoder.block[0].layer[0].SelfAttention.relative_attention_max_distance = 32
        elif fault == "start":
            batches = tuple(_begun_otherwise(batch) for batch in batches)
        else:
            model.lm_head.weight[5, 0] = float("nan")
    if fault == "NaN":
        with pytest.raises(Exception, match="NaN"):
            divergence.record(wrong, batches, tmp_path)
        return
    recorded = divergence.record(wrong, batches, tmp_path)
    recorded = divergence.Reference(recorded.folder, reference.batches)  # what was asked of the candidate stays right
    with pytest.raises(LimitExceeded, match="gate"):
        parity.check_parity(
            parity.parity(recorded, candidate), 1e-4, "gate", parity.exact_error(0.0, reference.rounding)
        )


def _begun_otherwise(batch):
    ids = batch.ids.copy()
    ids[:, 0] = 7
    return divergence.Batch(batch.name, ids, batch.mask, batch.scored, batch.source, batch.source_mask)


def test_it_writes_what_transformers_writes(runtime, t5):
    import torch

    target, folder = runtime
    about, model = Seq2Seq.load(folder), t5.load("float32")
    for text in ("The try statement specifies exception handlers.", "a"):
        source = about.tokenizer.encode(text).ids
        assert source[-1] == 0  # what the tokenizer ends every text with
        made = model.generate(input_ids=torch.tensor([source]), max_new_tokens=12, do_sample=False, num_beams=1)
        expected = made[0, 1:].tolist()
        engine = target.open(folder, EXACT)
        assert written(engine, source, max_tokens=12) == [token for token in expected if token != 0]
        assert written(engine, source, max_tokens=12, ignore_eos=True)[: len(expected)] == expected


def written(engine, source, **params):
    engine.submit(source, GenerationParams(**params))
    found = []
    while engine.busy():
        for event in engine.step():
            found += event.token_ids
    return found


def test_sampling_queue_and_bounds(runtime):
    target, folder = runtime
    engine = target.open(folder)
    drawn = [written(engine, [5, 6, 0], max_tokens=8, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    first, second = (engine.submit([5, 0], GenerationParams(max_tokens=3, ignore_eos=True)) for _ in range(2))
    engine.step()
    engine.cancel(first)
    assert {event.request_id for _ in range(3) for event in engine.step()} == {second} and not engine.busy()
    assert engine.stats()["batching"] == "none"
    for source, error in (([], RequestError), ([100_000], RequestError), ([5] * 600, ContextTooLong)):
        with pytest.raises(error):
            engine.submit(source, GenerationParams())
    with pytest.raises(ContextTooLong):
        engine.submit([5], GenerationParams(max_tokens=512))
    never = engine.submit([5, 0], GenerationParams(max_tokens=1, logprobs=True))
    (event,) = engine.step()
    assert event.request_id == never and event.logprobs[0] < 0
    engine.close()


def test_pairs_of_the_user(t5, tmp_path):
    text = tmp_path / "pairs.jsonl"
    entries = [{"source": f"The {number} statement", "target": f"a {number} word or two"} for number in range(40)]
    text.write_text("\n".join(map(json.dumps, entries)))
    cases = tmp_path / "cases.jsonl"
    cases.write_text(json.dumps({"prompt": "The", "expect": {"regex": "."}, "max_tokens": 4}) + "\n")
    bundle = ship(recipe(t5, golden=str(cases)), tmp_path / "out")
    assert "default text only" in bundle.report.meta["verdict"] and bundle.report.get("golden").n == 1
    report = evaluate(tmp_path / "out", str(t5.folder), text=str(text))
    assert "on your text" in report.meta["verdict"] and report.get("kld").value < 1e-6
    assert report.get("bits_per_byte").value > 0 and "targets given" in report.get("kld").method
    for line, said in (
        ("{", "line 1"), ('{"source": "a"}', "target"), ('{"source": "a", "target": " "}', "line 1"), ("", "empty"),
        (json.dumps({"source": "word " * 900, "target": "a"}), "context"),
    ):  # fmt: skip
        text.write_text(line)
        with pytest.raises(UsageError, match=said):
            ship(recipe(t5, text=str(text)), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_serve_and_chat_refuse(t5, tmp_path):
    bundle = ship(recipe(t5, "int8"), tmp_path / "out")
    assert Bundle.open(bundle.folder).kind == "seq2seq" and bundle.report.get("kld").n > 100
    report = check(bundle.folder, repeats=1)
    assert report.get("golden_kld").value <= report.get("golden_kld").limit
    for verb in ("serve", "chat"):
        result = CliRunner().invoke(cli, [verb, str(bundle.folder)])
        assert isinstance(result.exception, UnsupportedError) and "not served yet" in str(result.exception)
    shown = CliRunner().invoke(cli, ["show", str(bundle.folder)])
    assert shown.exit_code == 0 and "seq2seq" in shown.output
    forged = shutil.copytree(bundle.folder, tmp_path / "forged")
    (forged / "golden" / "tokens.json").write_text('{"rows": [[1]]}')
    with pytest.raises(Exception, match="golden/ cannot be read"):
        Bundle(forged, bundle.manifest, "").golden_sources()


def test_equal_constants_are_stored_once(runtime, t5, tmp_path):
    """The table that encoder, decoder and head share, above all."""
    target, folder = runtime
    (file,) = folder.glob("weights.*")
    matrices = sum(each.numel() for each in t5.load().parameters() if each.numel() > 1000)  # shared ones counted once
    assert 4 * matrices <= file.stat().st_size < 4.4 * matrices
    target.quantise(folder, tmp_path / "int8", Precision(name="int8"))
    target.finish(tmp_path / "int8", Precision(name="int8"))
    assert matrices < (tmp_path / "int8" / file.name).stat().st_size < 1.25 * matrices
    assert {path.name for path in (tmp_path / "int8").iterdir()} == {path.name for path in folder.iterdir()}


def test_what_encoder_decoders_are_not_shipped_at(t5, tmp_path):
    with pytest.raises(UnsupportedError, match="gptq"):
        ship(Recipe(source=str(t5.folder), precision=Precision(name="int4", gptq=True)), tmp_path / "out")
    with pytest.raises(UnsupportedError, match="fake"):
        ship(recipe(t5, target="fake"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("file", "change", "match"), [
    ("config.json", {"model_type": "whisper"}, "whisper"),
    ("config.json", {"architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
    ("generation_config.json", {"decoder_start_token_id": "first"}, "decoder_start_token_id"),
    ("generation_config.json", {"decoder_start_token_id": 9999}, "not below the vocabulary"),
    ("generation_config.json", {"pad_token_id": -1}, "pad_token_id"),
    ("config.json", {"vocab_size": 100}, "tokenizer has"),
])  # fmt: skip
def test_odd_folders_are_refused(t5, tmp_path, file, change, match):
    folder = shutil.copytree(t5.folder, tmp_path / "model")
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **change}))
    with pytest.raises((UnsupportedError, SourceError), match=match):
        ship(recipe(Checkpoint(folder)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
