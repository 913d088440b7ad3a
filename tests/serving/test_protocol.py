"""The protocol between API, worker process and engine, with `FakeEngine` in a real child and real HTTP in front.

The fake counts upwards and token ids are bytes, so that a prompt decides exactly what is said: "a" gives "bcdef…".
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lightship.engine import EngineSettings, GenerationParams
from lightship.errors import ContextTooLong, EngineDied
from lightship.serving import openai as routes
from lightship.serving.app import create_app
from lightship.serving.auth import guard
from lightship.serving.generation import Piece
from lightship.serving.keys import KeyRing
from lightship.serving.limits import BODY_LIMIT, Limits
from lightship.serving.model import DEFAULT_MAX_TOKENS, ServedModel, fingerprint
from lightship.serving.schema import ChatRequest, CompletionRequest
from lightship.serving.server import bind, in_thread, url_of, wait_ready
from lightship.serving.shapes import Chat, Completion
from lightship.serving.supervisor import Supervisor
from lightship.serving.text import TextStream
from lightship.tokenizer import load_tokenizer

CONTEXT = 4_000_000


def byte_tokenizer() -> Tokenizer:
    """One token a byte; id = value of the byte."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    vocabulary = {chr(byte if byte in printable else next(spare)): byte for byte in range(256)}
    assert set(vocabulary) == set(letters)
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake")
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(5)  # must be switched off: a prompt is never cut silently
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 256, "max_position_embeddings": CONTEXT}))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (folder / "fake.json").write_text(json.dumps({"eos_token_id": ord("~")}))
    return folder


@contextlib.contextmanager
def served(folder):
    worker = Supervisor("fake", EngineSettings())
    worker.load(folder)
    model = ServedModel.load("org/fake", "0" * 64, folder)
    app = create_app(worker, lambda app: routes.add_routes(app, worker, model))
    guard(app, KeyRing(None), Limits())
    with bind("127.0.0.1", 0) as bound:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2))
        with in_thread(server, bound, url_of(bound)):
            yield url_of(bound), worker
    assert not worker.alive


@pytest.fixture(scope="module")
def api(folder):
    with served(folder) as (url, worker):
        yield url, worker


@pytest.fixture(scope="module")
def client(api):
    return openai.OpenAI(base_url=f"{api[0]}/v1", api_key="none", max_retries=0)


def say(client, prompt, **options):
    return client.completions.create(model="org/fake", prompt=prompt, **options)


def test_text_usage_and_end_are_exact(client):
    answer = say(client, "abcdefgh", max_tokens=5)
    assert answer.choices[0].text == "ijklm" and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (8, 5, 13)
    ended = say(client, "w", max_tokens=50)
    assert ended.choices[0].text == "xyz{|}" and ended.choices[0].finish_reason == "stop"
    assert ended.usage.completion_tokens == 6


def test_a_prompt_may_be_text_or_ids_one_or_several(client):
    for prompt in ([97], ["a"], [[97]]):
        assert say(client, prompt, max_tokens=2).choices[0].text == "bc"
    for prompt in (["a", "mn"], [[97], [109, 110]]):
        answer = say(client, prompt, max_tokens=2, n=2)
        assert [(choice.index, choice.text) for choice in answer.choices] == [
            (0, "bc"),
            (1, "bc"),
            (2, "op"),
            (3, "op"),
        ]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 8)


def test_choices_end_each_for_itself_and_stream_under_their_index(client):
    stream = say(client, ["a", "y"], max_tokens=8, stream=True, stream_options={"include_usage": True})
    texts, ends = ["", ""], {}
    for chunk in stream:
        for choice in chunk.choices:
            assert choice.index not in ends
            texts[choice.index] += choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert (texts, ends) == (["bcdefghi", "z{|}"], {0: "length", 1: "stop"})
    assert (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) == (2, 12)
    chat = client.chat.completions.create(model="org/fake", messages=CHAT["messages"], n=3, max_tokens=2, stream=True)
    roles = [choice.index for chunk in chat for choice in chunk.choices if choice.delta.role]
    assert sorted(roles) == [0, 1, 2]


