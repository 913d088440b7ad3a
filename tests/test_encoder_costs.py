"""What is predicted of an encoder's run: its shape from headers, files as they are written, rows as they are cut."""

import json
import shutil
from dataclasses import replace

import pytest

from lightship import encoder_costs, encoder_pipeline
from lightship.checkpoint import Checkpoint
from lightship.costs import Rates
from lightship.encoder import Encoder
from lightship.evaluation.encoders import amount, gate_rows, score_rows
from lightship.evaluation.text import open_text
from lightship.pipeline import plan_convert, plan_ship, run
from lightship.recipe import Precision, Recipe
from lightship.sources import peek
from tests.cli.test_cli import edit
from tests.tiny import tiny_encoder

STEADY = Rates(exact=1e11, fast=3e11, memory=2e10, file=1e9, slow=1.0)
BOTH = ("openvino", "onnx")
INT8 = Precision(name="int8")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("embedder"), "BertModel")


@pytest.fixture
def copy(embedder, tmp_path):
    return Checkpoint(shutil.copytree(embedder.folder, tmp_path / "model"))


def test_the_shape_of_an_encoder(embedder):
    """Against the loaded model itself."""
    model, shape = embedder.load(), peek(str(embedder.folder)).shape
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.table == model.get_input_embeddings().weight.numel()
    assert (shape.layers, shape.hidden, shape.heads, shape.context, shape.width) == (2, 64, 4, 160, 4)
    assert (shape.size, shape.files) == (embedder.weight_bytes, (embedder.folder / "tokenizer.json").stat().st_size)


def test_the_context_is_that_of_the_encoder(copy, tmp_path):
    (copy.folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48}))
    assert peek(str(copy.folder)).shape.context == Encoder.load(copy.folder).context == 48
    roberta = tiny_encoder(tmp_path / "roberta", "RobertaForSequenceClassification")
    assert peek(str(roberta.folder)).shape.context == Encoder.load(roberta.folder).context < 160


@pytest.mark.parametrize(("changes", "says"), [
    ({"num_hidden_groups": 1}, "share their weights"),
    ({"hidden_size": None}, "width of a layer"),
])  # fmt: skip
def test_what_is_not_predicted_says_so(copy, tmp_path, changes, says):
    edit(copy.folder / "config.json", **changes)
    planned = plan_ship(Recipe(source=str(copy.folder)), tmp_path / "out")
    assert says in planned.said() and planned.to_dict()["memory"] is None


def test_every_stage_has_its_cost(embedder, tmp_path):
    shape, tokens = peek(str(embedder.folder)).shape, amount(160, 64, 5)
    for targets in (BOTH, ("onnx",)):
        found = encoder_costs.predict(shape, INT8, tokens, STEADY, targets)
        assert tuple(found) == encoder_pipeline.stages(targets)
    recipe = Recipe(source=str(embedder.folder))
    whole, first = plan_ship(recipe, tmp_path / "out"), plan_convert(recipe, tmp_path / "out")
    assert whole.predicted and first.predicted and first.seconds < whole.seconds
    assert [step.name for step in first.steps] == list(encoder_pipeline.stages(BOTH[:1], convert=True))


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_files_are_predicted_as_they_are_written(tmp_path, precision):
    """Stage by stage: weights, with the tokenizer; a tiny graph's description is no figure. The model is wide enough
    for its vectors and scales to count little."""
    wide = {"hidden_size": 256, "intermediate_size": 1024}
    checkpoint = tiny_encoder(tmp_path / "model", "BertForSequenceClassification", **wide)
    recipe = Recipe(source=str(checkpoint.folder), name="tiny", out=str(tmp_path / "out"), accept=("kld<=9",),
                    precision=Precision(name=precision))  # fmt: skip
    planned = plan_ship(recipe, tmp_path / "other")

    def stop(line):
        if line.endswith("] evaluate"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, runs=tmp_path / "runs", progress=stop)
    steps = {step.name: step.cost for step in planned.steps}
    targets = BOTH[:1] if precision == "bf16" else BOTH
    for target in targets:
        fixed = encoder_costs.TARGETS[target].layer * 2
        for stage in (f"export {target}", f"quantise {target}"):
            (folder,) = (tmp_path / "runs" / "tiny").glob(f"[0-9][0-9]-{stage.replace(' ', '-')}-*")
            kept = (*folder.rglob("*.bin"), *folder.rglob("*.data"), *folder.rglob("tokenizer.json"))
            assert steps[stage].kept - fixed == pytest.approx(sum(path.stat().st_size for path in kept), rel=0.05)
    assert planned.result == steps["pack"].kept == sum(steps[f"quantise {target}"].kept for target in targets)


def test_rows_are_counted_as_they_are_cut(embedder):
    encoder, text = Encoder.load(embedder.folder), open_text(None, None)
    tokens = amount(encoder.context, 64, 5)
    for rows, calls in (
        (gate_rows(encoder, text), tokens.gate_calls),
        (score_rows(encoder, text, 64), tokens.score_calls),
    ):
        batches = list(rows.batches(encoder))
        assert len(batches) == calls
        assert max(batch.ids.size for batch in batches) <= tokens.widest
        assert max(map(len, rows.rows)) <= tokens.longest
    assert (tokens.speed, tokens.speed_calls, tokens.speed_widest) == (6 * 48 * 48, 6 * 17, 32 * 48)


def test_more_work_costs_more(embedder):
    """Slower rates, a larger model, more targets, wider weights: never less time, memory or disk."""
    shape, tokens = peek(str(embedder.folder)).shape, amount(160, 64, 5)

    def totals(shape=shape, precision=INT8, tokens=tokens, rates=STEADY, targets=BOTH):
        found = encoder_costs.predict(shape, precision, tokens, rates, targets).values()
        return sum(cost.seconds for cost in found), max(cost.memory for cost in found), sum(cost.kept for cost in found)

    seconds, memory, kept = totals()
    large = replace(shape, parameters=10**8, size=4 * 10**8, table=10**7)
    assert all(more > less for more, less in zip(totals(large), (seconds, memory, kept), strict=True))
    for slower in (replace(STEADY, slow=2.0), replace(STEADY, exact=1e9), replace(STEADY, file=1e5)):
        assert totals(rates=slower)[0] > seconds and totals(rates=slower)[1:] == (memory, kept)
    assert totals(tokens=amount(160, 256, 15))[0] > seconds
    assert all(one < both for one, both in zip(totals(large, targets=("onnx",)), totals(large), strict=True))
    assert totals(large, Precision(name="fp32"))[2] > totals(large)[2]
    longer = amount(2048, 64, 5)  # the scores of attention grow with the square
    assert all(more > less for more, less in zip(totals(tokens=longer)[:2], (seconds, memory), strict=True))
