"""What a token costs on its way from the engine to the socket: processor time of the API, and of the engine's process
around the model, with an engine that computes nothing.

The engine says English text in the tokens of the bundle, one token a step for each of the clients, 50 steps a second.
Processor time does not depend on who else uses the machine as much as time does. A second run under cProfile says where
it goes; it slows all functions of Python down, so that its shares count and not its times.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import io
import json
import pstats
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import psutil
from fastapi import FastAPI

from benchmarks.arms import started
from benchmarks.load import whole
from benchmarks.page import put, table
from lightship.bench.loop import closed_loop
from lightship.bench.prompts import Manner
from lightship.bench.trace import Line, Trace
from lightship.bench.wire import Door, Place
from lightship.bundle import Bundle
from lightship.calibration import default_text
from lightship.engine import EngineSettings
from lightship.report import Report
from lightship.serving import openai
from lightship.serving.app import create_app, create_routes, create_shell
from lightship.serving.deployment import Deployment
from lightship.serving.draining import DrainingServer
from lightship.serving.front import Front
from lightship.serving.keys import KeyRing
from lightship.serving.model import ServedModel
from lightship.serving.server import bind, wait_ready
from lightship.serving.settings import ServeSettings
from lightship.serving.slot import Slot, Switch
from lightship.serving.supervisor import Supervisor
from lightship.serving.ticket import Limits
from lightship.tokenizer import load_tokenizer

OUT = 256  # tokens of an answer
REQUESTS = 2  # of each client
STEP = 0.02  # seconds
TOP = 12  # functions of the profile
READ = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def pretended(bundle: Bundle, folder: Path) -> None:
    """A runtime folder with the tokenizer of `bundle` whose engine only pretends."""
    source = bundle.target_folder(bundle.targets[0])
    for name in READ:
        if (source / name).is_file():
            shutil.copy(source / name, folder)
    text = "".join(document.text for document in default_text().documents[:20])
    ids = load_tokenizer(source).encode(text, add_special_tokens=False).ids[:2000]
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    (folder / "fake.json").write_text(json.dumps({"script": ids, "vocabulary": vocabulary, "slow": STEP}))


def serve(folder: Path, port: int, profile: Path | None, plain: bool) -> None:
    """The server of `lightship serve` before the pretended engine, until it is told to stop; `plain`: its routes in the
    outer app itself, where no other bundle could take their place."""
    import uvicorn

    settings = ServeSettings(keys=None)
    engine = Supervisor("fake", EngineSettings())
    engine.load(folder)
    model = ServedModel.load("pretended", "0" * 64, folder)
    front = Front(settings, KeyRing(None), model.name, model.context)
    admission = front.admission(Limits(blocks=10**9), Report(()))
    admission.begin(admission.limits)

    def add_routes(app: FastAPI) -> None:
        openai.add_routes(app, engine, model, admission=admission)
        front.furnish(app)

    if plain:
        app = create_app(engine, add_routes)
    else:
        app, slot = create_shell(engine), Slot()
        slot.current = Deployment(cast(Any, None), admission, create_routes(app, engine, add_routes))
        app.add_middleware(Switch, slot=slot)
    config = uvicorn.Config(front.stand_before(app, engine, admission.snapshot), **front.listening)
    server = DrainingServer(config, front.door, engine.close)
    profiler = cProfile.Profile()
    with bind("127.0.0.1", port) as bound:
        if profile is None:
            server.run(sockets=[bound])
        else:
            profiler.runcall(server.run, sockets=[bound])
            profiler.dump_stats(profile)


@contextmanager
def serving(folder: Path, port: int, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """(URL, process of the API)."""
    with started(["benchmarks.overhead", "--serve", str(folder), "--port", str(port), *options]) as process:
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, alive=lambda: process.poll() is None)
        yield url, psutil.Process(process.pid)


def spent(process: psutil.Process) -> float:
    """Seconds of processor time so far."""
    times = process.cpu_times()
    return times.user + times.system


def drain(url: str, clients: int, chat: bool) -> int:
    """All requests; returns the tokens they got."""
    content: Any = [{"role": "user", "content": "Go on."}] if chat else [1, 2, 3]
    requests = Trace((Line(content, OUT, None),) * REQUESTS * clients, Manner())
    run = whole(asyncio.run(closed_loop(Door(Place.of(url), keep_alive=False), requests, clients)))
    return sum(each.tokens for each in run.seen)


def measured(folder: Path, port: int, clients: int, chat: bool, *options: str) -> list[float]:
    """Microseconds of processor time a token in the API and in the engine's process."""
    with serving(folder, port, *options) as (url, api):
        drain(url, clients, chat)  # what happens once
        (engine,) = api.children()
        before = spent(api), spent(engine)
        tokens = drain(url, clients, chat)
        after = spent(api), spent(engine)
    return [1e6 * (end - start) / tokens for start, end in zip(before, after, strict=True)]


def row(folder: Path, port: int, clients: int, chat: bool) -> list[str]:
    """As served, and without the step that lets another bundle take the place of the first."""
    api, engine = measured(folder, port, clients, chat)
    plain, _ = measured(folder, port, clients, chat, "--plain")
    tokens = OUT * REQUESTS * clients
    return ["chat" if chat else "completions", str(clients), str(tokens), f"{api:.0f}", f"{plain:.0f}", f"{engine:.0f}"]


def profiled(folder: Path, port: int, clients: int, kept: Path) -> list[list[str]]:
    """Rows of the functions in which the API spends most, their own time."""
    with serving(folder, port, "--profile", str(kept)) as (url, _):
        tokens = drain(url, clients, chat=True)
    stats = pstats.Stats(str(kept), stream=io.StringIO())
    total: float = stats.total_tt  # type: ignore[attr-defined]  # typeshed leaves it out
    rows = [["function", "own time", "calls a token"]]
    found = sorted(stats.stats.items(), key=lambda item: -item[1][2])  # type: ignore[attr-defined]  # as above
    for (file, _, name), (_, calls, own, _, _) in found:
        if "poll" in name or len(rows) > TOP:  # waiting
            continue
        place = "/".join(Path(file).parts[-2:]) if file != "~" else ""
        rows.append([f"`{place} {name}`".replace("` ", "`"), f"{own / total:.1%}", f"{calls / tokens:.1f}"])
    return rows


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", default=Path("bundles/demo-int8"))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--port", type=int, default=18_700)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--profile", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve is not None:
        return serve(asked.serve, asked.port, asked.profile, asked.plain)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pretended(Bundle.open(asked.bundle), folder)
        rows = [
            ["route", "clients", "tokens", "API, µs a token", "that without `reload`", "engine's process, µs a token"]
        ]
        for chat in (False, True):
            for clients in asked.clients:
                rows.append(row(folder, asked.port, clients, chat))
                print(rows[-1], file=sys.stderr)
        profile = profiled(folder, asked.port, asked.clients[-1], folder / "profile")
    put(
        "overhead",
        f"{table(rows)}\n\nWhere the API's time goes, chat, {asked.clients[-1]} clients:\n\n{table(profile)}",
    )


if __name__ == "__main__":
    main()
