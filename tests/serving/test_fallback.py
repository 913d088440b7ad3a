"""Tuned settings with which a bundle cannot be served: refused, deadly or wrong. The defaults serve instead, and say
so; what the defaults cannot do either is no fault of the file."""

import asyncio
import contextlib
import logging
import threading
import time
import types

import httpx
import pytest
from fastapi import FastAPI

from lightship import tuning
from lightship.errors import EngineDied, EngineError, LightshipError, ReloadFailed
from lightship.serving import server
from lightship.serving.admission import Admission
from lightship.serving.deployment import Deployment, Maker
from lightship.serving.fallback import attempted
from lightship.serving.server import running
from lightship.serving.settings import ServeSettings
from lightship.serving.ticket import Limits
from lightship.tuning import Chosen
from tests.serving.door import wait_for
from tests.serving.test_api import worker_pids
from tests.serving.test_reload import change, deployments, digest_of, fake_bundle, served
from tests.serving.virtual import asking, settled
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


def test_who_waits_for_settings_that_do_not_load_hears_so_at_once():
    async def closed():
        pass

    async def run():
        admission = Admission(Limits(blocks=10), begun=False)
        engine = types.SimpleNamespace(failure="prompt lookup is not there", close=closed)
        old = Deployment(types.SimpleNamespace(engine=engine, beside=[]), admission, FastAPI())
        waiting = asking(admission)
        await settled()
        await old.close()
        with pytest.raises(EngineDied, match="prompt lookup is not there"):
            await asyncio.wait_for(waiting, 5)

    asyncio.run(run())


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


# ── At the start, while it happens ──────────────────────────────────────────


DIES = {"with": {"prompt_lookup": {"die": True}}}


def tuned_with(folder, **faults):
    bundle = fake_bundle(folder, **faults)
    tuning.write(bundle.folder, entry(bundle=bundle.digest, target="fake", settings=Chosen(prompt_lookup=3)))
    return bundle


def test_what_kills_the_defaults_too_is_not_blamed_on_the_file(tmp_path, caplog):
    """They load as well, and die of the first prompt as well."""
    bundle = tuned_with(tmp_path / "one", fail_after=0)
    with pytest.raises(EngineError, match="told to fail"), running(bundle, settings=ServeSettings(keys=None)):
        pass
    assert warnings(caplog) == []


def test_a_small_context_warms_up_with_a_token(tmp_path, caplog):
    """`FakeEngine` fails on an empty prompt, as real ones do."""
    bundle = tuned_with(tmp_path / "one")
    with served(bundle, max_context=16) as url:
        assert "tuned_ignored" not in card(url)
    assert warnings(caplog) == []


@pytest.fixture
def slowly(monkeypatch):
    """A second deployment takes its time to be made; `fails` says with which error, `spawned` whether its engine had a
    process already, which nobody would end."""
    state, kind = types.SimpleNamespace(begun=threading.Event(), fails=None, spawned=None), Maker.kind

    def made(maker, bundle, engine, chosen):
        state.spawned = engine.alive
        state.begun.set()
        time.sleep(0.5)
        if state.fails is not None:
            raise state.fails
        return kind(maker, bundle, engine, chosen)

    monkeypatch.setattr(Maker, "kind", made)
    return state


def test_a_fallback_is_alive(tmp_path, monkeypatch, slowly):
    lives, wait_ready = [], server.wait_ready

    def watched(url, **given):
        def ready():
            with contextlib.suppress(httpx.TransportError):
                lives.append(httpx.get(f"{url}/livez").status_code)
                return httpx.get(f"{url}/readyz").status_code == 200
            return False

        wait_for(ready)
        wait_ready(url, **given)

    monkeypatch.setattr(server, "wait_ready", watched)
    with served(tuned_with(tmp_path / "one", **DIES)) as url:
        assert "tuned_ignored" in card(url)
    assert slowly.begun.is_set() and set(lives) == {200}


def test_a_fallback_that_cannot_be_made_leaves_no_process(tmp_path, slowly):
    slowly.fails, before = EngineError("no memory for it"), set(worker_pids())
    bundle = tuned_with(tmp_path / "one", **DIES)
    with pytest.raises(EngineError, match="no memory for it"), running(bundle, settings=ServeSettings(keys=None)):
        pass
    assert slowly.spawned is False
    wait_for(lambda: set(worker_pids()) <= before)


def test_a_start_that_is_given_up_leaves_no_process(tmp_path, monkeypatch, slowly):
    def given_up(url, **_):
        assert slowly.begun.wait(30)
        raise ConnectionAbortedError

    before = set(worker_pids())
    monkeypatch.setattr(server, "wait_ready", given_up)
    bundle = tuned_with(tmp_path / "one", **DIES)
    with pytest.raises(ConnectionAbortedError), running(bundle, settings=ServeSettings(keys=None)):
        pass
    assert slowly.spawned is False
    wait_for(lambda: set(worker_pids()) <= before)


# ── When there is another attempt, and what is said of it ───────────────────


def tried(tmp_path, error, **more):
    """What `attempted` makes of tuned settings that end with `error`, and how often it tries."""
    chosen, seen = ServeSettings(tuned=entry()), []

    async def attempt(settings):
        seen.append(settings)
        if settings is chosen:
            raise error
        return settings.tuned_ignored["reason"]

    try:
        return asyncio.run(attempted(chosen, ServeSettings(), tmp_path / "one", attempt, **more)), len(seen)
    except LightshipError as raised:
        return raised, len(seen)


def test_a_server_that_stops_begins_nothing(tmp_path):
    error = EngineError("the engine was closed")
    assert tried(tmp_path, error, stopping=lambda: True) == (error, 1)
    assert tried(tmp_path, error, stopping=lambda: False) == ("the engine was closed", 2)


@pytest.mark.parametrize(("cause", "reason"), [
    (TimeoutError(), "load failed: too late"), (None, "load failed: too late"), (OSError("gone"), "OSError: gone"),
    (EngineError("refused"), "refused"),
])  # fmt: skip
def test_there_is_always_a_reason(tmp_path, cause, reason):
    error = ReloadFailed("load failed: too late")
    error.__cause__ = cause
    assert tried(tmp_path, error) == (reason, 2)


@pytest.fixture(autouse=True)
def heard(caplog):
    caplog.set_level(logging.WARNING, "lightship.serving")
