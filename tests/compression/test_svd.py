"""The low-rank step, against what it must equal: slow references in float64, errors measured on the calibration set."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lightship.compression._activations import second_moments
from lightship.compression._allocation import Curve, allocate, uniform
from lightship.compression._gradients import fisher
from lightship.compression.svd import spectrum
from lightship.errors import LightshipError, UsageError
from lightship.layers import linears, weight_of
from lightship.low_rank import LowRank
from lightship.step import make_step
from tests.compression.context import context
from tests.matrix.gate import through_all_gates
from tests.tiny import tiny_encoder, tiny_gpt2

WIDE, TALL = (24, 40), (40, 24)


def layer(shape, seed=0, tokens=300):
    """A weight, correlated inputs of it, and gradients of its outputs; all (…, ·) float64."""
    draw = torch.Generator().manual_seed(seed)
    outputs, inputs = shape
    x = torch.randn(tokens, inputs, generator=draw).double() @ torch.randn(inputs, inputs, generator=draw).double()
    g = torch.randn(tokens, outputs, generator=draw).double() @ torch.randn(outputs, outputs, generator=draw).double()
    return torch.randn(shape, generator=draw).double(), x, g


def cut(found, rank):
    return found.left[:, :rank] @ found.right[:rank]


def svd_llm(weight, x, rank):
    """Algorithm 1 of the paper as it is written: truncate W·S, then multiply by S⁻¹."""
    root = torch.linalg.cholesky(x.T @ x)
    u, sigma, v = torch.linalg.svd(weight @ root, full_matrices=False)
    sigma[rank:] = 0
    return u @ torch.diag(sigma) @ v @ torch.linalg.inv(root), sigma


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("rank", [1, 7, 23])
def test_it_is_the_paper_s_solution(shape, rank):
    weight, x, _ = layer(shape)
    expected, _ = svd_llm(weight, x, rank)
    torch.testing.assert_close(cut(spectrum(weight, x.T @ x), rank), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("weighed", [False, True])
def test_full_rank_is_the_weight_even_where_inputs_span_little(shape, weighed):
    weight, x, g = layer(shape, tokens=10)  # fewer tokens than inputs: no Cholesky factor exists
    outputs = g.T @ g + torch.eye(shape[0]) if weighed else None
    torch.testing.assert_close(cut(spectrum(weight, x.T @ x, outputs), 24), weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_energies_dropped_are_the_error_measured(shape):
    weight, x, g = layer(shape)
    plain, both = spectrum(weight, x.T @ x), spectrum(weight, x.T @ x, g.T @ g)
    for rank in range(1, 24):
        error = x @ (weight - cut(plain, rank)).T
        assert float(error.square().sum()) == pytest.approx(float(plain.energies[rank:].sum()), rel=1e-6)
        moved = g @ (weight - cut(both, rank)) @ x.T  # of every gradient with every input
        assert float(moved.square().sum()) == pytest.approx(float(both.energies[rank:].sum()), rel=1e-6)


def test_each_measure_is_best_by_itself():
    weight, x, g = layer(WIDE)
    found = {
        "inputs": spectrum(weight, x.T @ x),
        "weights": spectrum(weight, torch.eye(40).double()),
        "both": spectrum(weight, x.T @ x, g.T @ g),
    }
    lost = {name: weight - cut(each, 9) for name, each in found.items()}
    errors = {
        "inputs": {name: float((x @ each.T).square().sum()) for name, each in lost.items()},
        "weights": {name: float(each.square().sum()) for name, each in lost.items()},
        "both": {name: float((g @ each @ x.T).square().sum()) for name, each in lost.items()},
    }
    for measure, by in errors.items():
        assert min(by, key=by.get) == measure, errors


def test_what_is_not_finite_is_refused():
    weight, x, _ = layer(WIDE)
    weight[3, 4] = torch.nan
    with pytest.raises(LightshipError, match="not finite"):
        spectrum(weight, x.T @ x)
    with pytest.raises(LightshipError, match="cannot be factorised"):
        spectrum(torch.ones(WIDE), x.T @ x, torch.zeros(24, 24).double())


# ── Allocation ──────────────────────────────────────────────────────────────


def curves(seed=0, count=6, grain=1):
    draw = np.random.default_rng(seed)
    made = {}
    for number in range(count):
        outputs, inputs = (int(side) for side in draw.integers(4, 30, 2))
        energies = np.sort(draw.exponential(draw.uniform(0.1, 5), min(outputs, inputs)) ** 2)[::-1]
        made[str(number)] = Curve(outputs, inputs, np.append(np.cumsum(energies[::-1])[::-1], 0.0), grain)
    return made


def total(made, ranks):
    return sum(made[name].cost(rank) for name, rank in ranks.items()), sum(
        made[name].loss(rank) for name, rank in ranks.items()
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("keep", [0.3, 0.55, 0.8, 0.9, 0.97])
def test_the_budget_holds_and_beats_the_same_share_everywhere(seed, keep):
    made = curves(seed, count=12)
    budget = int(keep * sum(curve.whole for curve in made.values()))
    cost, error = total(made, allocate(made, budget))
    even_cost, even_error = total(made, uniform(made, keep))
    assert even_cost <= budget and cost <= budget
    assert error < even_error


def test_it_is_near_the_best_of_all_choices():
    made = curves(3, count=3)
    choices = [[None, *range(1, curve.most + 1)] for curve in made.values()]
    every = [total(made, dict(zip(made, each, strict=True))) for each in itertools.product(*choices)]
    whole = sum(curve.whole for curve in made.values())
    for budget in range(whole // 3, whole, whole // 20):
        best = min(error for cost, error in every if cost <= budget)
        nothing = sum(float(curve.error[0]) for curve in made.values())
        assert total(made, allocate(made, budget))[1] - best <= 0.02 * nothing


@pytest.mark.parametrize("grain", [1, 4])
def test_no_rank_without_a_saving(grain):
    made = curves(1, grain=grain)
    for keep in (0.6, 0.75, 0.9, 0.99):
        budget = int(keep * sum(curve.whole for curve in made.values()))
        for name, rank in allocate(made, budget).items():
            assert rank is None or (rank >= 1 and rank % grain == 0 and made[name].cost(rank) < made[name].whole)
    square = Curve(576, 576, np.zeros(577))
    assert square.most == 287  # at 288 = r* nothing is saved
    assert allocate({"only": square}, square.whole) == {"only": None}


def test_a_budget_below_rank_1_is_an_error():
    with pytest.raises(UsageError, match="the smallest ranks need"):
        allocate(curves(), 10)
    with pytest.raises(UsageError, match=r"keep: .*greater than 0, received '0'"):
        make_step("svd", {"keep": "0"})
    with pytest.raises(UsageError, match=r"keep: .*less than or equal to 1, received '1\.1"):
        make_step("svd", {"keep": 1.1})
    with pytest.raises(UsageError, match="keep=1 leaves every linear layer whole"):
        make_step("svd", {"keep": 1})


# ── Sensitivity ─────────────────────────────────────────────────────────────


def test_gradients_are_those_of_the_answers_drawn(llama):
    """Against autograd on one weight at a time: Σ_t g_t x_tᵀ is the gradient of the weight."""
    model, given = llama.load("float32"), context(llama, rows=2, length=12)
    layers = linears(model)
    seen, sums = {}, {}

    def remember(name):
        def note(module, inputs, out):
            seen[name] = inputs[0].detach()
            out.register_hook(lambda gradient: sums.__setitem__(name, gradient))

        return note

    handles = [each.register_forward_hook(remember(name)) for name, each in layers.items()]
    ids, mask = (torch.from_numpy(given.batches[0][name]) for name in ("input_ids", "attention_mask"))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    drawn = torch.multinomial(logits.softmax(-1).flatten(0, -2), 1, generator=torch.Generator().manual_seed(5))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), drawn[:, 0], reduction="none")
    (loss * mask.flatten()).sum().backward()
    for handle in handles:
        handle.remove()
    found = fisher(model, layers, given.batches, 5)
    tokens = int(mask.sum())
    for name, each in layers.items():
        flat = sums[name].flatten(0, 1)
        torch.testing.assert_close(flat.T @ seen[name].flatten(0, 1), each.weight.grad, rtol=1e-3, atol=1e-4)
        expected = (flat.T @ flat).double() / tokens**2
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-9)


def test_the_start_and_the_end_of_a_span_are_two_answers(tmp_path):
    """As a loss counts them. Against autograd: all draws of a row at once, each text by itself."""
    encoder = tiny_encoder(tmp_path / "bert", "BertForQuestionAnswering")
    model, given = encoder.load("float32"), context(encoder, rows=3, length=12)
    layer = model.get_submodule(name := "bert.encoder.layer.1.output.dense")
    draw, expected, tokens = torch.Generator().manual_seed(5), 0.0, 0
    for batch in given.batches:
        inputs, seen = {each: torch.from_numpy(values) for each, values in batch.items()}, []
        handle = layer.register_forward_hook(lambda module, read, out, seen=seen: seen.append(out))
        out = model(**inputs)
        handle.remove()
        loss = 0.0
        for logits in (out.start_logits, out.end_logits):
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
            loss = loss + torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
        gradient = torch.autograd.grad(loss, seen[0])[0].flatten(0, 1)
        expected = expected + (gradient.T @ gradient).double()
        tokens += int(inputs["attention_mask"].sum())
    spans = sum(len(batch["input_ids"]) for batch in given.batches)
    found = fisher(model, {name: layer}, given.batches, 5)[name]
    torch.testing.assert_close(found, expected / (2 * spans * tokens), rtol=1e-3, atol=1e-12)


# ── The step ────────────────────────────────────────────────────────────────


def test_the_error_of_a_model_is_the_one_foreseen(llama, tmp_path):
    """Of every layer, on the calibration set: from the figures alone it would be a claim."""
    given = context(llama, rows=4, length=32)
    made = make_step("svd", {"method": "whitened", "keep": 0.6}).apply(llama, tmp_path / "made", given)
    before, after = llama.load("float32"), made.load("float32")
    layers = linears(before)
    moments = second_moments(before, layers, given.batches)
    sensitive = fisher(before, layers, given.batches, given.seed)
    foreseen = 0.0
    for name, each in layers.items():
        now = after.get_submodule(name)
        if isinstance(now, LowRank):
            lost = (weight_of(each) - now.expand.weight.data @ now.reduce.weight.data).double()
            damped = moments[name] + 0.01 * moments[name].diagonal().mean() * torch.eye(len(moments[name]))
            foreseen += float((lost @ damped @ lost.T).trace() * sensitive[name].diagonal().mean() / 2)
    assert made.lineage[-1]["predicted_kld"] == pytest.approx(foreseen, rel=1e-3)


def kept_of(before, after):
    """Share of the linear layers' parameters, counted in the model."""
    whole = {name: weight_of(each).numel() for name, each in linears(before).items()}
    kept = sum(
        sum(part.weight.numel() for part in now) if isinstance(now := after.get_submodule(name), LowRank) else count
        for name, count in whole.items()
    )
    return kept / sum(whole.values())


