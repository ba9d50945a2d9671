"""Rewrites compute what the text does; those that might not are not offered."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import pytest

from megacode.corpus.pairs import rewriting
from megacode.corpus.pairs.rewriting import rewritten

LISTS = [[], [3], [1, 2, 3, 4, 5, 6], [0, -1, 7, 7]]
REWRITTEN = {
    "append": "def f(s):\n    x = []\n    for t in s:\n        if t > 1:\n            x.append(t * 2)\n    return x",
    "add": "def f(s):\n    x = set()\n    for t in s:\n        x.add(t)\n    return x",
    "entry": "def f(s):\n    x = {}\n    for i, t in enumerate(s):\n        x[t] = i\n    return x",
    "count": "def f(s):\n    x = 0\n    for t in s:\n        if t > 1:\n            x += 1\n    return x",
    "list": "def f(s):\n    return [t + u for t, u in zip(s, s) if t if u]",
    "set": "def f(s):\n    x = {t for t in s}\n    return x",
    "dict": "def f(s):\n    x = {t: 1 for t in s}\n    return x",
    "any": "def f(s):\n    for t in s:\n        if t == 7:\n            return True\n    return False",
    "not any": "def f(s):\n    for t in s:\n        if t == 7:\n            return False\n    return True",
    "all": "def f(s):\n    return all(t > 0 for t in s)",
    "range": "def f(s):\n    x = 1\n    n = len(s)\n    for i in range(1, n):\n        x = x * s[i]\n    return x",
    "while": "def f(s):\n    n = len(s)\n    x = 1\n    i = 0\n    while i < n:\n        x = x * s[i]\n        i += 1\n    return x",
    "branches": "def f(s):\n    if len(s) > 2:\n        x = 1\n    elif s:\n        x = 2\n    else:\n        x = 3\n    return x",
    "early": "def f(s):\n    if not s:\n        return 0\n    s.append(1)\n    return len(s)",
    "condition": "def f(s):\n    x = 1 if s else 2\n    return x",
    "two arms": "def f(s):\n    if s:\n        x = 1\n    else:\n        x = 2\n    return x",
    "chain": "def f(s):\n    n = len(s)\n    return 0 < n < 4",
    "de Morgan": "def f(s):\n    return not (s and s[0] == 3 or len(s) == 4)",
    "augmented": "def f(s):\n    x = len(s)\n    x -= 2\n    return x",
}  # fmt: skip
LEFT = {
    "the target is used later": "def f(s):\n    x = []\n    for t in s:\n        x.append(t)\n    return x, t",
    "the list is read": "def f(s):\n    x = []\n    for t in s:\n        x.append(len(x))\n    return x",
    "how far it came matters": "def f(s):\n    try:\n        x = [int(t) for t in s]\n    except ValueError:\n        pass\n    g(x)",
    "scopes": "def f(s):\n    x = []\n    for t in s:\n        x.append(lambda: t)\n    g(x)",
    "continue": "def f(s, n):\n    for i in range(n):\n        with s:\n            continue\n        g(i)",
    "the bound is set": "def f(n):\n    for i in range(n):\n        n = g(i)\n",
    "a list in place": "def f(s, t):\n    s += t\n    s *= 2",
    "awaited": "async def f(s):\n    x = []\n    for t in s:\n        x.append(await t)\n    g(x)",
    "two calls in a chain": "def f():\n    g(1 < g() < 3)",
    "frames": "def f(s):\n    x = []\n    for t in s:\n        x.append(super().g(t))\n    g(x)",
}  # fmt: skip


def value(text: str, given: Sequence[int]) -> tuple[Any, list[int]]:
    names: dict[str, Any] = {}
    exec(text, names)
    argument = list(given)
    return names["f"](argument), argument


@pytest.mark.parametrize("name", REWRITTEN)
def test_a_rewrite_computes_the_same(name: str) -> None:
    text = REWRITTEN[name]
    found = {rewritten(text, key) for key in range(30)}
    assert None not in found and found
    for one in found:
        assert one is not None and ast.dump(ast.parse(one)) != ast.dump(ast.parse(text))
        for given in LISTS:
            assert value(one, given) == value(text, given), one


@pytest.mark.parametrize("name", LEFT)
def test_what_might_compute_something_else_is_left(name: str) -> None:
    assert {rewritten(LEFT[name], key) for key in range(10)} == {None}


def test_every_rule_is_used() -> None:
    """Each of the rules applies to one of the texts above."""
    used = set()
    for text in REWRITTEN.values():
        tree = ast.parse(text)
        for rule in rewriting._STATEMENTS:
            for node in ast.walk(tree):
                for _, block in ast.iter_fields(node):
                    if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                        used |= {rule for at in range(len(block)) if rule(block[at:], tree)}
    assert used == {*rewriting._STATEMENTS}


@pytest.mark.parametrize("text", ["", "def f(:", "\0", "x = 1", "(" * 5000, "def f(): pass"])
def test_nothing_to_rewrite(text: str) -> None:
    assert rewritten(text, 1) is None
