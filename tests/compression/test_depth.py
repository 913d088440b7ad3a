"""Layers left out: the model without them computes what one with identities in their place does, and it is theirs that
cost the least."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lightship.checkpoint import Checkpoint, save
from lightship.compression._activations import read
from lightship.compression._stacks import Layers
from lightship.compression.depth import greedy, influence
from lightship.errors import UnsupportedError, UsageError
from lightship.layers import stacks
from lightship.low_rank import LowRank
from lightship.step import make_step
from lightship.structure import replace_module, structure_of
from tests.compression.context import context
from tests.matrix.families import make
from tests.tiny import tiny_encoder, tiny_gpt2, tiny_llama, tiny_seq2seq

LAYERS = 4
MODELS = {
    "llama": lambda folder: tiny_llama(folder, num_hidden_layers=LAYERS),
    "gpt2": lambda folder: tiny_gpt2(folder, n_layer=LAYERS),
    "bert": lambda folder: tiny_encoder(folder, "BertForSequenceClassification", num_hidden_layers=LAYERS),
    "embedder": lambda folder: tiny_encoder(folder, "BertModel", num_hidden_layers=LAYERS, add_pooling_layer=False),
    "distilbert": lambda folder: tiny_encoder(folder, "DistilBertForSequenceClassification", n_layers=LAYERS),
    "t5": lambda folder: tiny_seq2seq(folder, "t5", num_layers=LAYERS, num_decoder_layers=3),
    "bart": lambda folder: tiny_seq2seq(folder, "bart", encoder_layers=LAYERS, decoder_layers=3),
}


def gemma3(folder):
    """Sliding and full attention in turns, with bases of RoPE that differ."""
    from transformers import Gemma3TextConfig

    from tests.tiny import tiny_tokenizer

    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}  # fmt: skip
    config = Gemma3TextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=2048, initializer_range=0.25, vocab_size=tiny_tokenizer(folder),
        sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2, rope_parameters=rope,
        pad_token_id=0, eos_token_id=[0, 1, 2, 3], bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return Checkpoint(folder)


MODELS["gemma3"] = gemma3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = MODELS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return get


@torch.no_grad()
def outputs(model, given):
    return next(read(model, given.batches))[0][0]


class Identity(torch.nn.Module):
    """Gives back what it got, as a layer of T5 with what else that gives."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        for name in ("attention_type", "layer_type"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states, *rest, **named):
        given = self.layer(hidden_states, *rest, **named)
        return (hidden_states, *given[1:]) if isinstance(given, tuple) else hidden_states


def without(checkpoint, numbers):
    """The whole model with identities in the place of the layers `numbers`."""
    model = checkpoint.load("float32")
    layers = [(stack, index) for stack in stacks(model).values() for index in range(len(stack))]
    for number in numbers:
        stack, index = layers[number]
        stack[index] = Identity(stack[index])
    return model


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_identities_in_their_place_do(models, name, tmp_path):
    checkpoint, chosen = models(name), "3,1" if name not in ("t5", "bart") else "2,5"
    given = context(checkpoint)
    made = make_step("depth", {"layers": chosen}).apply(checkpoint, tmp_path / "cut", given)
    found, expected = outputs(made.load(), given), outputs(without(checkpoint, map(int, chosen.split(","))), given)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - outputs(checkpoint.load(), given)).abs().max() > 0.01
    assert not made.structure and made.weight_bytes < checkpoint.weight_bytes
    assert [len(layers) for layers in stacks(made.load()).values()] == ([2] if len(chosen) and name not in
                                                                       ("t5", "bart") else [3, 2])  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_plain_transformers_loads_it_and_its_cache_works(models, name, tmp_path):
    made = make_step("depth", {"layers": "0,2"}).apply(models(name), tmp_path / "cut", context(models(name)))
    plain = AutoModelForCausalLM.from_pretrained(made.folder).eval()
    ids = torch.arange(5, 45).reshape(2, 20)
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    cached = plain.generate(ids, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, plain.generate(ids, attention_mask=mask, use_cache=False, **options))
    whole = models(name).load()
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == (
        whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    )
    if name == "gemma3":
        assert plain.config.layer_types == ["full_attention"] * 2  # layers 1 and 3
        assert plain.config.eos_token_id == [0, 1, 2, 3]  # as long as a list of layers, and none


