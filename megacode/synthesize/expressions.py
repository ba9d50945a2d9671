"""Whether two expressions of LaTeX are the same, by math_verify, within limits.

math_verify stops itself by signals, which only a main thread gets, so that its work is bounded
here:

1. `is_tame` lets through short expressions of few commands and small powers: nothing whose value
   has millions of digits, because no one can interrupt a single operation on such a number.
2. `_bounded` counts the lines of Python that are run and stops at `_LINES`. Lines, unlike seconds,
   do not depend on the machine (a little on what was compared before: sympy remembers results).
"""

from __future__ import annotations

import inspect
import logging
import math
import re
import sys
from collections.abc import Callable
from functools import cache
from types import FrameType
from typing import Any

from megacode.errors import UserError

_LONGEST = 150
"""Characters of an expression."""
_LINES = 1_500_000
"""About a third of a second."""


def same_expression(a: str, b: str) -> bool:
    """Whether two expressions, without delimiters, are equal; no where that is beyond the limits.

    Raises:
        UserError: math_verify is not installed.
    """
    return is_tame(a) and is_tame(b) and _bounded(lambda: _verified(a, b))


_COMMANDS = frozenset(
    "frac sqrt pi cdot times div pm mp infty cup cap in le ge leq geq lt gt ne neq sin cos tan cot "
    "sec csc arcsin arccos arctan ln log alpha beta gamma theta lambda mu phi omega begin end "
    "pmatrix bmatrix mathbb emptyset varnothing i".split()
)
_FUNCTIONS = re.compile(r"\b(?:sqrt|sin|cos|tan|ln|log|pi|pmatrix|bmatrix)\b")


def is_tame(text: str) -> bool:
    """Whether math_verify can be given it: an expression, no sentence, and a small one."""
    if not 0 < len(text) <= _LONGEST or "!" in text or text.count("{") > 16:
        return False
    if any(name not in _COMMANDS for name in re.findall(r"\\([A-Za-z]+)", text)):
        return False
    bare = _FUNCTIONS.sub("", re.sub(r"\\[A-Za-z]+", " ", text))
    if re.search(r"[A-Za-z]{3}", bare) or not re.search(r"[\d+*/^=<>\\-]", text):
        return False
    return not re.search(r"\d{16}", text) and _is_low(text)


def _is_low(text: str) -> bool:
    """Whether no power has a power in its exponent, and all exponents multiplied, which bounds
    every power of powers, are small: 10,000 of numbers alone, else so that no power of a sum of its
    letters has more than 5,000 terms (sympy makes them in one call)."""
    total = 1.0
    for power in re.finditer(r"\^|\*\*", text):
        rest = text[power.end() :].lstrip()
        if rest[:1] in ("{", "("):
            depth, end = 0, len(rest)
            for at, sign in enumerate(rest):
                depth += (sign in "{(") - (sign in "})")
                if not depth:
                    end = at
                    break
            exponent = rest[:end]
        else:
            found = re.match(r"[+-]?(?:[\d.]+|\\?[A-Za-z]+)", rest)
            exponent = found[0] if found else rest
        if "^" in exponent or "**" in exponent:
            return False
        total *= math.prod(max(1.0, float(n)) for n in re.findall(r"\d+", exponent))
    letters = set(re.findall(r"[A-Za-z]", _FUNCTIONS.sub("", re.sub(r"\\[A-Za-z]+", "", text))))
    if total > 10_000 or not letters:
        return total <= 10_000
    return math.comb(int(total) + len(letters), len(letters)) <= 5_000


class _Beyond(BaseException):
    """Too many lines. No Exception, which libraries catch."""


def _bounded(question: Callable[[], bool]) -> bool:
    """The answer to it; no, if that takes more than `_LINES` lines, or fails."""
    left = _LINES

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        # Not while a generator is closed: Python would swallow the exception, and go on uncounted.
        if left < 0 and (left < -_LINES or not frame.f_code.co_flags & inspect.CO_GENERATOR):
            raise _Beyond
        return count

    math_verify()
    before = sys.gettrace()
    sys.settrace(count)
    try:
        return question()
    except (Exception, _Beyond):
        return False
    finally:
        sys.settrace(before)


def _verified(a: str, b: str) -> bool:
    left, right = _parsed(a), _parsed(b)
    verify = math_verify().verify
    return bool(left and right) and bool(
        verify(left, right, timeout_seconds=None) or verify(right, left, timeout_seconds=None)
    )


def _parsed(text: str) -> list[Any]:
    kit = math_verify()
    return kit.parse(
        f"${text}$",
        [kit.LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )


@cache
def math_verify() -> Any:
    """The library, warmed up: its parser's tables are made while it parses.

    Raises:
        UserError: it is not installed.
    """
    try:
        import math_verify as library
    except ImportError:
        raise UserError(
            "comparing answers needs math_verify; pip install 'megacode[synthesis]'"
        ) from None
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that signals are off
    config = [library.LatexExtractionConfig()]
    for a, b in (
        ("(x+1)^2", "x^{2}+2x+1"),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
        (r"(1,2)\cup[3,\infty)", r"\{1, 2\}"),
        (r"2\pi", r"\sin(x)+\log 2"),
    ):
        left, right = (
            library.parse(f"${text}$", config, "no_fallback", parsing_timeout=None)
            for text in (a, b)
        )
        library.verify(left, right, timeout_seconds=None)
    return library
