"""A model cut in width computes what the whole one does without the same channels and heads, and the fit of what
remains is that of least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lightship.checkpoint import save
from lightship.compression._activations import norms, read
from lightship.compression._gradients import fisher
from lightship.compression._units import allocate, heads, mlps, refit
from lightship.errors import UnsupportedError, UsageError
from lightship.layers import linears, weight_of
from lightship.low_rank import LowRank
from lightship.step import make_step
from lightship.structure import replace_module
from tests.compression.context import context
from tests.matrix.families import make
from tests.tiny import tiny_encoder, tiny_gpt2, tiny_llama, tiny_seq2seq

WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}  # 8 × 16 is not the width, 64
MODELS = {
    "llama": lambda folder: tiny_llama(folder, **WIDE),
    "biased": lambda folder: tiny_llama(folder, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "qwen2": lambda folder: make("qwen2", folder),
    "qwen3": lambda folder: make("qwen3", folder),
    "gemma3": lambda folder: make("gemma3", folder),
    "gpt2": tiny_gpt2,
    "bert": lambda folder: tiny_encoder(folder, "BertForSequenceClassification"),
    "distilbert": lambda folder: tiny_encoder(folder, "DistilBertForSequenceClassification"),
    "t5": lambda folder: tiny_seq2seq(folder, "t5"),
    "gated t5": lambda folder: tiny_seq2seq(folder, "t5", feed_forward_proj="gated-gelu"),
    "bart": lambda folder: tiny_seq2seq(folder, "bart"),
}
LLAMA_LIKE = ("llama", "biased", "qwen2", "qwen3", "gemma3")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = MODELS[name](tmp_path_factory.mktemp("model"))
        return made[name]

    return get


@torch.no_grad()
def outputs(model, given):
    return next(read(model, given.batches))[0][0]


def step(**options):
    return make_step("width", {"multiple": 16, "update": False, **options})


def zeroed(checkpoint, made):
    """The whole model; what is not in the cut one contributes nothing. Which that is, is read off its weights."""
    model, cut = checkpoint.load("float32"), made.load("float32")
    left = linears(cut)
    for find in (mlps, heads):
        try:
            units = find(model)
        except UnsupportedError:
            continue
        for each in units:
            whole, kept = weight_of(each.reader), weight_of(left[each.name])
            columns = {column.numpy().tobytes() for column in kept.T}
            gone = [index for index, column in enumerate(whole.T) if column.numpy().tobytes() not in columns]
            assert len(gone) == whole.shape[1] - kept.shape[1]
            whole[:, gone] = 0
    return model


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_zeroed_model_does(models, name, uniform, tmp_path):
    if not uniform and name not in LLAMA_LIKE:
        return  # see test_what_is_refused
    checkpoint = models(name)
    given = context(checkpoint)
    shares = {"mlp": 0.7, **({"heads": 0.5} if name in LLAMA_LIKE else {})}
    made = step(uniform=uniform, **shares).apply(checkpoint, tmp_path / "cut", given)
    found, expected = outputs(made.load(), given), outputs(zeroed(checkpoint, made), given)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - outputs(checkpoint.load(), given)).abs().max() > 0.01
    kept = made.lineage[-1]["kept"]
    assert sum(kept["mlp"]) <= 0.7 * sum(each.count for each in mlps(checkpoint.load()))
    assert all(count % 16 == 0 for count in kept["mlp"])
    if uniform:
        assert not made.structure and len(set(kept["mlp"])) == 1


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_plain_transformers_loads_uniform_cuts(models, name, tmp_path):
    checkpoint = models(name)
    made = step(mlp=0.7, heads=0.5).apply(checkpoint, tmp_path / "cut", context(checkpoint))
    plain = AutoModelForCausalLM.from_pretrained(made.folder).eval()
    before, after = checkpoint.load().config, plain.config
    groups = before.num_key_value_heads // 2
    assert (after.num_key_value_heads, after.num_attention_heads) == (groups, before.num_attention_heads // 2)
    head = plain.model.layers[0].self_attn.head_dim
    assert head == checkpoint.load().model.layers[0].self_attn.head_dim
    assert plain.model.layers[0].self_attn.k_proj.out_features == groups * head
    ids = torch.arange(5, 45).reshape(2, 20)
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    cached = plain.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(cached, plain.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options))
    tied = checkpoint.config["tie_word_embeddings"]
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) is tied
    again = made.load()
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied


def test_heads_go_in_whole_groups(models, tmp_path):
    """The weights of the queries that read a group go with it: what is left are blocks of the whole weights."""
    checkpoint = models("llama")
    made = step(mlp=1.0, heads=0.75, uniform=False).apply(checkpoint, tmp_path / "cut", context(checkpoint))
    assert sum(made.lineage[-1]["kept"]["heads"]) == 6
    for whole, cut in zip(checkpoint.load().model.layers, made.load().model.layers, strict=True):
        blocks = {name: getattr(whole.self_attn, name).weight.reshape(4, -1, 64) for name in ("q_proj", "k_proj")}
        keys = cut.self_attn.k_proj.weight.reshape(-1, 16, 64)
        left = [group for group in range(4) if any(torch.equal(blocks["k_proj"][group], each) for each in keys)]
        assert len(left) == len(keys)
        assert torch.equal(cut.self_attn.q_proj.weight.reshape(-1, 32, 64), blocks["q_proj"][left])
        assert cut.self_attn.num_key_value_groups == whole.self_attn.num_key_value_groups == 2


@pytest.mark.parametrize("importance", ["activation", "fisher"])
def test_what_adds_the_least_goes(models, importance, tmp_path):
    """Importance against plain sums in float64, of what a channel adds for each token, squared; by fisher in the metric
    of the answers' gradients."""
    checkpoint = models("llama")
    given = context(checkpoint)
    model = checkpoint.load("float64")
    units = mlps(model)[1]
    asked = fisher(model, {"x": units.reader}, given.batches, given.seed)["x"] if importance == "fisher" else None
    found = units.energy(norms(model, {"x": units.reader}, given.batches)["x"], asked)
    seen = []
    units.reader.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].numpy()))
    list(read(model, given.batches))
    rows = seen[0][given.batches[0]["attention_mask"] == 1]
    weight = units.reader.weight.detach().numpy()
    metric = np.eye(64) if asked is None else asked.numpy()
    added = [[value * weight[:, index] for value in rows[:, index]] for index in range(128)]
    expected = [sum(float(each @ metric @ each) for each in channel) for channel in added]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    made = step(mlp=0.5, importance=importance).apply(checkpoint, tmp_path / "cut", given)
    kept = made.load("float64").model.layers[1].mlp.up_proj.weight
    best = sorted(np.argsort(expected)[64:])
    assert torch.equal(kept, model.model.layers[1].mlp.up_proj.weight[best])


