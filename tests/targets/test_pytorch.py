"""The reference must be exact: whatever is stored, it computes in float32."""

import numpy as np
import pytest
import torch

from lightship.checkpoint import Checkpoint
from lightship.targets import pytorch
from tests.tiny import tiny_gpt2, tiny_llama

IDS = np.array([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
MASK = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_give_the_logits_of_their_float32_copy(tmp_path, make, dtype):
    original = make(tmp_path / "full")
    model = original.load(dtype)
    model.save_pretrained(tmp_path / "half")
    half = Checkpoint(tmp_path / "half")
    scorer = pytorch.open_scorer(half.folder)
    with torch.no_grad():
        positions = torch.from_numpy(np.maximum(np.cumsum(MASK, axis=1) - 1, 0))
        expected = half.load("float32")(
            input_ids=torch.from_numpy(IDS), attention_mask=torch.from_numpy(MASK), position_ids=positions
        ).logits.numpy()
    found = scorer.logits(IDS, MASK)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    half.load("float32").save_pretrained(tmp_path / "wide")
    np.testing.assert_array_equal(found, pytorch.open_scorer(tmp_path / "wide").logits(IDS, MASK))
    assert np.abs(found - pytorch.open_scorer(original.folder).logits(IDS, MASK)).max() > 1e-3  # rounding is visible
    assert {parameter.dtype for parameter in scorer._model.parameters()} == {getattr(torch, dtype)}  # narrow again
    continued = scorer.greedy([[1, 2, 3], [4, 5, 6]], 4)
    assert [len(row) for row in continued] == [4, 4]
