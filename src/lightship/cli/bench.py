"""Put load on a server: TTFT, TPOT, throughput, goodput under limits, and the rate at which a limit breaks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lightship.bench.figures import Limit
    from lightship.bench.session import Settings

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
COUNT, ABOVE = click.IntRange(1), click.FloatRange(min=0, min_open=True)
FILE = click.Path(dir_okay=False, path_type=Path)


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    options: list[Decorator] = [
        click.option("--rate", "--request-rate", type=ABOVE, help="Open loop: so many requests a second, by a Poisson "
                     "process, however slow the server is."),
        click.option("--clients", "--max-concurrency", type=COUNT,
                     help="Closed loop: so many clients, each with one request at a time (default: 8)."),
        click.option("--sweep", is_flag=True, help="Raise the rate until a limit breaks: where is the knee? A --trace "
                     'gives its lines in their order, over and over; its "at" is not looked at.'),
        click.option("--requests", "--num-prompts", type=COUNT, help="End after so many, warm-up not counted."),
        click.option("--seconds", "--max-seconds", type=ABOVE, help="Send nothing after so long; in a sweep of each "
                     "rate. (Default: 100 requests or 60 s, whichever comes first; sweep: 30 s.)"),
        click.option("--warmup", type=click.IntRange(0), metavar="N", help="The first N requests do not count "
                     "(default: one a client; open loop 3; trace 0)."),
        click.option("--in", "--input-len", "inputs", default=200, show_default=True, type=COUNT, help="Tokens a "
                     "prompt."),
        click.option("--out", "--output-len", "outputs", default=64, show_default=True, type=COUNT,
                     help="Tokens an answer."),
        click.option("--prefix", "--prefix-len", "prefix", default=0, type=click.IntRange(0),
                     help="Tokens before those that all prompts share."),
        click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), help="tokenizer.json, or a bundle: "
                     "prompts become token ids of exactly this length (default: text, measured by the server's "
                     "count)."),
        click.option("--trace", type=FILE, help='Requests from a file: {"at": seconds, "prompt" or "messages", '
                     '"max_tokens"} a line.'),
        click.option("--chat", is_flag=True, help="Ask /v1/chat/completions instead of /v1/completions."),
        click.option("--model", help="Its name (default: the first that the server lists)."),
        click.option("--api-key-env", default="LIGHTSHIP_KEY", show_default=True, metavar="NAME",
                     help="The environment variable with the server's key."),
        click.option("--limit", "limits", multiple=True, metavar="NAME=TIME", help="ttft=3, tpot=250ms or e2e=20; "
                     "again for more. (Sweep without any: ttft=3 and tpot=0.25.)"),
        click.option("--goodput", "share", default=0.9, show_default=True, type=click.FloatRange(0, 1),
                     help="Share of the requests that must meet every limit; below it exit code 1."),
        click.option("--timeout", default=600.0, show_default=True, type=ABOVE, help="Seconds for one request."),
        click.option("--no-keep-alive", is_flag=True, help="A connection for each request."),
        click.option("--seed", type=int, help="Of arrivals and prompts (default: another each time, since a "
                     "server may remember prompts)."),
        click.option("--record", type=FILE, metavar="FILE", help="A JSON line for each request."),
        click.option("--json", "as_json", is_flag=True, help="Print as JSON."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("url")
@_options
def command(
    url: str, sweep: bool, limits: tuple[str, ...], share: float, record: Path | None, as_json: bool, **given: Any
) -> int:
    """Measure the server at URL, such as http://127.0.0.1:8000. Ctrl-C prints what was measured by then."""
    import asyncio
    import json

    from lightship.bench.figures import FORMULAS
    from lightship.bench.record import Record
    from lightship.bench.session import find_knee, measure
    from lightship.bench.tell import told, told_sweep
    from lightship.bench.view import watching

    settings, known = _settings(url, sweep, **given), _limits(limits, sweep)
    chance = sweep or settings.trace is None or settings.rate is not None  # arrivals, prompts or both
    seed = settings.seed if chance else None
    kept = None if record is None else Record(record, known)
    cut: list[Any] = []  # what had been measured when Ctrl-C came
    found: Any = None
    with watching(lambda line: click.echo(line, err=True)) as board:
        try:
            if sweep:
                found = asyncio.run(find_knee(settings, known, share, board, kept, cut.append))
            else:
                found = asyncio.run(measure(settings, known, board, kept, cut.append))
        except KeyboardInterrupt:
            if not cut:
                raise
    partial = found is None
    found = cut[0] if partial else found
    if as_json:
        click.echo(json.dumps({**found.to_dict(), "seed": seed, "partial": partial, "formulas": FORMULAS}))
    else:
        text = told_sweep(found, seed) if sweep else told(found, seed)
        click.echo(f"PARTIAL: stopped before its end.\n\n{text}" if partial else text)
    if partial:
        return 130
    enough = found.knee is not None if sweep else found.goodput >= share
    return 0 if enough else 1


def _settings(url: str, sweep: bool, **given: Any) -> Settings:
    import os
    import secrets

    from lightship.bench.session import Settings
    from lightship.errors import UsageError

    variable, no_keep_alive = given.pop("api_key_env"), given.pop("no_keep_alive")
    key = os.environ.get(variable)
    if key is None and variable != "LIGHTSHIP_KEY":
        raise UsageError(f"${variable} is not set", hint="--api-key-env names the variable that holds the key")
    if sweep and given["rate"] is not None:
        raise UsageError("--sweep chooses its own rates", hint="leave out --rate")
    chosen = sweep or given["trace"] is None  # else the trace says when, and how many
    if given["requests"] is None and given["seconds"] is None and chosen:
        given |= {"seconds": 30.0} if sweep else {"seconds": 60.0, "requests": 100}
    if given["rate"] is None and given["clients"] is None and chosen:
        given["clients"] = 16 if sweep else 8
    if given["seed"] is None:
        given["seed"] = secrets.randbelow(10**6)
    return Settings(url, key=key, keep_alive=not no_keep_alive, **given)


def _limits(given: tuple[str, ...], sweep: bool) -> tuple[Limit, ...]:
    from lightship.bench.figures import Limit
    from lightship.errors import UsageError

    limits = tuple(map(Limit.parse, given or (("ttft=3", "tpot=0.25") if sweep else ())))
    if len({limit.name for limit in limits}) < len(limits):
        raise UsageError("a limit is given twice", hint="one --limit for each of ttft, tpot and e2e")
    return limits
