"""One tree from several: `extends`, overrides, and the rules by which one recipe changes another.

Mappings merge key by key, `KEY: !replace {...}` and anything else replace what was there. On top of that:

* `phases` may be a mapping in a recipe that extends another: `NAME: {...}` changes the phase of that name, `NAME: null`
  drops it, and `+: [...]` adds phases at the end. A list replaces all phases.
* `null` takes a key back to its default.
* Keys that exclude each other do so here too: `tokens` over `steps`, `domains` over `sources`, a new schedule over an
  old one.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.recipe.schema import MixtureSource, section_at
from megacode.recipe.section import is_plain
from megacode.recipe.yaml_tree import Node, describe, parse_yaml, read_yaml

_EXCLUSIVE = ({"steps", "tokens"}, {"sources", "domains"})
_PASS_THROUGH = (("model", "megatron"), ("optimizer", "megatron"), ("parallel", "ddp"))


def compose(path: Path, overrides: Sequence[str]) -> Node:
    """The whole tree of a recipe: its file, what it extends, and `--set` overrides, without nulls."""
    tree = _read(path, ())
    for override in overrides:
        tree = _merge(tree, _override(tree, override), ())
    return _without_nulls(tree, ())


def _read(path: Path, above: tuple[Path, ...]) -> Node:
    resolved = path.resolve()
    if resolved in above:
        chain = " -> ".join(p.name for p in (*above[above.index(resolved) :], resolved))
        raise UserError(
            f"{path}: extends: the recipes extend each other in a circle ({chain}); take one `extends` out"
        )
    tree = _expanded(read_yaml(path), ())
    base = tree.value.pop("extends", None)
    if base is None or base.value is None:
        phases = tree.value.get("phases")
        if phases is not None and isinstance(phases.value, dict):
            raise UserError(
                f"{phases.where}: phases: expected a list (`- name: ...`); a mapping by name changes phases of a "
                "recipe named by `extends:`"
            )
        return tree
    if not isinstance(base.value, str):
        raise UserError(
            f"{base.where}: extends: expected the path of one recipe, not {describe(base.value)}"
        )
    other = path.parent / Path(base.value).expanduser()
    if not other.is_file():
        raise UserError(
            f"{base.where}: extends: there is no file {other}; the path is relative to {path.name}"
        )
    return _merge(_read(other, (*above, resolved)), tree, ())


# --------------------------------------------------------------------------------------------------- short forms


def _is(path: tuple[str, ...], *pattern: str) -> bool:
    return len(path) == len(pattern) and all(
        p in ("*", part) for part, p in zip(path, pattern, strict=True)
    )


def _is_mixture_source(path: tuple[str, ...]) -> bool:
    return section_at(path) is MixtureSource


def _expanded(node: Node, path: tuple[str, ...]) -> Node:
    """Short forms written out, so that they merge with long ones."""
    value = node.value
    is_names = isinstance(value, list) and all(isinstance(item.value, str) for item in value)
    if is_names and _is(path, "phases", "*", "mixture", "domains", "*", "sources"):
        value = {item.value: item.with_value({}) for item in value}
    section = section_at(path)
    if section and section.short_for and is_plain(value):
        return node.with_value({section.short_for: node.with_value(value)})
    if isinstance(value, dict):
        return node.with_value({k: _expanded(child, (*path, k)) for k, child in value.items()})
    if isinstance(value, list) and path == ("phases", "+"):  # phases to be added
        return node.with_value([_expanded(child, path) for child in value])
    if isinstance(value, list):
        return node.with_value([_expanded(child, (*path, str(i))) for i, child in enumerate(value)])
    return node.with_value(value)


# ------------------------------------------------------------------------------------------------------- merging


def _merge(base: Node, over: Node, path: tuple[str, ...]) -> Node:
    if path == ("phases",) and isinstance(base.value, list) and isinstance(over.value, dict):
        return _merge_phases(base, over)
    if over.replaces or not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    if "shape" in over.value and "shape" in base.value:
        return over
    out: dict[str, Node] = dict(base.value)
    for key, node in over.value.items():
        if path[:1] == ("phases",):
            for pair in _EXCLUSIVE:
                if key in pair and node.value is not None:
                    for other in pair - {key}:
                        out.pop(other, None)
        if node.value is None and key in out:
            del out[key]
        else:
            out[key] = _merge(out[key], node, (*path, key)) if key in out else node
    return over.with_value(out)


def _phase_name(phase: Node) -> str | None:
    name = phase.value.get("name") if isinstance(phase.value, dict) else None
    return name.value if name is not None else None


def _merge_phases(base: Node, over: Node) -> Node:
    phases = list(base.value)
    for key, node in over.value.items():
        if key == "+":
            added = node.value if isinstance(node.value, list) else [node]
            phases.extend(added)
            continue
        names = [_phase_name(phase) for phase in phases]
        if key not in names:
            known = [name for name in names if name]
            raise UserError(
                f"{node.where}: phases.{key}: there is no such phase{did_you_mean(key, known)}"
            )
        at = names.index(key)
        if node.value is None:
            del phases[at]
        else:
            phases[at] = _merge(phases[at], node, ("phases", key))
    return base.with_value(phases)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The end of a sentence: the nearest known word, else all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{near[0]}`?"
    shown = ", ".join(list(known)[:20]) + (", ..." if len(known) > 20 else "")
    return f"; known here: {shown}" if known else ""


# ------------------------------------------------------------------------------------------------------ overrides


def _override(tree: Node, text: str) -> Node:
    """`a.b=value` as a tree to merge. Phases go by name or number, and names with dots are found too."""
    origin = f"--set {text}"
    dotted, equals, value_text = text.partition("=")
    parts = [part for part in dotted.strip().split(".") if part]
    if not equals or not parts:
        raise UserError(
            f"{origin}: expected KEY=VALUE, such as parallel.tensor=2 or phases.phase1.steps=100"
        )
    node = parse_yaml(value_text.strip(), origin, Path.cwd(), numbered=False)
    keys = _keys(tree, parts, origin)
    place = tuple(keys)
    if place == ("extends",):
        raise UserError(f"{origin}: extends belongs in a recipe file; write one that extends both")
    for depth in range(len(keys), 0, -1):
        # Lists inside are replaced whole, with the one item changed.
        at = _at(tree, keys[: depth - 1])
        if (
            at is not None
            and isinstance(at.value, list)
            and not (depth == 2 and keys[0] == "phases")
        ):
            items = list(at.value)
            items[int(keys[depth - 1])] = _merge(items[int(keys[depth - 1])], node, ("*",))
            node = _around(node, items)
        else:
            key = keys[depth - 1]
            if (
                depth == 2
                and keys[0] == "phases"
                and at is not None
                and isinstance(at.value, list)
                and key.isdigit()
            ):
                key = _phase_name(at.value[int(key)]) or key
            node = _around(node, {key: node})
    return _expanded(node, ())


def _around(node: Node, value: Any) -> Node:
    """What holds `node` on the way to it: `!replace` is the node's own."""
    return replace(node, value=value, replaces=False)


