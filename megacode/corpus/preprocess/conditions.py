"""Fields of a record, and `--where`, an expression over them that chooses records.

The grammar is Python's, cut down to comparisons, `and`, `or`, `not`, `in`, constants, lists, and
the functions below. A name is a field, dots reach into nested ones: `meta.stars >= 10 and license
in ("mit", "apache-2.0")`. A record that lacks a field has None there; a comparison that makes no
sense (None >= 10) is false, and so is a function of it.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from megacode.corpus.inputs import InputFile
from megacode.corpus.readers import TextDocument, lookup
from megacode.errors import UserError

_EXAMPLE = "expected for example: stars >= 10 and license == 'mit'"
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "len": len,
    "lower": lambda text: text.lower(),
    "startswith": lambda text, start: text.startswith(start),
    "endswith": lambda text, end: text.endswith(end),
    "matches": lambda text, pattern: re.search(pattern, text) is not None,
}


def _call(name: str, *values: Any) -> Any:
    """A function's value, None where it makes no sense: `lower(3)`, `startswith(None, "a")`."""
    try:
        return _FUNCTIONS[name](*values)
    except (TypeError, AttributeError, re.error):
        return None


_ALLOWED = (ast.BoolOp, ast.UnaryOp, ast.Compare, ast.Constant, ast.List, ast.Tuple, ast.Set)


@dataclass(frozen=True)
class Condition:
    text: str
    fields: tuple[str, ...]
    """What has to be looked up in a record, with dots."""
    _code: CodeType = field(repr=False, compare=False)

    def __call__(self, values: Mapping[str, Any]) -> bool:
        """Whether a record with these values (by field, dots and all) is wanted."""
        names = {"__builtins__": {}, "_call": _call, "_sensible": _sensible, "_values": values}
        return _sensible(lambda: eval(self._code, names))


def _sensible(test: Callable[[], Any]) -> bool:
    try:
        return bool(test())
    except TypeError:  # None >= 10
        return False


def parse_condition(text: str) -> Condition:
    """UserError, with the part that is not understood, for anything but the grammar above."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"--where {text!r}: {reason}; {_EXAMPLE}") from None
    fields: dict[str, None] = {}
    rewritten = ast.fix_missing_locations(ast.Expression(_rewrite(tree.body, text, fields)))
    if not fields:
        raise UserError(f"--where {text!r}: names no field; {_EXAMPLE}")
    return Condition(text.strip(), tuple(fields), compile(rewritten, "--where", "eval"))


def _rewrite(node: ast.expr, text: str, fields: dict[str, None]) -> ast.expr:
    """Fields become look-ups in `_values`, functions go through `_call`; anything that is not
    allowed is refused."""
    name = _dotted(node)
    if name:
        fields[name] = None
        values = ast.Name("_values", ast.Load())
        return ast.Subscript(values, ast.Constant(name), ast.Load())
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        _check_call(node.func.id, node.args, text)
        given = [_rewrite(argument, text, fields) for argument in node.args]
        return ast.Call(ast.Name("_call", ast.Load()), [ast.Constant(node.func.id), *given], [])
    if not isinstance(node, _ALLOWED):
        raise UserError(
            f"--where {text!r}: {ast.unparse(node)!r} is not understood; "
            "use fields, constants, comparisons, in, and, or, not"
        )
    for key, value in ast.iter_fields(node):
        if isinstance(value, ast.expr):
            setattr(node, key, _rewrite(value, text, fields))
        elif isinstance(value, list):
            inner = [_rewrite(v, text, fields) if isinstance(v, ast.expr) else v for v in value]
            setattr(node, key, inner)
    if isinstance(node, ast.Compare):
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        return ast.Call(ast.Name("_sensible", ast.Load()), [ast.Lambda(nothing, node)], [])
    return node


def _check_call(name: str, arguments: list[ast.expr], text: str) -> None:
    if name not in _FUNCTIONS:
        raise UserError(f"--where {text!r}: no function {name}; there are {', '.join(_FUNCTIONS)}")
    takes = list(inspect.signature(_FUNCTIONS[name]).parameters)
    if len(arguments) != len(takes):
        raise UserError(
            f"--where {text!r}: {name} has {len(arguments)} arguments; "
            f"it is {name}({', '.join(takes)})"
        )
    pattern = arguments[-1]
    if name == "matches" and isinstance(pattern, ast.Constant):
        try:
            re.compile(pattern.value)  # type: ignore[type-var]  # TypeError if it is no text
        except (re.error, TypeError) as error:
            raise UserError(
                f"--where {text!r}: {pattern.value!r} is no regular expression ({error}); "
                r"`.*` stands for anything, and `\.py$` for names that end in .py"
            ) from None


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        start = _dotted(node.value)
        return f"{start}.{node.attr}" if start else ""
    return ""


# ------------------------------------------------------------------------------------------- fields

FILE_FIELDS = ("file.name", "file.path", "file.suffix", "file.folder", "file.repository")


def field_value(file: InputFile, document: TextDocument, name: str) -> Any:
    """A field of the record or of the file it is in; None if there is no such field."""
    try:
        return lookup(document.values, name)
    except (LookupError, TypeError):
        pass
    path = file.path
    if name == "file.name":
        return path.name
    if name == "file.path":
        return path.relative_to(file.base).as_posix()
    if name == "file.suffix":
        return path.suffix
    if name == "file.folder":
        return path.parent.name
    if name == "file.repository":  # the first folder below the input
        inside = path.relative_to(file.base).parts
        return inside[0] if len(inside) > 1 else file.base.name
    return None
