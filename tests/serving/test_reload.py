"""Another bundle while the server works: bundles of `FakeEngine` for every way to fail, the tiny real model for the way
that succeeds."""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import signal
import threading
import time
import types

import httpx
import numpy as np
import psutil
import pytest

from lightship.bundle import pack
from lightship.cli import main
from lightship.errors import LimitExceeded, ReloadFailed
from lightship.report import Metric, Report
from lightship.serving.golden import Found, divergence
from lightship.serving.keys import KeyFile
from lightship.serving.reload import Reloader
from lightship.serving.server import Serving, in_thread, running
from lightship.serving.settings import ServeSettings
from lightship.serving.supervisor import Care
from tests.serving.door import model_folder, wait_for
from tests.serving.test_api import worker_pids

ROW = list(range(5, 45))


def fake_bundle(folder, says=1, metrics=(), **faults):
    """A bundle whose engine says the next number, as its golden rows have it when `says` is 1."""
    runtime = folder / "targets" / "fake"
    runtime.mkdir(parents=True)
    model_folder(runtime)
    (runtime / "fake.json").write_text(json.dumps(faults))
    (folder / "report.json").write_text(Report(metrics, {"limit_kld": 0.02}).to_json())
    (folder / "golden").mkdir()
    (folder / "golden" / "tokens.json").write_text(json.dumps({"rows": [ROW]}))
    likeliest = np.array([[token + says, token + 100] for token in ROW], np.int32)
    logprobs = np.tile(np.array([-0.5, -3.0], np.float32), (len(ROW), 1))
    np.savez(folder / "golden" / "logprobs.npz", ids=likeliest, logprobs=logprobs)
    return pack(folder, {"name": folder.name, "targets": ["fake"]})


@pytest.fixture
def first(tmp_path):
    return fake_bundle(tmp_path / "first", slow=0.002)


@contextlib.contextmanager
def served(bundle, **settings):
    before = set(worker_pids())
    with running(bundle.folder, settings=ServeSettings(**{"keys": None, **settings})) as url:
        yield url
    wait_for(lambda: set(worker_pids()) <= before)


def change(url, folder, **more):
    return httpx.post(f"{url}/admin/reload", json={"bundle": str(folder)}, timeout=60, **more)


def deployments(url):
    return httpx.get(f"{url}/admin/deployments").json()


def digest_of(url):
    return httpx.get(f"{url}/v1/models").json()["data"][0]["digest"]


def ask(url, stream=False, tokens=20, **more):
    """The text of a whole answer; raises for anything else."""
    body = {"prompt": "a", "max_tokens": tokens, "stream": stream, **more}
    if not stream:
        return (
            httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status().json()["choices"][0]["text"]
        )
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


ALPHABET = "bcdefghijklmnopqrstu"


# ── It changes ──────────────────────────────────────────────────────────────


def test_no_request_is_lost_while_bundles_change_under_load(first, tmp_path):
    others = [first, fake_bundle(tmp_path / "second", slow=0.001)]
    with served(first) as url, concurrent.futures.ThreadPoolExecutor(8) as pool:
        ended = threading.Event()

        def client(number):
            found = []
            while not ended.is_set() or len(found) < 10:
                found.append(ask(url, stream=(number + len(found)) % 2 == 0))
            return found

        clients = [pool.submit(client, number) for number in range(8)]
        for turn in range(3):
            new = others[(turn + 1) % 2]
            answer = change(url, new.folder)
            assert answer.status_code == 200, answer.text
            assert answer.json()["digest"] == digest_of(url) == new.digest
        ended.set()
        answers = [text for each in clients for text in each.result()]
        assert len(answers) >= 80 and set(answers) == {ALPHABET}
        wait_for(lambda: not deployments(url)["retiring"])
        found = deployments(url)
        assert found["changes"] == 3 and found["name"] == "first"
        metrics = httpx.get(f"{url}/metrics").text
        assert (
            f'lightship:request_success_total{{finished_reason="length",model_name="first"}} {len(answers)}' in metrics
        )


