"""Admission under a virtual clock: an event loop that jumps to its next timer instead of sleeping, so that minutes of
traffic take milliseconds and every run of a test is the same."""

import asyncio
import selectors

from lightship.serving.ticket import Demand


class Jumping(selectors.DefaultSelector):
    """Waits for nothing: time passes at once."""

    now = 0.0

    def select(self, timeout=None):
        assert timeout is not None, "everyone waits and nobody will wake: a lost wake-up"
        self.now += max(0.0, timeout)
        return super().select(0)


def virtually(main):
    """Run the coroutine function `main` in virtual time; it is given the clock."""
    selector = Jumping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main(loop.time))


def virtual(test):
    """A test that is a coroutine function of the clock."""

    def run():
        virtually(test)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def demand(key, prompt, output, sequences=1, **rates):
    """`sequences` choices of one prompt."""
    return Demand(key, (prompt,), (output,), sequences, **rates)


async def settled():
    """Let every task that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


def asking(admission, key="a", prompt=32, output=0, **more):
    return asyncio.create_task(admission.enter(demand(key, prompt, output, **more)))


def blocks(count, **more):
    """A prompt of `count` blocks."""
    return {"prompt": 32 * count, **more}


def is_empty(admission):
    now = admission.snapshot()
    assert (now.running, now.sequences, now.blocks_used, now.waiting, now.waiting_by_key) == (0, 0, 0, 0, {})
    assert admission._long_blocks == 0
    return True
