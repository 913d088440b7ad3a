"""The API over real HTTP with a real tiny model behind it, and clients nobody here wrote."""

import json
import os
import signal
import socket
from pathlib import Path

import httpx
import openai
import pytest

from lightship.errors import UsageError
from lightship.serving.server import bind, running, wait_ready
from lightship.serving.tokens import TokenBytes
from lightship.tokenizer import load_tokenizer

MESSAGES = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def url(bundle_path):
    with running(bundle_path) as url:
        yield url


@pytest.fixture(scope="module")
def onnx_url(onnx_path):
    with running(onnx_path) as url:
        yield url


@pytest.fixture(scope="module", params=["openvino", "onnx"])
def each(request):
    """A client of each engine."""
    url = request.getfixturevalue("url" if request.param == "openvino" else "onnx_url")
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


SAMPLED = {"temperature": 1.0, "seed": 11, "top_p": 0.9, "presence_penalty": 0.5}


@pytest.mark.parametrize("options", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
def test_a_stream_is_token_for_token_the_whole(each, options):
    """And the same again for the same seed, of a request alone."""
    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, "logprobs": True, **options}
    whole = each.chat.completions.create(**options).choices[0]
    again = each.chat.completions.create(**options).choices[0]
    streamed, finish, text = [], None, ""
    for chunk in each.chat.completions.create(**options, stream=True):
        choice = chunk.choices[0]
        streamed += choice.logprobs.content if choice.logprobs else []
        text += choice.delta.content or ""
        finish = choice.finish_reason or finish
    assert (text, finish) == (whole.message.content, whole.finish_reason)
    assert streamed == whole.logprobs.content == again.logprobs.content
    assert bytes(byte for entry in streamed for byte in entry.bytes).decode("utf-8", "replace") == text
    assert len(streamed) > 5


def test_choices_of_a_seed(each):
    options = {"model": "tiny", "prompt": ["Once upon", "Hello"], "max_tokens": 20, "temperature": 1, "seed": 3}
    choices = each.completions.create(**options, n=2).choices
    texts = [choice.text for choice in choices]
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert texts[0] != texts[1] and texts[2] != texts[3]
    alone = [each.completions.create(**{**options, "prompt": prompt}).choices[0].text for prompt in options["prompt"]]
    if each.models.retrieve("tiny").model_extra["batching"] == "none":  # what runs beside it changes no number
        assert [texts[0], texts[2]] == alone
    greedy = each.completions.create(**{**options, "temperature": 0}, n=3).choices
    assert len({choice.text for choice in greedy[:3]}) == 1 and len({choice.text for choice in greedy[3:]}) == 1


@pytest.mark.parametrize("options", [
    {"temperature": 0}, {"temperature": 1.5, "seed": 1, "top_k": 9},
    {"temperature": 0.7, "seed": 2, "presence_penalty": 1.5, "frequency_penalty": 1, "repetition_penalty": 1.3},
])  # fmt: skip
def test_log_probabilities_are_the_models_own(each, llama, options):
    """Whatever penalties and temperature made of the choice: equal to those of PyTorch on the same tokens."""
    import torch

    extra = {name: options.pop(name) for name in ("top_k", "repetition_penalty") if name in options}
    chat = each.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=16, logprobs=True, extra_body=extra, **options
    ).choices[0]
    tokenizer = load_tokenizer(llama.folder)
    names = {bytes(TokenBytes(tokenizer).of(number)): number for number in range(4, tokenizer.get_vocab_size())}
    produced = [names[bytes(entry.bytes)] for entry in chat.logprobs.content]
    prompt = tokenizer.encode("<|user|>Hello there<|end|><|assistant|>", add_special_tokens=False).ids
    with torch.no_grad():
        logits = llama.load()(torch.tensor([prompt + produced])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits.double(), -1)[range(len(produced)), produced]
    found = torch.tensor([entry.logprob for entry in chat.logprobs.content])
    assert len(produced) > 5 and (found - expected).abs().max() < 1e-3


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_models(client):
    assert [model.id for model in client.models.list().data] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert client.models.retrieve("tiny").model_extra["batching"] == "continuous"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_stream_equals_whole_and_usage_is_exact(client):
    options = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens <= 40
    assert (whole.choices[0].finish_reason == "length") == (whole.usage.completion_tokens == 40)


