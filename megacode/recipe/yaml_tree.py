"""YAML as a tree whose every part knows the file and line it was written in.

The dialect is the plain one people mean: `true`/`false` are the only booleans (`yes`, `no`, `on`, `off` are words),
`1e-4` and `3E-4` are numbers, there are no dates, octals or base-60 numbers, a key given twice is an error, and tags
are refused, but for `!replace` before a mapping (see `compose`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megacode.errors import UserError

_MAX_NODES = 500_000
_REPLACE = "!replace"
_CONTAINERS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_RESOLVERS = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9](?:_?[0-9])*$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
        ),
        list("-+.0123456789"),
    ),
    ("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"]),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


class Dumper(yaml.SafeDumper):
    """Writes YAML that reads back as the same values here and under YAML 1.1's own rules."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: list(resolvers)
        for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    if not _tag.endswith("merge"):
        Dumper.add_implicit_resolver(_tag, _pattern, _first)


@dataclass(frozen=True)
class Node:
    """A value and where it was written. `value`: dict[str, Node], list[Node], str, int, float, bool or None.

    Attributes:
        origin: the file, or the override, for messages.
        line: 1-based, of the key that holds the value; None for an override.
        folder: what relative paths in it are relative to.
        replaces: a mapping that takes the place of the one it would be merged into.
    """

    value: Any
    origin: str
    line: int | None
    folder: Path
    replaces: bool = False

    @property
    def where(self) -> str:
        return f"{self.origin}:{self.line}" if self.line else self.origin

    def plain(self) -> Any:
        """The value without positions."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def with_value(self, value: Any) -> Node:
        return Node(value, self.origin, self.line, self.folder, self.replaces)


def read_yaml(path: Path) -> Node:
    """The tree of a file whose top is a mapping.

    Raises:
        UserError: the file is not there, not text, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such recipe; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); a recipe is a YAML file in UTF-8"
        ) from error
    tree = parse_yaml(text, str(path), path.parent.resolve())
    if not isinstance(tree.value, dict):
        raise UserError(
            f"{path}: expected `key: value` lines at the top of a recipe, not {describe(tree.value)}"
        )
    return tree


def parse_yaml(text: str, origin: str, folder: Path, numbered: bool = True) -> Node:
    """The tree of a text; `numbered` False leaves line numbers out (an override)."""
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}" if mark and numbered else ""
        problem = " ".join(str(error.problem or error.context).split())
        raise UserError(
            f"{origin}{at}: not valid YAML: {problem}; correct the line, or quote the text in it"
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise UserError(
            f"{origin}: is nested too deeply to be read; a recipe has about eight levels"
        ) from None
    if root is None:
        return (
            Node({}, origin, 1 if numbered else None, folder)
            if numbered
            else Node(None, origin, None, folder)
        )
    return _Builder(origin, folder, numbered).build(root, root.start_mark.line, ())


@dataclass
class _Builder:
    origin: str
    folder: Path
    numbered: bool
    built: int = 0

    def build(self, node: yaml.Node, line: int, above: tuple[int, ...]) -> Node:
        self.built += 1
        if id(node) in above or self.built > _MAX_NODES:
            what = (
                "an alias that contains itself"
                if id(node) in above
                else f"more than {_MAX_NODES:,} values"
            )
            raise UserError(
                f"{self.origin}:{line + 1}: {what} cannot be read; write the values out"
            )
        replaces = node.tag == _REPLACE and isinstance(node, yaml.MappingNode)
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _CONTAINERS and not replaces:
            raise UserError(
                f"{self.origin}:{line + 1}: the tag {node.tag!r} cannot be read; take it out"
            )
        if isinstance(node, yaml.MappingNode):
            value: Any = self._mapping(node, (*above, id(node)))
        elif isinstance(node, yaml.SequenceNode):
            value = [
                self.build(item, item.start_mark.line, (*above, id(node))) for item in node.value
            ]
        else:
            value = self._scalar(node)
        return Node(value, self.origin, line + 1 if self.numbered else None, self.folder, replaces)

    def _mapping(self, node: yaml.MappingNode, above: tuple[int, ...]) -> dict[str, Node]:
        out: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(
                    f"{self.origin}:{line + 1}: a key is a word, not a list or mapping; correct the line"
                )
            value = self.build(value_node, line, above)
            if key_node.tag.endswith(":merge"):
                for part in value.value if isinstance(value.value, list) else [value]:
                    if not isinstance(part.value, dict):
                        raise UserError(
                            f"{self.origin}:{line + 1}: `<<` takes a mapping (an alias of one); correct the line"
                        )
                    merged = part.value | merged
                continue
            key = key_node.value
            if key in out:
                raise UserError(
                    f"{self.origin}:{line + 1}: {key}: is given twice (first in line {lines[key] + 1}); keep one of "
                    "the two"
                )
            out[key], lines[key] = value, line
        return merged | out

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind == "null":
            return None
        if kind == "bool":
            return node.value.lower() == "true"
        if kind in ("int", "float"):
            try:
                return (int if kind == "int" else float)(node.value)
            except ValueError:
                kind = "a number"
        if kind in ("str", "merge"):
            return node.value
        line = node.start_mark.line + 1
        raise UserError(
            f"{self.origin}:{line}: {node.value!r} cannot be read as {kind}; write a plain value without a tag"
        )


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
        data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None
    )
