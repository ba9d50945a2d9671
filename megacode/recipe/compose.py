"""One tree from several: `extends`, `--set` overrides, and the rules by which one recipe changes
another.

Mappings merge key by key; anything else, and `KEY: !replace {...}`, replaces what was there.
Besides:

* Phases are held by name. `phases` may be a mapping in a recipe that extends another: `NAME: {...}`
  changes a phase, `NAME: null` drops it, `+: [...]` adds phases at the end. A list replaces all
  phases.
* `null` takes a key back to its default.
* Short forms merge with long ones: `c4: 0.3` over `c4: {fim_rate: 0.5}` sets its weight.
* Keys that exclude each other replace each other: `steps`, `tokens` and `budget`, `domains` and
  `sources`, two schedules, two forms of a budget.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.recipe.schema import MixtureDomain, sections_at
from megacode.recipe.section import is_plain
from megacode.recipe.yaml_tree import Tree, describe, parse_yaml, read_yaml

_EXCLUSIVE = (
    {"steps", "tokens", "budget"},
    {"sources", "domains"},
    {"competitive", "additive", "split"},
)


def compose(path: Path, overrides: Sequence[str], folder: Path | None = None) -> Tree:
    """The tree of a recipe with what it extends and its overrides; `phases` by name,
    paths absolute: those in overrides against `folder`, by default the working directory."""
    return with_overrides(_read(path, ()), overrides, folder or Path.cwd())


def with_overrides(tree: Tree, overrides: Sequence[str], folder: Path) -> Tree:
    """`KEY=VALUE` each, merged into a tree in their order; a recipe's paths against `folder`."""
    for override in overrides:
        tree = _merge(tree, _override(tree, override, folder), ())
    return tree


def _read(path: Path, above: tuple[Path, ...]) -> Tree:
    resolved = path.resolve()
    if resolved in above:
        chain = " -> ".join(p.name for p in (*above[above.index(resolved) :], resolved))
        raise UserError(
            f"{path}: extends: the recipes extend each other in a circle ({chain}); take one "
            "`extends` out"
        )
    tree = _with_absolute_paths(read_yaml(path), resolved.parent)
    base, place = tree.pop("extends", None), tree.places.get("extends")
    if base is None:
        return _merge(Tree({}, tree.place, {}), tree, ())
    if not isinstance(base, str):
        raise UserError(f"{place}: extends: expected the path of one recipe, not {describe(base)}")
    other = path.parent / Path(base).expanduser()
    if not other.is_file():
        raise UserError(
            f"{place}: extends: there is no file {other}; the path is relative to {path.name}"
        )
    return _merge(_read(other, (*above, resolved)), tree, ())


def _override(tree: Tree, text: str, folder: Path) -> Tree:
    """`a.b=value` as a tree to merge. Phases go by name or number."""
    origin = f"--set {text}"
    dotted, equals, value_text = text.partition("=")
    parts = [part for part in dotted.strip().split(".") if part]
    if not equals or not parts:
        raise UserError(
            f"{origin}: expected KEY=VALUE, such as parallel.tensor=2 or phases.phase1.steps=100"
        )
    if parts == ["extends"]:
        raise UserError(f"{origin}: extends belongs in a recipe file; write one that extends both")
    value = parse_yaml(value_text.strip(), origin)
    for key in reversed(split_key(tree, parts)):
        value = Tree({key: value}, origin, {key: origin})
    return _with_absolute_paths(value, folder.resolve())


def split_key(node: Any, parts: Sequence[str]) -> list[str]:
    """Parts of a dotted key as keys of a tree; names may have dots, so the longest that
    is there is taken."""
    if not parts:
        return []
    known: Mapping[str, Any] = node if isinstance(node, Tree) else {}
    lengths = range(len(parts), 0, -1)
    length = next((n for n in lengths if ".".join(parts[:n]) in known), 1)
    key = ".".join(parts[:length])
    return [key, *split_key(known.get(key), parts[length:])]


