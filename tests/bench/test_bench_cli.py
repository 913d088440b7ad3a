"""`lightship bench` as a user meets it, against the real server with a tiny model, and where it cannot measure."""

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from lightship.serving.server import running

COMMAND = [sys.executable, "-m", "lightship", "bench"]
SMALL = ["--requests", "12", "--warmup", "2", "--in", "30", "--out", "8"]


def bench(*arguments, **options):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=240, **options)


def refused(*arguments, says, **options):
    done = bench(*arguments, **options)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    for words in [says] if isinstance(says, str) else says:
        assert words in done.stderr
    return done


@pytest.fixture(scope="module")
def url(bundle_path):
    with running(bundle_path) as url:
        yield url


@pytest.mark.parametrize("load", [["--clients", "3"], ["--rate", "40"]])
@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_our_own_server(url, tmp_path, load, chat):
    """The record, recomputed, is what is said; every answer is whole or was ended by the model, none failed."""
    done = bench(url, *load, *chat, *SMALL, "--json", "--record", tmp_path / "r.jsonl", "--limit", "e2e=100")
    assert done.returncode in (0, 1), done.stderr  # 1: the model ends too many answers itself
    found = json.loads(done.stdout)
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert found["requests"] == len(rows) == 12 and found["missed"]["failures"] == 0, found["reasons"]
    assert found["counted"] == "usage" and found["output_tokens"] == sum(row["tokens"] for row in rows)
    whole = [row for row in rows if row["outcome"] == "whole"]
    assert all(row["tokens"] == 8 for row in whole) and found["outcomes"].get("whole", 0) == len(whole)
    assert found["ttft"]["mean"] == pytest.approx(sum(row["first"] - row["scheduled"] for row in rows) / 12)
    spans = [(row["last"] - row["first"]) / (row["tokens"] - 1) for row in rows if row["tokens"] > 1]
    assert found["tpot"]["mean"] == pytest.approx(sum(spans) / len(spans))
    assert found["tokens_per_second"] == pytest.approx(found["output_tokens"] / found["seconds"])
    assert all(row["scheduled"] <= row["sent"] <= row["first"] <= row["last"] <= row["ended"] for row in rows)
    assert found["good"] == len(whole) and found["formulas"]
    assert not any("usage" in note for note in found["notes"])  # our server counts


def test_for_people(url):
    done = bench(url, *SMALL, "--clients", "2")
    assert done.returncode == 0, done.stderr
    for words in ("TTFT, s", "TPOT = (last − first) / (tokens − 1)", "2 clients, closed loop", "by the server's usage"):
        assert words in done.stdout
    assert "warm-up: 2 requests" in done.stderr and "closed loop: 12 requests" in done.stderr


def test_exact_prompts_from_the_bundles_tokenizer(url, bundle_path):
    done = bench(url, *SMALL, "--clients", "2", "--tokenizer", bundle_path, "--prefix", "10", "--json")
    assert json.loads(done.stdout)["input_tokens"] == 12 * 40


def test_the_seed_is_another_each_time_and_can_be_given(url):
    seeds = [json.loads(bench(url, *SMALL, "--json", *more).stdout)["seed"] for more in ([], [], ["--seed", "7"])]
    assert seeds[0] != seeds[1] and seeds[2] == 7
    assert "--seed 7 asks the same again" in bench(url, *SMALL, "--seed", "7").stdout


def test_a_limit_that_is_not_met(url):
    done = bench(url, *SMALL, "--clients", "2", "--limit", "ttft=0.000001")
    assert done.returncode == 1 and "0.0% of all within ttft" in done.stdout


def test_a_sweep(url):
    done = bench(url, "--sweep", "--requests", "15", "--in", "20", "--out", "2", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["knee"] else 1) and found["partial"] is False
    assert [step["requests"] for step in found["steps"]] == [15] * len(found["steps"])
    assert found["broke"] is None or found["broke"]["limit"] in ("ttft", "tpot", "failures")
    assert "The knee: " in bench(url, "--sweep", "--requests", "5", "--in", "20", "--out", "2").stdout


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_ctrl_c_prints_what_was_measured(url, tmp_path, as_json):
    record = tmp_path / "r.jsonl"
    command = [*COMMAND, url, "--clients", "2", "--requests", "100000", "--in", "20", "--out", "2", "--record",
               str(record), *as_json]  # fmt: skip
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # also where a shell ignores it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heard)
    for line in process.stderr:
        if "closed loop:" in line:
            break
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    said, wrong = process.communicate(timeout=60)
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert process.returncode == 130 and "Traceback" not in wrong and rows
    if as_json:
        found = json.loads(said)
        assert found["partial"] is True and found["requests"] == len(rows)
    else:
        assert said.startswith("PARTIAL") and f"{len(rows)} in " in said and "broken off" in said


