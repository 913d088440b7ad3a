"""A load of clients on an engine, and the golden rows on the path that serves."""

import numpy as np
import pytest

from lightship.engine import MAX_CONCURRENT, FakeEngine
from lightship.errors import EngineError, LimitExceeded
from lightship.evaluation import load, workload
from lightship.evaluation.replay import replay_served
from lightship.serving.settings import ServeSettings


def test_all_clients_ask_and_all_is_counted():
    engine = FakeEngine()
    found = load.run(engine, [[1]] * 12, clients=4, new_tokens=8)
    assert found.tokens == (2 + 4 + 6 + 8) + 8 * 8 and found.finished
    assert len(found.ttft) == len(found.tpot) == 8  # those that only shift the clients against each other are left out
    assert not engine.busy()


class Watched(FakeEngine):
    """Knows how many ran at most, and claims a small KV cache."""

    most = 0
    blocks = None

    def step(self):
        self.most = max(self.most, len(self._requests))
        return super().step()

    def stats(self):
        return {**super().stats(), "blocks": self.blocks, "block_tokens": 32}


def test_as_many_run_as_there_are_clients():
    engine = Watched()
    load.run(engine, [[1]] * 9, clients=3, new_tokens=5)
    assert engine.most == 3


def test_no_more_run_than_a_server_lets_in():
    engine = Watched()
    load.run(engine, [[1]] * 300, clients=100, new_tokens=5)
    assert engine.most == MAX_CONCURRENT == ServeSettings().max_concurrent


def test_no_more_run_than_the_cache_has_room_for():
    """A server lets no more in: what waits counts into the time to the first token."""
    engine = Watched(slow=0.002)
    engine.blocks = 4
    found = load.run(engine, [[1] * 40] * 16, clients=8, new_tokens=10)  # two blocks each
    assert engine.most == 2 and len(found.ttft) == 8
    assert min(found.ttft) > 0.002 * 10  # at least one answer of ten steps is waited for


def test_who_is_too_slow_is_stopped():
    engine = FakeEngine(slow=0.01)
    found = load.run(engine, [[1]] * 8, clients=4, new_tokens=1000, deadline=0.05)
    assert not found.finished and found.tokens < 100 and not engine.busy()


def test_a_request_that_fails_is_an_error():
    class Failing(FakeEngine):
        def step(self):
            from dataclasses import replace

            return [
                replace(event, finish_reason="error", error="the KV cache is exhausted") for event in super().step()
            ]

    with pytest.raises(EngineError, match="exhausted"):
        load.run(Failing(), [[1]], clients=1, new_tokens=4)


def test_prompts_have_their_length_and_share_what_they_are_to(bundle_path):
    folder = bundle_path / "targets" / "openvino"
    prompts = workload.text_prompts(folder, 6, 80, shared=0.5)
    assert {len(prompt) for prompt in prompts} == {80}
    assert len({tuple(prompt[:40]) for prompt in prompts}) == 1 and len({tuple(prompt[40:]) for prompt in prompts}) == 6
    assert prompts == workload.text_prompts(folder, 6, 80, shared=0.5)  # equal work for every candidate


def test_copying_prompts_hold_a_passage_and_keep_within_their_length(bundle_path):
    prompts = workload.copy_prompts(bundle_path / "targets" / "openvino", 4, 120)
    assert all(90 < len(prompt) <= 120 for prompt in prompts) and len({tuple(prompt) for prompt in prompts}) == 4


def test_the_served_path_is_compared_where_the_original_is_known():
    ids = np.array([[7, 3], [9, 1], [5, 2]], np.int32)
    logprobs = np.log(np.array([[0.6, 0.2], [0.5, 0.3], [0.9, 0.05]], np.float32))
    served = [np.log(np.array([0.4, 0.1], np.float32))]  # of the tokens 3 and 8; 8 is none of the likeliest
    found = replay_served([[4, 3, 8]], {"ids": ids, "logprobs": logprobs}, served)
    assert found.n == 1 and found.value == pytest.approx(np.log(2))
    with pytest.raises(LimitExceeded, match="NaN"):
        replay_served([[4, 3, 8]], {"ids": ids, "logprobs": logprobs}, [np.array([np.nan, 0], np.float32)])