def test_layers_that_the_answers_depend_on_keep_more(tmp_path):
    """The first layer adds a thousandth of what it did; by its own energy it is like the others."""
    model = tiny_llama(tmp_path / "model", num_hidden_layers=3).load("float32")
    for name, weight in model.named_parameters():
        if name.startswith("model.layers.0.mlp.down_proj"):
            weight.data *= 1e-3
    changed = save(model, tmp_path / "model", tmp_path / "quiet", {"step": "quiet"})
    given = context(changed)
    kept = {}
    for importance in ("activation", "fisher"):
        made = step(mlp=0.5, uniform=False, importance=importance).apply(changed, tmp_path / importance, given)
        kept[importance] = made.lineage[-1]["kept"]["mlp"]
    assert kept["fisher"][0] == 16 < min(kept["fisher"][1:])
    assert kept["activation"][0] > 32


def test_the_fit_is_that_of_least_squares():
    """Against numpy's, with the ridge as further rows."""
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(200, 12)) @ draw.normal(size=(12, 12))
    weight, kept, ridge = draw.normal(size=(5, 12)), [0, 2, 3, 7, 8, 11], 0.03
    moments = inputs.T @ inputs
    damp = np.sqrt(ridge * np.mean(np.diag(moments)))
    left = np.vstack([inputs[:, kept], damp * np.eye(len(kept))])
    right = np.vstack([inputs @ weight.T, damp * weight[:, kept].T])
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    found = refit(torch.from_numpy(weight), torch.from_numpy(moments), torch.tensor(kept), ridge)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    whole = refit(torch.from_numpy(weight), torch.from_numpy(moments), torch.arange(12), ridge)
    np.testing.assert_allclose(whole.numpy(), weight, rtol=1e-7)  # nothing gone, nothing changed


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_the_fit_brings_the_last_mlp_nearer(models, name, tmp_path):
    """What the last layer's MLP gives on the calibration set, all layers before it as they were."""
    checkpoint = models(name)
    given = context(checkpoint)
    found = {}
    for update in (False, True):
        made = step(mlp=0.5, update=update).apply(checkpoint, tmp_path / str(update), given)
        whole = checkpoint.load("float64")
        last, cut = mlps(whole)[-1], mlps(made.load("float64"))[-1]
        results = []
        last.reader.register_forward_hook(lambda module, arguments, output, results=results: results.append(output))
        list(read(whole, given.batches))
        for (writer, _), (other, _) in zip(last.writers, cut.writers, strict=True):
            replace_module(whole, _name(whole, writer), other)
        replace_module(whole, last.name, cut.reader)
        cut.reader.register_forward_hook(lambda module, arguments, output, results=results: results.append(output))
        list(read(whole, given.batches))
        found[update] = float((results[0] - results[1]).square().mean())
    assert found[True] < 0.9 * found[False]


