"""The gate must let the right model through and stop every wrong one."""

import json
import shutil

import numpy as np
import pytest

from lightship.calibration import default_text
from lightship.checkpoint import Checkpoint
from lightship.errors import LightshipError, LimitExceeded
from lightship.evaluation import divergence, parity
from lightship.evaluation.text import scoring_set, tokeniser
from lightship.recipe import KLD_LIMITS
from lightship.targets import openvino, pytorch


@pytest.fixture(scope="module")
def gate(llama, tmp_path_factory):
    original = pytorch.open_scorer(llama.folder)
    tokens = scoring_set(default_text(), tokeniser(llama)[0], 1024, 1).sequences[0]
    batches = parity.gate_batches(tokens, llama.context_length, original.greedy)
    return parity.record(original, batches, tmp_path_factory.mktemp("reference"))


def copy_of(llama, folder, change=None, **config):
    """The checkpoint with `config` entries replaced and `change(state)` applied to its tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(llama.folder, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if change:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


def exported(checkpoint, folder):
    openvino.export(checkpoint, folder)
    return openvino.open_scorer(folder, openvino.EngineSettings(inference_precision="f32", kv_precision="f32",
                                                                dynamic_quantisation_group=0))  # fmt: skip


def test_the_right_model_passes(gate, llama, tmp_path):
    found = parity.parity(gate, exported(llama, tmp_path / "ir"))
    parity.check_parity(found, KLD_LIMITS["fp32"], "gate", parity.exact_error(0.0, gate.rounding))
    assert found.mean_kld < 1e-6 and found.top1 == 1.0 and found.greedy == 1.0


def swap_layers(state):
    for name in [name for name in state if name.startswith("model.layers.0.")]:
        other = name.replace("layers.0", "layers.1")
        state[name], state[other] = state[other], state[name]


def poison(state):
    state["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (None, {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}),
        (swap_layers, {}),
        (poison, {}),
    ],
    ids=["wrong RoPE base", "shuffled layer", "NaN"],
)
def test_a_wrong_model_is_stopped_even_at_the_widest_limit(gate, llama, tmp_path, change, config):
    wrong = copy_of(llama, tmp_path / "wrong", change, **config)
    found = parity.parity(gate, exported(wrong, tmp_path / "ir"))
    with pytest.raises(LimitExceeded):
        parity.check_parity(found, KLD_LIMITS["int4"], "gate")


def test_a_fault_too_small_for_the_divergence_is_stopped(gate, llama, tmp_path):
    """An epsilon of 1e-5 where the original has 1e-6: the mean KLD is far below its limit, one log p is not."""
    wrong = copy_of(llama, tmp_path / "wrong", rms_norm_eps=1e-5)
    assert llama.config["rms_norm_eps"] == 1e-6
    found = parity.parity(gate, exported(wrong, tmp_path / "ir"))
    parity.check_parity(found, KLD_LIMITS["fp32"], "gate")
    with pytest.raises(LimitExceeded, match="more than rounding"):
        parity.check_parity(found, KLD_LIMITS["fp32"], "gate", parity.exact_error(0.0, gate.rounding))
    parity.check_parity(found, 0.01, "gate", parity.exact_error(0.01, gate.rounding))  # accepted on purpose


def test_a_dropped_mask_is_stopped(gate, llama, tmp_path):
    class Blind:
        """The exported graph, seeing padding as text."""

        def __init__(self):
            self.inner = exported(llama, tmp_path / "ir")

        def blocks(self, ids, mask, size):
            return self.inner.blocks(ids, np.ones_like(mask), size)

    with pytest.raises(LimitExceeded):
        parity.check_parity(parity.parity(gate, Blind()), KLD_LIMITS["fp32"], "gate")


def test_an_original_with_nan_is_refused(llama, tmp_path):
    broken = copy_of(llama, tmp_path / "broken", poison)
    with pytest.raises(LightshipError, match="original model itself"):
        divergence.record(
            pytorch.open_scorer(broken.folder), [divergence.Batch.of("x", [[1, 2, 3]])], tmp_path / "reference"
        )


def test_served_path_sees_a_wrong_model(gate, llama):
    right = np.linspace(-3, -1, 50, dtype=np.float32)
    parity.check_served(right, right + 1e-4, 1e-4)
    with pytest.raises(LimitExceeded, match="served path"):
        parity.check_served(right, right + 0.1, 1e-4)
    with pytest.raises(LimitExceeded):
        parity.check_served(right, right * np.nan, 0.15)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_row_that_overflows_is_infinitely_far_and_no_warning(value):
    random = np.random.default_rng(1)
    right = random.normal(size=(3, 40)).astype(np.float32)
    wrong = right.copy()
    wrong[1] = value
    kld, top1, *_ = divergence._compare_rows(*map(divergence.log_softmax, (right, wrong)), np.array([0, 1, 2]))
    np.testing.assert_allclose(kld, [0, np.inf, 0], atol=1e-6)
    assert top1.tolist() == [True, False, True]


def test_kld_against_an_obvious_reference():
    random = np.random.default_rng(1)
    p, q = (divergence.log_softmax(random.normal(size=(7, 40)).astype(np.float32) * 3) for _ in range(2))
    label = np.array([0, 1, 2, 3, 4, 5, -1])
    kld, top1, _, margin, error, original, candidate = divergence._compare_rows(p, q, label)
    for row in range(7):
        weights = np.exp(p[row].astype(float))
        assert kld[row] == pytest.approx(
            sum(w * (a - b) for w, a, b in zip(weights, p[row], q[row], strict=True)), rel=1e-4
        )
        assert top1[row] == (int(np.argmax(p[row])) == int(np.argmax(q[row])))
        assert margin[row] == pytest.approx(sorted(p[row])[-1] - sorted(p[row])[-2], rel=1e-5)
        likely = weights > 1e-4
        assert error[row] == pytest.approx(np.abs(p[row] - q[row])[likely].max(), rel=1e-5)
    assert original[2] == p[2, 2] and candidate[3] == q[3, 3] and np.isnan(original[6])


def test_blocks_carry_the_cache(llama, tmp_path):
    """Chunked scoring equals one pass, padding included."""
    scorer = exported(llama, tmp_path / "ir")
    ids = np.random.default_rng(0).integers(1, llama.vocabulary, (2, 50))
    mask = np.ones_like(ids)
    mask[0, :7] = 0
    whole = scorer.logits(ids, mask)
    parts = np.concatenate(list(scorer.blocks(ids, mask, 13)), axis=1)
    assert np.abs(whole - parts)[mask.astype(bool)].max() < 1e-4


def test_blocks_without_a_scored_position(gate, tmp_path):
    """The first half of every passage of a text is context only, whole blocks of it."""
    ids = gate.batches[1].ids[:, :300]
    scored = np.zeros_like(ids, bool)
    scored[:, 200:299] = True
    batch = divergence.Batch("text", ids, np.ones_like(ids), scored)

    class Same:
        def blocks(self, ids, mask, size):
            random = np.random.default_rng(0)
            for start in range(0, ids.shape[1], size):
                yield random.normal(size=(1, min(size, ids.shape[1] - start), 512)).astype(np.float32)

    found = divergence.compare(divergence.record(Same(), [batch], tmp_path), Same())
    assert len(found.kld) == 99 and found.kld.max() < 1e-6 and found.top1.all()
