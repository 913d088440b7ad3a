"""Serve a bundle over HTTP: OpenAI-compatible routes and /predict, on 127.0.0.1."""

from __future__ import annotations

import contextlib

import click


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--kv-cache", default=1, show_default=True, type=click.IntRange(1, 1024), help="GiB for the KV cache.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the engine (default: all cores).")
def command(bundle: str, host: str, port: int, kv_cache: int, threads: int | None) -> None:
    """Verify BUNDLE and serve it until Ctrl-C."""
    from lightship.engine import EngineSettings
    from lightship.serving.server import serve

    settings = EngineSettings(kv_cache_gb=kv_cache, threads=threads)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is the ordinary way to stop
        serve(bundle, host, port, settings, progress=lambda line: click.echo(line, err=True))
