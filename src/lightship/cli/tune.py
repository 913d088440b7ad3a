"""Find the engine settings that serve a bundle best on this machine; `serve` uses them from then on."""

from __future__ import annotations

from pathlib import Path

import click

from lightship.cli.display import stages


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--clients", required=True, type=click.IntRange(1, 4096), help="That ask at the same time.")
@click.option("--in", "tokens_in", required=True, type=click.IntRange(1), help="Tokens of a prompt.")
@click.option("--out", "tokens_out", required=True, type=click.IntRange(2), help="Tokens of an answer.")
@click.option("--task", type=click.Choice(["text", "copy"]), default="text", show_default=True,
              help="copy: prompts that ask to repeat a passage; then prompt lookup is tried too.")  # fmt: skip
@click.option("--shared", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              help="Share of a prompt that all have in common.")  # fmt: skip
@click.option("--limit", "limits", multiple=True, metavar="ttft=S|tpot=S",
              help="Seconds that 90 % of the requests must keep.")  # fmt: skip
@click.option(
    "--draft", type=click.Path(), metavar="BUNDLE", help="A draft, as of serve: whether it pays is tried too."
)
@click.option("--kv-cache", default=1, show_default=True, type=click.IntRange(1, 1024), help="GiB, as of serve.")
@click.option("--budget", default=10.0, show_default=True, type=click.FloatRange(min=0, min_open=True), help="Minutes.")
@click.option("--only", multiple=True, metavar="SETTING", help="Try this setting; several may be named (default: all).")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(
    bundle: str,
    clients: int,
    tokens_in: int,
    tokens_out: int,
    task: str,
    shared: float,
    limits: tuple[str, ...],
    draft: str | None,
    kv_cache: int,
    budget: float,
    only: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure engine settings for BUNDLE on this machine, and write the best, with the whole table, to a file next to
    it. Settings that break the bundle's KLD limit are rejected."""
    from lightship.draft import open_draft
    from lightship.tune_pipeline import tune
    from lightship.tuning import Workload, parse_limits, to_markdown

    load = Workload.model_validate({
        "clients": clients, "tokens_in": tokens_in, "tokens_out": tokens_out, "task": task, "shared": shared,
        "kv_cache_gb": kv_cache, "limits": parse_limits(limits),
    })  # fmt: skip
    with stages() as progress:
        opened = None if draft is None else open_draft(draft)
        entry = tune(Path(bundle), load, draft=opened, budget=60 * budget, only=only, progress=progress)
    click.echo(entry.model_dump_json(indent=1) if as_json else to_markdown(entry))
