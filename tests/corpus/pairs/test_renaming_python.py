"""Renaming in Python, judged by Python: it compiles, only variables changed, and it does the same."""

from __future__ import annotations

import ast
import importlib
import random
import sysconfig
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.corpus.pairs.functions import Function, functions_of
from megacode.corpus.pairs.languages import LANGUAGES
from megacode.corpus.pairs.renaming import renamed
from megacode.data.permute import make_key
from tests.corpus.pairs.python_checks import changes, local_names

STDLIB = Path(sysconfig.get_paths()["stdlib"])
KEPT = LANGUAGES["python"].kept


@cache
def functions_of_module(name: str) -> dict[str, Function]:
    source = (STDLIB / f"{name}.py").read_text(encoding="utf-8")
    functions = functions_of(source, "python")
    return {function.name: function for function in functions if "(self" not in function.text}


def test_the_standard_library_still_compiles_and_only_its_variables_have_other_names() -> None:
    texts = {}
    for file in sorted(STDLIB.glob("*.py")):
        source = file.read_text(encoding="utf-8", errors="replace")
        for function in functions_of(source, "python"):
            if function.name != "top":
                texts[file.name, function.number] = function.text
    assert len(texts) > 6000
    chosen = random.Random(0).sample(sorted(texts), 3000)
    unchanged, local, stayed = 0, 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes in strings
        for place in chosen:
            text = texts[place]
            after = renamed(text, "python", make_key(0, *place))
            if after is None:
                unchanged += 1
                continue
            compile(after, str(place), "exec")
            changed, names = changes(text, after), local_names(text)
            assert set(changed) <= names, (place, set(changed) - names)
            local, stayed = local + len(names - KEPT), stayed + len(names - set(changed) - KEPT)
    assert unchanged / 3000 < 0.06  # nothing to rename, frames, eval
    assert stayed / local < 0.1  # methods that are mentioned, dunder names, keyword arguments


INPUTS: dict[tuple[str, str], list[tuple[Any, ...]]] = {
    ("textwrap", "dedent"): [("  a\n    b\n\n  c",), ("\ta\n  b",)],
    ("textwrap", "indent"): [("a\n\nb\n", "> ")],
    ("textwrap", "fill"): [("one two three four five", 9)],
    ("textwrap", "shorten"): [("one two  three four five", 14)],
    ("statistics", "mean"): [([1, 2, 4],), ([0.5, 1.25],)],
    ("statistics", "median"): [([3, 1, 2],), ([4, 1, 2, 3],)],
    ("statistics", "median_grouped"): [([1, 3, 3, 5, 7],)],
    ("statistics", "multimode"): [("aabbc",)],
    ("statistics", "quantiles"): [([1, 2, 4, 8, 9],)],
    ("statistics", "linear_regression"): [([1, 2, 3], [2, 4.5, 6])],
    ("statistics", "_exact_ratio"): [(0.75,), (3,)],
    ("bisect", "bisect_left"): [([1, 2, 2, 5], 2), ([], 1)],
    ("bisect", "bisect_right"): [([1, 2, 2, 5], 2), ([1, 9], 4)],
    ("heapq", "nsmallest"): [(2, [5, 3, 1, 4]), (3, ["b", "aa", "c"], len)],
    ("heapq", "nlargest"): [(2, [5, 3, 1, 4])],
    ("heapq", "merge"): [([1, 4], [2, 3], [])],
    ("difflib", "get_close_matches"): [("appel", ["ape", "apple", "peach"])],
    ("difflib", "unified_diff"): [(["a\n", "b\n"], ["a\n", "c\n"], "x", "y")],
    ("difflib", "ndiff"): [(["one\n", "two\n"], ["ore\n", "tree\n"])],
    ("colorsys", "rgb_to_hls"): [(0.2, 0.4, 0.4), (0, 0, 0)],
    ("colorsys", "hls_to_rgb"): [(0.5, 0.3, 0.3)],
    ("colorsys", "rgb_to_hsv"): [(0.2, 0.9, 0.4)],
    ("colorsys", "hsv_to_rgb"): [(0.5, 0.5, 0.4)],
    ("string", "capwords"): [("hello  big world",)],
    ("posixpath", "normpath"): [("/a/./b//../c",), ("../x/",), (b"a//b",)],
    ("posixpath", "join"): [("a", "b/", "c"), ("a", "/b")],
    ("posixpath", "relpath"): [("/a/b/c", "/a/x")],
    ("posixpath", "commonpath"): [(["/a/b/c", "/a/b"],)],
    ("posixpath", "split"): [("/a/b",), ("c",)],
    ("calendar", "monthrange"): [(2024, 2), (1900, 2)],
    ("calendar", "leapdays"): [(1900, 2001)],
    ("calendar", "weekday"): [(2026, 12, 1)],
    ("shlex", "split"): [("a 'b c' d",)],
    ("fnmatch", "translate"): [("*.py[co]?",)],
    ("base64", "b32encode"): [(b"hello",)],
    ("ast", "literal_eval"): [("{'a': [1, -2.5, (3+4j)]}",)],
    ("ast", "dump"): [(ast.parse("x + 1"),)],
    ("copy", "deepcopy"): [([1, {"a": (2, [3])}],)],
}  # fmt: skip