def test_log_probabilities_of_both_routes(client):
    chat = client.chat.completions.create(
        model="org/fake", messages=CHAT["messages"], max_tokens=3, logprobs=True, top_logprobs=0
    )
    content = chat.choices[0].logprobs.content
    assert [(entry.token, entry.bytes, entry.logprob, entry.top_logprobs) for entry in content] == [
        (letter, [ord(letter)], -0.5, []) for letter in "bcd"
    ]
    legacy = say(client, "a", max_tokens=3, logprobs=0).choices[0].logprobs
    assert (legacy.tokens, legacy.token_logprobs) == (["b", "c", "d"], [-0.5] * 3)
    assert (legacy.text_offset, legacy.top_logprobs) == ([0, 1, 2], None)


def test_tokens_behind_a_stop_string_are_not_listed(client):
    for stream in (False, True):
        answer = say(client, "a", max_tokens=20, stop="ef", logprobs=0, stream=stream)
        chunks = list(answer) if stream else [answer]
        choices = [choice for chunk in chunks for choice in chunk.choices]
        text = "".join(choice.text for choice in choices)
        tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.tokens]
        assert (text, tokens) == ("bcd", ["b", "c", "d"])


def test_every_answer_and_chunk_names_model_and_settings(client):
    answer = say(client, "a", max_tokens=1)
    assert re.fullmatch("fp_[0-9a-f]{12}", answer.system_fingerprint)
    chat = client.chat.completions.create(model="org/fake", messages=CHAT["messages"], max_tokens=2, stream=True)
    assert {chunk.system_fingerprint for chunk in chat} == {answer.system_fingerprint}
    assert fingerprint("0" * 64, EngineSettings()) == answer.system_fingerprint
    others = [fingerprint("1" * 64, EngineSettings()), fingerprint("0" * 64, EngineSettings(threads=1))]
    assert answer.system_fingerprint not in others


def test_an_answer_may_be_sent_back_as_it_came(client):
    answer = client.chat.completions.create(model="org/fake", **CHAT, max_tokens=1).choices[0].message
    again = client.chat.completions.create(
        model="org/fake", max_tokens=1, messages=[*CHAT["messages"], answer.model_dump()]
    )
    assert (answer.content, again.choices[0].message.content) == ("b", "c")


HARMLESS = {
    "user": "me", "safety_identifier": "me", "prompt_cache_key": "k", "prompt_cache_retention": "in_memory",
    "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "reasoning_effort": "none", "verbosity": "medium",
    "modalities": ["text"], "parallel_tool_calls": False, "tools": [], "tool_choice": "none", "logit_bias": {},
    "response_format": {"type": "text"}, "n": 1, "top_p": 1, "stop": None, "seed": None,
}  # fmt: skip


def test_each_parameter_a_client_can_send_is_known(client):
    """Taken where it asks for nothing; the same list of the client's own signature tells when a new one comes."""
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase as Chat
    from openai.types.completion_create_params import CompletionCreateParamsBase as Legacy

    client.chat.completions.create(model="org/fake", **CHAT, **HARMLESS, max_tokens=1)
    assert set(Chat.__annotations__) <= set(ChatRequest.model_fields)
    assert set(Legacy.__annotations__) <= set(CompletionRequest.model_fields)


def test_without_a_limit_an_answer_is_bounded(folder):
    model = ServedModel.load("org/fake", "0" * 64, folder)
    assert model.room([1], None, "prompt") == DEFAULT_MAX_TOKENS
    assert model.room([1] * (CONTEXT - 7), None, "prompt") == 7
    assert model.room([1], 5000, "prompt") == 5000
    with pytest.raises(ContextTooLong):
        model.room([1] * CONTEXT, None, "prompt")