def test_block_influence_is_what_the_paper_says(models):
    checkpoint = models("llama")
    model, given = checkpoint.load("float64"), context(checkpoint)
    layers = Layers(model)
    found = influence(layers, given.batches)
    batch = given.batches[0]
    with torch.no_grad():
        seen = []
        layers.all[-1].register_forward_hook(lambda module, arguments, output: seen.append(output))
        states = [*model(**{key: torch.from_numpy(value) for key, value in batch.items()},
                         output_hidden_states=True).hidden_states[:-1], *seen]  # fmt: skip
    for number in range(LAYERS):
        values = []
        for row, column in zip(*np.nonzero(batch["attention_mask"]), strict=True):
            before, after = (state[row, column].numpy() for state in states[number : number + 2])
            values.append(before @ after / np.sqrt((before @ before) * (after @ after)))
        assert found[number] == pytest.approx(1 - np.mean(values), abs=1e-9)


def test_the_least_influence_goes_first(models, tmp_path):
    checkpoint = models("llama")
    given = context(checkpoint)
    made = make_step("depth", {"drop": 2, "method": "influence"}).apply(checkpoint, tmp_path / "cut", given)
    entry = made.lineage[-1]
    assert entry["dropped"] == sorted(range(LAYERS), key=entry["influence"].__getitem__)[:2]


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "embedder"])
def test_greedy_finds_what_trying_all_does(models, name, tmp_path):
    """Of one layer: the KL divergence (of an embedder 1 − cos) of every model with one layer less, computed from its
    own checkpoint in float64."""
    checkpoint = models(name)
    given = context(checkpoint)
    made = make_step("depth", {"drop": 1, "rows": 2}).apply(checkpoint, tmp_path / "greedy", given)
    costs = {}
    whole = said(checkpoint, given)
    for number in range(len(Layers(checkpoint.load()))):
        try:
            other = make_step("depth", {"layers": [number]}).apply(checkpoint, tmp_path / str(number), given)
        except UsageError:
            assert name == "t5" and number in (0, LAYERS)  # the first of each stack holds the position bias
            continue
        costs[number] = np.mean([kl(p, q) for p, q in zip(whole, said(other, given), strict=True)])
    best = min(costs, key=costs.__getitem__)
    assert made.lineage[-1]["dropped"] == [best]
    assert made.lineage[-1]["cost"] == [pytest.approx(costs[best], rel=1e-3)]


def said(checkpoint, given):
    """What the model says of the real positions of the first two rows, one array a row."""
    found = outputs(checkpoint.load("float64"), given)[:2]
    if found.ndim == 3 and "decoder_input_ids" not in given.batches[0]:
        return [row[mask == 1] for row, mask in zip(found, given.batches[0]["attention_mask"], strict=False)]
    return list(found)


def kl(p, q):
    if p.shape[-1] == 64:
        return float(1 - torch.nn.functional.cosine_similarity(p, q, dim=-1).mean())
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_greedy_looks_at_the_model_as_it_is_cut(models, tmp_path):
    """The second layer is chosen with the first gone."""
    checkpoint = models("llama")
    given = context(checkpoint)
    step = {"method": "greedy", "rows": 2}
    both = make_step("depth", {"drop": 2, **step}).apply(checkpoint, tmp_path / "both", given)
    first, second = both.lineage[-1]["dropped"]
    whole = said(checkpoint, given)
    costs = {}
    for number in set(range(LAYERS)) - {first}:
        made = make_step("depth", {"layers": [first, number]}).apply(checkpoint, tmp_path / str(number), given)
        costs[number] = np.mean([kl(p, q) for p, q in zip(whole, said(made, given), strict=True)])
    assert second == min(costs, key=costs.__getitem__)
    assert both.lineage[-1]["cost"][1] == pytest.approx(costs[second], rel=1e-3)


def test_greedy_computes_only_what_comes_after_a_layer(models):
    """A row of the original, one of what is kept, then for each of four layers those after it."""
    layers, computed = Layers(models("llama").load()), []
    for layer in layers.all:
        layer.mlp.register_forward_hook(lambda *_: computed.append(1))
    greedy(layers, context(models("llama")), 1, rows=1)
    assert len(computed) == LAYERS + LAYERS + sum(range(LAYERS))