@pytest.mark.parametrize(("module", "name"), INPUTS)
def test_functions_of_the_standard_library_give_the_same_results(module: str, name: str) -> None:
    function = functions_of_module(module)[name]
    after = renamed(function.text, "python", 3)
    assert after is not None and after != function.text
    results = []
    for text in (function.text, after):
        namespace = dict(vars(importlib.import_module(module)))
        exec(compile(text, name, "exec"), namespace)
        run = namespace[functions_of(text, "python")[0].name]
        outputs = [run(*arguments) for arguments in INPUTS[module, name]]
        results.append([list(one) if hasattr(one, "__next__") else one for one in outputs])
    assert results[0] == results[1]


class Program:
    """A function of nested scopes over few names, so that most of them hide another."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def name(self) -> str:
        return self.draw.choice(["a", "b", "c", "d", "len", "max"])

    def expression(self, depth: int = 0) -> str:
        name, draw = self.name, self.draw.randrange(11 if depth < 3 else 2)
        inner = self.expression
        return [
            name,
            lambda: str(self.draw.randrange(9)),
            lambda: f"{name()}.{name()}",
            lambda: f"({inner(depth + 1)} + {inner(depth + 1)})",
            lambda: f"{name()}({inner(depth + 1)}, z={inner(depth + 1)})",
            lambda: (
                f"[{inner(depth + 1)} for {name()} in {inner(depth + 1)} if {inner(depth + 1)}]"
            ),
            lambda: (
                f"{{{name()}: {inner(depth + 1)} for {name()} in {name()} for {name()} in {name()}}}"
            ),
            lambda: f"(lambda {name()}, *e, f={inner(depth + 1)}: {inner(depth + 1)})",
            lambda: f"({name()} := {inner(depth + 1)})",
            lambda: "f'{" + name() + "!r:>{" + name() + "}} a b'",
            lambda: f"{{'{name()}': {name()}}}[{name()}:{inner(depth + 1)}]",
        ][draw]()

    def block(self, depth: int) -> list[str]:
        lines = [line for _ in range(self.draw.randint(1, 4)) for line in self.statement(depth)]
        return ["    " + line for line in lines]

    def statement(self, depth: int) -> list[str]:
        name, expression = self.name, self.expression
        draw = self.draw.randrange(14 if depth < 3 else 5)
        if draw == 0:
            return [f"{name()} = {expression()}"]
        if draw == 1:
            return [f"({name()}, *{name()}), {name()}.{name()} = {expression()}"]
        if draw == 2:
            return [f"return {expression()}"]
        if draw == 3:
            return [f"import {name()}.g, h as {name()}"]
        if draw == 4:
            return [f"{name()}: {name()} = {expression()}"]
        if draw == 5:
            return [f"global {name()}"]
        if draw == 6:
            return [f"nonlocal {name()}"]
        if draw == 7:
            return [f"class {name()}({name()}):", *self.block(depth + 1)]
        if draw == 8:
            return [f"for {name()} in {expression()}:", *self.block(depth + 1)]
        if draw == 9:
            return [f"with {expression()} as ({name()}, {name()}):", *self.block(depth + 1)]
        if draw == 10:
            return ["try:", *self.block(depth + 1), f"except {name()} as {name()}:", *self.block(depth + 1)]  # fmt: skip
        if draw == 11:
            case = (
                f"    case {{'k': {name()}, **i}} | [{name()}, *j] | m({name()}=n, p=q.{name()}):"
            )
            return [
                f"match {expression()}:",
                case,
                *("    " + line for line in self.block(depth + 1)),
            ]
        return self.function(depth)

    def function(self, depth: int = 0) -> list[str]:
        head = f"def {self.name()}({self.name()}, s: {self.name()}={self.expression()}, **t):"
        return [f"@{self.name()}", head, *self.block(depth + 1)]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_generated_programs_keep_what_their_names_mean(seed: int) -> None:
    text = "\n".join(Program(seed).function())
    try:
        compile(text, "text", "exec")
        names = local_names(text)  # symtable refuses some that compile takes
    except SyntaxError:  # `nonlocal` of nothing, a name that is global and a parameter
        return
    after = renamed(text, "python", seed)
    changed = set() if after is None else set(changes(text, after))
    assert changed <= names
    if after is not None:
        assert renamed(after, "python", seed) == after
