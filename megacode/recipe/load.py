"""A YAML file (and what it extends, and `--set` overrides) -> Recipe, or sentences that say what is
wrong and where.

`megacode.recipe.compose` has the rules of merging, `megacode.recipe.yaml_tree` the dialect of YAML.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from megacode.errors import UserError
from megacode.recipe.budgets import with_budgets
from megacode.recipe.checks import check_recipe
from megacode.recipe.compose import compose, did_you_mean, split_key, with_overrides
from megacode.recipe.schema import Recipe, all_keys, sections_at
from megacode.recipe.section import Section
from megacode.recipe.yaml_tree import Tree, describe, dump_yaml, read_yaml

AnySection = TypeVar("AnySection", bound=Section)


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), folder: Path | None = None
) -> Recipe:
    """The recipe of a file, checked.

    Relative paths in it (sources, validation, tokenizer, pack_cache, initialize_from) come back
    absolute, resolved against the file they were written in; those in an override against
    `folder`, by default the working directory.

    Args:
        overrides: `KEY=VALUE` each, the value in YAML; phases by name or number
            (`phases.phase1.steps=100`).

    Raises:
        UserError: every mistake found, a line each.
    """
    tree = compose(Path(path), overrides, folder)
    data = dict(tree)
    if isinstance(tree.get("phases"), Tree):
        data["phases"] = list(tree["phases"].values())
    recipe, problems = with_budgets(_validated(Recipe, data, tree))
    if problems := problems or check_recipe(recipe):
        raise UserError("\n".join(f"{_place(tree, problem)}: {problem}" for problem in problems))
    return recipe


def load_section(kind: type[AnySection], path: Path, overrides: Sequence[str] = ()) -> AnySection:
    """Another YAML file than a recipe, named after its section (a task, a sweep), checked with the
    same sentences. Paths come as they are written, those in overrides too.

    Raises:
        UserError: every mistake found, a line each.
    """
    tree = with_overrides(read_yaml(path, kind.__name__.lower()), overrides, path.parent)
    return _validated(kind, dict(tree), tree)


def _validated(kind: type[AnySection], data: dict[str, Any], tree: Tree) -> AnySection:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError("\n".join(dict.fromkeys(_sentences(error, tree, kind)))) from None


def dump_recipe(recipe: Recipe) -> str:
    """YAML text with every key that has a value; `load_recipe` reads an equal recipe from it."""

    def without_none(data: Any, key: str = "") -> Any:
        if isinstance(data, list):
            return [without_none(item) for item in data]
        if not isinstance(data, dict) or key in ("megatron", "ddp"):
            return data
        return {k: without_none(v, k) for k, v in data.items() if v is not None}

    return dump_yaml(without_none(recipe.model_dump()))


def _place(tree: Tree, problem: str) -> str:
    """File and line of the key that a problem begins with, or of the nearest thing above it."""
    node, place = tree, tree.place
    for key in split_key(tree, problem.partition(": ")[0].split(".")):
        if isinstance(node, Tree) and key in node:
            node, place = node[key], node.places[key]
    return place


# ------------------------------------------------------------------- pydantic's errors as sentences

_Error = dict[str, Any]
_PLAIN = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of keys",
    "string_pattern_mismatch": (
        "a name of letters, digits, `.`, `_` and `-` that begins with a letter or digit"
    ),
}
_SECTIONS = {
    "Schedule": "a schedule {shape, start, end, over}",
    "BatchRamp": "a ramp {start, end, increment, over}",
}


def _sentences(error: ValidationError, tree: Tree, kind: type[Section]) -> Iterator[str]:
    """One sentence per mistake."""
    errors: dict[tuple[str, ...], list[_Error]] = {}
    for item in error.errors(include_url=False):
        located = _located(dict(item), tree)
        errors.setdefault(located["keys"], []).append(located)
    for keys, items in errors.items():
        # Where a key takes a number or a mapping, pydantic reports the complaints of both forms.
        own = [i for i in items if i["type"] == "model_type" or i["type"] not in _PLAIN]
        below = any(other != keys and other[: len(keys)] == keys for other in errors)
        is_mapping = isinstance(items[0]["value"], dict) and (own or below)
        if meant := own if is_mapping else items:
            yield _sentence(keys, meant, kind)


def _located(error: _Error, tree: Tree) -> _Error:
    """An error of pydantic with its `keys` (phases by name), `place` and `value`."""
    loc = list(error["loc"])
    node: Any = tree
    keys: list[str] = []
    place = tree.place
    if loc[:1] == ["phases"] and len(loc) > 1:
        loc[1] = list(tree["phases"])[loc[1]]
    for part in loc:
        if isinstance(node, Tree) and part in node:
            node, place = node[part], node.places[part]
        elif isinstance(node, list) and isinstance(part, int):
            node = node[part]
            place = getattr(node, "place", place)
        elif error["type"] != "missing" or part is not loc[-1]:
            continue  # a form's name in pydantic's words
        keys.append(str(part))
    return {**error, "keys": tuple(keys), "place": place, "value": node}


def _sentence(keys: tuple[str, ...], errors: list[_Error], kind: type[Section]) -> str:
    error = next((one for one in errors if one["type"] == "value_error"), errors[0])
    whole = "the recipe" if kind is Recipe else "the file"
    value, start = error["value"], f"{error['place']}: {'.'.join(keys) or whole}: "
    if error["type"] == "missing":
        parent = ".".join(keys[:-1])
        where = f"under {parent}" if parent else f"to {whole}"
        return f"{start}is missing; add `{keys[-1]}:` {where}"
    if error["type"] == "extra_forbidden":
        return f"{start}unknown key{_suggestion(keys, kind)}"
    if error["type"] == "value_error":
        return start + str(error["ctx"]["error"])
    expected = " or ".join(dict.fromkeys(map(_expected, errors)))
    return f"{start}expected {expected}, not {describe(value)}; {_remedy(value, error['place'])}"


def _expected(error: _Error) -> str:
    section = _SECTIONS.get(error.get("ctx", {}).get("class_name", ""))
    said = error["msg"].removeprefix("Input should be ")
    if said.startswith(("greater", "less")):
        said = f"a number {said}"
    return section or _PLAIN.get(error["type"], said)


def _remedy(value: Any, place: str) -> str:
    if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
        return f"write {'true' if value.lower() in ('yes', 'on') else 'false'}"
    if place.startswith("--set "):
        return "correct the override"
    return "correct the value" if value is not None else "give it a value or take the key out"


def _suggestion(keys: tuple[str, ...], kind: type[Section]) -> str:
    """What an unknown key was probably meant to be: a key beside it, else the same key elsewhere in
    the schema."""
    hint = did_you_mean(
        keys[-1], [k for one in sections_at(keys[:-1], kind) for k in one.model_fields]
    )
    elsewhere = [dotted for dotted in all_keys(kind) if dotted.rsplit(".", 1)[-1] == keys[-1]]
    return f"; there is `{elsewhere[0]}`" if elsewhere and "did you mean" not in hint else hint
