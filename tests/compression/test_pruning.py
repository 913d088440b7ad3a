"""Unstructured pruning against a slow reference that follows the papers' formulas weight by weight."""

import numpy as np
import pytest
import torch

from lightship.compression._activations import norms
from lightship.compression.wanda import Wanda
from lightship.errors import UnsupportedError, UsageError
from lightship.layers import linears, weight_of
from lightship.step import make_step
from tests.compression.context import context
from tests.tiny import tiny_gpt2, tiny_llama

GROUPS = {"unstructured": None, "2:4": (2, 4), "4:8": (4, 8)}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tmp_path_factory):
    """Linear layers, or the Conv1D of GPT-2, whose weight lies the other way round."""
    make = {"llama": tiny_llama, "gpt2": tiny_gpt2}[request.param]
    return make(tmp_path_factory.mktemp(request.param) / "model")


def inputs_of(model, batches):
    """What each linear layer reads, every real token, float64 (tokens, inputs): the slow way, one layer at a time."""
    seen = {}
    for name, layer in linears(model).items():
        rows = []
        handle = layer.register_forward_pre_hook(lambda _, given, rows=rows: rows.append(given[0].clone()))
        for batch in batches:
            with torch.inference_mode():
                model(**{key: torch.from_numpy(values) for key, values in batch.items()})
            rows[-1] = rows[-1][torch.from_numpy(batch["attention_mask"]) == 1]
        handle.remove()
        seen[name] = torch.cat(rows).double().numpy()
    return seen


def wanda_by_hand(weight, read, sparsity, group):
    """Row by row, group by group, weight by weight."""
    pruned = weight.copy()
    length = [np.sqrt(sum(value * value for value in column)) for column in read.T]
    for row in pruned:
        score = [abs(float(value)) * float(size) for value, size in zip(row, length, strict=True)]
        starts = range(0, len(row), group[1]) if group else [0]
        for start in starts:
            inside = range(start, start + group[1]) if group else range(len(row))
            count = group[0] if group else int(sparsity * len(row))
            for index in sorted(inside, key=lambda each: score[each])[:count]:
                row[index] = 0
    return pruned


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.3), ("2:4", 0.5), ("4:8", 0.5)])
def test_wanda_is_the_papers(model, pattern, sparsity):
    given = context(model)
    loaded = model.load("float32")
    read = inputs_of(loaded, given.batches)
    before = {name: weight_of(layer).double().numpy().copy() for name, layer in linears(loaded).items()}
    figures = Wanda(sparsity=sparsity, pattern=pattern).change(loaded, given)
    for name, layer in linears(loaded).items():
        expected = wanda_by_hand(before[name], read[name], sparsity, GROUPS[pattern])
        np.testing.assert_array_equal(weight_of(layer).double().numpy(), expected, err_msg=name)
    zeros = sum(int((weight_of(layer) == 0).sum()) for layer in linears(loaded).values())
    assert figures == {"zeros": zeros, "of": sum(each.size for each in before.values())}
    assert figures["zeros"] == pytest.approx(sparsity * figures["of"], rel=0.02)


def test_wanda_asks_where_a_weight_is_used(llama):
    """An input that is always zero loses its weights first, however large they are."""
    loaded, given = llama.load("float32"), context(llama)
    with torch.no_grad():
        loaded.model.layers[1].post_attention_layernorm.weight[:16] = 0
        loaded.model.layers[1].mlp.gate_proj.weight[:, :16] *= 100
    assert norms(loaded, linears(loaded), given.batches)["model.layers.1.mlp.gate_proj"][:16].max() == 0
    Wanda(sparsity=0.25).change(loaded, given)
    assert (loaded.model.layers[1].mlp.gate_proj.weight[:, :16] == 0).all()


def test_magnitude_with_a_pattern(model):
    loaded, given = model.load("float32"), context(model)
    make_step("magnitude", {"pattern": "2:4"}).change(loaded, given)
    for layer, original in zip(linears(loaded).values(), linears(model.load("float32")).values(), strict=True):
        found = weight_of(layer).reshape(-1, 4)
        assert ((found == 0).sum(1) == 2).all()
        left = weight_of(original).reshape(-1, 4).abs().topk(2).values.sum(1)
        torch.testing.assert_close(found.abs().sum(1), left)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_of_weights_alike_only_as_many_go_as_were_asked(model, scope):
    """As they are once they were stored in four bits."""
    loaded = model.load("float32")
    for layer in linears(loaded).values():
        layer.weight.data = layer.weight.data.sign() * (1 + (layer.weight.data.abs() > 0.2))
    made = make_step("magnitude", {"sparsity": 0.1, "scope": scope}).change(loaded, context(model))
    each = [int((weight_of(layer) == 0).sum()) / weight_of(layer).numel() for layer in linears(loaded).values()]
    assert made["zeros"] / made["of"] == pytest.approx(0.1, abs=1e-3)
    assert scope == "model" or each == pytest.approx([0.1] * len(each), abs=1e-3)


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_a_pattern_has_its_own_sparsity(name):
    with pytest.raises(UsageError, match=r"zeroes one half, a sparsity of 0\.3 was asked for"):
        make_step(name, {"pattern": "2:4", "sparsity": 0.3})


def test_a_width_that_is_no_multiple_of_the_group(tmp_path):
    odd = tiny_llama(tmp_path / "odd", intermediate_size=66)
    with pytest.raises(UnsupportedError, match=r"down_proj has 66 inputs, no multiple of 4"):
        make_step("wanda", {"pattern": "2:4"}).change(odd.load("float32"), context(odd))
