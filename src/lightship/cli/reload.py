"""Let a running server change to another bundle, without losing a request; `rollback` goes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which server, its key, and how to print what it says."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the server's answer as JSON."),
        click.option("--key", envvar="LIGHTSHIP_KEY",
                     help="A key with the scope admin; better in $LIGHTSHIP_KEY, where others on this machine do not "
                     "see it."),
        click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Where the server is."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("bundle", type=click.Path())
@server_options
def command(bundle: str, url: str, key: str | None, as_json: bool) -> None:
    """Let the server at --url change to BUNDLE, a folder on its machine. Exit code 1 when it keeps the one it has."""
    from pathlib import Path

    from lightship.serving.client import change

    click.echo(f"{url} loads {bundle} beside what it serves, and compares its golden rows", err=True)
    show(change(url, "reload", {"bundle": str(Path(bundle).absolute())}, key), as_json)


def show(answer: dict[str, Any], as_json: bool) -> None:
    """What the server serves now."""
    import json

    golden = answer["golden"]
    seconds = sum(step["seconds"] for step in answer["steps"])
    click.echo(json.dumps(answer) if as_json else (
        f"serving {answer['bundle']} as {answer['name']}\n"
        f"digest {answer['digest']}, before {answer['previous']['digest']}\n"
        f"golden: {golden['what']} {golden['mean']:.3g} (limit {golden['limit']:g}, n = {golden['n']}); {seconds:.1f} s"
    ))  # fmt: skip
