"""Embedding and head of low rank: against slow references, in every kind of model, in the runtimes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightship.compression._embedding import factors
from lightship.errors import LightshipError, UnsupportedError, UsageError
from lightship.layers import linears
from lightship.low_rank import LowRank, LowRankEmbedding, tables
from lightship.step import make_step
from tests.compression.context import context
from tests.compression.test_steps import gemma3
from tests.matrix.gate import through_all_gates
from tests.tiny import tiny_encoder, tiny_gpt2, tiny_llama, tiny_seq2seq


def drawn(tokens=60, width=12):
    draw = torch.Generator().manual_seed(3)
    table = torch.randn(tokens, width, generator=draw).double()
    rows = torch.rand(tokens, generator=draw).double() * 9 + 0.1
    x = torch.randn(50, width, generator=draw).double() @ torch.randn(width, width, generator=draw).double()
    return table, rows, x.T @ x


def lost(table, product, rows, columns):
    """Row by row, as it is defined."""
    return sum(float(rows[t] * (d := table[t] - product[t]) @ columns @ d) for t in range(len(table)))


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_it_loses_what_it_says_and_no_other_of_its_rank_less(rank):
    table, rows, columns = drawn()
    tall, wide, share = factors(table, rank, rows, columns)
    mine = lost(table, tall @ wide, rows, columns)
    assert mine == pytest.approx(share * lost(table, torch.zeros_like(table), rows, columns), rel=1e-9)
    left = torch.diag(rows.sqrt())  # the theorem of Eckart and Young, written out
    right = torch.linalg.cholesky(columns)
    u, sigma, v = torch.linalg.svd(left @ table @ right, full_matrices=False)
    sigma[rank:] = 0
    best = torch.linalg.inv(left) @ u @ torch.diag(sigma) @ v @ torch.linalg.inv(right)
    torch.testing.assert_close(tall @ wide, best, rtol=0, atol=1e-8)
    plain = factors(table, rank, torch.ones(60), torch.eye(12))
    assert lost(table, plain[0] @ plain[1], rows, columns) > mine


def test_full_rank_is_the_table():
    table, rows, columns = drawn()
    tall, wide, share = factors(table, 12, rows, columns)
    torch.testing.assert_close(tall @ wide, table, rtol=0, atol=1e-9)
    assert share == pytest.approx(0, abs=1e-12)


def test_what_cannot_be_weighed_is_refused():
    table, rows, columns = drawn()
    with pytest.raises(LightshipError, match="cannot be factorised"):
        factors(table, 3, rows, -columns)
    table[2, 2] = torch.inf
    with pytest.raises(LightshipError, match="not finite"):
        factors(table, 3, rows, columns)


MODELS = {
    "llama": lambda folder: tiny_llama(folder),
    "untied": lambda folder: tiny_llama(folder, tie_word_embeddings=False),
    "gemma3": gemma3,
    "gpt2": tiny_gpt2,
    "bert": lambda folder: tiny_encoder(folder, "BertForSequenceClassification"),
    "t5": lambda folder: tiny_seq2seq(folder, "t5"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_table_of_a_model_becomes_a_product(kind, tmp_path):
    """As the model with that product multiplied out computes, saved and loaded again; what was one table stays one."""
    source = MODELS[kind](tmp_path / "source")
    given = context(source)
    made = make_step("svd", {"keep": 0.99, "embedding": 0.6}).apply(source, tmp_path / "made", given)
    model, whole = made.load("float32"), source.load("float32")
    found = {name: each for name, each in model.named_modules() if isinstance(each, LowRankEmbedding)}
    heads = {name: model.get_submodule(name) for name in tables(whole) if name.endswith("lm_head")}
    assert found and all(isinstance(each, LowRank) for each in heads.values())
    assert found.keys() | heads.keys() == tables(whole).keys()
    rows = {id(each.weight) for each in (*found.values(), *heads.values())}
    assert len(rows) == len({id(each.weight) for each in tables(whole).values()})
    width = whole.get_input_embeddings().weight.shape[1]
    for each in found.values():
        share = each.rank * (source.vocabulary + width) / (source.vocabulary * width)
        assert 0.6 - 8 / width < share <= 0.6
    mended = source.load("float32")  # the same products, multiplied out
    for name, each in model.named_modules():
        if isinstance(each, LowRank) and name not in heads:
            product = (each.expand.weight @ each.reduce.weight).data
            mended.get_submodule(name).weight.data.copy_(product.T if kind == "gpt2" else product)
    for name, each in (found | heads).items():
        table = mended.get_submodule(name)
        scale = getattr(table, "scalar_embed_scale", 1.0)
        product = (each.expand(each.reduce.weight) / scale if name in found else
                   each.expand.weight @ each.reduce.weight)  # fmt: skip
        table.weight = torch.nn.Parameter(product.data.clone())
    inputs = {name: torch.from_numpy(values) for name, values in given.batches[0].items()}
    with torch.inference_mode():
        torch.testing.assert_close(model(**inputs).logits, mended(**inputs).logits, rtol=1e-3, atol=1e-3)


def test_frequent_tokens_lose_less(tmp_path):
    source = tiny_llama(tmp_path / "source", tie_word_embeddings=False)
    given = context(source)
    given.batches[0]["input_ids"][:] = np.arange(32) + 40
    errors = {}
    for method in ("plain", "whitened"):
        options = {"method": method, "keep": 1, "embedding": 0.4}
        made = make_step("svd", options).apply(source, tmp_path / method, given).load("float32")
        assert len(linears(made)) == len(linears(source.load())), "the layers are whole"
        table = made.model.embed_tokens
        gone = table.expand(table.reduce.weight) - source.load("float32").model.embed_tokens.weight
        errors[method] = float(gone[40:72].square().sum().detach())
    assert errors["whitened"] < 0.9 * errors["plain"], errors


def test_a_vocabulary_can_be_cut_after_it(tmp_path):
    source = tiny_llama(tmp_path / "source")
    given = context(source)
    lower = make_step("svd", {"keep": 0.99, "embedding": 0.6}).apply(source, tmp_path / "lower", given)
    made = make_step("vocabulary", {"keep": 400}).apply(lower, tmp_path / "made", given)
    kept = torch.from_numpy(made.kept_tokens)
    before, after = lower.load("float32"), made.load("float32")
    assert torch.equal(after.model.embed_tokens.weight, before.model.embed_tokens.weight[kept])
    assert after.lm_head.weight is after.model.embed_tokens.weight


def test_shares_without_a_rank_and_a_second_time_are_refused(tmp_path):
    source = tiny_llama(tmp_path / "source")
    given = context(source)
    with pytest.raises(UsageError, match=r"embedding: .*less than 1"):
        make_step("svd", {"embedding": 1.0})
    with pytest.raises(UnsupportedError, match="no rank of a table"):
        make_step("svd", {"embedding": 0.01}).apply(source, tmp_path / "none", given)
    made = make_step("svd", {"keep": 0.9, "embedding": 0.6}).apply(source, tmp_path / "made", given)
    with pytest.raises(UnsupportedError, match="of low rank already"):
        make_step("svd", {"keep": 0.9, "embedding": 0.6}).apply(made, tmp_path / "again", given)


@pytest.mark.parametrize(("kind", "target"), [
    ("llama", "openvino"), ("llama", "onnx"), ("bert", "openvino"), ("bert", "onnx"),
    pytest.param("untied", "openvino", marks=pytest.mark.slow), pytest.param("untied", "onnx", marks=pytest.mark.slow),
])  # fmt: skip
def test_it_passes_the_gates_of_a_runtime(tmp_path, kind, target):
    source = MODELS[kind](tmp_path / "source")
    options = {"keep": 0.9, "embedding": 0.6}
    made = make_step("svd", options).apply(source, tmp_path / "made", context(source))
    for precision in ("fp32", "int8"):
        through_all_gates(made, target, precision, tmp_path / precision)
        weights = sum(path.stat().st_size for path in (tmp_path / precision).rglob("openvino_model.bin"))
        assert weights == 0 or weights < (1.05 if precision == "fp32" else 0.4) * made.weight_bytes