def _name(model, wanted):
    return next(name for name, module in model.named_modules() if module is wanted)


def test_layers_share_a_budget():
    scores = [torch.tensor([5.0, 1, 9, 9]), torch.tensor([8.0, 8, 8, 8]), torch.tensor([0.5, 0.5, 0.5, 0.5])]
    assert allocate(scores, 0.75, 1) == [4, 4, 1]  # its last stays
    assert allocate(scores, 0.70, 1) == [3, 4, 1]
    assert allocate(scores, 0.75, 2) == [2, 4, 2]  # in pairs
    with pytest.raises(UsageError, match="less than the smallest"):
        allocate(scores, 0.01, 2)


def test_it_goes_on_after_low_rank_and_another_cut(models, tmp_path):
    model = models("llama").load()
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.o_proj"):
        low = LowRank.of(model.get_submodule(name), 24)
        torch.nn.init.normal_(low.reduce.weight), torch.nn.init.normal_(low.expand.weight)
        replace_module(model, name, low)
    whole = save(model, models("llama").folder, tmp_path / "whole", {"step": "by hand"})
    given = context(whole)
    once = step(mlp=0.8, heads=0.75, uniform=False).apply(whole, tmp_path / "once", given)
    assert dict(once.structure.low_rank) == dict(whole.structure.low_rank)
    found = outputs(once.load(), given)
    model = whole.load()
    for find in (mlps, heads):
        for each, cut in zip(find(model), find(once.load()), strict=True):
            silence(each, cut)
    torch.testing.assert_close(found, outputs(model, given), atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError, match="already"):
        step(mlp=0.8, heads=0.9).apply(once, tmp_path / "no", given)
    twice = step(mlp=0.8, uniform=False, update=True).apply(once, tmp_path / "twice", given)
    assert sum(each["intermediate_size"] for each in twice.structure.layers) < 0.8 * 0.8 * 256 + 1
    assert torch.isfinite(outputs(twice.load(), given)).all()


def silence(whole, cut):
    """Zero what `whole` reads of the units that `cut` has not."""

    def matrix(units):
        reader = units.reader
        return reader.reduce.weight.data if isinstance(reader, LowRank) else reader.weight.data

    columns = {column.numpy().tobytes() for column in matrix(cut).T}
    for column in matrix(whole).T:
        if column.numpy().tobytes() not in columns:
            column.zero_()


@pytest.mark.parametrize(
    ("name", "options", "kind", "word"),
    [
        ("llama", {"heads": 0.2}, UsageError, "leaves none of 4"),
        ("llama", {"mlp": 0.1}, UsageError, "leaves none of 128 in steps of 16"),
        ("llama", {"mlp": 1.0}, UsageError, "would cut nothing"),
        ("llama", {"heads": 0.75}, UnsupportedError, r"hidden size \(64\) is not a multiple"),
        ("gpt2", {"heads": 0.5}, UnsupportedError, "heads are cut in llama-like models only"),
        ("gpt2", {"uniform": False}, UnsupportedError, "llama-like"),
        ("bert", {"heads": 0.5}, UnsupportedError, "heads are cut in llama-like models only"),
        ("t5", {"uniform": False}, UnsupportedError, "llama-like"),
    ],
)
def test_what_is_refused(models, tmp_path, name, options, kind, word):
    checkpoint = models(name)
    with pytest.raises(kind, match=word) as caught:
        step(**options).apply(checkpoint, tmp_path / "cut", context(checkpoint))
    assert caught.value.hint and not (tmp_path / "cut").exists()


def test_attention_with_parts_that_depend_on_the_number_of_heads_is_refused(tmp_path):
    """OLMo 2 normalises all queries together."""
    checkpoint = make("olmo2", tmp_path / "olmo2")
    with pytest.raises(UnsupportedError, match="q_norm"):
        step(heads=0.5).apply(checkpoint, tmp_path / "cut", context(checkpoint))
    with pytest.raises(UnsupportedError, match="0 MLPs"):
        phi3 = make("phi3", tmp_path / "phi3")
        step().apply(phi3, tmp_path / "fused", context(phi3))


def test_random_is_seeded(models, tmp_path):
    checkpoint = models("llama")
    made = [step(importance="random").apply(checkpoint, tmp_path / f"{index}", context(checkpoint, seed=seed))
            for index, seed in enumerate((1, 1, 2))]  # fmt: skip
    assert made[0].digest() == made[1].digest() != made[2].digest()