def test_a_trace(url, tmp_path):
    trace = tmp_path / "trace.jsonl"
    rows = [{"at": 0.1, "prompt": "Hello", "max_tokens": 4}, {"at": 0.0, "prompt": [5, 6], "max_tokens": 2},
            {"at": 0.2, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}]  # fmt: skip
    trace.write_text("\n".join(map(json.dumps, rows)))
    found = json.loads(bench(url, "--trace", trace, "--json").stdout)
    assert found["outcomes"] == {"whole": 3} and found["seed"] is None  # nothing was left to chance
    found = json.loads(bench(url, "--trace", trace, "--sweep", "--requests", "5", "--json").stdout)
    assert [step["requests"] for step in found["steps"]] == [5] * len(found["steps"]) and found["seed"] is not None
    trace.write_text("\n".join(json.dumps({"prompt": each, "max_tokens": 2}) for each in "abc"))
    assert json.loads(bench(url, "--trace", trace, "--rate", "20", "--json").stdout)["seed"] is not None
    trace.write_text('{"prompt": "a"}\n{"prompt": 5}')
    refused(url, "--trace", trace, says=["trace.jsonl:2", "token ids"])


# ── What cannot be measured ─────────────────────────────────────────────────


def test_no_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        refused(address, says=["no answer from 127.0.0.1", "is the server running"])
        refused(address, "--model", "m", says="no answer from 127.0.0.1")


def test_another_model(url):
    refused(url, "--model", "gpt-9", says=["no such model", "the model 'tiny' only"])


def test_keys(bundle_path, tmp_path):
    """The key comes from the environment and is shown nowhere."""
    from lightship.serving.keys import KeyFile
    from lightship.serving.settings import ServeSettings

    _, key = KeyFile(tmp_path / "keys.json").create("bench")
    with running(bundle_path, settings=ServeSettings(keys=tmp_path / "keys.json")) as url:
        environment = {name: value for name, value in os.environ.items() if name != "LIGHTSHIP_KEY"}
        refused(url, says=["wants a key (401)", "LIGHTSHIP_KEY"], env=environment)
        refused(url, says="wants a key (401)", env={**environment, "LIGHTSHIP_KEY": "wrong"})
        done = bench(url, *SMALL, env={**environment, "LIGHTSHIP_KEY": key})
        assert done.returncode == 0 and key not in done.stdout + done.stderr, done.stderr
        other = ["--api-key-env", "OTHER_KEY"]
        assert bench(url, *SMALL, *other, env={**environment, "OTHER_KEY": key}).returncode == 0
        refused(url, *other, says="$OTHER_KEY is not set", env=environment)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rate", "1", "--clients", "2"], "open or closed loop"),
        (["--sweep", "--rate", "1"], "--sweep chooses"),
        (["--limit", "ttft"], "no limit"),
        (["--limit", "ttft=1", "--limit", "ttft=2"], "twice"),
        (["--record", "/nonexistent/r.jsonl"], "cannot be written"),
        (["--chat", "--tokenizer", "."], "--chat cannot send"),
    ],
)
def test_wrong_use(arguments, says):
    refused("http://127.0.0.1:1", *arguments, says=says)


# ── The live view ───────────────────────────────────────────────────────────


def test_on_a_terminal_the_view_is_live(url):
    """Standard error is a terminal: it shows the counts as they grow; standard output is the result alone."""
    ours, theirs = pty.openpty()
    shown = []

    def read():
        with contextlib.suppress(OSError):  # the end of a terminal
            while data := os.read(ours, 4096):
                shown.append(data)

    reading = threading.Thread(target=read)
    reading.start()
    done = subprocess.run([*COMMAND, url, *SMALL, "--json"], stdout=subprocess.PIPE, stderr=theirs, timeout=240,
                          env={**os.environ, "TERM": "xterm", "COLUMNS": "120"})  # fmt: skip
    os.close(theirs)
    reading.join(10)
    os.close(ours)
    assert json.loads(done.stdout)["requests"] == 12
    text = b"".join(shown).decode()
    assert "requests" in text and "running" in text and "TTFT" in text