def test_a_chat_stream_with_usage(client):
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    stream = client.chat.completions.create(
        model="org/fake",
        messages=messages,
        max_completion_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, ending, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "bcde"
    assert ending.choices[0].finish_reason == "length" and ending.usage is None
    assert last.choices == [] and last.usage.completion_tokens == 4


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_so_far_in_every_chunk(api, path):
    body = CHAT if "chat" in path else {"prompt": "a"}
    told = {"include_usage": True, "continuous_usage_stats": True}
    answer = httpx.post(api[0] + path, json={**body, "max_tokens": 4, "stream": True, "stream_options": told})
    *chunks, ending = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    seen = 0
    for chunk in chunks:  # each byte is a token, so that it is known how many a chunk stands behind
        (choice,) = chunk["choices"]
        text = choice.get("text", "") if "chat" not in path else choice["delta"].get("content") or ""
        seen += len(text)
        assert chunk["usage"]["prompt_tokens"] == 1
        # The role comes before its tokens, all four of them where they wait for a slow reader.
        assert seen <= chunk["usage"]["completion_tokens"] <= (seen if text else 4)
        assert chunk["usage"]["total_tokens"] == 1 + chunk["usage"]["completion_tokens"]
    assert seen == 4 and ending["choices"] == [] and ending["usage"] == chunks[-1]["usage"]


@pytest.mark.parametrize("shape", [Completion, Chat])
def test_a_token_without_text_has_a_chunk_where_the_usage_comes_with_it(shape):
    """The first byte of a character: nothing to show yet, but computed."""
    model = SimpleNamespace(name="m", fingerprint="f")
    made, silent, spoken = shape("id", 0, model), Piece(0, "", produced=1), Piece(0, "b", produced=1)
    assert made.chunks(silent, False) == []
    assert len(made.chunks(silent, False, counted=True)) == len(made.chunks(spoken, False, counted=True)) == 1
    assert len(made.chunks(Piece(0, "", produced=1, finish="stop"), False, counted=True)) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_several_tokens(client, stream):
    answer = say(client, "a", max_tokens=20, stop=["efg", "zzz"], stream=stream)
    if not stream:
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("bcd", "stop")
        return
    chunks = list(answer)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "bcd"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_ids_with_slashes_can_be_retrieved(client):
    assert client.models.retrieve("org/fake").id == "org/fake"


SECRET = "do-not-echo-" * 30
CHAT = {"messages": [{"role": "user", "content": "a"}]}
REFUSED = [
    ("/v1/chat/completions", {**CHAT, "temperature": SECRET}, 400, "temperature"),
    ("/v1/chat/completions", {**CHAT, "max_tokens": "5"}, 400, "max_tokens"),
    ("/v1/chat/completions", {**CHAT, "unheard_of": 1}, 400, "unheard_of"),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 1, "max_completion_tokens": 2}, 400, "max_tokens"),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 1}, 400, "top_logprobs"),
    ("/v1/chat/completions", {**CHAT, "top_logprobs": 0}, 400, "top_logprobs"),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, 400, "response_format"),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": SECRET}}, 400, "response_format.type"),
    ("/v1/chat/completions", {**CHAT, "n": 9}, 400, "n"),
    ("/v1/chat/completions", {**CHAT, "n": 0}, 400, "n"),
    ("/v1/chat/completions", {**CHAT, "logit_bias": {"5": 1}}, 400, "logit_bias"),
    ("/v1/chat/completions", {**CHAT, "store": True}, 400, "store"),
    ("/v1/chat/completions", {**CHAT, "reasoning_effort": "high"}, 400, "reasoning_effort"),
    ("/v1/chat/completions", {**CHAT, "modalities": ["text", "audio"]}, 400, "modalities"),
    ("/v1/chat/completions", {**CHAT, "metadata": {"a": SECRET * 2}}, 400, "metadata.a"),
    ("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, 400, "stream_options"),
    (
        "/v1/completions",
        {"prompt": "a", "stream": True, "stream_options": {"continuous_usage_stats": True}},
        400,
        "continuous_usage_stats",
    ),
    ("/v1/chat/completions", {"messages": [{"role": SECRET, "content": "a"}]}, 400, "messages.0.role"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a", "name": "x"}]}, 400, "messages.0.name"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}]}, 400, "messages"),
    ("/v1/completions", {"prompt": "a", "stop": ""}, 400, "stop"),
    ("/v1/completions", {"prompt": [10**30]}, 400, "prompt"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "best_of": 3}, 400, "best_of"),
    ("/v1/completions", {"prompt": "a", "logprobs": 1}, 400, "logprobs"),
    ("/v1/completions", {"prompt": "a", "logprobs": 6, "echo": True}, 400, "logprobs"),
    ("/v1/completions", {"prompt": "a", "logprobs": 1, "echo": True}, 400, "echo"),
    ("/v1/completions", {"prompt": ["a"] * 33}, 400, "prompt"),
    ("/v1/completions", {"prompt": ["a"] * 32, "n": 3}, 400, "n"),
    ("/predict", {"input": ""}, 400, "input"),
    ("/v1/models/none", None, 404, "model"),
    ("/v1/completions", None, 405, None),
]


