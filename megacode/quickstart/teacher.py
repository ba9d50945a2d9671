"""A served model that needs no weights: a teacher by rules, for tests and tiny studies.

    python -m megacode.quickstart.teacher --port 8001

It speaks as much of OpenAI's protocol as `megacode synthesize` asks of a server. To a prompt of the
operator `tutorship` that has the right solution it replies with a verdict, the first line of the
attempt that differs from the solution's, and the rest of the solution. A prompt without an attempt
is answered as a weak student: with the solution of the problem among `--problems`, for about half
of them with numbers that are wrong from some line on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.files import read_json_lines
from megacode.synthesize.answers import final_answer
from megacode.synthesize.templates import steps

_NUMBER = re.compile(r"\d+")


def tutoring(solution: str, attempt: str) -> str:
    """The reply to an attempt at a problem whose right solution is known."""
    right, tried = steps(solution), steps(attempt)
    wrong = next((i for i, line in enumerate(right) if i >= len(tried) or tried[i] != line), None)
    if wrong is None:
        return "correct\nEvery step is right, and so is the answer."
    quoted = "Steps are missing."
    if wrong < len(tried):
        quoted = f'The first wrong step is "{tried[wrong]}".'
    rest = "\n".join(right[wrong:])
    return f"wrong\n{quoted} It should be:\n{rest}\nAnswer: {_answer_in(right)}"


def weak_attempt(solution: str, number: int) -> str:
    """The solution; for an odd `number`, numbers are one too large from some line on."""
    lines = steps(solution)
    if number % 2:
        at = number // 2 % len(lines)
        lines = [
            _NUMBER.sub(lambda m: str(int(m[0]) + 1), line) if i >= at else line
            for i, line in enumerate(lines)
        ]
    return "\n".join([*lines, f"Answer: {_answer_in(lines)}"])


def _answer_in(lines: Sequence[str]) -> str:
    """Of a solution's last line, which may be the bare answer."""
    return final_answer(lines[-1]) or lines[-1]


def reply_to(prompt: str, problems: Mapping[str, str]) -> str:
    """What the teacher says; nothing to a prompt that it does not know."""
    parts = {
        name: found[1].strip()
        for name in ("right_solution", "attempt")
        if (found := re.search(rf"<{name}>\n(.*?)\n</{name}>", prompt, re.DOTALL))
    }
    if "attempt" in parts:
        return tutoring(parts.get("right_solution", ""), parts["attempt"])
    known = next((text for text in problems if prompt.startswith(text)), None)
    if known is None:
        return ""
    return weak_attempt(problems[known], zlib.crc32(prompt.encode()))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    problems: Mapping[str, str]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        text = reply_to(prompt, self.problems)
        self._send(
            {
                "id": f"reply-{zlib.crc32(prompt.encode()):08x}",
                "object": "chat.completion",
                "model": body["model"],
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": text},
                        "finish_reason": "stop",
                    }
                ],
                "usage": {
                    "prompt_tokens": len(prompt.split()),
                    "completion_tokens": len(text.split()),
                    "total_tokens": len(prompt.split()) + len(text.split()),
                },
            }
        )

    def do_GET(self) -> None:
        self._send({"status": "ok"})

    def _send(self, value: Mapping[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def make_server(port: int, problems: Mapping[str, str] = {}) -> ThreadingHTTPServer:
    """On 127.0.0.1; `problems`: problem -> right solution. Port 0 takes a free one."""
    handler = type("Handler", (_Handler,), {"problems": problems})
    return _Server(("127.0.0.1", port), handler)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megacode.quickstart.teacher",
        description="Serve a teacher by rules, and a weak student, on this machine.",
    )
    parser.add_argument("--port", type=int, default=8001, help="(default: %(default)s)")
    parser.add_argument(
        "--problems", type=Path, help="JSONL of `input` and `target`, whose weak student it is"
    )
    args = parser.parse_args()
    try:
        problems = {}
        if args.problems:
            for _, record in read_json_lines(args.problems, "problems"):
                problems[record["input"].strip()] = record["target"]
        server = make_server(args.port, problems)
    except UserError as error:
        print(f"teacher: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"teacher: --port {args.port}: {error.strerror}; give another", file=sys.stderr)
        return 2
    print(f"serving on http://127.0.0.1:{server.server_port}/v1; Ctrl-C ends it", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
