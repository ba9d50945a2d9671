"""A server of chat completions that answers by a script, in a thread of this process.

A script is a function of a `Seen` request that returns bytes to send, `HANG`, or either after a wait of `(seconds, bytes)`. The
connection is closed after an answer that says so (`cut`, `nonsense`), and kept otherwise.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HANG = b""
Answer = bytes | tuple[float, bytes]


@dataclass(frozen=True)
class Seen:
    """A request. `number`: from 1, of all; `time`: of the same content, from 1. A probe has number 0."""

    content: str
    body: dict[str, Any]
    headers: dict[str, str]
    number: int
    time: int


def http(status: int, body: Any, **headers: str) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} Status", f"Content-Length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + content


def completion(text: str | None, finish: str | None = "stop", **more: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}  # fmt: skip
    return http(200, {"id": "1", "model": "served-1", "choices": [choice], **more})


def usual(seen: Seen) -> bytes:
    """A reply that is the same for the same request."""
    usage = {"prompt_tokens": 10, "completion_tokens": len(seen.content)}
    return completion(f"reply to {seen.content}", usage=usage)


def cut(answer: bytes) -> bytes:
    """The first part of an answer; the connection ends there."""
    return answer[:-10] + b"\0CUT"


def nonsense() -> bytes:
    return b"\x16\x03\x01 what?\r\n\r\n\0CUT"


class Scripted:
    """A context manager. `url` is the base address; `close_port` and `open_port` make the server go and come."""

    def __init__(self, script: Callable[[Seen], Answer] = usual) -> None:
        self.script = script
        self.sent: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        """Whole completions, by the request's content."""
        self.headers: list[dict[str, str]] = []
        self.probes = self.now = self.most = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> Scripted:
        self._thread.start()
        self.open_port()
        return self

    def __exit__(self, *_: object) -> None:
        self.close_port()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def open_port(self) -> None:
        self._do(self._start())

    def close_port(self) -> None:
        self._do(self._stop())

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, limit=2**24)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        if self._server:
            self._server.close()
            for writer in self._open:
                writer.transport.abort()
        self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.split(": ", 1) for line in head[1:] if line)
                body = json.loads(await reader.readexactly(int(headers["Content-Length"])))
                await self._answer(body, headers, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answer(
        self, body: dict[str, Any], headers: dict[str, str], writer: asyncio.StreamWriter
    ) -> None:
        content = body["messages"][-1]["content"]
        probe = body.get("max_tokens") == 1
        self.probes += probe
        self.headers.append(headers)
        if not probe:
            self.sent[content] += 1
        self.now += 1
        self.most = max(self.most, self.now)
        number = 0 if probe else self.sent.total()
        try:
            answer = self.script(Seen(content, body, headers, number, self.sent[content]))
            seconds, answer = answer if isinstance(answer, tuple) else (0.0, answer)
            await asyncio.sleep(3600 if answer == HANG else seconds)
            whole = answer.removesuffix(b"\0CUT")
            writer.write(whole)
            await writer.drain()
            if whole != answer:
                raise ConnectionError
            if not probe and b'"assistant"' in whole:
                self.answered[content] += 1
        finally:
            self.now -= 1