def test_random_is_seeded_and_nested(models, tmp_path):
    checkpoint, chosen = models("llama"), {}
    for seed in range(6):
        for drop in (1, 2):
            folder = tmp_path / f"{seed}-{drop}"
            made = make_step("depth", {"drop": drop, "method": "random"}).apply(
                checkpoint, folder, context(checkpoint, seed=seed)
            )
            chosen[seed, drop] = made.lineage[-1]["dropped"]
        assert chosen[seed, 2][:1] == chosen[seed, 1]
    assert len({tuple(each) for each in chosen.values()}) > 4


@pytest.mark.parametrize(
    ("options", "word"),
    [({"drop": 4}, "cannot leave out 4 of 4 layers, at most 3"), ({"layers": "4"}, "expected different numbers"),
     ({"layers": "1,1"}, "expected different numbers"), ({"layers": "0,1,2,3"}, "layer 3 cannot go"),
     ({"layers": "-1"}, "expected different numbers")],
)  # fmt: skip
def test_what_cannot_be_left_out(models, tmp_path, options, word):
    checkpoint = models("llama")
    with pytest.raises(UsageError, match=word):
        make_step("depth", options).apply(checkpoint, tmp_path / "cut", context(checkpoint))
    assert not (tmp_path / "cut").exists()


def test_the_first_block_of_t5_stays(models, tmp_path):
    checkpoint = models("t5")
    made = make_step("depth", {"drop": 5, "method": "random"}).apply(checkpoint, tmp_path / "cut", context(checkpoint))
    config = made.load().config
    assert (config.num_layers, config.num_decoder_layers) == (1, 1)
    with pytest.raises(UsageError, match="at most 5"):
        make_step("depth", {"drop": 6}).apply(checkpoint, tmp_path / "more", context(checkpoint))


def test_layers_scaled_by_their_place_are_refused(tmp_path):
    checkpoint = tiny_gpt2(tmp_path / "gpt2", n_layer=3, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UnsupportedError, match="scaling"):
        make_step("depth", {"layers": "0"}).apply(checkpoint, tmp_path / "cut", context(checkpoint))
    made = make_step("depth", {"layers": "2"}).apply(checkpoint, tmp_path / "last", context(checkpoint))
    assert len(made.load().transformer.h) == 2  # the last: no other moves


def test_what_a_configuration_says_of_each_layer_moves_along(tmp_path):
    """Which layers of SmolLM3 have RoPE; it is not what its configuration would say of two layers by itself."""
    checkpoint = make("smollm3", tmp_path / "smollm3")
    made = make_step("depth", {"layers": "0"}).apply(checkpoint, tmp_path / "cut", context(checkpoint))
    assert made.config["no_rope_layers"] == [0]
    given = context(checkpoint)
    torch.testing.assert_close(outputs(made.load(), given), outputs(without(checkpoint, [0]), given), atol=1e-5, rtol=0)


def test_cut_layers_and_low_rank_move_along(models, tmp_path):
    """After a cut in width and a factorisation: what is said of layers left out goes, the rest keeps its meaning."""
    model = models("llama").load()
    for layer, name in ((1, "mlp.up_proj"), (2, "mlp.down_proj")):
        old = model.get_submodule(f"model.layers.{layer}.{name}")
        replace_module(model, f"model.layers.{layer}.{name}", low := LowRank.of(old, 5))
        torch.nn.init.normal_(low.reduce.weight), torch.nn.init.normal_(low.expand.weight)
    mlp = model.model.layers[3].mlp
    for name, shape in (("gate_proj", (64, 96)), ("up_proj", (64, 96)), ("down_proj", (96, 64))):
        setattr(mlp, name, torch.nn.Linear(*shape, bias=False))
    whole = save(model, models("llama").folder, tmp_path / "whole", {"step": "by hand"})
    given = context(whole)
    made = make_step("depth", {"layers": "0,2"}).apply(whole, tmp_path / "cut", given)
    assert dict(made.structure.low_rank) == {"model.layers.0.mlp.up_proj": 5}
    assert [each["intermediate_size"] for each in made.structure.layers] == [128, 96]
    torch.testing.assert_close(outputs(made.load(), given), outputs(without(whole, [0, 2]), given), atol=1e-5, rtol=0)
    plain = make_step("depth", {"layers": "1,2,3"}).apply(whole, tmp_path / "plain", given)
    assert not plain.structure and not structure_of(plain.load()) and not (plain.folder / "structure.json").exists()
