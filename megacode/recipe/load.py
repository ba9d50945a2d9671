"""A YAML file (and what it extends, and `--set` overrides) -> Recipe, or sentences that say what is wrong and where.

`megacode.recipe.compose` has the rules of merging, `megacode.recipe.yaml_tree` the dialect of YAML.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megacode.errors import UserError
from megacode.recipe import checks
from megacode.recipe.compose import compose, did_you_mean
from megacode.recipe.schema import Recipe
from megacode.recipe.yaml_tree import Node, describe, dump_yaml

KeyPath = tuple[str, ...]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, checked.

    Relative paths in it (sources, validation, tokenizer, pack_cache, initialize_from) come back absolute, resolved
    against the file they were written in; those in an override against the working directory.

    Args:
        overrides: `KEY=VALUE` each, the value in YAML; phases by name or number (`phases.phase1.steps=100`).

    Raises:
        UserError: every mistake found, a line each.
    """
    tree = _with_absolute_paths(compose(Path(path), overrides), ())
    data = tree.plain()
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError("\n".join(dict.fromkeys(_sentences(error, tree)))) from None
    problems = checks.check_recipe(recipe)
    if problems:
        raise UserError(
            "\n".join(
                f"{_where(tree, problem.at or problem.key)}: {problem}" for problem in problems
            )
        )
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """YAML text with every key that has a value; `load_recipe` reads an equal recipe from it."""
    return dump_yaml(_without_none(recipe.model_dump(mode="python"), ()))


def _without_none(data: Any, path: KeyPath) -> Any:
    if isinstance(data, dict):
        keep = path[-1:] in (("megatron",), ("ddp",))
        return {k: _without_none(v, (*path, k)) for k, v in data.items() if v is not None or keep}
    if isinstance(data, list):
        return [_without_none(item, (*path, str(i))) for i, item in enumerate(data)]
    return data


# ---------------------------------------------------------------------------------------------------------- paths


def _with_absolute_paths(node: Node, path: KeyPath) -> Node:
    if len(path) == 3 and path[0] == "sources" and path[2] in ("path", "validation"):
        return _absolute(node)
    if path in (("tokenizer", "path"), ("initialize_from",), ("data", "pack_cache")):
        return _absolute(node)
    if isinstance(node.value, dict):
        return node.with_value(
            {k: _with_absolute_paths(child, (*path, k)) for k, child in node.value.items()}
        )
    return node


def _absolute(node: Node) -> Node:
    if isinstance(node.value, list):
        return node.with_value([_absolute(item) for item in node.value])
    if not isinstance(node.value, str) or not node.value:
        return node
    joined = node.folder / Path(node.value).expanduser()
    # Not resolve(): a link in the path may be what the user means to move later, and patterns are no files.
    return node.with_value(str(Path(*_collapsed(joined.parts))))


