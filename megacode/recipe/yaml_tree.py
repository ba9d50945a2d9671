"""YAML as plain dicts and lists whose mappings know the file and line of every key.

The dialect is what most people expect. `true` and `false` are the only booleans; `yes`, `no`, `on`
and `off` are text. `1e-4` and `3E-4` are numbers. There are no dates, octals or base-60 numbers. A
key given twice is an error. Tags are refused, except `!replace` before a mapping (see
`megacode.recipe.compose`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megacode.errors import UserError

_TAG = "tag:yaml.org,2002:"
_NUMBER = r"(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))"
_RESOLVERS = {
    "null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "int": (r"^[-+]?[0-9](?:_?[0-9])*$", list("-+0123456789")),
    "float": (rf"^[-+]?{_NUMBER}(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    "merge": (r"^<<$", ["<"]),
}


class Tree(dict[str, Any]):
    """A mapping of a recipe.

    Attributes:
        place: where it begins, `file:line` or the override, for messages.
        places: the same for each of its keys.
        replaces: it was marked `!replace`.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        place: str,
        places: Mapping[str, str],
        replaces: bool = False,
    ) -> None:
        super().__init__(values)
        self.place, self.places, self.replaces = place, dict(places), replaces


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[str, Any]] = {}


class _Dumper(yaml.SafeDumper):
    """Writes YAML that reads back as the same values here and under YAML 1.1's own rules."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: list(resolvers)
        for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _name, (_pattern, _first) in _RESOLVERS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)
    if _name != "merge":
        _Dumper.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)


def read_yaml(path: Path, what: str = "recipe") -> Tree:
    """The tree of a file, a `what`.

    Raises:
        UserError: the file is not there, not text, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such {what}; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); a {what} is a YAML file in UTF-8"
        ) from error
    tree = parse_yaml(text, str(path))
    if tree is None:
        return Tree({}, f"{path}:1", {})
    if not isinstance(tree, Tree):
        raise UserError(
            f"{path}: expected `key: value` lines at the top of a {what}, not {describe(tree)}"
        )
    return tree


def parse_yaml(text: str, origin: str) -> Any:
    """The value of a text from `origin`: a file, or an override (`--set ...`), which
    has no lines."""
    try:
        loader = _Loader(text)
        loader.name = origin
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = _place(mark) if mark else origin
        problem = " ".join(str(error.problem or error.context).split())
        raise UserError(
            f"{at}: not valid YAML: {problem}; correct the line, or quote the text in it"
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise UserError(
            f"{origin}: is nested too deeply to be read; a recipe has about eight levels"
        ) from None


def _place(mark: yaml.Mark) -> str:
    name = str(mark.name)
    return name if name.startswith("--set ") else f"{name}:{mark.line + 1}"


def _mapping(loader: _Loader, node: yaml.Node) -> Tree:
    if not isinstance(node, yaml.MappingNode):
        _refuse(loader, node)
    lines: dict[str, int] = {}
    for key, _ in node.value:
        at = _place(key.start_mark)
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{at}: a key is a word, not a list or mapping; correct the line")
        if key.value in lines and key.tag != _TAG + "merge":
            first = lines[key.value] + 1
            raise UserError(
                f"{at}: {key.value}: is given twice (first in line {first}); keep one of the two"
            )
        lines[key.value] = key.start_mark.line
    loader.flatten_mapping(node)  # `<<: *alias`
    values = {key.value: loader.construct_object(value, deep=True) for key, value in node.value}
    places = {key.value: _place(key.start_mark) for key, _ in node.value}
    return Tree(values, _place(node.start_mark), places, replaces=node.tag == "!replace")


def _refuse(loader: _Loader, node: yaml.Node) -> Any:
    at = _place(node.start_mark)
    raise UserError(f"{at}: the tag {node.tag!r} cannot be read; take it out")


def _number(kind: type) -> Any:
    return lambda loader, node: kind(loader.construct_scalar(node))


_Loader.add_constructor(None, _refuse)
_Loader.add_constructor("!replace", _mapping)
_Loader.add_constructor(_TAG + "map", _mapping)
_Loader.add_constructor(_TAG + "seq", lambda loader, node: loader.construct_sequence(node, True))
_Loader.add_constructor(_TAG + "null", lambda loader, node: None)
_Loader.add_constructor(_TAG + "bool", lambda loader, node: node.value.lower() == "true")
for _name, _kind in (("str", str), ("merge", str), ("int", int), ("float", float)):
    _Loader.add_constructor(_TAG + _name, _number(_kind))


def describe(value: Any) -> str:
    """A value as a message shows it."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    return str(value)


def dump_yaml(data: Any) -> str:
    """YAML text of plain data, in the order given."""
    return yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=120,
        default_flow_style=None,
    )