def _with_absolute_paths(tree: Tree, folder: Path) -> Tree:
    """Paths of a file, relative to its folder. Links stay links, since the user may move them."""

    def absolute(value: Any) -> Any:
        is_path = isinstance(value, str) and value
        return os.path.normpath(folder / Path(value).expanduser()) if is_path else value

    sources = tree.get("sources")
    found: list[tuple[Any, str]] = [
        (tree, "initialize_from"),
        (tree.get("tokenizer"), "path"),
        (tree.get("data"), "pack_cache"),
        (tree.get("evaluation"), "tasks"),
    ]
    if isinstance(tree.get("evaluation"), Tree):
        found.append((tree["evaluation"].get("harness"), "folder"))
    for source in sources.values() if isinstance(sources, Tree) else ():
        found += [(source, "path"), (source, "validation")]
    for section, key in found:
        if isinstance(section, Tree) and key in section:
            value = section[key]
            section[key] = [*map(absolute, value)] if isinstance(value, list) else absolute(value)
    return tree


# ------------------------------------------------------------------------------------------ merging


def _merge(base: Any, over: Any, path: tuple[str, ...]) -> Any:
    """`over` merged into `base`; `path` is where both stand."""
    if not isinstance(base, Tree) or not isinstance(over, Tree) or over.replaces:
        return over
    if "shape" in base and "shape" in over:  # two schedules
        return over
    values, places = dict(base), dict(base.places)
    for key, value in over.items():
        here = (*path, key)
        if path[:1] == ("phases",) and value is not None:
            for other in next((keys - {key} for keys in _EXCLUSIVE if key in keys), ()):
                values.pop(other, None)
        if value is None and key in values:
            del values[key]
            continue
        place = over.places[key]
        if here == ("phases",):
            values[key] = _merge_phases(values.get(key), value, place)
        elif key in values:
            old = _written_out(values[key], here, places[key])
            values[key] = _merge(old, _written_out(value, here, place), here)
        else:
            values[key] = value
        places[key] = place
    return Tree(values, over.place, places)


def _merge_phases(base: Tree | None, over: Any, place: str) -> Any:
    """Phases by name. Anything but a list or a mapping is left for the schema to refuse."""
    if isinstance(over, list):
        return _by_name(over, place)
    if not isinstance(over, Tree):
        return over
    if base is None:
        raise UserError(
            f"{place}: phases: expected a list (`- name: ...`); a mapping by name changes phases "
            "of a recipe named by `extends:`"
        )
    phases, names, added = dict(base), list(base), []
    for key, phase in over.items():
        if key == "+":
            added = phase if isinstance(phase, list) else [phase]
            continue
        is_number = key not in base and key.isdigit() and int(key) < len(names)
        name = names[int(key)] if is_number else key
        if name not in base:
            hint = did_you_mean(name, names)
            raise UserError(f"{over.places[key]}: phases.{key}: there is no such phase{hint}")
        if phase is None:
            del phases[name]
        else:
            phases[name] = _merge(base[name], phase, ("phases", name))
            phases[name].place = over.places[key]
    return _by_name([*phases.values(), *added], place)


def _by_name(phases: list[Any], place: str) -> Tree:
    tree = Tree({}, place, {})
    for number, phase in enumerate(phases):
        name = str(phase.get("name", number) if isinstance(phase, Tree) else number)
        if name in tree:
            raise UserError(
                f"{phase.places['name']}: phases.{name}.name: is given to two phases; name each "
                "differently"
            )
        tree[name], tree.places[name] = phase, getattr(phase, "place", place)
    return tree


def _written_out(value: Any, path: tuple[str, ...], place: str) -> Any:
    """The long form of a short one."""
    if (
        isinstance(value, list)
        and path[-1] == "sources"
        and MixtureDomain in sections_at(path[:-1])
    ):
        return Tree(
            {name: Tree({}, place, {}) for name in value}, place, dict.fromkeys(value, place)
        )
    short = next((one.short_for for one in sections_at(path) if one.short_for), None)
    return Tree({short: value}, place, {short: place}) if short and is_plain(value) else value


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The end of a sentence: the nearest known word, else all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{near[0]}`?"
    shown = ", ".join(list(known)[:20]) + (", ..." if len(known) > 20 else "")
    return f"; known here: {shown}" if known else ""
