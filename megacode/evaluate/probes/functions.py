"""One-line functions: a docstring of one or two operations, and the `return` that is run."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megacode.evaluate.probes.probe import Item, Probe, ProbeTask, Record, is_held_out
from megacode.evaluate.probes.words import nonce

_TRAIN, _DEV = 4000, 200
_CONSTANTS = range(2, 21)
# What the docstring says, the expression of {e}, and what it does with a value and the constant.
_OPERATIONS: tuple[tuple[str, str, Callable[[int, int], int]], ...] = (
    ("add {k}", "{e} + {k}", lambda x, k: x + k),
    ("subtract {k}", "{e} - {k}", lambda x, k: x - k),
    ("multiply by {k}", "{e} * {k}", lambda x, k: x * k),
    ("divide by {k} and round down", "{e} // {k}", lambda x, k: x // k),
    ("take the remainder by {k}", "{e} % {k}", lambda x, k: x % k),
    ("raise it to at least {k}", "max({e}, {k})", lambda x, k: x if x > k else k),
    ("limit it to at most {k}", "min({e}, {k})", lambda x, k: x if x < k else k),
    ("negate", "-{e}", lambda x, _: 0 - x),
    ("square", "{e} ** 2", lambda x, _: x * x),
    ("cube", "{e} ** 3", lambda x, _: x * x * x),
    ("take the absolute value", "abs({e})", lambda x, _: x if x >= 0 else 0 - x),
    ("count the decimal digits", "len(str(abs({e})))", lambda x, _: len(f"{x}".lstrip("-"))),
)
_GROUPS = ("one operation", "two operations, pair in training", "two operations, new pair")


@dataclass(frozen=True)
class _Function:
    """What a function does, as text and as code; operations by number."""

    said: str
    expression: str
    operations: tuple[int, ...]
    constants: tuple[int, ...]

    @property
    def group(self) -> str:
        if len(self.operations) == 1:
            return _GROUPS[0]
        return _GROUPS[1 + is_held_out(f"{self.operations[0]} then {self.operations[1]}")]

    @property
    def is_for_tests(self) -> bool:
        return self.group == _GROUPS[2] or (any(self.constants) and is_held_out(self.said))


def make(random_: random.Random, items: int) -> Probe:
    """Functions, their names and one in five pairs of operations are in tests or in training."""
    each = -(-items // len(_GROUPS))
    train, tests = (
        [one for one in _all() if one.is_for_tests == for_tests] for for_tests in (False, True)
    )
    found: list[Item] = []
    for group in _GROUPS:
        functions = [one for one in tests if one.group == group]
        for one in random_.sample(functions, min(each, len(functions))):
            name = nonce(random_, held_out=True)
            found.append(
                {"prompt": _prompt(name, one), "answer": f" {one.expression}",
                 "tests": _tests(random_, name, one), "group": group}
            )  # fmt: skip
    known: dict[tuple[int, ...], list[_Function]] = {}
    for one in train:
        known.setdefault(one.operations, []).append(one)
    singles = [operations for operations in known if len(operations) == 1]
    records: dict[Record, None] = {}
    while len(records) < _TRAIN + _DEV:
        one = random_.choice(known[random_.choice(random_.choice((singles, list(known))))])
        record = _prompt(nonce(random_, held_out=False), one), f" {one.expression}"
        records[record] = None
    how = {"check": "run", "max_tokens": 48, "stop": ["\n"], "seconds": 5.0, "memory_mb": 256}
    about = "One line of Python for a docstring of one or two operations, run."
    done = list(records)
    return Probe([ProbeTask("functions", about, found, None, how)], done[:_TRAIN], done[_TRAIN:])


def _all() -> list[_Function]:
    """Every function of one or two operations."""
    steps = [
        (number, k)
        for number, (said, *_) in enumerate(_OPERATIONS)
        for k in (_CONSTANTS if "{k}" in said else (0,))
    ]
    return [_function([step]) for step in steps] + [
        _function(pair) for pair in itertools.product(steps, repeat=2)
    ]


def _function(steps: Sequence[tuple[int, int]]) -> _Function:
    said: list[str] = []
    expression = "x"
    operations, constants = zip(*steps, strict=True)
    for number, k in zip(operations, constants, strict=True):
        words, code, _ = _OPERATIONS[number]
        said.append(words.format(k=k))
        inner = expression if expression == "x" or code.count("(") else f"({expression})"
        expression = code.format(e=inner, k=k)
    return _Function(", then ".join(said), expression, operations, constants)


def _prompt(name: str, function: _Function) -> str:
    return f'def {name}(x):\n    """Take x, {function.said}."""\n    return'


def _tests(random_: random.Random, name: str, function: _Function) -> str:
    """Eight assertions, with negative numbers and 0 among them."""
    lines = []
    for x in (0, -1, *random_.sample(range(-60, -1), 2), *random_.sample(range(1, 120), 4)):
        value = x
        for number, k in zip(function.operations, function.constants, strict=True):
            value = _OPERATIONS[number][2](value, k)
        lines.append(f"assert {name}({x}) == {value}\n")
    return "".join(lines)
