"""Run a recipe: as ship, but every finished stage is kept, so that a second run does only what changed."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lightship.cli.display import stages


@click.command()
@click.argument("recipe", type=click.Path())
@click.option("--runs", default="runs", show_default=True, type=click.Path(), help="Where finished stages are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(recipe: str, runs: str, as_json: bool) -> None:
    """Build the bundle that the YAML file RECIPE describes."""
    from lightship.pipeline import STAGES, run
    from lightship.recipe import read_recipe

    with stages(STAGES) as progress:
        bundle = run(read_recipe(Path(recipe)), runs=Path(runs), progress=progress)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle.folder), "digest": bundle.digest}))
        return
    click.echo(bundle.report.to_markdown())
    click.echo(f"bundle: {bundle.folder}  ({bundle.size_bytes / 1e6:.0f} MB, digest {bundle.digest[:16]})")
