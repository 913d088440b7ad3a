"""Tuned settings with which a bundle cannot be served: refused, deadly or wrong. The defaults serve instead, and say
so; what the defaults cannot do either is no fault of the file."""

import logging

import httpx
import pytest

from lightship import tuning
from lightship.errors import EngineError
from lightship.serving.server import running
from lightship.serving.settings import ServeSettings
from lightship.tuning import Chosen
from tests.serving.door import wait_for
from tests.serving.test_api import worker_pids
from tests.serving.test_reload import change, deployments, digest_of, fake_bundle, served
from tests.test_tuning import entry

FAULTS = {
    "refused": ({"refuse": "prompt lookup is not there"}, "prompt lookup is not there"),
    "its process dies while it loads": ({"die": True}, "while loading the model"),
    "its process dies of the first prompt": ({"segfault_after": 0}, "the engine process ended"),
    "it fails at the first prompt": ({"fail_after": 0}, "told to fail"),
}


@pytest.fixture(params=FAULTS)
def fault(request):
    """Fields of `fake.json`, and a word of the reason."""
    return FAULTS[request.param]


def tuned(folder, **fields):
    """A bundle with a file of tuned settings next to it; where these are used `fields` hold."""
    bundle = fake_bundle(folder, **{"with": {"prompt_lookup": fields}})
    tuning.write(folder, entry(bundle=bundle.digest, target="fake", settings=Chosen(prompt_lookup=3)))
    return bundle


def card(url):
    return httpx.get(f"{url}/v1/models").json()["data"][0]


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if "cannot be used" in record.getMessage()]


def answers(url):
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 4}, timeout=30)
    return answer.status_code == 200 and answer.json()["choices"][0]["text"] == "bcde"


@pytest.mark.parametrize("workers", [1, 2])
def test_the_defaults_serve_and_say_so(tmp_path, caplog, fault, workers):
    fields, why = fault
    with served(tuned(tmp_path / "one", **fields), workers=workers) as url:
        assert answers(url)
        told = card(url)
        assert told["tuned_ignored"]["file"] == "one.tuned.json" and why in told["tuned_ignored"]["reason"]
        assert told["measured"] == "unmeasured here"  # the figures are of settings that are not used
        wait_for(lambda: len(worker_pids()) == workers)
    (said,) = warnings(caplog)
    assert str(tmp_path / "one.tuned.json") in said and why in said and "prompt_lookup 3" in said


def test_settings_that_work_are_used(tmp_path, caplog):
    """Here they show: the engine says something else with them."""
    with served(tuned(tmp_path / "one", script=[ord("z")])) as url:
        assert not answers(url) and "tuned_ignored" not in card(url) and "tuned" in card(url)["measured"]
    assert warnings(caplog) == []


def test_what_the_defaults_cannot_do_either_is_their_fault(tmp_path, caplog):
    bundle = fake_bundle(tmp_path / "one", refuse="nothing works", **{"with": {"prompt_lookup": {"die": True}}})
    tuning.write(bundle.folder, entry(bundle=bundle.digest, target="fake", settings=Chosen(prompt_lookup=3)))
    before = set(worker_pids())
    with pytest.raises(EngineError, match="nothing works"), running(bundle, settings=ServeSettings(keys=None)):
        pass
    assert warnings(caplog) == []
    wait_for(lambda: set(worker_pids()) <= before)


def test_nothing_tuned_is_tried_once(tmp_path, caplog):
    """A fault without tuned settings is raised as before: no second try hides it."""
    bundle = fake_bundle(tmp_path / "one", die=True)
    with (
        pytest.raises(EngineError, match="while loading the model"),
        running(bundle, settings=ServeSettings(keys=None)),
    ):
        pass
    assert warnings(caplog) == []


# ── Another bundle while one is served ──────────────────────────────────────


def test_another_bundle_is_served_with_the_defaults(tmp_path, caplog, fault):
    fields, why = fault
    first, second = fake_bundle(tmp_path / "first"), tuned(tmp_path / "second", **fields)
    with served(first) as url:
        answer = change(url, second.folder)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert told["tuned_ignored"]["file"] == "second.tuned.json" and why in told["tuned_ignored"]["reason"]
        assert [step["step"] for step in told["steps"]] == [
            "verify", "memory", "load", "warm up", "golden", "shift"]  # fmt: skip
        assert digest_of(url) == second.digest and answers(url) and "tuned_ignored" in card(url)
        assert httpx.post(f"{url}/admin/rollback", json={}, timeout=30).status_code == 200
        assert digest_of(url) == first.digest and "tuned_ignored" not in card(url)
    assert len(warnings(caplog)) == 1


def test_settings_that_answer_wrongly_are_not_taken(tmp_path, caplog):
    """The golden rows are asked of the engine as it would serve."""
    with served(fake_bundle(tmp_path / "first")) as url:
        answer = change(url, tuned(tmp_path / "second", script=[ord("z")]).folder)
        assert answer.status_code == 200, answer.text
        assert "above the bundle's limit" in answer.json()["tuned_ignored"]["reason"] and answers(url)
    assert len(warnings(caplog)) == 1


def test_a_bundle_that_fails_with_the_defaults_too_is_not_served(tmp_path, caplog):
    first = fake_bundle(tmp_path / "first")
    bad = fake_bundle(tmp_path / "bad", refuse="nothing works", **{"with": {"prompt_lookup": {"die": True}}})
    tuning.write(bad.folder, entry(bundle=bad.digest, target="fake", settings=Chosen(prompt_lookup=3)))
    with served(first) as url:
        answer = change(url, bad.folder)
        assert answer.status_code >= 400 and "nothing works" in answer.text and "die" not in answer.text
        assert digest_of(url) == first.digest and answers(url) and deployments(url)["coming"] is None
        wait_for(lambda: len(worker_pids()) == 1)
    assert warnings(caplog) == []


@pytest.fixture(autouse=True)
def heard(caplog):
    caplog.set_level(logging.WARNING, "lightship.serving")
