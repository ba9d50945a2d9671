"""Small problems, each with solutions in different forms: what is equivalent though no line is.

A problem filters numbers, maps them and takes the rest together. The same seed gives the same
problems.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

_FILTERS = (
    "{x} % {a} == 0", "{x} % {a} != 0", "{x} > {a}", "{x} < {a}", "abs({x}) > {a}", "{x} != {a}",
)  # fmt: skip
_MAPS = ("{x}", "{x} * {x}", "{x} + {b}", "{x} * {b}", "{x} - {b}", "abs({x}) + {b}")
_ENDS = (
    ("{t} + {v}", "sum({all})"),
    ("max({t}, {v})", "max([0, *{all}])"),
    ("min({t}, {v})", "min([0, *{all}])"),
    ("{t} + ({v}) ** 2", "sum(n ** 2 for n in {all})"),
    ("({v}) - {t}", "functools.reduce(lambda t, n: n - t, {all}, 0)"),
)
"""What a value makes of the total, which begins at 0; the same of a list at once."""
_NUMBERS = """import random


def numbers(rng):
    return {"values": [rng.randint(-30, 30) for _ in range(rng.randint(0, 12))]}
"""


def solved_problems(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """`count` problems with two solutions each: records of `text`, `problem` and `generator`, as
    `megacode pairs` reads them."""
    rng = random.Random(seed)
    kinds = list(itertools.product(_FILTERS, _MAPS, _ENDS))
    for number, (where, value, end) in enumerate(rng.sample(kinds, count)):
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        for form in rng.sample((_loop, _comprehension, _while, _recursion), 2):
            text = form(where.format(x="x", a=a), value.format(x="x", b=b), end)
            yield {"text": text, "problem": f"solved-{number}", "generator": _NUMBERS}


_End = tuple[str, str]


def _loop(where: str, value: str, end: _End) -> str:
    step, _ = end
    return f"""def solve(values):
    total = 0
    for x in values:
        if {where}:
            total = {step.format(t="total", v=value)}
    return total
"""


def _comprehension(where: str, value: str, end: _End) -> str:
    _, whole = end
    return f"""import functools


def result_of(values):
    chosen = [x for x in values if {where}]
    changed = [{value} for x in chosen]
    return {whole.format(all="changed")}
"""


def _while(where: str, value: str, end: _End) -> str:
    step, _ = end
    return f"""def compute(values):
    position = 0
    answer = 0
    while position < len(values):
        x = values[position]
        position += 1
        if not ({where}):
            continue
        answer = {step.format(t="answer", v=value)}
    return answer
"""


def _recursion(where: str, value: str, end: _End) -> str:
    step, _ = end
    return f"""def fold(values):
    if not values:
        return 0
    *before, x = values
    rest = fold(before)
    if {where}:
        return {step.format(t="rest", v=value)}
    return rest
"""