def test_what_has_begun_stays_with_its_bundle_and_what_comes_is_the_new_ones(first, tmp_path):
    second, before = fake_bundle(tmp_path / "second"), set(worker_pids())
    with served(first) as url:
        body = {"model": "first", "prompt": "a", "max_tokens": 1500, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            began = json.loads(next(lines)[6:])["system_fingerprint"]
            (pid,) = set(worker_pids()) - before
            assert change(url, second.folder).status_code == 200
            after = httpx.post(f"{url}/v1/completions", json={"model": "first", "prompt": "a", "max_tokens": 2})
            assert after.status_code == 200 and after.json()["system_fingerprint"] != began
            assert deployments(url)["retiring"][0]["digest"] == first.digest and psutil.pid_exists(pid)
            rest = [line[6:] for line in lines if line]
        assert {json.loads(line)["system_fingerprint"] for line in rest[:-1]} == {began}
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length" and rest[-1] == "[DONE]"
        wait_for(lambda: not psutil.pid_exists(pid))
        assert not deployments(url)["retiring"]


def test_back_and_forth_again(first, tmp_path):
    second = fake_bundle(tmp_path / "second")
    with served(first) as url:
        nothing = httpx.post(f"{url}/admin/rollback", json={})
        assert nothing.status_code == 409 and nothing.json()["error"]["code"] == "nothing_to_roll_back"
        assert change(url, second.folder).status_code == 200
        for expected in (first, second):
            answer = httpx.post(f"{url}/admin/rollback", json={}, timeout=30)
            assert answer.status_code == 200 and answer.json()["digest"] == digest_of(url) == expected.digest
        shutil.rmtree(first.folder)
        fake_bundle(first.folder, slow=0.1)
        refused = httpx.post(f"{url}/admin/rollback", json={}, timeout=30)
        assert refused.status_code == 400 and "another bundle" in refused.json()["error"]["message"]
        assert digest_of(url) == second.digest


def test_a_link_that_is_changed_changes_nothing_by_itself(first, tmp_path):
    """An engine that is started again, and a change back, take the bundle that was verified."""
    other, link = fake_bundle(tmp_path / "other", script=[120]), tmp_path / "current"
    second = fake_bundle(tmp_path / "second")
    link.symlink_to(first.folder)
    before = set(worker_pids())
    with running(link, settings=ServeSettings(keys=None)) as url:
        (pid,) = set(worker_pids()) - before
        link.unlink()
        link.symlink_to(other.folder)
        os.kill(pid, signal.SIGKILL)
        assert ask(url) == ALPHABET and digest_of(url) == first.digest
        link.unlink()
        link.symlink_to(second.folder)
        assert change(url, link).status_code == 200 and digest_of(url) == second.digest
        link.unlink()
        back = httpx.post(f"{url}/admin/rollback", json={}, timeout=30)
        assert back.status_code == 200 and digest_of(url) == first.digest


def test_another_bundle_in_the_same_place_is_not_loaded_before_it_is_verified(first, tmp_path):
    """Shipped over the one that is served: neither an engine that is started again takes it, nor what begins later."""
    care, other = Care(restarts=2, backoff=0.05, interval=0.05), fake_bundle(tmp_path / "other", slow=0.001)
    before = set(worker_pids())
    with running(first.folder, settings=ServeSettings(keys=None, care=care)) as url:
        (pid,) = set(worker_pids()) - before
        first.folder.rename(tmp_path / "away")
        other.folder.rename(first.folder)
        assert ask(url) == ALPHABET  # what is loaded goes on
        scored = {"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 1}
        refused = httpx.post(f"{url}/v1/completions", json=scored, timeout=60)
        assert refused.status_code == 503 and "has changed since it was verified" in refused.text
        os.kill(pid, signal.SIGKILL)
        dead = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 2}, timeout=60)
        assert dead.status_code == 503 and "has changed since it was verified" in dead.text
        assert change(url, first.folder).status_code == 200 and digest_of(url) == other.digest
        assert ask(url) == ALPHABET


def test_what_a_key_has_used_is_known_to_the_next_bundle(first, tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    secrets = {name: {"Authorization": f"Bearer {file.create(name, **options)[1]}"} for name, options in {
        "slow": {"requests_per_minute": 1}, "root": {"scopes": ("admin",)},
    }.items()}  # fmt: skip
    with served(first, keys=file.path) as url:
        body = {"prompt": "a", "max_tokens": 2}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=secrets["slow"]).status_code == 200
        assert change(url, fake_bundle(tmp_path / "second").folder, headers=secrets["root"]).status_code == 200
        assert httpx.post(f"{url}/v1/completions", json=body, headers=secrets["slow"]).status_code == 429


