"""A request at the door of the engine: whose it is, what it may need at most, and the ticket it gets."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request

from lightship.serving.admission import Admission
from lightship.serving.connection import unless_gone
from lightship.serving.keys import Key
from lightship.serving.prefix import Prefix
from lightship.serving.ticket import Demand, Ticket


def whose(request: Request) -> str:
    """The id of the key that a request came with, "" where the server has none."""
    key: Key | None = getattr(request.state, "key", None)
    return "" if key is None else key.id


async def enter(
    admission: Admission,
    request: Request,
    prompts: Sequence[int],
    outputs: Sequence[int],
    choices: int = 1,
    prefix: Prefix | None = None,
    beside: bool = False,
) -> Ticket:
    """Wait for a place for `choices` sequences of each prompt (tokens of each, and of its output at most), the first of
    which begins with `prefix`; `beside`: as of `Demand`. The caller closes the ticket. Raises what `Admission.enter`
    raises, and `ClientLeft`."""
    key: Key | None = getattr(request.state, "key", None)
    demand = Demand(
        key=whose(request),
        prompts=tuple(prompts),
        outputs=tuple(outputs),
        choices=choices,
        requests_per_minute=None if key is None else key.requests_per_minute,
        tokens_per_minute=None if key is None else key.tokens_per_minute,
        prefix=prefix,
        beside=beside,
    )
    got: list[Ticket] = []

    async def entering() -> None:
        got.append(await admission.enter(demand))

    try:
        await unless_gone(request, entering())
    except BaseException:
        for ticket in got:  # it came in the moment in which the client left
            ticket.close()
        raise
    (ticket,) = got
    if (record := getattr(request.state, "record", None)) is not None:
        record.ticket = ticket
    return ticket