@pytest.mark.parametrize("options", [{}, {"method": "plain"}, {"method": "scaled"}, {"allocation": "uniform"}])
@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_what_is_kept_is_what_was_asked(llama, tmp_path, options, keep):
    made = make_step("svd", {"keep": keep, "multiple": 2, **options}).apply(llama, tmp_path / "made", context(llama))
    kept = kept_of(llama.load(), made.load())
    assert keep - 0.06 < kept <= keep
    assert made.lineage[-1]["kept"] == pytest.approx(kept, abs=1e-12)
    for module in made.load().modules():
        if isinstance(module, LowRank):
            outputs, inputs = module.expand.out_features, module.reduce.in_features
            assert module.rank * (outputs + inputs) < outputs * inputs


def test_biases_stay_and_a_transposed_layer_is_one_too(tmp_path):
    from lightship.checkpoint import save

    gpt2 = tiny_gpt2(tmp_path / "gpt2")
    model = gpt2.load()
    for each in linears(model).values():
        torch.nn.init.normal_(each.bias)  # they start at 0
    shifted = save(model, gpt2.folder, tmp_path / "shifted", {"step": "test"})
    made = make_step("svd", {"keep": 0.5}).apply(shifted, tmp_path / "made", context(shifted)).load()
    found = {name: module for name, module in made.named_modules() if isinstance(module, LowRank)}
    assert {name.rpartition(".")[2] for name in found} >= {"c_attn", "c_fc", "c_proj"}
    for name, module in found.items():
        assert module.reduce.bias is None
        assert torch.equal(module.expand.bias, model.get_submodule(name).bias)


