"""Run a recipe: as ship, but every finished stage is kept, so that a second run does only what changed."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lightship.cli.display import show_plan, stages
from lightship.cli.options import preflight_options


@click.command()
@click.argument("recipe", type=click.Path())
@click.option("--runs", default="runs", show_default=True, type=click.Path(), help="Where finished stages are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@preflight_options
def command(recipe: str, runs: str, as_json: bool, dry_run: bool, ignore_shortage: bool) -> None:
    """Build the bundle that the YAML file RECIPE describes."""
    from lightship.pipeline import plan_run, run
    from lightship.recipe import read_recipe

    asked = read_recipe(Path(recipe))
    if dry_run:
        show_plan(plan_run(asked, runs=Path(runs)), as_json)
        return
    with stages() as progress:
        bundle = run(asked, runs=Path(runs), progress=progress, ignore_shortage=ignore_shortage)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle.folder), "digest": bundle.digest}))
        return
    click.echo(bundle.report.to_markdown())
    click.echo(f"bundle: {bundle.folder}  ({bundle.size_bytes / 1e6:.0f} MB, digest {bundle.digest[:16]})")
