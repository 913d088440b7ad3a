"""The OpenVINO target beyond its gates."""

import logging
import subprocess
import sys

import numpy as np
import openvino
import openvino_tokenizers
import pytest
import torch
from transformers import AutoModelForCausalLM

from lightship.calibration import default_text
from lightship.errors import UnsupportedError
from lightship.pipeline import convert
from lightship.recipe import Precision, Recipe
from lightship.targets._openvino_weights import TABLE_GROUP, _head
from lightship.targets._tracing import tracing
from lightship.targets.openvino import GRAPH
from lightship.tokenizer import load_tokenizer
from tests.tiny import tiny_llama


def test_a_signal_after_an_engine_was_closed(bundle_path):
    """OpenVINO leaves the thread with a signal stack that is freed: Ctrl-C was a segmentation fault."""
    code = f"""
import os, signal, time
from pathlib import Path
from lightship.targets import openvino
engine = openvino.open(Path({str(bundle_path / "targets" / "openvino")!r}))
engine.close()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_the_tokenizer_beside_the_graph_gives_the_same_ids(bundle_path):
    """OpenVINO's tokenizer and detokenizer against tokenizer.json, on prose, code, white space and other scripts."""
    folder = bundle_path / "targets" / "openvino"
    core = openvino.Core()
    core.add_extension(openvino_tokenizers._ext_path)
    encoder = core.compile_model(folder / "openvino_tokenizer.xml", "CPU")
    decoder = core.compile_model(folder / "openvino_detokenizer.xml", "CPU")
    tokenizer = load_tokenizer(folder)
    texts = [document.text[:300] for document in default_text().documents[:40]]
    texts += ["", " ", "\n\n\t", "naïve façade — 漢字 🚢 العربية", "a" * 300, "x=1;\r\ny=2", "<|user|>typed<|end|>"]
    for text in texts:
        expected = tokenizer.encode(text).ids
        assert encoder([text])["input_ids"][0].tolist() == expected, text
        if expected:
            found = decoder(np.array([expected]))["string_output"][0]
            assert found == tokenizer.decode(expected), text


def test_a_refused_model_leaves_the_callers_logging_as_it_was(llama):
    """OpenVINO's converter leaves the root logger at ERROR when it fails, so that later warnings were lost."""
    root = logging.getLogger()
    before = root.level, list(root.filters), list(root.handlers)
    with pytest.raises(UnsupportedError, match="could not be exported to OpenVINO"), tracing(llama, "OpenVINO"):
        openvino.convert_model(_Untraceable(), example_input=torch.ones(1))
    assert (root.level, root.filters, root.handlers) == before


class _Untraceable(torch.nn.Module):
    def forward(self, value):
        raise RuntimeError("cannot be traced")


NARROW = {"int8": Precision(name="int8"),
          "int4": Precision(name="int4", group_size=32, fit=False)}  # fmt: skip


@pytest.mark.parametrize(("name", "tied", "dtype"), [("int8", True, "float32"), ("int4", False, "bfloat16")])
def test_the_weights_of_the_head_share_a_scale_in_groups(tmp_path, name, tied, dtype):
    """Its columns differ thirtyfold from group to group: one scale for the whole row would lose the small ones. The
    gates pass, the served path's among them; embedding and head stay one table where they are."""
    checkpoint = tiny_llama(tmp_path / "model", hidden_size=2 * TABLE_GROUP, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype)
    model.lm_head.weight.data[:, TABLE_GROUP:] /= 30
    model.save_pretrained(checkpoint.folder)
    recipe = Recipe(source=str(checkpoint.folder), precision=NARROW[name], accept=("kld<=2",))
    graph = openvino.Core().read_model(convert(recipe, tmp_path / "runtime") / GRAPH)

    output = _head(graph).input_value(1)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    (stored,) = openvino.compile_model(openvino.Model([output], []), "CPU", exact)([]).values()
    table = model.lm_head.weight.detach().float().numpy()
    groups, found = (part.astype(np.float32).reshape(len(table), -1, TABLE_GROUP) for part in (table, stored))
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    assert (np.abs(groups - found) <= largest * (1 / 254 + 2**-10)).all()  # half a step, and two roundings to float16
    assert len(output.get_target_inputs()) == (2 if tied else 1)
