"""Try each way to make a model lighter, once and lightly, and say which serves which need."""

from __future__ import annotations

import json

import click

from lightship.cli.completion import models
from lightship.cli.display import stages


@click.command()
@click.argument("source", shell_complete=models)
@click.option("--text", type=click.Path(), help="Measure on this, and calibrate on another part of it.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(source: str, text: str | None, as_json: bool) -> None:
    """Say what would make SOURCE (a folder, a .gguf file, a hub id, or `demo`) lighter, and what it would lose."""
    from lightship.advise_pipeline import advise

    with stages() as progress:
        found = advise(source, text=text, progress=progress)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
        return
    click.echo(f"{found.source}: {found.parameters / 1e6:.1f} M parameters, {found.tables:.0%} in embedding and head\n")
    rows = [["technique", "serves", "bytes", "computing", "loss"]]
    for trial in found.trials:
        losses = trial.refused or ", ".join(f"{name} {value:.3g}" for name, value in trial.losses.items())
        shares = ["", ""] if trial.refused else [f"{trial.bytes:.0%}", f"{trial.compute:.0%}"]
        rows.append([trial.label, trial.serves, *shares, losses])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    click.echo("\n" + "\n".join(found.words))
