"""Make, list and revoke the keys that a server asks for."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from lightship.serving.keys import Key, KeyFile, Scope

Command = Callable[..., Any]


def _file(command: Command) -> Command:
    """The option that says where the keys are."""
    text = "The key file (default: lightship/keys.json in $XDG_CONFIG_HOME or ~/.config)."
    return click.option("--keys", "path", type=click.Path(dir_okay=False), metavar="FILE", help=text)(command)


def _opened(path: str | None) -> KeyFile:
    from pathlib import Path

    from lightship.serving.keys import KeyFile, usual_path

    return KeyFile(Path(path) if path else usual_path())


def _names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What `revoke` can be completed to."""
    from click.shell_completion import CompletionItem

    from lightship.errors import UsageError

    try:
        keys = _opened(ctx.params.get("path")).read()
    except UsageError:
        return []  # the command itself says why
    words = (word for key in keys for word in (key.name, key.id))
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


@click.group()
def command() -> None:
    """Make, list and revoke the keys that a server asks for. A running server notices within a second."""


@command.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["use", "metrics", "admin"]),
    default=["use"],
    show_default=True,
    help="What it may do; several times for several. admin may do everything.",
)
@click.option("--requests-per-minute", type=click.IntRange(1), help="At most so many requests (default: any number).")
@click.option("--tokens-per-minute", type=click.IntRange(1), help="At most so many tokens, of prompts and answers.")
@click.option(
    "--expires",
    type=click.FloatRange(0, 36_500, min_open=True),
    metavar="DAYS",
    help="Days until it ends (default: never).",
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@_file
def create(
    name: str,
    scopes: tuple[Scope, ...],
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    expires: float | None,
    as_json: bool,
    path: str | None,
) -> None:
    """Make a key and print it, this once: only its hash is stored."""
    file = _opened(path)
    key, secret = file.create(name, scopes, requests_per_minute, tokens_per_minute, expires)
    click.echo(json.dumps({**_plain(key), "key": secret}) if as_json else secret)
    click.echo(f"{key.id} {key.name} is in {file.path}; the key is shown this once", err=True)


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@_file
def show(as_json: bool, path: str | None) -> None:
    """List what is known of the keys."""
    file = _opened(path)
    keys = file.read()
    if as_json:
        click.echo(json.dumps([_plain(key) for key in keys]))
        return
    if not keys:
        click.echo(f"no keys in {file.path}", err=True)
    for key in keys:
        limits = [f"{value} {unit}/min" for value, unit in ((key.requests_per_minute, "requests"),
                                                            (key.tokens_per_minute, "tokens")) if value]  # fmt: skip
        ends = "" if key.expires is None else f"{'expired' if key.expired() else 'expires'} {_day(key.expires)}"
        facts = [key.id, f"{key.name:<20}", ",".join(key.scopes), f"created {_day(key.created)}", *limits, ends]
        click.echo("  ".join(filter(None, facts)))


@command.command()
@click.argument("which", metavar="ID|NAME", shell_complete=_names)
@_file
def revoke(which: str, path: str | None) -> None:
    """Remove a key, also from running servers."""
    key = _opened(path).revoke(which)
    click.echo(f"{key.id} {key.name} is revoked", err=True)


def _plain(key: Key) -> dict[str, Any]:
    """What may be shown of a key."""
    names = ("id", "name", "scopes", "created", "requests_per_minute", "tokens_per_minute", "expires")
    return {name: getattr(key, name) for name in names}


def _day(moment: int) -> str:
    return datetime.datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M")
