"""The OpenVINO target beyond its gates."""

import subprocess
import sys

import numpy as np
import openvino
import openvino_tokenizers

from lightship.calibration import default_text
from lightship.tokenizer import load_tokenizer


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
