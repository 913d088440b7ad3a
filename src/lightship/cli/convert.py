"""Convert a model to a runtime folder: export, quantise and gate, without evaluation or bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lightship.cli.display import stages
from lightship.cli.options import build_options, recipe_of


@click.command()
@build_options
def command(source: str, out: str | None, force: bool, as_json: bool, **given: Any) -> None:
    """Convert SOURCE to a gated runtime folder."""
    from lightship.pipeline import CONVERT, STAGES, convert

    recipe = recipe_of(source, **given)
    folder = Path(out) if out else Path(f"{recipe.label}-runtime")
    with stages({name: STAGES[name] for name in CONVERT}) as progress:
        convert(recipe, folder, force=force, progress=progress)
    click.echo(json.dumps({"folder": str(folder)}) if as_json else f"runtime folder: {folder}")
