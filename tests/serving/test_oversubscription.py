"""More work than the KV cache holds, with a real engine: a tiny model whose keys and values are huge."""

import concurrent.futures

import httpx
import pytest

from lightship.pipeline import ship
from lightship.recipe import Precision, Recipe
from lightship.serving.server import running
from lightship.serving.settings import ServeSettings
from tests.serving.test_front import post, scraped
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """512 KiB for each token in float32: a GiB is 64 blocks of 32 tokens."""
    folder = tmp_path_factory.mktemp("wide")
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 256, "num_hidden_layers": 8}
    source = tiny_llama(folder / "model", **heads, max_position_embeddings=4096, initializer_range=0.03).folder
    ship(Recipe(source=str(source), precision=Precision(name="fp32")), folder / "wide")
    with running(folder / "wide", settings=ServeSettings(keys=None)) as url:
        yield url


def test_long_outputs_wait_for_room_and_none_is_lost(url):
    """24 answers that may take 13 blocks each, of 64: the cache never overflows, and every answer is whole."""
    blocks = scraped(url, "none")["lightship:kv_blocks"]
    assert 40 <= blocks <= 100
    bodies = [{"prompt": f"Number {seed}", "max_tokens": 400, "temperature": 1, "seed": seed} for seed in range(24)]
    alone = post(url, bodies[0], timeout=120).json()["usage"]
    most = 0.0
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(post, url, body, timeout=240) for body in bodies]
        while not all(each.done() for each in asked):
            now = scraped(url, "none")
            most = max(most, now["lightship:kv_blocks_reserved"])
            assert now["lightship:kv_cache_usage_perc"] <= 1
            concurrent.futures.wait(asked, timeout=0.5)
    answers = [each.result() for each in asked]
    assert [answer.status_code for answer in answers] == [200] * 24
    for answer in answers:
        choice, usage = answer.json()["choices"][0], answer.json()["usage"]
        assert (choice["finish_reason"] == "length") == (usage["completion_tokens"] == 400)
    assert answers[0].json()["usage"]["prompt_tokens"] == alone["prompt_tokens"]
    assert 0.5 * blocks < most <= blocks  # it was crowded


def test_what_never_fits_is_refused_by_its_numbers(url):
    refused = post(url, {"prompt": "a", "max_tokens": 3500})
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "request_too_large"
    assert "blocks" in refused.json()["error"]["message"]
    assert httpx.get(f"{url}/livez").status_code == 200