def _at(tree: Node, keys: Sequence[str]) -> Node | None:
    node: Node | None = tree
    for key in keys:
        if node is None:
            return None
        node = _child(node, key)
    return node


def _child(node: Node, key: str) -> Node | None:
    if isinstance(node.value, dict):
        return node.value.get(key)
    if isinstance(node.value, list):
        for item in node.value:
            if _phase_name(item) == key:
                return item
        if key.isdigit() and int(key) < len(node.value):
            return node.value[int(key)]
    return None


def _keys(tree: Node, parts: list[str], origin: str) -> list[str]:
    """Dotted parts as keys of the tree: at each level the longest run of parts that names something there."""
    keys: list[str] = []
    node: Node | None = tree
    rest = parts
    while rest:
        take = 1
        if node is not None:
            for count in range(len(rest), 0, -1):
                if _child(node, ".".join(rest[:count])) is not None:
                    take = count
                    break
            else:
                if isinstance(node.value, list) and not (keys == ["phases"] and rest[0] == "+"):
                    known = [_phase_name(item) or str(i) for i, item in enumerate(node.value)]
                    wanted = ".".join([*keys, rest[0]])
                    raise UserError(
                        f"{origin}: {wanted}: there is no such entry{did_you_mean(rest[0], known)}"
                    )
        keys.append(".".join(rest[:take]))
        node = _child(node, keys[-1]) if node is not None else None
        rest = rest[take:]
    return keys


# ---------------------------------------------------------------------------------------------------------- nulls


def _without_nulls(node: Node, path: tuple[str, ...]) -> Node:
    """A key without a value is a key at its default, but for sources in mixtures (`c4:`) and Megatron-Core's own
    fields."""
    value: Any = node.value
    if isinstance(value, dict):
        keep = path in _PASS_THROUGH
        return node.with_value(
            {
                key: _without_nulls(child, (*path, key))
                for key, child in value.items()
                if child.value is not None or keep or _is_mixture_source((*path, key))
            }
        )
    if isinstance(value, list):
        return node.with_value(
            [_without_nulls(child, (*path, str(i))) for i, child in enumerate(value)]
        )
    return node