def test_a_tied_table_stays_tied(llama, tmp_path):
    made = make_step("svd", {"keep": 0.5}).apply(llama, tmp_path / "made", context(llama))
    model = made.load()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    removed = llama.weight_bytes - made.weight_bytes
    linear = sum(4 * weight_of(each).numel() for each in linears(llama.load()).values())
    assert removed == pytest.approx((1 - made.lineage[-1]["kept"]) * linear, rel=0.02)


def test_saved_and_loaded_and_saved_again(llama, tmp_path):
    from lightship.checkpoint import save

    made = make_step("svd", {}).apply(llama, tmp_path / "made", context(llama))
    again = save(made.load(), made.folder, tmp_path / "again", {"step": "test"})
    assert made.structure.low_rank
    assert again.structure == made.structure
    for name, each in made.load().state_dict().items():
        assert torch.equal(each, again.load().state_dict()[name])
    twice = make_step("svd", {"keep": 0.5}).apply(again, tmp_path / "twice", context(llama))
    assert len(twice.structure.low_rank) > len(again.structure.low_rank), "the layers left whole are factorised next"


def test_weights_that_are_not_finite_name_their_layer(llama):
    model = llama.load()
    weight_of(model.model.layers[1].mlp.up_proj)[0, 0] = torch.inf
    with pytest.raises(LightshipError, match=r"svd, model\.layers\.\d.*not finite"):
        make_step("svd", {}).change(model, context(llama))


@pytest.mark.parametrize(("kind", "target"), [
    ("llama", "openvino"), ("bert", "onnx"),
    pytest.param("llama", "onnx", marks=pytest.mark.slow), pytest.param("bert", "openvino", marks=pytest.mark.slow),
])  # fmt: skip
def test_it_passes_the_gates_of_a_runtime(llama, tmp_path, kind, target):
    """As it is and in int8, at the limits of any model: two matrix products are nothing new to a runtime."""
    source = llama if kind == "llama" else tiny_encoder(tmp_path / "bert", "BertForSequenceClassification")
    made = make_step("svd", {"keep": 0.6}).apply(source, tmp_path / "made", context(source))
    assert made.structure.low_rank
    for precision in ("fp32", "int8"):
        through_all_gates(made, target, precision, tmp_path / precision)
        weights = sum(path.stat().st_size for path in (tmp_path / precision).rglob("openvino_model.bin"))
        assert weights == 0 or weights < (1.05 if precision == "fp32" else 0.4) * made.weight_bytes
