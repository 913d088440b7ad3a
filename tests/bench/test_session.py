"""Whole measurements of a scripted server in virtual time: every figure is known beforehand."""

import asyncio
import json

import pytest

from lightship.bench.figures import Limit
from lightship.bench.session import Session, Settings, find_knee, measure
from lightship.bench.trace import read_trace
from lightship.errors import EngineError, UsageError
from tests.bench.scripted import Plan, Scripted, virtually
from tests.tiny import tiny_tokenizer


def measured(server_of, limits=(), probes=2, **settings):
    """(figures, runs, what the server logged after the probes)."""
    runs = []

    async def main():
        server = server_of()
        async with server.open() as url:
            found = await measure(Settings(url, **settings), limits, keep=runs.append)
        return found, runs, server.log[probes:], server

    return virtually(main())


# ── Closed loop ─────────────────────────────────────────────────────────────


def test_closed_loop():
    """Each answer takes 0.5 s + 15 · 0.1 s; 4 clients send 20 requests in 5 rounds, after a warm-up round."""
    found, runs, log, _ = measured(Scripted, clients=4, requests=20, outputs=16)
    assert (found.requests, found.outcomes, found.clients) == (20, {"whole": 20}, 4)
    assert found.seconds == pytest.approx(5 * 2.0) and found.requests_per_second == pytest.approx(2.0)
    assert found.tokens_per_second == pytest.approx(32.0)
    assert found.ttft.mean == pytest.approx(0.5) and found.tpot.mean == pytest.approx(0.1)
    assert found.e2e.value("p90") == pytest.approx(2.0) and found.e2e.value("p99") is None
    assert len(log) == 24  # one warm-up request a client, which no figure knows
    assert [each.number for each in runs[0].seen] == list(range(4, 24))


def test_seconds_end_a_closed_loop():
    """What is running after 5 s is waited for: rounds begin at 0, 2 and 4 s."""
    found, _, _, _ = measured(Scripted, clients=2, seconds=5, outputs=16, warmup=0)
    assert found.requests == 6 and found.seconds == pytest.approx(6.0)


def test_never_more_at_a_time_than_clients():
    most = []

    def server():
        made = Scripted(lambda number, body: (most.append(made.running), Plan(first=0.1 * (number % 5)))[1])
        return made

    measured(server, clients=3, requests=30)
    assert max(most) == 2  # when one more begins, at most two others run


# ── Open loop ───────────────────────────────────────────────────────────────


def test_open_loop_does_not_wait_for_a_slow_server():
    """At 4 requests/s an answer takes 20 s: all are sent by the schedule, and TTFT is that of the log."""
    found, runs, log, _ = measured(
        lambda: Scripted(lambda n, b: Plan(first=5 + 0.01 * n, each=1.0)), rate=4, requests=100, outputs=16
    )
    assert found.requests == 100 and len(log) == 103
    assert found.delay.value("p99") == pytest.approx(0.0, abs=1e-9)
    arrived = [each.arrived for each in log[3:]]
    begun = arrived[0] - runs[0].seen[0].scheduled
    for seen, logged in zip(runs[0].seen, log[3:], strict=True):
        assert seen.sent + begun == pytest.approx(logged.arrived)
        assert seen.ttft == pytest.approx(logged.pieces[0] - logged.arrived)
        assert seen.tpot == pytest.approx((logged.pieces[-1] - logged.pieces[0]) / 15)
        assert seen.e2e == pytest.approx(logged.ended - logged.arrived)
    assert found.seconds == pytest.approx(max(each.ended for each in log) - log[2].arrived)


def test_latency_counts_from_the_schedule():
    """A server that answers one at a time: the queue before it is part of the latency, as in coordinated reality."""
    found, runs, _, _ = measured(
        lambda: Scripted(lambda n, b: Plan(first=1.0, each=0.0), slots=1), rate=2, requests=40, outputs=2, warmup=0
    )
    free = 0.0
    for seen in runs[0].seen:
        free = max(free, seen.scheduled) + 1.0
        assert seen.ttft == pytest.approx(free - seen.scheduled)
    assert found.ttft.value("p50") > 5


def test_the_same_seed_asks_the_same():
    def asked(seed):
        _, runs, log, _ = measured(Scripted, rate=5, requests=10, seed=seed)
        return [(seen.scheduled, each.body) for seen, each in zip(runs[0].seen, log[3:], strict=True)]

    assert asked(1) == asked(1) != asked(2)


# ── What is asked ───────────────────────────────────────────────────────────


