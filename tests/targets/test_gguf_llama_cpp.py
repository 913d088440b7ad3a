"""llama.cpp itself reads what is written: the same ids of the same text, and the same log-probabilities.

Runs where LIGHTSHIP_LLAMA_SERVER names the program `llama-server` of a build of llama.cpp."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from lightship.recipe import Precision
from lightship.targets import _gguf_tokenizer, gguf, pytorch
from tests.targets.test_gguf_target import LLAMA3, sentencepiece_llama, tiny

SERVER = os.environ.get("LIGHTSHIP_LLAMA_SERVER")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SERVER, reason="needs llama.cpp: name its llama-server in LIGHTSHIP_LLAMA_SERVER"),
]


def post(port, path, body):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.fixture
def serve(tmp_path):
    """Start llama-server on a file; returns its port."""
    running = []

    def start(file):
        port = free_port()
        command = [SERVER, "-m", str(file), "--host", "127.0.0.1", "--port", str(port), "-c", "1024", "-t", "1"]
        exact = ["--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32"]
        with (tmp_path / "server.log").open("wb") as log:
            running.append(subprocess.Popen([*command, *exact], stdout=log, stderr=subprocess.STDOUT))
        for _ in range(600):
            assert running[-1].poll() is None, (tmp_path / "server.log").read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    return port
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise AssertionError("llama-server does not answer")

    yield start
    for server in running:
        server.terminate()
        server.wait(30)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {"rope_parameters": LLAMA3}), ("llama", {"head_dim": 32, "tie_word_embeddings": True}),
     ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
     ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})],
    ids=["llama3", "heads", "linear", "qwen2"],
)  # fmt: skip
def test_llama_cpp_computes_the_same(model_type, changes, tmp_path, serve):
    checkpoint = tiny(tmp_path, model_type, **changes)
    gguf.export(checkpoint, tmp_path / "out")
    port = serve(tmp_path / "out" / gguf.FILE)
    ids = np.arange(4, 304)[None]
    logits = pytorch.open_scorer(checkpoint.folder).logits(ids, np.ones_like(ids))[0, -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    answer = post(port, "/completion", {"prompt": ids[0].tolist(), "n_predict": 1, "n_probs": 8, "temperature": 0})
    found = {each["id"]: each["logprob"] for each in answer["completion_probabilities"][0]["top_logprobs"]}
    assert list(found) == np.argsort(-expected)[:8].tolist()
    np.testing.assert_allclose(list(found.values()), expected[list(found)], atol=0.01)


def test_llama_cpp_cuts_text_the_same(llama, tmp_path, serve):
    gguf.export(llama, tmp_path / "floats")
    gguf.quantise(tmp_path / "floats", tmp_path / "out", Precision(name="q4_0"))
    port = serve(tmp_path / "out" / gguf.FILE)
    tokenizer = pytorch.Checkpoint(llama.folder).carry(tmp_path)
    for text in (*_gguf_tokenizer.PROBES, "<|user|>hi<|end|>\n<|assistant|> 12"):
        body = {"content": text, "add_special": True, "parse_special": True}
        assert post(port, "/tokenize", body)["tokens"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("owner", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_llama_cpp_cuts_text_of_sentencepiece_the_same(owner, tmp_path, serve):
    checkpoint = sentencepiece_llama(tmp_path / "llama", owner)
    gguf.export(checkpoint, tmp_path / "out")
    port = serve(tmp_path / "out" / gguf.FILE)
    tokenizer = checkpoint.carry(tmp_path)
    reader = _gguf_tokenizer.reader(gguf._metadata(gguf._reader(tmp_path / "out")))
    same = []
    for text in (*_gguf_tokenizer.PROBES, "The statement is executed</s> again and</s>\nonce <s>more 漢字  🚢"):
        found = post(port, "/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        assert found == [1, *reader(text)], "what llama.cpp does is known exactly"
        same.append(found == tokenizer(text)["input_ids"])
    assert all(same) == (owner != "LlamaTokenizer") and sum(same) > 5
