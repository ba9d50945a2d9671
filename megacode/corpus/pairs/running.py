"""What `proof` runs inside the sandbox: programs on inputs, each program in a process of its own.

Standard library only; nothing of megacode is there to import. `order.json` is [trials, inputs,
seconds]. Printed is one JSON list: [[whether each candidate agrees], reason] of each trial.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import io
import itertools
import json
import os
import random
import re
import resource
import select
import signal
import sys
import time
from typing import Any

_ITEMS = 1_000
"""Items of a generator that are looked at."""
_OFTEN = ("collections", "datetime", "fractions", "functools", "heapq", "math", "statistics")
"""Imported before the processes are made: programs often do."""


def main() -> None:
    with open("order.json") as file:
        trials, inputs, seconds = json.load(file)
    for name in _OFTEN:
        importlib.import_module(name)
    found = [judged(trial, inputs, seconds) for trial in trials]
    print(json.dumps(found))


def judged(trial: dict[str, Any], inputs: int, seconds: int) -> tuple[list[bool], str]:
    """Whether each candidate agrees with the program, or why nothing can be compared with it."""
    try:
        parameters = [one.arg for one in _entry(trial["program"]).args.args]
    except (SyntaxError, ValueError, LookupError, RecursionError):
        return [], "has no function to call"

    def run(source: str) -> list[str]:
        return outcomes(source, trial["generator"], parameters, inputs, seconds)

    own = run(trial["program"])
    errors = [one for one in own if one.startswith("!")]
    if len(errors) == len(own):
        return [], f"raises {errors[0][1:]} on every input"
    if own != run(trial["program"]):
        return [], "gives other results when it is run again"
    return [run(candidate) == own for candidate in trial["candidates"]], ""


def outcomes(
    source: str, generator: str, parameters: list[str], inputs: int, seconds: int
) -> list[str]:
    """A digest of what each input gives, or `!` and the type of the error; of a process of its
    own."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        _limit(seconds)
        lines: list[str] = []
        try:
            _outcomes(source, generator, parameters, inputs, lines)
        except BaseException as error:
            lines = [f"!{type(error).__name__}"] * inputs
        with contextlib.suppress(OSError):
            os.write(write, "\n".join(lines).encode())  # less than a pipe holds
        os._exit(0)
    os.close(write)
    told, end = b"", time.monotonic() + 5 * seconds
    while (left := end - time.monotonic()) > 0 and select.select([read], [], [], left)[0]:
        if not (piece := os.read(read, 1 << 16)):
            break
        told += piece
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(read)
    lines = told.decode().split("\n")
    return lines if len(lines) == inputs else ["!no end"] * inputs


def _limit(seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    folder = str(os.getpid())
    os.mkdir(folder)
    os.chdir(folder)


def _outcomes(
    source: str, generator: str, parameters: list[str], inputs: int, lines: list[str]
) -> None:
    make = _function(generator, {"Random": random.Random, "random": random})
    function = _function(source, {})
    for number in range(inputs):
        made = make(random.Random(number))
        arguments, named = _arguments(made, parameters)
        random.seed(number)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                value = _shown(function(*arguments, **named))
        except Exception as error:
            lines.append(f"!{type(error).__name__}")
            continue
        shown = f"{value}\0{_shown(arguments)}\0{_shown(named)}\0{printed.getvalue()}"
        lines.append(hashlib.sha256(shown.encode(errors="backslashreplace")).hexdigest()[:16])


def _arguments(made: Any, parameters: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments by place where they can be: a candidate may have other names for them."""
    if not isinstance(made, dict):
        return list(made) if isinstance(made, tuple) else [made], {}
    first = list(itertools.takewhile(lambda name: name in made, parameters))
    return [made[name] for name in first], {k: v for k, v in made.items() if k not in first}


def _entry(source: str) -> ast.FunctionDef:
    """The last top-level function. LookupError: there is none."""
    functions = [one for one in ast.parse(source).body if isinstance(one, ast.FunctionDef)]
    if not functions:
        raise LookupError
    return functions[-1]


def _function(source: str, names: dict[str, Any]) -> Any:
    names["__name__"] = "program"
    exec(compile(source, "program", "exec", dont_inherit=True), names)
    return names[_entry(source).name]


def _shown(value: Any, depth: int = 0) -> str:
    """A value as text, without addresses and without the order of sets."""
    if depth > 20 or isinstance(value, (str, bytes, int, float, complex, type(None))):
        return repr(value)
    if isinstance(value, (set, frozenset)):
        return f"{{{sorted(_shown(one, depth + 1) for one in value)}}}"
    if isinstance(value, dict):
        pairs = [f"{_shown(k, depth + 1)}:{_shown(v, depth + 1)}" for k, v in value.items()]
        return f"{type(value).__name__}{pairs}"
    if isinstance(value, (list, tuple)) or hasattr(value, "__next__"):
        kind = type(value).__name__
        items = itertools.islice(value, None if isinstance(value, (list, tuple)) else _ITEMS)
        return f"{kind}{[_shown(one, depth + 1) for one in items]}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


if __name__ == "__main__":
    sys.setrecursionlimit(10_000)
    main()
