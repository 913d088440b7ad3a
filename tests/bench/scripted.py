"""A streaming server whose every delay is decided by the test, in virtual time, with a log of what it did when."""

import asyncio
import contextlib
import json
import selectors
from dataclasses import dataclass, field


class Jumping(selectors.DefaultSelector):
    """Sockets are real, time is not: it jumps to the next timer once no socket has anything to say."""

    now = 0.0

    def select(self, timeout=None):
        for _ in range(4):  # loopback delivers within the call that sends, or nearly
            if ready := super().select(0):
                return ready
        if timeout is None:
            ready = super().select(5)
            assert ready, "everyone waits and nobody will wake"
            return ready
        self.now += max(0.0, timeout)
        return super().select(0)


def virtually(main):
    """The result of the coroutine `main`, run in virtual time."""
    selector = Jumping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now

    async def whole():
        result = await main
        for _ in range(5):
            await asyncio.sleep(0)  # what was closed has time to go
        return result

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(whole())


@dataclass
class Plan:
    """How one request is answered. Seconds; `each` lies between two tokens."""

    first: float = 0.5
    each: float = 0.1
    tokens: int | None = None  # None: as many as are asked for
    status: int = 200
    headers: dict = field(default_factory=dict)
    body: bytes = b'{"error": {"message": "no"}}'  # of a refusal
    finish: str | None = "length"
    usage: bool = True
    done: bool = True  # [DONE] at the end
    breaks: int | None = None  # the connection ends after so many tokens
    error: int | None = None  # an error event after so many tokens
    framing: str = "chunked"  # or "close"
    split: bool = False  # each event in two chunks
    kind: str = "text/event-stream"
    per_piece: int = 1  # tokens in a piece
    silent: bool = False  # no text at all


@dataclass
class Logged:
    """What the server did with one request."""

    body: dict
    arrived: float
    head: str
    pieces: list = field(default_factory=list)
    ended: float = 0.0


class Scripted:
    """`answer(number, body)` gives the plan of each completion; with `slots`, so many are answered at a time."""

    def __init__(self, answer=lambda number, body: Plan(), slots=None, models=b'{"data": [{"id": "m"}]}', status=200):
        self.answer, self.models, self.status = answer, models, status
        self.log, self.connections, self.running, self._serving = [], 0, 0, set()
        self.slots = asyncio.Semaphore(slots) if slots else contextlib.nullcontext()

    @contextlib.asynccontextmanager
    async def open(self, tls=None):
        """Yields the URL."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        try:
            yield f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in self._serving:
                task.cancel()
            await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader, writer):
        self.connections += 1
        self._serving.add(asyncio.current_task())
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
                body = await reader.readexactly(length)
                if head.startswith("GET"):
                    writer.write(plain(self.status, self.models))
                elif not await self._complete(head, json.loads(body), writer):
                    break
                if "connection: close" in head.lower():
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client left, or the test is over
        finally:
            writer.close()

    async def _complete(self, head, body, writer):
        now = asyncio.get_running_loop().time
        logged = Logged(body, now(), head)
        self.log.append(logged)
        plan = self.answer(len(self.log) - 1, body)
        if plan.status != 200:
            await asyncio.sleep(plan.first)
            writer.write(plain(plan.status, plan.body, plan.headers))
            return True
        async with self.slots:
            self.running += 1
            whole = await self._stream(plan, logged, "messages" in body, writer, now)
            self.running -= 1
        logged.ended = now()
        return whole

    async def _stream(self, plan, logged, chat, writer, now):
        framing = "Transfer-Encoding: chunked" if plan.framing == "chunked" else "Connection: close"
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: {plan.kind}\r\n{framing}\r\n\r\n".encode())

        def send(event):
            data = b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"
            halves = [data[: len(data) // 2], data[len(data) // 2 :]] if plan.split else [data]
            for half in halves:
                writer.write(b"%x\r\n%s\r\n" % (len(half), half) if plan.framing == "chunked" else half)

        def choice(text, finish=None):
            content = {"delta": {"content": text}} if chat else {"text": text}
            return {"choices": [{"index": 0, **content, "finish_reason": finish}]}

        tokens = logged.body.get("max_tokens", 16) if plan.tokens is None else plan.tokens
        if chat:
            send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(plan.first)
        for token in range(0, tokens, plan.per_piece):
            if token:
                await asyncio.sleep(plan.each)
            if plan.breaks is not None and token >= plan.breaks:
                return False
            if plan.error is not None and token >= plan.error:
                send({"error": {"message": "the engine died"}})
                send(b"[DONE]")
                break
            logged.pieces.append(now())
            event = choice("" if plan.silent else " word")
            if logged.body.get("stream_options", {}).get("continuous_usage_stats"):
                event["usage"] = {"completion_tokens": min(token + plan.per_piece, tokens)}
            send(event)
        else:
            send(choice("", plan.finish))
            if plan.usage:
                send(
                    {"choices": [], "usage": {"prompt_tokens": prompt_tokens(logged.body), "completion_tokens": tokens}}
                )
            if plan.done:
                send(b"[DONE]")
        if plan.framing == "chunked":
            writer.write(b"0\r\n\r\n")
        return plan.framing == "chunked"


def prompt_tokens(body):
    """10 for a template and 2 a word; of token ids their number."""
    prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
    return 10 + 2 * len(prompt.split()) if isinstance(prompt, str) else len(prompt)


def plain(status, body, headers=()):
    """A whole answer."""
    more = "".join(f"{name}: {value}\r\n" for name, value in dict(headers).items())
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body
