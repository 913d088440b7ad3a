"""A server without a model: replays one recorded stream to everybody, token by token at a given pace."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from pathlib import Path


async def serve(recorded: bytes, first: float, each: float) -> None:
    """Print the port, then answer until killed. `first`: seconds before the first token, `each`: between two."""
    events = [part + b"\n\n" for part in recorded.split(b"\n\n") if part.strip()]
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    )
    chunks = [b"%x\r\n%s\r\n" % (len(event), event) for event in events]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        length = int(request.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        writer.write(head)
        await asyncio.sleep(first)
        with contextlib.suppress(ConnectionError):  # who drains is ended when the baseline is measured
            for chunk in chunks:
                writer.write(chunk)
                await writer.drain()
                await asyncio.sleep(each)
            writer.write(b"0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Until killed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stub", description=__doc__)
    parser.add_argument("recorded", type=Path)
    parser.add_argument("--first", type=float, required=True)
    parser.add_argument("--each", type=float, required=True)
    asked = parser.parse_args()
    asyncio.run(serve(asked.recorded.read_bytes(), asked.first, asked.each))


if __name__ == "__main__":
    main()
