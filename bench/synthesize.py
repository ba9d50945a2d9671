"""Requests to a served model: requests per second and peak memory, beside plain clients in the same run.

    python bench/synthesize.py [--requests 5000] [--in-flight 200] [--delay 0.05] [--table FILE]

The server is a stub in its own process on this machine: it answers each request after `--delay` seconds with a completion of 2,000
characters. Every side runs in a process of its own, which sends all requests with so many in flight; sides take turns. "megacode" is
`Served` through `in_order`, which looks into the journal first and writes each reply to it; "megacode, again" is the same with all
replies in the journal. "aiohttp" and "httpx" post the same bodies and read the replies as JSON, and do nothing else: no journal, no
limits, no second try. httpx needs `pip install httpx`.

Measured: docs/results/synthesize.md
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import time
from contextlib import aclosing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_data import machine_line
from rich.console import Console

PROMPT = "Write a function that gives the number of trailing zeros of n factorial. " * 8


def body(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{PROMPT}{number}"}]


CONTENT = json.dumps(
    {
        "model": "stub",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "An answer of 25 letters. " * 80},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 150, "completion_tokens": 500},
    }
).encode()


class Stub(asyncio.Protocol):
    """Answers whatever has a body, by its Content-Length."""

    delay = 0.0
    answer = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(CONTENT)}\r\n\r\n".encode() + CONTENT  # fmt: skip

    def __init__(self) -> None:
        self.buffer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
            if len(self.buffer) < end + 4 + length:
                return
            self.buffer = self.buffer[end + 4 + length :]
            asyncio.get_running_loop().call_later(self.delay, self.transport.write, self.answer)


def serve(delay: float, port: Any) -> None:
    async def run() -> None:
        Stub.delay = delay
        server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", 0, backlog=4096)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


async def megacode(url: str, requests: int, in_flight: int, folder: str) -> None:
    from megacode.synthesize import ordered
    from megacode.synthesize.journal import Journal, Reply
    from megacode.synthesize.schema import ServedModel
    from megacode.synthesize.served import Served

    models = {"teacher": ServedModel(model="stub", endpoints=[url], in_flight=in_flight)}
    with Journal(Path(folder, "replies")) as journal:
        async with Served(models, journal) as served:

            def ask(number: int) -> Any:
                return served.reply("teacher", body(number), 0)

            async with aclosing(
                ordered.in_order(range(requests), ask, lambda: 3 * in_flight)
            ) as replies:
                async for reply in replies:
                    assert isinstance(reply, Reply)
        assert len(journal) == requests


async def plain(client: Any, url: str, requests: int, in_flight: int) -> None:
    numbers = iter(range(requests))

    async def worker() -> None:
        for number in numbers:
            request = json.dumps({"model": "stub", "messages": body(number)}).encode()
            reply = json.loads(await client(f"{url}/chat/completions", request))
            assert reply["choices"][0]["message"]["content"]

    await asyncio.gather(*(worker() for _ in range(in_flight)))


async def with_aiohttp(url: str, requests: int, in_flight: int, folder: str) -> None:
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def post(url: str, content: bytes) -> bytes:
            headers = {"Content-Type": "application/json"}
            async with session.post(url, data=content, headers=headers) as response:
                return await response.read()

        await plain(post, url, requests, in_flight)


async def with_httpx(url: str, requests: int, in_flight: int, folder: str) -> None:
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=600) as client:

        async def post(url: str, content: bytes) -> bytes:
            headers = {"Content-Type": "application/json"}
            return (await client.post(url, content=content, headers=headers)).content

        await plain(post, url, requests, in_flight)


SIDES = {
    "megacode": megacode,
    "megacode, again": megacode,
    "aiohttp": with_aiohttp,
    "httpx": with_httpx,
}


def measure(side: str, url: str, requests: int, in_flight: int, folder: str) -> None:
    """In a process of its own: a warm-up, then all requests; prints seconds, CPU seconds and MiB."""
    run = SIDES[side]
    with TemporaryDirectory() as warm:
        asyncio.run(run(url, 50, 10, warm))
    began, cpu = time.perf_counter(), time.process_time()
    asyncio.run(run(url, requests, in_flight, folder))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([seconds, cpu, peak]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--in-flight", type=int, default=200)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds to an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the page here too")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        measure(args.side, args.url, args.requests, args.in_flight, args.folder)
        return

    clients = {}
    for name in ("aiohttp", "httpx"):
        try:
            clients[name] = version(name)
        except PackageNotFoundError:
            print(f"{name} is not installed; it is left out")
    sides = [side for side in SIDES if side.startswith("megacode") or side in clients]
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(args.delay, theirs), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ours.recv()}/v1"
    found: dict[str, list[list[float]]] = {side: [] for side in sides}
    options = ["--url", url, "--requests", str(args.requests), "--in-flight", str(args.in_flight)]
    with Console(stderr=True).status("asking"):
        for _ in range(args.repeats):
            with TemporaryDirectory() as folder:
                for side in sides:
                    command = [sys.executable, __file__, "--side", side, "--folder", folder]
                    output = subprocess.run(
                        [*command, *options], check=True, stdout=subprocess.PIPE, text=True
                    ).stdout
                    found[side].append(json.loads(output))
    server.kill()

    def middle(side: str, column: int) -> float:
        return statistics.median(row[column] for row in found[side])

    rows = [
        f"| {side} | {args.requests / middle(side, 0):,.0f} | {middle(side, 0) / middle('megacode', 0):.2f} x "
        f"| {middle(side, 1) / args.requests * 1e3:.2f} | {middle(side, 2):,.0f} |"
        for side in sides
    ]
    page = "\n".join(
        [
            "# Requests to served models: `bench/synthesize.py`",
            "",
            f"{datetime.date.today()}, {machine_line()}, "
            + ", ".join(f"{name} {number}" for name, number in clients.items())
            + ("" if "httpx" in clients else "; httpx is not installed")
            + ".",
            f"Command: `python bench/synthesize.py --requests {args.requests} --in-flight {args.in_flight} --delay {args.delay}`.",
            f"The stub server answers after {args.delay:g} s, in a process of its own: {args.in_flight / args.delay:,.0f} requests/s at most. Medians of",
            f"{args.repeats} turns. Only megacode's sides keep a journal, limits and tries.",
            "",
            "| side | requests/s | time, of megacode's | CPU ms/request | peak RSS, MiB |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    print(page)
    if args.table:
        args.table.write_text(page)


if __name__ == "__main__":
    main()