def test_several_engines_change_together(first, tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("an engine has at least one core")
    before = set(worker_pids())
    with served(first, workers=2) as url:
        old = set(worker_pids()) - before
        assert change(url, fake_bundle(tmp_path / "second").folder).status_code == 200
        wait_for(lambda: not deployments(url)["retiring"])
        new = set(worker_pids()) - before
        assert len(old) == len(new) == 2 and not old & new
        assert ask(url) == ALPHABET


# ── It stays ────────────────────────────────────────────────────────────────


def broken(folder, kind):
    """A bundle that must not take over, or no bundle."""
    faults = {"load": {"unheard_of": 1}, "warm up": {"segfault_after": 3}, "golden: dies": {"fail_after": 16}}
    if kind == "golden: says other":
        fake_bundle(folder, says=2)
    elif kind == "memory":
        fake_bundle(folder, metrics=(Metric("peak_pss", 1e15, "bytes", 1, None, "lower", None, ""),))
    else:
        fake_bundle(folder, **faults.get(kind, {}))
    if kind == "verify: changed":
        (folder / "report.json").write_text("{}")
    if kind == "verify: none":
        (folder / "manifest.json").unlink()
    if kind == "golden: none":
        shutil.rmtree(folder / "golden")
        (folder / "manifest.json").unlink()
        pack(folder, {"name": "x", "targets": ["fake"]})
    return folder


WAYS = {
    "verify: changed": "verify failed: .*report.json has 2 bytes", "verify: none": "verify failed: .*no manifest.json",
    "memory": "memory failed: .*MiB are available", "load": "load failed: .*cannot be loaded.*unheard_of",
    "warm up": "warm up failed: .*engine process ended", "golden: dies": "golden failed: .*told to fail",
    "golden: says other": "golden failed: mean KLD .* above the bundle's limit 0.02",
    "golden: none": "warm up failed: .*golden/tokens.json",
}  # fmt: skip


@pytest.mark.parametrize("kind", WAYS)
def test_whatever_fails_the_old_one_stays_and_says_why(first, tmp_path, kind):
    second = broken(tmp_path / "second", kind)
    before = set(worker_pids())
    with served(first) as url, concurrent.futures.ThreadPoolExecutor(1) as pool:
        own = set(worker_pids()) - before
        meanwhile = pool.submit(ask, url, True, 500)
        refused = change(url, second)
        error = refused.json()["error"]
        assert refused.status_code == 400 and error["code"] == "reload_failed"
        assert re.match(WAYS[kind], error["message"]), error["message"]
        assert len(meanwhile.result()) == 500 and ask(url) == ALPHABET
        assert digest_of(url) == first.digest and set(worker_pids()) - before == own
        found = deployments(url)
        assert found["last"] == {"status": "failed", "reason": found["last"]["reason"]} and not found["changes"]
        assert error["message"][:60] in found["last"]["reason"] and found["coming"] is None
        shutil.rmtree(second)
        assert change(url, fake_bundle(second).folder).status_code == 200  # and the next may


@pytest.mark.parametrize("path", ["bundles/mine", "https://example.invalid/bundle", "file:///tmp/x", "/nowhere/at/all"])
def test_only_a_folder_of_this_machine_is_taken(first, path):
    with served(first) as url:
        refused = change(url, path)
        assert refused.status_code == 400 and refused.json()["error"]["message"].startswith("verify failed: ")


def test_one_at_a_time(first, tmp_path):
    slow, second = fake_bundle(tmp_path / "slow", load=2), fake_bundle(tmp_path / "second")
    with served(first) as url, concurrent.futures.ThreadPoolExecutor(1) as pool:
        changing = pool.submit(change, url, slow.folder)
        wait_for(lambda: (deployments(url)["coming"] or {}).get("step") == "load")
        refused = change(url, second.folder)
        assert refused.status_code == 409 and refused.json()["error"]["code"] == "reload_running"
        assert changing.result().status_code == 200 and digest_of(url) == slow.digest


def test_a_client_that_leaves_does_not_stop_the_change(first, tmp_path):
    slow = fake_bundle(tmp_path / "slow", load=1)
    with served(first) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/admin/reload", json={"bundle": str(slow.folder)}, timeout=0.5)
        wait_for(lambda: deployments(url)["last"])
        assert deployments(url)["last"]["status"] == "serving" and digest_of(url) == slow.digest


def test_the_engine_that_serves_may_die_meanwhile(first, tmp_path):
    slow, before = fake_bundle(tmp_path / "slow", load=1.5), set(worker_pids())
    with served(first) as url, concurrent.futures.ThreadPoolExecutor(1) as pool:
        (pid,) = set(worker_pids()) - before
        changing = pool.submit(change, url, slow.folder)
        wait_for(lambda: (deployments(url)["coming"] or {}).get("step") == "load")
        os.kill(pid, signal.SIGKILL)
        assert ask(url) == ALPHABET  # by the next engine of the old bundle
        assert changing.result().status_code == 200 and ask(url) == ALPHABET
        assert deployments(url)["current"]["restarts"] == 0
        assert 'lightship:engine_restarts_total{model_name="first"} 1.0' in httpx.get(f"{url}/metrics").text


def test_a_server_that_is_told_to_stop_gives_the_change_up(first, tmp_path):
    slow, before = fake_bundle(tmp_path / "slow", load=60), set(worker_pids())
    with Serving(ServeSettings(keys=None, drain=30), "127.0.0.1", 0) as serving:
        server, _ = serving.server(first, serving.engine("fake"))
        with in_thread(server, serving.bound, serving.url) as thread:
            url = serving.url
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                changing = pool.submit(change, url, slow.folder)
                wait_for(lambda: (deployments(url)["coming"] or {}).get("step") == "load")
                assert len(set(worker_pids()) - before) == 2
                began = time.monotonic()
                server.handle_exit(signal.SIGTERM, None)
                answer = changing.result()
            assert answer.status_code == 400 and "load failed: the server is stopping" in answer.text
            thread.join(10)
            assert not thread.is_alive() and time.monotonic() - began < 10
    wait_for(lambda: set(worker_pids()) <= before)


@pytest.mark.parametrize("cancelled", [False, True], ids=["told", "cancelled"])
def test_a_change_that_was_given_up_is_remembered_as_failed(first, cancelled):
    stopping = threading.Event()

    class Slow(Reloader):
        async def _change(self, folder, digest):
            self._step = "load"
            await asyncio.sleep(60)

    async def run():
        slot = types.SimpleNamespace(begun=True, current=types.SimpleNamespace(folder=str(first.folder)))
        reloader = Slow(slot, None, stopping.is_set)
        changing = asyncio.create_task(reloader.reload("/new"))
        await asyncio.sleep(0.05)
        if cancelled:
            changing.cancel()
        else:
            stopping.set()
        with pytest.raises(asyncio.CancelledError if cancelled else ReloadFailed):
            await changing
        assert reloader.last["status"] == "failed" and "load failed: the server is stopping" in reloader.last["reason"]

    asyncio.run(run())


def test_a_server_that_ends_while_an_old_bundle_still_answers_ends_that_too(first, tmp_path):
    before = set(worker_pids())
    with Serving(ServeSettings(keys=None, drain=0.5), "127.0.0.1", 0) as serving:
        server, _ = serving.server(first, serving.engine("fake"))
        with in_thread(server, serving.bound, serving.url) as thread:
            body = {"prompt": "a", "max_tokens": 100_000, "stream": True}
            with httpx.stream("POST", f"{serving.url}/v1/completions", json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                next(lines)
                assert change(serving.url, fake_bundle(tmp_path / "second").folder).status_code == 200
                server.handle_exit(signal.SIGTERM, None)
                *_, last, done = [line for line in lines if line]
                assert json.loads(last[6:])["error"]["code"] == "unavailable" and done == "data: [DONE]"
            thread.join(10)
            assert not thread.is_alive()
    wait_for(lambda: set(worker_pids()) <= before)


def test_requests_that_never_end_do_not_keep_an_old_bundle_for_ever(first, tmp_path, monkeypatch):
    monkeypatch.setattr("lightship.serving.slot.RETIRING", 0.5)
    before = set(worker_pids())
    with served(first) as url:
        (pid,) = set(worker_pids()) - before
        body = {"prompt": "a", "max_tokens": 1_000_000, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert change(url, fake_bundle(tmp_path / "second").folder).status_code == 200
            *_, last, done = [line for line in lines if line]
        assert json.loads(last[6:])["error"]["code"] == "unavailable" and done == "data: [DONE]"
        wait_for(lambda: not psutil.pid_exists(pid))
        assert ask(url) == ALPHABET


def test_before_the_first_bundle_is_loaded_there_is_nothing_to_change(tmp_path):
    slow = fake_bundle(tmp_path / "slow", load=1.5)
    with Serving(ServeSettings(keys=None), "127.0.0.1", 0) as serving:
        server, _ = serving.server(slow, serving.engine("fake"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [serving.bound]}, daemon=True)
        thread.start()
        try:
            refused = change(serving.url, slow.folder)
            assert refused.status_code == 409 and refused.json()["error"]["code"] == "loading"
            wait_for(lambda: httpx.get(f"{serving.url}/readyz").status_code == 200)
        finally:
            server.should_exit = True
            thread.join(20)


# ── Who may ─────────────────────────────────────────────────────────────────


def test_only_an_admin_may_once_there_are_keys(first, tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    plain, root = (file.create(name, scopes)[1] for name, scopes in (("plain", ("use",)), ("root", ("admin",))))
    with served(first, keys=file.path) as url:
        for key, status in ((None, 401), (plain, 403), (root, 200)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            assert httpx.get(f"{url}/admin/deployments", headers=headers).status_code == status
            for route, body in (("reload", {"bundle": str(first.folder)}), ("rollback", {})):
                answer = httpx.post(f"{url}/admin/{route}", json=body, headers=headers, timeout=30)
                assert answer.status_code == status


def test_a_web_page_cannot(first):
    """Without keys: under another name, or by a request that a page may send without asking."""
    with served(first) as url:
        for route in ("reload", "rollback"):
            strange = httpx.post(f"{url}/admin/{route}", json={}, headers={"Host": "evil.example"})
            assert strange.status_code == 403 and strange.json()["error"]["code"] == "host_not_allowed"
            assert httpx.post(f"{url}/admin/{route}").status_code == 400
            plain = httpx.post(f"{url}/admin/{route}", content="{}", headers={"Content-Type": "text/plain"})
            assert plain.status_code == 415
        assert not deployments(url)["changes"] and deployments(url)["last"] is None


# ── The golden rows ─────────────────────────────────────────────────────────


def test_the_divergence_of_two_outcomes_bounds_the_whole_from_below():
    chance = np.random.default_rng(0)
    for _ in range(200):
        p, q = (chance.dirichlet(np.full(50, 0.3)) for _ in range(2))
        whole = float((p * np.log(p / q)).sum())
        top, token = np.argsort(-p)[:20].astype(np.int32), int(q.argmax())
        found = divergence(top, np.log(p[top]).astype(np.float32), token, float(np.log(q[token])))
        assert 0 <= found <= whole + 1e-5
    ids, logprobs = np.array([3, 4], np.int32), np.log(np.array([0.7, 0.2], np.float32))
    assert divergence(ids, logprobs, 3, float(np.log(0.7))) < 1e-6
    assert divergence(ids, logprobs, 9, float(np.log(0.9))) > 1.0  # the original gives it a tenth at most
    assert divergence(ids, logprobs, 3, float("nan")) == float("inf")


def test_a_mean_is_above_its_limit_when_it_surely_is():
    Found("x", (0.019, 0.021, 0.02, 0.0202), 0.02).check()
    Found("x", (0.0,) * 31 + (0.9,), 0.02).check()  # one position of 32 says little
    with pytest.raises(LimitExceeded, match="above the bundle's limit"):
        Found("x", (0.03, 0.031) * 8, 0.02).check()
    for value in (float("inf"), float("nan")):
        with pytest.raises(LimitExceeded, match="NaN or infinity"):
            Found("x", (value, 0.0), 0.02).check()


# ── The real thing ──────────────────────────────────────────────────────────


def run_cli(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code, capsys.readouterr()


def test_a_real_model_is_changed_from_the_command_line_and_back(bundle_path, onnx_path, tmp_path, capsys):
    with running(bundle_path, settings=ServeSettings(keys=None, name="served")) as url:
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["batching"] == "continuous"
        code, said = run_cli(capsys, "reload", str(onnx_path), "--url", url)
        assert code == 0 and f"serving {onnx_path} as served" in said.out
        model = httpx.get(f"{url}/v1/models").json()["data"][0]
        assert model["batching"] == "none" and model["id"] == "served"
        code, said = run_cli(capsys, "rollback", "--url", url, "--json")
        answer = json.loads(said.out)
        assert code == 0 and answer["bundle"] == str(bundle_path) and answer["golden"]["mean"] < 0.02
        code, said = run_cli(capsys, "reload", str(tmp_path), "--url", url)
        assert code == 1 and "verify failed" in said.err and str(bundle_path) in said.err
    code, said = run_cli(capsys, "reload", str(bundle_path), "--url", url)
    assert code == 2 and "is the server running" in said.err
