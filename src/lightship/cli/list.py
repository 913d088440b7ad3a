"""List the sources, targets and steps that are installed."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(as_json: bool) -> None:
    """List the sources, targets and steps that are installed, third parties' among them."""
    from lightship.find import names

    found = {folder: names(folder) for folder in ("sources", "compression", "targets")}
    if as_json:
        click.echo(json.dumps(found))
        return
    for folder, entries in found.items():
        click.echo(f"{folder:12} {' '.join(entries)}")
