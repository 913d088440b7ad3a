"""A server with the FakeEngine, scraped: what it says of requests that are known, and what dashboards ask it for."""

import contextlib
import json
import re
import socket
import threading
from importlib import resources

import httpx
import pytest
import uvicorn
import yaml
from fastapi import FastAPI, Request
from prometheus_client.parser import text_string_to_metric_families

from lightship.engine import EngineSettings, GenerationParams
from lightship.serving.admission import Admission
from lightship.serving.app import create_app
from lightship.serving.journal import Journal, journal_to
from lightship.serving.metrics import FIRST_TOKEN, Metrics, add_metrics, own_port, token_buckets
from lightship.serving.server import bind, url_of, wait_ready
from lightship.serving.supervisor import Supervisor
from lightship.serving.ticket import Demand, Limits

DASHBOARDS = resources.files("lightship.serving") / "dashboards"


@contextlib.contextmanager
def served(folder, aliases=False, own=None):
    """The engine behind admission, journal and metrics, as a server wires them, with one plain route."""
    metrics = Metrics("tiny", 2048, aliases)
    admission = Admission(Limits(blocks=40, max_queue=2), observer=metrics)
    worker = Supervisor("fake", EngineSettings())
    worker.load(folder)
    logger, sink = journal_to(folder / "journal")
    metrics.watch(admission.snapshot, lambda: worker.stats, lines_dropped=lambda: sink.dropped)

    def add_routes(app: FastAPI) -> None:
        add_metrics(app, metrics)

        @app.post("/generate")
        async def generate(request: Request, prompt: int, output: int) -> list[int]:
            demand = Demand("key-1", (prompt,), (output,))
            params = GenerationParams(max_tokens=output)
            async with await admission.enter(demand) as ticket:
                request.state.record.ticket = ticket
                events = ticket.watch(worker.generate([7] * prompt, params))
                return [token async for event in events for token in event.token_ids]

        @app.post("/own")
        async def on_its_own_port() -> str:
            async with own_port(metrics, own), httpx.AsyncClient(trust_env=False) as client:
                return (await client.get(url_of(own))).text

    app = Journal(create_app(worker, add_routes), logger, answered=metrics.answered)
    with bind("127.0.0.1", 0) as bound:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            wait_ready(url_of(bound), 30, thread.is_alive)
            yield url_of(bound)
        finally:
            server.should_exit = True
            thread.join(10)
            sink.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake")
    (folder / "fake.json").write_text(json.dumps({"slow": 0.01}))
    return folder


@pytest.fixture(scope="module")
def scraped(folder):
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        own.listen()
        with served(folder, own=own) as url:
            for prompt, output in ((3, 5), (200, 1), (7, 60)):
                answer = httpx.post(f"{url}/generate", params={"prompt": prompt, "output": output})
                assert len(answer.json()) == output
            assert httpx.post(f"{url}/generate", params={"prompt": 2000, "output": 20}).status_code == 400
            answer = httpx.get(f"{url}/metrics")
            assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            elsewhere = httpx.post(f"{url}/own").json()
            yield answer.text, elsewhere