def test_prompts_have_the_length_that_was_asked_for_and_share_their_prefix():
    """The server counts 10 tokens for the template and 2 a word: 20 + 50 tokens are 30 words, the first 25 shared."""
    found, _, log, _ = measured(Scripted, clients=1, requests=10, inputs=20, prefix=50, chat=True)
    assert found.input_tokens == 10 * 70
    prompts = [each.body["messages"][0]["content"].split(" ") for each in log]
    assert len({tuple(prompt[:25]) for prompt in prompts}) == 1
    assert len({prompt[25] for prompt in prompts}) > 5
    _, _, other, _ = measured(Scripted, clients=1, requests=10, inputs=20, prefix=50, seed=1)
    assert other[0].body["prompt"].split(" ")[:25] != prompts[0][:25]


def test_token_ids_have_exactly_the_length_that_was_asked_for(tmp_path):
    tiny_tokenizer(tmp_path)
    _, _, log, _ = measured(Scripted, probes=1, clients=1, requests=5, inputs=20, prefix=7, tokenizer=tmp_path)
    prompts = [each.body["prompt"] for each in log]
    assert [len(prompt) for prompt in prompts] == [27] * 6
    assert all(isinstance(token, int) for prompt in prompts for token in prompt)
    assert len({tuple(prompt[:7]) for prompt in prompts}) == 1 and len({tuple(prompt) for prompt in prompts}) == 6


def test_a_server_that_does_not_count_prompts():
    found, _, log, _ = measured(lambda: Scripted(lambda n, b: Plan(usage=False)), probes=1, clients=1, requests=2)
    assert [len(each.body["prompt"].split(" ")) for each in log] == [150] * 3
    assert any("4 tokens are taken for 3 words" in note for note in found.notes)


def test_answers_cut_short_are_told():
    found, _, _, _ = measured(lambda: Scripted(lambda n, b: Plan(tokens=min(3, b["max_tokens"]), finish="stop")),
                              clients=1, requests=5)  # fmt: skip
    assert found.outcomes == {"stopped": 5} and found.e2e.n == 0 and found.ttft.n == 5


def test_optional_fields_are_left_out_where_they_are_unknown():
    """As servers do that refuse unknown fields by name."""

    def answer(number, body):
        for name in ("ignore_eos", "stream_options"):
            if name in body:
                return Plan(status=400, body=json.dumps({"error": {"message": f"unknown field: {name}"}}).encode())
        return Plan(usage=False)

    found, _, log, _ = measured(lambda: Scripted(answer), probes=3, clients=1, requests=3)
    assert found.outcomes == {"whole": 3} and found.counted == "pieces"
    assert not any("ignore_eos" in each.body for each in log)
    assert len(found.notes) == 3 and "ignore_eos" in found.notes[0] and "pieces" in found.notes[1]


def test_a_trace_is_asked_as_it_is_written(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"at": 7, "messages": [{"role": "user", "content": "b"}]}\n\n{"at": 5.5, "prompt": [1, 2], '
                    '"max_tokens": 3}\n{"at": 9, "prompt": "c", "max_tokens": 4}\n')  # fmt: skip
    found, runs, log, _ = measured(Scripted, probes=1, trace=path)
    assert [each.scheduled for each in runs[0].seen] == [0.0, 1.5, 3.5]
    assert [each.arrived - log[0].arrived for each in log] == pytest.approx([0.0, 1.5, 3.5])
    assert [each.body.get("prompt") for each in log] == [[1, 2], None, "c"]
    assert [each.body.get("max_tokens") for each in log] == [3, None, 4]
    assert not any("ignore_eos" in each.body for each in log)
    assert found.outcomes == {"whole": 3}
    measured_only = measured(Scripted, probes=1, trace=path, warmup=1)[1][0]
    assert len(measured_only.seen) == 2


