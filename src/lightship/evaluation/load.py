"""Speed under load: clients that ask an engine one request after the other, driven in one process, without HTTP."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightship.engine import MAX_CONCURRENT, Engine, GenerationParams
from lightship.errors import EngineError


@dataclass(frozen=True)
class Run:
    """`tokens` came out in `seconds`; `ttft` and `tpot` of the whole requests, seconds. `finished` is False when the
    time was up before the work was done."""

    tokens: int
    seconds: float
    ttft: list[float]
    tpot: list[float]
    finished: bool


@dataclass
class _Request:
    """A request on its way: when its client asked, when its first and its last token came."""

    asked: float
    counted: bool
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    with_first: int = field(default=0)


def room(engine: Engine, length: int) -> int:
    """How many requests of `length` tokens a server lets in at once by default: as many as fit into the KV cache, where
    the engine tells its size, and `MAX_CONCURRENT` at most."""
    stats = engine.stats()
    if not stats.get("blocks"):
        return MAX_CONCURRENT
    return min(max(int(stats["blocks"]) // -(-length // int(stats["block_tokens"])), 1), MAX_CONCURRENT)


def run(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    clients: int,
    new_tokens: int,
    *,
    deadline: float | None = None,
    ignore_eos: bool = True,
) -> Run:
    """Let `clients` ask for all `prompts`, greedily, `new_tokens` each; at most `deadline` seconds.

    The first request of client i is cut to (i + 1)/clients of the tokens, so that afterwards prompts and answers of
    different clients fall together, as they do in a server; TTFT and TPOT are those of the other requests. The tokens
    of both count, over the whole time, so that candidates are compared by equal work. Time to the first token includes
    the wait for room in the KV cache.
    """
    slots = min(clients, room(engine, max(map(len, prompts)) + new_tokens))
    began = time.perf_counter()
    ends = None if deadline is None else began + deadline
    lengths = [max(round(new_tokens * (client + 1) / clients), 1) for client in range(clients)]
    todo = deque((prompt, lengths[i] if i < clients else new_tokens, i >= clients) for i, prompt in enumerate(prompts))
    asked: deque[float] = deque([began] * clients)  # of the clients that wait for an answer to begin
    running: dict[int, _Request] = {}
    done: list[_Request] = []
    while todo or running:
        while todo and asked and len(running) < slots:
            prompt, length, counted = todo.popleft()
            params = GenerationParams(max_tokens=length, ignore_eos=ignore_eos)
            running[engine.submit(prompt, params)] = _Request(asked.popleft(), counted)
        for number in _step(engine, running):
            request = running.pop(number)
            done.append(request)
            asked.append(request.last)
        if ends is not None and time.perf_counter() > ends and running:
            for number in running:
                engine.cancel(number)
            return _result([*done, *running.values()], began, finished=False)
    return _result(done, began, finished=True)


def _step(engine: Engine, running: dict[int, _Request]) -> list[int]:
    """One step; the requests that it finished."""
    finished = []
    events = engine.step()
    now = time.perf_counter()
    for event in events:
        if event.error or event.finish_reason in ("error", "cancelled"):
            raise EngineError(f"a request failed under load: {event.error or event.finish_reason}")
        request = running[event.request_id]
        if event.token_ids:
            request.last = now
            if not request.tokens:
                request.first, request.with_first = now, len(event.token_ids)
            request.tokens += len(event.token_ids)
        if event.finish_reason is not None:
            request.last = request.last or now  # it ended at once
            finished.append(event.request_id)
    return finished


def _result(requests: Sequence[_Request], began: float, finished: bool) -> Run:
    whole = [request for request in requests if request.counted and request.tokens]
    later = [(r.last - r.first, r.tokens - r.with_first) for r in whole if r.tokens > r.with_first]
    return Run(
        tokens=sum(request.tokens for request in requests),
        seconds=time.perf_counter() - began,
        ttft=[request.first - request.asked for request in whole],
        tpot=[seconds / tokens for seconds, tokens in later],
        finished=finished,
    )
