"""What renaming may change in Python, judged by `ast` and `symtable`."""

from __future__ import annotations

import ast
import symtable
from collections.abc import Iterator

from megacode.corpus.pairs.functions import functions_of

_NAMES = {
    "Name": ["id"],
    "arg": ["arg"],
    "FunctionDef": ["name"],
    "AsyncFunctionDef": ["name"],
    "ClassDef": ["name"],
    "ExceptHandler": ["name"],
    "MatchAs": ["name"],
    "MatchStar": ["name"],
    "MatchMapping": ["rest"],
    "Nonlocal": ["names"],
    "TypeVar": ["name"],
    "ParamSpec": ["name"],
    "TypeVarTuple": ["name"],
}
"""The fields that name a variable; every other field must not change."""


def changes(before: str, after: str) -> dict[str, str]:
    """Old name -> new name. AssertionError where anything but a variable's name changed, or not one to one."""
    new: dict[str, str] = {}
    for old_name, new_name in _compare(ast.parse(before), ast.parse(after)):
        assert new.setdefault(old_name, new_name) == new_name, f"{old_name} has two new names"
    assert len(set(new.values())) == len(new), "two names became one"
    return {a: b for a, b in new.items() if a != b}


def _compare(a: object, b: object) -> Iterator[tuple[str, str]]:
    assert type(a) is type(b)
    if isinstance(a, ast.AST):
        names = _NAMES.get(type(a).__name__, [])
        for field in a._fields:
            x, y = getattr(a, field), getattr(b, field)
            if field not in names or x is None:
                yield from _compare(x, y)
            elif isinstance(x, list):
                yield from zip(x, y, strict=True)
            else:
                yield x, y
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            yield from _compare(x, y)
    else:
        assert a == b, f"{a!r} became {b!r}"


def local_names(text: str) -> set[str]:
    """The names that stand for something of the function in every scope that mentions them.

    The text holds one function, and it is not named `top`: symtable of Python 3.11 takes that for the module.
    """
    own = functions_of(text, "python")[0].name
    names, others = {own}, set()
    tables = [symtable.symtable(text, "text", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            name = symbol.get_name()
            outside = (symbol.is_global() and name != own) or symbol.is_imported()
            member = table.get_type() == "class" and symbol.is_local()
            (others if outside or member else names).add(name)
    return {name for name in names - others if name != ".0"}  # the iterable of a comprehension