def _collapsed(parts: Sequence[str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if part == ".." and len(out) > 1 and out[-1] != "..":
            out.pop()
        elif part != ".":
            out.append(part)
    return out


# ---------------------------------------------------------------------------------------------- where a key stands


def _find(tree: Node, key: Sequence[str]) -> tuple[Node, list[str], list[str]]:
    """The deepest node on the way to a key, the way there, and what is left of the key."""
    node, done = tree, []
    rest = list(key)
    while rest:
        part = rest[0]
        if isinstance(node.value, dict) and part in node.value:
            node = node.value[part]
        elif isinstance(node.value, list):
            names = [
                item.value.get("name") if isinstance(item.value, dict) else None
                for item in node.value
            ]
            plain = [name.value if name is not None else None for name in names]
            if part in plain:
                node = node.value[plain.index(part)]
            elif part.isdigit() and int(part) < len(node.value):
                part = str(plain[int(part)]) if isinstance(plain[int(part)], str) else part
                node = node.value[int(rest[0])]
            else:
                break
        else:
            break
        done.append(part)
        rest.pop(0)
    return node, done, rest


def _where(tree: Node, key: str | Sequence[str]) -> str:
    """File and line of a dotted key, or of the nearest thing above it."""
    parts = key.split(".") if isinstance(key, str) else list(key)
    return _find(tree, parts)[0].where


# ------------------------------------------------------------------------------------------------------ sentences


def _sentences(error: ValidationError, tree: Node) -> Iterator[str]:
    """One sentence per mistake. Where a key takes one of several forms, pydantic reports each form's complaint; the one
    of the form that was meant is used."""
    grouped: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    found: _Items = [dict(one) for one in error.errors(include_url=False)]
    for item in found:
        loc = [str(part) for part in item["loc"]]
        node, done, rest = _find(tree, loc)
        item["node"] = node
        wanted = item["type"] in ("missing", "extra_forbidden")
        # Union members leave their own name in the path: skip what is neither a key nor an index.
        while rest and not (wanted and len(rest) == 1):
            item["form"] = rest[0]
            inner, more, rest = _find(item["node"], rest[1:])
            item["node"] = inner
            done += more
        if wanted and rest:
            done.append(rest[0])
        grouped.setdefault(tuple(done), []).append(item)
    for place, items in grouped.items():
        meant = _meant(place, items, grouped.keys())
        if meant:
            yield _sentence(place, meant)


_Items = list[dict[str, Any]]


def _meant(place: KeyPath, items: _Items, places: Iterable[KeyPath]) -> _Items:
    """Without the complaints of a plain form (a number) about a mapping, where the mapping's own form complains too."""
    if not isinstance(items[0]["node"].value, dict):
        return items
    own = [
        item
        for item in items
        if item["type"].removesuffix("_type").removesuffix("_parsing") not in _PLAIN
    ]
    below = any(len(other) > len(place) and other[: len(place)] == place for other in places)
    return own if own or below else items


def _sentence(place: KeyPath, items: _Items) -> str:
    item = next((item for item in items if item["type"] == "value_error"), items[0])
    node: Node = item["node"]
    key = ".".join(place) or "the recipe"
    if item["type"] == "missing":
        parent = ".".join(place[:-1])
        return f"{node.where}: {key}: is missing; add `{place[-1]}:` {'under ' + parent if parent else 'to the recipe'}"
    if item["type"] == "extra_forbidden":
        wrong = _find(node, [place[-1]])[0]
        return f"{wrong.where}: {key}: unknown key{_suggestion(place)}"
    if item["type"] == "value_error":
        return f"{node.where}: {key}: {str(item['ctx']['error']).removeprefix('Value error, ')}"
    forms = dict.fromkeys(_expected(i) for i in items)
    return f"{node.where}: {key}: expected {' or '.join(forms)}, not {describe(node.plain())}{_remedy(node)}"


_PLAIN = {
    "int": "a whole number",
    "int_from_float": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "list": "a list",
    "dict": "a mapping",
    "finite_number": "a finite number",
}


_SECTIONS = {
    "Schedule": "a schedule {shape, start, end, over}",
    "BatchRamp": "a ramp {start, end, increment, over}",
}
_BOUNDS = {
    "greater_than": ("gt", "a number above"),
    "greater_than_equal": ("ge", "a number of at least"),
    "less_than": ("lt", "a number below"),
    "less_than_equal": ("le", "a number of at most"),
}


def _expected(item: dict[str, Any]) -> str:
    context = item.get("ctx", {})
    kind = item["type"].removesuffix("_type").removesuffix("_parsing")
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{words} {context[name]:g}"
    if kind in ("model", "model_attributes", "dataclass"):
        return _SECTIONS.get(context.get("class_name", ""), "a mapping of keys")
    known = {
        **_PLAIN,
        "literal_error": str(context.get("expected")),
        "string_pattern_mismatch": (
            "a name of letters, digits, `.`, `_` and `-` that begins with a letter or digit"
        ),
        "too_short": f"at least {context.get('min_length')} entry",
    }
    return known.get(kind, item["msg"][0].lower() + item["msg"][1:])


def _remedy(node: Node) -> str:
    value = node.value
    if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
        return f"; write {'true' if value.lower() in ('yes', 'on') else 'false'}"
    if node.line is None:
        return "; correct the override"
    return "; correct the value" if value is not None else "; give it a value or take the key out"


def _suggestion(place: KeyPath) -> str:
    """What an unknown key was probably meant to be: a key beside it, else the same key elsewhere in the schema."""
    beside = [name for model in _models_at(place[:-1]) for name in model.model_fields]
    word = place[-1]
    hint = did_you_mean(word, beside)
    if hint.startswith("; did"):
        return hint
    elsewhere = [dotted for dotted in all_keys() if dotted.rsplit(".", 1)[-1] == word]
    return f"; there is `{elsewhere[0]}`" if elsewhere else hint


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def _models_at(place: KeyPath) -> list[type[BaseModel]]:
    """The schema's classes that a path of keys, names and indices leads to."""
    models: list[type[BaseModel]] = [Recipe]
    skip = False
    for part in place:
        if skip:  # the name or number of an entry: the classes are those of its container already
            skip = False
            continue
        found, container = [], False
        for model in models:
            if part in model.model_fields:
                annotation = model.model_fields[part].annotation
                found += _models_in(annotation)
                container = container or _is_container(annotation)
        models, skip = found, container
    return models


def _is_container(annotation: Any) -> bool:
    if typing.get_origin(annotation) in (dict, list):
        return True
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return any(_is_container(part) for part in typing.get_args(annotation))
    return False


def all_keys() -> Iterator[str]:
    """Every dotted key that a recipe may have, sections too; NAME stands for the name of an entry."""
    return _keys(Recipe, ())


def _keys(model: type[BaseModel], above: KeyPath) -> Iterator[str]:
    for name, field in model.model_fields.items():
        here = (*above, name)
        yield ".".join(here)
        inner = (*here, "NAME") if _is_container(field.annotation) else here
        for part in _models_in(field.annotation):
            yield from _keys(part, inner)
