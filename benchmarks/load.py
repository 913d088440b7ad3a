"""A light load generator: closed loop, a fixed number of clients, raw sockets, so that it takes little from the server.

It shares the cores with what it measures; `benchmarks.serve` lets it drain a stub while the baseline is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit


@dataclass
class Load:
    """What one run saw. Times in seconds; TPOT = (last − first token) / (tokens − 1)."""

    tokens: int = 0
    seconds: float = 0.0
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)


def bodies(prompts: Path, new_tokens: int) -> list[bytes]:
    """One streamed completion request a prompt, greedy, asking for its usage."""
    rows = json.loads(prompts.read_text())
    return [
        json.dumps({"prompt": row, "max_tokens": new_tokens, "temperature": 0, "stream": True,
                    "stream_options": {"include_usage": True}}).encode()
        for row in rows
    ]  # fmt: skip


async def one(
    host: str, port: int, body: bytes, load: Load, record: Path | None, route: str = "/v1/completions"
) -> None:
    """Send one request and read its stream to the end."""
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST {route} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    began = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    first = last = 0.0
    tokens, whole = 0, []
    async for line in reader:
        whole.append(line)
        if not line.startswith(b"data: {"):
            continue
        if b'"text":""' not in line and b'"choices":[]' not in line:
            last = time.perf_counter()
            first = first or last
        if b'"completion_tokens":' in line:
            tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    writer.close()
    if not tokens:
        raise SystemExit(f"a request failed: {b''.join(whole)[:500]!r}")
    load.tokens += tokens
    load.ttft.append(first - began)
    if tokens > 1:
        load.tpot.append((last - first) / (tokens - 1))
    if record is not None:
        record.write_bytes(b"".join(whole))


async def closed_loop(
    url: str, requests: list[bytes], clients: int, record: Path | None = None, route: str = "/v1/completions"
) -> Load:
    """`clients` at a time take the next request from the list until none is left."""
    place = urlsplit(url)
    load, waiting = Load(), iter(requests)

    async def client() -> None:
        for body in waiting:
            await one(place.hostname or "", place.port or 80, body, load, record, route)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    load.seconds = time.perf_counter() - began
    return load


def main() -> None:
    """Print the run as one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args()
    load = asyncio.run(closed_loop(asked.url, bodies(asked.prompts, asked.new), asked.clients, asked.record))
    print(json.dumps(vars(load)))


if __name__ == "__main__":
    main()