def test_the_model_answers_as_the_original_does(client, llama):
    """Greedy text over HTTP equals greedy text by PyTorch, template and tokenizer included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama.folder)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = llama.load().generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=24)
    assert answer.choices[0].message.content == tokenizer.decode(out, skip_special_tokens=True)
    assert answer.usage.prompt_tokens == ids["input_ids"].shape[1]


def test_same_seed_same_text(client):
    options = {"model": "tiny", "prompt": "Once upon", "temperature": 1.0, "max_tokens": 30}
    first, again, other = (client.completions.create(**options, seed=seed).choices[0].text for seed in (1, 1, 2))
    assert first == again != other


def test_stop_strings(client):
    text = client.completions.create(model="tiny", prompt="A", temperature=0, max_tokens=30).choices[0].text
    stop = text[4:7]
    answer = client.completions.create(model="tiny", prompt="A", temperature=0, max_tokens=30, stop=stop)
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_predict(url):
    answer = httpx.post(f"{url}/predict", json={"input": "Hello there", "max_tokens": 8}, timeout=60)
    assert set(answer.json()) >= {"output", "usage"} and answer.status_code == 200


def test_an_engine_without_grammars_says_so(onnx_url):
    body = {"messages": MESSAGES, "response_format": {"type": "json_object"}}
    answer = httpx.post(f"{onnx_url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "unsupported_parameter"
    assert answer.json()["error"]["param"] == "response_format"


BAD = [
    ("/v1/chat/completions", {"messages": []}, 400),
    ("/v1/chat/completions", {}, 400),
    ("/v1/chat/completions", {"messages": MESSAGES, "n": 9}, 400),
    ("/v1/chat/completions", {"messages": MESSAGES, "tools": [{"type": "function"}]}, 400),
    ("/v1/chat/completions", {"messages": MESSAGES, "logit_bias": {"5": 1}}, 400),
    ("/v1/chat/completions", {"messages": MESSAGES, "response_format": {"type": "json_schema"}}, 400),
    ("/v1/chat/completions", {"messages": MESSAGES, "temprature": 1}, 400),
    ("/v1/chat/completions", {"messages": MESSAGES, "temperature": 3}, 400),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 5000}, 400),
    ("/v1/chat/completions", {"messages": MESSAGES, "model": "other"}, 404),
    ("/v1/chat/completions", {"messages": MESSAGES, "stop": ["a"] * 5}, 400),
    ("/v1/completions", {"prompt": "", "max_tokens": 1}, 400),
    ("/v1/completions", {"prompt": [99999], "max_tokens": 1}, 400),
    ("/v1/completions", {"prompt": [-1], "max_tokens": 1}, 400),
    ("/v1/completions", {"prompt": [5] * 2048, "max_tokens": 1}, 400),
    ("/v1/completions", {"prompt": "x", "logprobs": 6, "echo": True}, 400),
    ("/predict", {"input": 5}, 400),
    ("/predict", {"text": "x"}, 400),
    ("/nothing", {}, 404),
    ("/livez", {}, 405),
]


@pytest.mark.parametrize(("route", "body", "status"), BAD, ids=lambda value: str(value)[:60])
def test_bad_requests_get_the_envelope(url, route, body, status):
    answer = httpx.post(url + route, json=body, timeout=30)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and len(answer.content) < 600
    assert error["code"] is None or isinstance(error["code"], str)


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b"[" * 100_000])
def test_malformed_json(url, body):
    answer = httpx.post(f"{url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "error" in answer.json()
    assert httpx.get(f"{url}/readyz").status_code == 200


def test_a_disconnect_cancels(url, bundle_path):
    """The engine is free again at once: a full-context request that was left does not delay the next one."""
    body = {"prompt": "Once", "max_tokens": 2000, "stream": True, "temperature": 1, "seed": 3}
    for _ in range(3):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
            next(answer.iter_lines())
    assert httpx.post(f"{url}/predict", json={"input": "x", "max_tokens": 4}, timeout=30).status_code == 200


def test_a_port_in_use_is_said_before_loading():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="in use"):
            bind("127.0.0.1", taken.getsockname()[1])


def children(module):
    """Processes below this one that run `module`."""
    from lightship.evaluation.memory import tree

    return [pid for pid in tree(os.getpid()) if module in Path(f"/proc/{pid}/cmdline").read_bytes()]


def worker_pids():
    """Engine processes below this one."""
    return children(b"lightship.serving.worker")


def test_the_api_outlives_its_engine(bundle_path):
    """Kill the engine in the middle of a stream: a clean error, then another engine."""
    before = set(worker_pids())
    with running(bundle_path) as url:
        (pid,) = set(worker_pids()) - before
        body = {"prompt": "Once", "max_tokens": 2000, "stream": True, "temperature": 1, "seed": 3}
        lines = []
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
            for line in answer.iter_lines():
                if line and not lines:
                    os.kill(pid, signal.SIGKILL)
                lines += [line] if line else []
        events = [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]
        assert events[-1]["error"]["type"] == "server_error"
        assert httpx.get(f"{url}/livez").status_code == 200
        assert httpx.get(f"{url}/readyz").json()["status"] == "restarting"
        wait_ready(url, 60)
        assert httpx.post(f"{url}/predict", json={"input": "x", "max_tokens": 5}, timeout=60).status_code == 200
    assert set(worker_pids()) == before
