"""Serve a bundle over HTTP: OpenAI-compatible routes and /predict, on 127.0.0.1 unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
FILE = click.Path(dir_okay=False, path_type=Path)


class Workers(click.ParamType):  # type: ignore[type-arg]  # click 8.2 has it without
    """A number of engines, or `auto`."""

    name = "workers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto":
            return value
        return click.IntRange(1, 64).convert(value, param, ctx)


WORKERS = Workers()
SECONDS = click.FloatRange(min=0, min_open=True)


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    options: list[Decorator] = [
        click.option("--host", default="127.0.0.1", show_default=True,
                     help="Address to bind. One that others can reach needs a key, and TLS or --behind-proxy."),
        click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: a free one."),
        click.option("--keys", type=FILE, metavar="FILE",
                     help="The key file (default: that of `lightship keys`). Once it holds one every route needs it."),
        click.option("--tls-cert", type=FILE, metavar="FILE", help="Certificate with its chain, PEM."),
        click.option("--tls-key", type=FILE, metavar="FILE", help="Its key, PEM, without a passphrase."),
        click.option("--behind-proxy", is_flag=True, help="A proxy in front ends TLS."),
        click.option("--share-prefix-cache", is_flag=True,
                     help="With keys: computed work is shared between them. How fast an answer comes then tells "
                     "whether another asked the same before."),
        click.option("--kv-cache", default=1, show_default=True, type=click.IntRange(1, 1024),
                     help="GiB for keys and values of what runs, of each engine."),
        click.option("--workers", metavar="auto|N", type=WORKERS, default=1, show_default=True,
                     help="Engines, each with the model, its cores and its KV cache; auto: one for each NUMA node."),
        click.option("--cores", multiple=True, metavar="SET",
                     help="The cores of an engine, such as 0-3,8-11; once for each engine, instead of --workers."),
        click.option("--name", help="The model's name in the API (default: that of the first bundle)."),
        click.option("--max-context", type=click.IntRange(16), 
                     help="Tokens of prompt and answer (default: the model's)."),
        click.option("--max-concurrent", default=64, show_default=True, type=click.IntRange(1),
                     help="Answers that each engine computes together at most."),
        click.option("--max-queue", default=256, show_default=True, type=click.IntRange(0), help="Requests that wait."),
        click.option("--max-body", default=2, show_default=True, type=click.IntRange(1, 8), help="MiB of a request."),
        click.option("--max-connections", default=500, show_default=True, type=click.IntRange(1),
                     help="Open at the same time; those beyond are refused."),
        click.option("--first-token", default=60.0, show_default=True, type=SECONDS,
                     help="Seconds until the first token, the queue included; then 503."),
        click.option("--max-time", type=SECONDS, help="Seconds for a whole answer (default: no limit)."),
        click.option("--no-scoring", is_flag=True,
                     help="Refuse echo with logprobs, for which the model is loaded a second time."),
        click.option("--reproducible", is_flag=True,
                     help="Same seed, same answer under any load: answers are computed one after the other, without "
                     "prefix cache. Many clients wait for long."),
        click.option("--stall", default=60.0, show_default=True, type=SECONDS,
                     help="Seconds without a step after which the engine is started again."),
        click.option("--max-memory", type=click.FloatRange(min=0.1),
                     help="GiB of the engine's process above which it is started again when idle "
                     "(default: what it has when loaded, the KV cache and 2)."),
        click.option("--drain", default=30.0, show_default=True, type=click.FloatRange(min=0),
                     help="Seconds for what runs when the server is told to stop."),
        click.option("--threads", type=click.IntRange(1), help="Threads of each engine (default: its cores)."),
        click.option("--target", help="Of those in BUNDLE (default: what was tuned here, else the first)."),
        click.option("--draft", type=click.Path(), metavar="BUNDLE",
                     help="A smaller bundle with the same tokenizer, which proposes tokens; answers stay the same."),
        click.option("--untuned", is_flag=True, help="Ignore what `lightship tune` found out about BUNDLE here."),
        click.option("--metrics-port", type=click.IntRange(0, 65535), help="/metrics on a port of its own."),
        click.option("--vllm-names", is_flag=True, help="Export metrics under vLLM's names too."),
        click.option("--log", type=FILE, metavar="FILE", help="A JSON line for each request, without its text."),
        click.option("--log-prompts", is_flag=True, help="With --log: the prompts too."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("bundle", type=click.Path())
@_options
def command(bundle: str, host: str, port: int, **given: Any) -> None:
    """Verify BUNDLE and serve it until Ctrl-C."""
    import contextlib

    from lightship.serving.server import serve

    settings = _settings(**given)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is the ordinary way to stop
        serve(bundle, host, port, settings, progress=lambda line: click.echo(line, err=True))


def _settings(**given: Any) -> Any:
    """The `ServeSettings` that the options describe."""
    from dataclasses import replace

    from lightship.draft import open_draft
    from lightship.engine import EngineSettings
    from lightship.serving.keys import usual_path
    from lightship.serving.limits import Limits
    from lightship.serving.settings import ServeSettings
    from lightship.serving.supervisor import Care

    engine = EngineSettings(kv_cache_gb=given["kv_cache"], threads=given["threads"])
    if given["reproducible"]:
        engine = replace(engine, **REPRODUCIBLE)
    limit = given["max_memory"]
    return ServeSettings(
        engine=engine,
        workers=given["workers"],
        cores=given["cores"],
        name=given["name"],
        target=given["target"],
        use_tuned=not given["untuned"],
        draft=None if given["draft"] is None else open_draft(given["draft"]),
        keys=given["keys"] or usual_path(),
        tls_cert=given["tls_cert"],
        tls_key=given["tls_key"],
        behind_proxy=given["behind_proxy"],
        share_prefix_cache=given["share_prefix_cache"],
        max_context=given["max_context"],
        max_concurrent=given["max_concurrent"],
        max_queue=given["max_queue"],
        first_token_deadline=given["first_token"],
        total_deadline=given["max_time"],
        scoring=not given["no_scoring"],
        drain=given["drain"],
        limits=Limits(body=given["max_body"] * 2**20, connections=given["max_connections"]),
        metrics_port=given["metrics_port"],
        vllm_names=given["vllm_names"],
        log=given["log"],
        log_prompts=given["log_prompts"],
        care=Care(stall=given["stall"], memory_limit=None if limit is None else int(limit * 2**30)),
    )


# What is computed together changes the order of sums, and with it low bits: in float32 too, though more rarely.
REPRODUCIBLE: dict[str, Any] = {"max_num_seqs": 1, "prefix_cache": False}