@pytest.mark.parametrize(("route", "body", "status", "param"), REFUSED, ids=lambda value: str(value)[:50])
def test_refusals_name_the_parameter_and_echo_nothing(api, route, body, status, param):
    answer = httpx.get(api[0] + route) if body is None else httpx.post(api[0] + route, json=body)
    assert answer.status_code == status and set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param
    assert "do-not-echo" not in answer.text and len(error["message"]) <= 300


RAW = [b'{"prompt": "\\ud800"}', b'{"prompt": "a", "temperature": NaN}', b'{"prompt": ' + b"9" * 9000 + b"}", b"null"]


@pytest.mark.parametrize("body", RAW, ids=["surrogate", "nan", "digits", "null"])
def test_json_no_client_should_send(api, body):
    answer = httpx.post(f"{api[0]}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("declared", [True, False])
def test_a_huge_body_is_refused(api, declared):
    body = b" " * (BODY_LIMIT + 1)
    content = body if declared else iter([body[:-9], body[-9:]])
    answer = httpx.post(f"{api[0]}/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


def endless(url, **options):
    body = {"prompt": [0], "max_tokens": 1_000_000, "stop": ["never"], **options}
    return httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20)


@pytest.fixture
def endless_folder(folder, tmp_path_factory):
    """The same without an end token."""
    endless = tmp_path_factory.mktemp("endless")
    for name in ("tokenizer.json", "config.json"):
        (endless / name).write_bytes((folder / name).read_bytes())
    return endless


def test_disconnects_free_the_engine_and_its_death_is_told(endless_folder):
    with served(endless_folder) as (url, worker):
        with endless(url, stream=True) as answer:
            next(answer.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json={"prompt": [0], "max_tokens": 1_000_000}, timeout=0.2)
        deadline = time.monotonic() + 5
        while worker._worker._streams and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not worker._worker._streams
        with endless(url, stream=True) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(worker.pid, signal.SIGTERM)  # ignored: only the parent ends a worker
            os.kill(worker.pid, signal.SIGINT)
            next(lines)
            assert worker.alive
            (endless_folder / "fake.json").write_text('{"load": 2}')  # the next engine takes its time
            os.kill(worker.pid, signal.SIGKILL)
            data = [line for line in lines if line]
        assert json.loads(data[-2][6:])["error"]["type"] == "server_error" and data[-1] == "data: [DONE]"
        assert httpx.get(f"{url}/livez").status_code == 200
        assert httpx.get(f"{url}/readyz").status_code == httpx.get(f"{url}/health").status_code == 503
        answer = httpx.post(f"{url}/predict", json={"input": "a"})
        assert answer.status_code == 200  # it waited for the next engine
        assert answer.json()["usage"]["completion_tokens"] == DEFAULT_MAX_TOKENS


def test_a_step_that_fails_says_why(folder, tmp_path):
    (tmp_path / "fake.json").write_text('{"fail_after": 3}')

    async def run():
        worker = Supervisor("fake", EngineSettings())
        worker.load(tmp_path)
        await worker.start()
        with pytest.raises(EngineDied, match="told to fail"):
            async for _ in worker.generate([1], GenerationParams(max_tokens=9)):
                pass
        assert not worker.ready
        await worker.close()

    asyncio.run(run())


def test_the_child_ends_when_its_parent_is_killed(tmp_path):
    code = (
        "import asyncio, pathlib, sys\nfrom lightship.engine import EngineSettings\n"
        "from lightship.serving.supervisor import Supervisor\n"
        "async def main():\n    worker = Supervisor('fake', EngineSettings())\n"
        "    worker.load(pathlib.Path(sys.argv[1]))\n"
        "    await worker.start()\n    print(worker.pid, flush=True)\n    await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and not gone(child):
        time.sleep(0.02)
    assert gone(child)


def gone(pid) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_serving_imports_nothing_of_the_build():
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'nncf', 'openvino'): sys.modules[name] = None\n"
        "import lightship.serving.server, lightship.serving.client, lightship.serving.worker"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("garbage", [b"\x80", b"\xf0\x9f", b"\xef\xbf\xbd"])
def test_bytes_that_are_no_text_are_not_decoded_again_and_again(folder, garbage):
    """The window stays small, and what follows is whole again."""
    stream = TextStream(load_tokenizer(folder))
    said = ""
    for byte in garbage * 200 + "a漢🚢z".encode():
        said += stream.push([byte])
        assert len(stream._ids) < 24
    assert (said + stream.finish()).endswith("a漢🚢z")


def test_ignore_eos_goes_on_behind_the_end(api):
    body = {"prompt": "z", "max_tokens": 8}
    ends, goes_on = (
        httpx.post(f"{api[0]}/v1/completions", json={**body, "ignore_eos": ignored}).json() for ignored in (False, True)
    )
    assert (ends["choices"][0]["text"], ends["choices"][0]["finish_reason"]) == ("{|}", "stop")
    assert goes_on["choices"][0]["text"].startswith("{|}~") and goes_on["choices"][0]["finish_reason"] == "length"
    assert goes_on["usage"]["completion_tokens"] == 8
    held = {
        "messages": [{"role": "user", "content": "z"}],
        "ignore_eos": True,
        "response_format": {"type": "json_object"},
    }
    refused = httpx.post(f"{api[0]}/v1/chat/completions", json=held).json()["error"]
    assert (refused["param"], refused["code"]) == ("ignore_eos", "unsupported_parameter")


SERVE = """
import pathlib, sys
from lightship.serving import server
from lightship.bundle import Bundle
from lightship.report import Report
from lightship.serving.settings import ServeSettings

Bundle.report = Report(())
folder = pathlib.Path(sys.argv[1])
Bundle.open = staticmethod(lambda path: Bundle(folder, {"name": "fake", "targets": ["fake"]}, "0" * 64))
Bundle.target_folder = lambda self, name: folder
Bundle.stated_targets = staticmethod(lambda path: ["fake"])
Bundle.stated_kind = staticmethod(lambda path: "decoder")
server.serve(folder, port=int(sys.argv[2]), settings=ServeSettings(use_tuned=False))
"""


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_finish_and_ends_with_0(folder, kind):
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, "-c", SERVE, str(folder), str(port)]) as process:
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, 30, lambda: process.poll() is None)
        body = {"prompt": [ord("~")], "max_tokens": 20_000, "stop": ["never"], "stream": True}  # a turn of 255 tokens
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(kind)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(10) == 0