def test_a_trace_without_times_runs_in_either_loop(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{n}", "max_tokens": 2}) for n in range(6)))
    for load in ({"clients": 2}, {"rate": 3.0}):
        found, _, log, _ = measured(Scripted, probes=1, trace=path, **load)
        assert found.requests == 6 and sorted(each.body["prompt"] for each in log) == list("012345")
    for warmup in (6, 7):
        with pytest.raises(UsageError, match=f"6 requests, and the first {warmup} are not measured"):
            measured(Scripted, probes=1, trace=path, rate=3.0, warmup=warmup)


def test_separators_of_unicode_do_not_end_a_line_of_a_trace(tmp_path):
    texts = ["a\u2028b", "c\u2029d", "e\x85f"]
    path = tmp_path / "trace.jsonl"
    path.write_text("\r\n".join(json.dumps({"prompt": each}, ensure_ascii=False) for each in texts), encoding="utf-8")
    assert [line.content for line in read_trace(path).lines] == texts


def test_settings_that_do_not_go_together(tmp_path):
    timed, ids = tmp_path / "timed.jsonl", tmp_path / "ids.jsonl"
    timed.write_text('{"at": 1, "prompt": "a"}')
    ids.write_text('{"prompt": [1]}')
    for wrong in ({"rate": 1.0, "clients": 1}, {"trace": timed, "rate": 1.0}, {"trace": ids, "chat": True}):
        with pytest.raises(UsageError):
            Session(Settings("http://127.0.0.1:1", **wrong))


# ── Servers that cannot be measured ─────────────────────────────────────────


@pytest.mark.parametrize(
    ("server", "says"),
    [
        (lambda: Scripted(models=b'{"error": {"message": "who?"}}', status=401), ["key (401): who?", "KEY"]),
        (lambda: Scripted(lambda n, b: Plan(status=401)), ["wants a key (401)"]),
        (lambda: Scripted(lambda n, b: Plan(status=404, body=b'{"error": {"message": "no model m"}}')), ["no model m"]),
        (lambda: Scripted(lambda n, b: Plan(kind="application/json")), ["not streamed"]),
        (lambda: Scripted(lambda n, b: Plan(status=500)), ["did not answer the first request: no"]),
        (lambda: Scripted(lambda n, b: Plan(breaks=0)), ["did not answer the first request: IncompleteReadError"]),
    ],
)  # fmt: skip
def test_what_cannot_be_measured(server, says):
    with pytest.raises(EngineError) as caught:
        measured(server, clients=1, requests=1)
    assert all(words in str(caught.value) for words in says)


def test_a_server_without_a_list_of_models():
    found, _, log, _ = measured(lambda: Scripted(models=b"", status=404), clients=1, requests=2)
    assert found.outcomes == {"whole": 2} and "model" not in log[0].body


def test_failures_while_measuring_are_counted():
    """Every third request is pushed back and every fifth breaks off, from the first measured one on."""

    def answer(number, body):
        number -= 3  # probes and warm-up
        if number >= 0 and number % 3 == 0:
            return Plan(status=429, headers={"Retry-After": "2"})
        return Plan(breaks=1) if number >= 0 and number % 5 == 0 else Plan()

    found, _, _, _ = measured(lambda: Scripted(answer), [Limit("ttft", 1)], clients=1, requests=30, warmup=1)
    assert found.outcomes == {"refused": 10, "broken": 4, "whole": 16}
    assert found.retry_after == 10 and found.good == 16 and found.missed == {"ttft": 0, "failures": 14}


# ── The knee ────────────────────────────────────────────────────────────────


def knee_of(server_of, limits, **settings):
    async def main():
        server = server_of()
        async with server.open() as url:
            settings.setdefault("seconds", 60)
            return await find_knee(Settings(url, clients=8, outputs=2, **settings), limits, 0.9)

    return virtually(main())


def test_the_knee_of_a_queue():
    """Two servers of 1 s each: capacity 2 requests/s. Below it the queue stays short; above it TTFT grows for ever."""
    found = knee_of(lambda: Scripted(lambda n, b: Plan(first=1.0, each=0.0), slots=2), [Limit("ttft", 8)])
    assert 1.4 <= found.knee.rate < found.broke.rate <= 2.6
    assert found.reason == "ttft" and "ttft broke" in found.said()
    told = found.to_dict()
    assert told["broke"]["limit"] == "ttft" and len(told["steps"]) == len(found.steps)


def test_the_knee_where_tokens_get_slow():
    """Every running answer slows the others: the time between tokens breaks, TTFT does not."""

    def server():
        made = Scripted(lambda n, b: Plan(first=1.0, each=0.5 * (1 + made.running)))
        return made

    found = knee_of(server, [Limit("ttft", 12), Limit("tpot", 2)])
    assert found.reason == "tpot" and found.broke.figures.missed["ttft"] == 0


def test_the_knee_where_the_server_refuses():
    def server():
        made = Scripted(lambda n, b: Plan(status=429) if made.running >= 4 else Plan(first=3.0, each=0.0))
        return made

    found = knee_of(server, [Limit("ttft", 9)])
    assert found.reason == "failures" and "failures broke" in found.said()


def test_no_rate_holds():
    found = knee_of(lambda: Scripted(lambda n, b: Plan(first=4.0)), [Limit("ttft", 3)], seconds=60)
    assert found.knee is None and "No rate holds" in found.said()


def test_rates_at_which_none_is_due_in_time_do_not_end_a_sweep():
    found = knee_of(lambda: Scripted(lambda n, b: Plan(first=4.0)), [Limit("ttft", 3)], seconds=1)
    assert found.knee is None and min(step.rate for step in found.steps) < 0.1
    assert all(step.figures.requests >= 1 for step in found.steps)


def test_a_sweep_too_short_for_its_limits_says_so():
    found = knee_of(lambda: Scripted(lambda n, b: Plan(first=2.0)), [Limit("ttft", 3)], seconds=6)
    assert any("short beside the limits" in note for note in found.steps[0].figures.notes)
    assert found.broke is None and "No limit broke" in found.said()


def test_a_sweep_over_the_lines_of_a_trace(tmp_path):
    """From the first on, one run after the other, over and over, and not at their times."""
    path = tmp_path / "trace.jsonl"
    rows = [{"at": 1000.0 * number, "prompt": f"Line {number}", "max_tokens": 2} for number in range(50)]
    path.write_text("\n".join(map(json.dumps, rows)))
    servers = []

    def server():
        servers.append(Scripted(lambda n, b: Plan(first=1.0, each=0.0), slots=2))
        return servers[0]

    found = knee_of(server, [Limit("ttft", 8)], trace=path)
    assert 1.4 <= found.knee.rate < found.broke.rate <= 2.6
    asked = [each.body["prompt"] for each in servers[0].log[1:]]  # behind the probe
    assert len(asked) > 200 and set(asked[:8]) == {f"Line {number}" for number in range(8)}
    assert len(set(asked[:50])) > 40 and len(set(asked)) == 50  # each client leaves one out when the time is over
    assert any("asked again" in note for note in found.steps[-1].figures.notes)
    path.write_text("\n".join(json.dumps({"prompt": f"Line {number}", "max_tokens": 2}) for number in range(5000)))
    found = knee_of(lambda: Scripted(lambda n, b: Plan(first=1.0, each=0.0), slots=2), [Limit("ttft", 8)], trace=path)
    assert not any("asked again" in note for step in found.steps for note in step.figures.notes)


# ── Broken off ──────────────────────────────────────────────────────────────


def broken_off(work, after, **settings):
    """What `work` gives to `cut` and `keep` when it is cancelled `after` so many seconds."""
    cut, runs = [], []

    async def main():
        async with Scripted().open() as url:
            task = asyncio.create_task(work(Settings(url, **settings), cut.append, runs.append))
            await asyncio.sleep(after)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    virtually(main())
    return cut, runs


def one(settings, cut, keep):
    return measure(settings, keep=keep, cut=cut)


@pytest.mark.parametrize("load", [{"clients": 2, "requests": 1000}, {"rate": 2.0, "requests": 1000}])
def test_a_run_that_is_broken_off_tells_what_had_ended(load):
    (found,), (run,) = broken_off(one, 20, outputs=16, warmup=2, **load)
    assert found.outcomes == {"whole": len(run.seen)} and 10 <= found.requests <= 45
    assert all(each.number >= 2 and each.ended <= 20 for each in run.seen) and "broken off" in found.notes[-1]
    assert found.e2e.mean == pytest.approx(2.0, abs=0.1)


def test_nothing_is_told_of_a_run_that_had_not_begun():
    assert broken_off(one, 0.2, outputs=16, clients=2, requests=10) == ([], [])
    assert broken_off(one, 3, outputs=16, clients=2, requests=10) == ([], [])  # in the warm-up


def test_a_sweep_that_is_broken_off_tells_the_rates_that_were_done():
    def sweep(settings, cut, keep):
        return find_knee(settings, [Limit("ttft", 100)], 0.9, keep=keep, cut=cut)

    (found,), runs = broken_off(sweep, 200, outputs=16, clients=4, seconds=60)
    assert [step.rate for step in found.steps] == pytest.approx([run.rate for run in runs[1:-1]], rel=0.5)
    assert len(runs) == len(found.steps) + 2 and runs[-1].seen  # the capacity, and the rate that was cut off
    assert broken_off(sweep, 30, outputs=16, clients=4, seconds=60)[0] == []


def test_the_watch_sees_every_request():
    events = []

    class Watching:
        def begin(self, name, requests, seconds):
            events.append(name)

        def sent(self):
            events.append("sent")

        def seen(self, seen):
            events.append(seen.outcome)

    async def main():
        async with Scripted().open() as url:
            await measure(Settings(url, clients=1, requests=2), watch=Watching())

    virtually(main())
    assert events == ["warm-up", "sent", "whole", "closed loop", *["sent", "whole"] * 2]
    assert asyncio.iscoroutinefunction(measure)