def samples(text):
    """(name, labels) → value, as Prometheus reads it."""
    families = text_string_to_metric_families(text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_known_requests_give_known_figures(scraped):
    found = samples(scraped[0])

    def value(name, **labels):
        return found[f"lightship:{name}", tuple(sorted({"model_name": "tiny", **labels}.items()))]

    assert value("prompt_tokens_total") == 210 and value("generation_tokens_total") == 66
    assert value("request_success_total", finished_reason="length") == 3
    assert value("request_success_total", finished_reason="stop") == 0
    assert value("admission_rejections_total", reason="too_large") == 1
    assert value("admission_rejections_total", reason="queue_full") == 0
    assert value("http_responses_total", status="400") == 1 and value("http_responses_total", status="200") >= 3
    assert value("http_responses_total", status="429") == 0  # there before the first, so that a rate sees that one
    assert value("request_prompt_tokens_sum") == 210 and value("request_prompt_tokens_bucket", le="5.0") == 1
    assert value("request_generation_tokens_count") == 3
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert value(f"{name}_count") == 3
    # Each but the first of a request, and those that came with the first where the server was slow.
    assert 45 <= value("inter_token_latency_seconds_count") <= 4 + 0 + 59
    assert value("time_to_first_token_seconds_sum") <= value("e2e_request_latency_seconds_sum")
    assert (value("num_requests_running"), value("num_requests_waiting"), value("kv_blocks_reserved")) == (0, 0, 0)
    assert value("kv_blocks") == 40 and value("kv_cache_usage_perc") != value("kv_cache_usage_perc")  # NaN
    assert all(dict(labels)["model_name"] == "tiny" for _, labels in found)
    assert not any("_created" in name or name.startswith("vllm:") for name, _ in found)


def test_tokens_that_come_together_count_each():
    metrics = Metrics("tiny", 2048)
    for tokens, seconds in ((1, None), (1, 0.2), (3, 0.3)):
        metrics.produced(tokens, seconds)
    found = samples(metrics.exposition()[0].decode())
    labels = (("model_name", "tiny"),)
    assert found["lightship:inter_token_latency_seconds_count", labels] == 4
    assert found["lightship:inter_token_latency_seconds_sum", labels] == pytest.approx(0.5)
    assert found["lightship:generation_tokens_total", labels] == 5


def test_the_journal_has_a_line_for_each(scraped, folder):
    lines = [json.loads(line) for line in (folder / "journal").read_text().splitlines()]
    made = [line for line in lines if line["route"] == "/generate"]
    assert [line["output_tokens"] for line in made] == [5, 1, 60, None]
    assert [line["finish"] for line in made] == ["length", "length", "length", None]
    assert [line["status"] for line in made] == [200, 200, 200, 400]
    assert all(0 <= line["queue_ms"] <= line["ttft_ms"] <= line["total_ms"] for line in made[:3])


def test_on_a_port_of_its_own(scraped):
    assert set(samples(scraped[1])) >= set(samples(scraped[0]))


def test_aliases_are_what_vllm_exports():
    metrics = Metrics("tiny", 100, aliases=True)
    admission = Admission(Limits(blocks=40), observer=metrics)
    metrics.watch(admission.snapshot, lambda: {"cache_usage": 0.25})
    found = samples(metrics.exposition()[0].decode())
    usual = (("engine", "0"), ("model_name", "tiny"))
    assert found["vllm:kv_cache_usage_perc", usual] == 0.25
    assert found["vllm:num_requests_waiting", usual] == 0 and found["vllm:prompt_tokens_total", usual] == 0
    assert found["vllm:request_success_total", (*usual[:1], ("finished_reason", "stop"), *usual[1:])] == 0
    assert found["vllm:admission_rejections_total", (("model_name", "tiny"), ("reason", "queue_full"))] == 0
    assert found["vllm:time_to_first_token_seconds_count", usual] == 0
    ours = {name for name, _ in found if name.startswith("lightship:")}
    assert {name.replace("vllm:", "lightship:") for name, _ in found if name.startswith("vllm:")} < ours
    assert not any("engine_restarts" in name for name, _ in found if name.startswith("vllm:"))


def test_buckets_are_those_of_vllm():
    assert token_buckets(100) == (1, 2, 5, 10, 20, 50, 100) and token_buckets(131072)[-1] == 100_000
    assert token_buckets(99)[-1] == 50
    text = Metrics("tiny", 100).exposition()[0].decode()
    edges = re.findall(r'lightship:time_to_first_token_seconds_bucket\{le="([^"]+)"', text)
    assert [float(edge) for edge in edges[:-1]] == list(FIRST_TOKEN) and edges[-1] == "+Inf"


SELECTOR = re.compile(r"(lightship:[a-z0-9_]+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!=|!~|=)\s*"([^"]*)"')


def expressions():
    board = json.loads((DASHBOARDS / "grafana.json").read_text(encoding="utf-8"))
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield f"panel {panel['title']}", target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["query"]["query"]
    for group in yaml.safe_load((DASHBOARDS / "alerts.yaml").read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"]


@pytest.mark.parametrize(("where", "expression"), list(expressions()), ids=lambda value: str(value)[:40])
def test_dashboards_ask_for_what_there_is(scraped, where, expression):
    """Every metric of an expression is in a live scrape, with the labels and values it is selected by."""
    found = samples(scraped[0])
    asked = SELECTOR.findall(expression)
    assert asked or expression.startswith("up{"), f"{where} asks for nothing"
    for name, matchers in asked:
        if name == "lightship:num_requests_waiting_by_key":
            continue  # has samples only while someone waits: see below
        there = [dict(labels) for each, labels in found if each == name]
        assert there, f"{where}: {name} is not exported"
        for label, how, value in MATCHER.findall(matchers):
            values = {labels.get(label) for labels in there}
            assert None not in values, f"{where}: {name} has no label {label}"
            assert how != "=" or value in values, f"{where}: {name} never has {label}={value!r}"
    for label in re.findall(r"by \(([^)]*)\)", expression):
        known = {each for _, labels in found for each, _ in labels} | {"le", "instance", "key"}
        assert {each.strip() for each in label.split(",")} <= known


def test_waiting_by_key():
    metrics = Metrics("tiny", 100)
    snapshot = Admission(Limits(blocks=40)).snapshot()
    metrics.watch(lambda: type(snapshot)(**{**snapshot.__dict__, "waiting_by_key": {"key-1": 3}}))
    found = samples(metrics.exposition()[0].decode())
    assert found["lightship:num_requests_waiting_by_key", (("key", "key-1"), ("model_name", "tiny"))] == 3
