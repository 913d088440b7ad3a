"""Write a commented recipe for a model, to be edited and run."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lightship.cli.completion import models


@click.command()
@click.argument("source", required=False, shell_complete=models)
@click.option("--out", "-o", default="recipe.yaml", show_default=True, type=click.Path(), help="The file to write.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of recipes instead, for editors.")
def command(source: str | None, out: str, schema: bool) -> None:
    """Write a recipe for SOURCE (a folder, a .gguf file, a hub id, or `demo`)."""
    from lightship.errors import UsageError
    from lightship.recipe import Recipe, commented

    if schema:
        click.echo(json.dumps(Recipe.model_json_schema(), indent=1))
        return
    if not source:
        raise UsageError("which model?", hint="lightship init ./my-checkpoint")
    path = Path(out)
    if path.exists():
        raise UsageError(f"{path} exists already", hint="choose another --out")
    path.write_text(commented(source), encoding="utf-8")
    click.echo(f"wrote {path}; next: lightship run {path}", err=True)
