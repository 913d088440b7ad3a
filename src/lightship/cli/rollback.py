"""Let a running server go back to the bundle that it served before."""

from __future__ import annotations

import click

from lightship.cli.reload import server_options, show


@click.command()
@server_options
def command(url: str, key: str | None, as_json: bool) -> None:
    """Let the server at --url go back to the bundle before; it is verified and compared again. Exit code 1 when it
    keeps the one it has."""
    from lightship.serving.client import change

    show(change(url, "rollback", {}, key), as_json)
