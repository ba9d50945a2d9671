"""Keys of config.json: there, refused, or, for rotary positions, in one of several places.
 transformers since version 5 has all of rotary positions in `rope_parameters`; older ones have the
base at the top and the rest in `rope_scaling`. An older one that saves a config of version 5 writes
its own default base beside `rope_parameters`, which it does not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megacode.errors import UserError
from megacode.recipe.schema import Model

_ORIGINAL = "original_max_position_embeddings"
_CONSTANTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"beta_fast": 32, "beta_slow": 1, "truncate": True},
}
"""Of the kinds of rotary scaling, which have no others here; what is silent means them."""
_DEFAULT_BASE = 10000.0


def value(config: Mapping[str, Any], key: str) -> Any:
    """A key of config.json; UserError where it is missing."""
    if config.get(key) is None:
        raise UserError(f"config.json: {key} is missing; give a Hugging Face model's whole folder")
    return config[key]


def refuse(config: Mapping[str, Any], key: str, wanted: Any, why: str) -> None:
    """UserError where a key is there with another value than `wanted` (or None)."""
    found = config.get(key)
    if found is not None and found != wanted:
        raise UserError(
            f"config.json: {key} is {found!r}, and only {wanted!r} can be imported exactly: {why}"
        )


# --------------------------------------------------------------------------------- rotary positions


def rope_keys(model: Model, length: int) -> dict[str, Any]:
    """Keys of rotary positions of every version of transformers; `length`: the longest sequence."""
    keys: dict[str, Any] = {"max_position_embeddings": length, "rope_theta": rotary_base(model)}
    if scaling := model.rotary_scaling:
        keys["rope_scaling"] = {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            **({} if scaling.kind == "yarn" else _CONSTANTS[scaling.kind]),
            **({_ORIGINAL: scaling.original_length} if scaling.kind != "linear" else {}),
        }
    return keys


def rotary_base(model: Model) -> int | float:
    """As published configs spell it: without a fraction where it has none."""
    return int(model.rotary_base) if model.rotary_base.is_integer() else model.rotary_base


def rotary_section(
    config: Mapping[str, Any], keys: Mapping[str, str], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """`rotary_base`, `rotary_fraction` and `rotary_scaling` of the recipe's `model`.

    Args:
        keys, defaults: of the `Family`; without a key for `rotary_fraction` it rotates whole heads.

    Raises:
        UserError: positions are scaled in a way that Megatron-Core does not know, or two keys
            say different things.
    """
    parameters, base = _rope_parameters(config), keys["rotary_base"]
    default_base = defaults.get(base, _DEFAULT_BASE)
    section: dict[str, Any] = {
        "rotary_base": _one_of_two(config, base, parameters, "rope_theta", default_base)
    }
    if fraction := keys.get("rotary_fraction"):
        section["rotary_fraction"] = _one_of_two(
            config, fraction, parameters, "partial_rotary_factor", defaults[fraction]
        )
    else:
        for place in (config, parameters):
            refuse(place, "partial_rotary_factor", 1, "this family rotates whole heads")
    kind = parameters.get("rope_type") or "default"
    if kind == "default":
        return section
    if kind not in _CONSTANTS:
        raise UserError(
            f"config.json: rope_scaling is of type {kind!r}, and rotary positions here know "
            f"{', '.join(_CONSTANTS)}; a model without it can be imported"
        )
    factor = float(value(parameters, "factor"))
    scaling: dict[str, Any] = {"kind": kind, "factor": factor}
    attention = 0.1 * math.log(factor) + 1
    if not math.isclose(parameters.get("attention_factor") or attention, attention):
        refuse(parameters, "attention_factor", attention, "it follows from the factor here")
    for key in ("mscale", "mscale_all_dim"):
        if parameters.get(key):
            refuse(parameters, key, None, "the attention factor follows from the factor here")
    for key, wanted in _CONSTANTS[kind].items():
        if kind == "llama3":
            value(parameters, key)
        refuse(parameters, key, wanted, f"{kind} scaling has these constants here")
    if kind != "linear":
        scaling["original_context_length"] = _original_length(config, parameters)
    return section | {"rotary_scaling": scaling}


def _original_length(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> int:
    """UserError where it is given twice: transformers' versions take it from different places."""
    found = parameters.get(_ORIGINAL) or config.get("max_position_embeddings")
    if config.get(_ORIGINAL) not in (None, found):
        raise _two_values(_ORIGINAL, config[_ORIGINAL], "that of rotary positions", found)
    return int(value({_ORIGINAL: found}, _ORIGINAL))


def _rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_scaling` and `rope_parameters` as one.

    UserError: both are there and differ, or they differ by kind of layer.
    """
    old, new = ({**(config.get(key) or {})} for key in ("rope_scaling", "rope_parameters"))
    for parameters in (old, new):
        if nested := [name for name, one in parameters.items() if isinstance(one, Mapping)]:
            raise UserError(
                f"config.json: rope_parameters differ by kind of layer ({', '.join(nested)}); "
                "a recipe has one for all"
            )
        if "type" in parameters:
            parameters.setdefault("rope_type", parameters.pop("type"))
    for name in sorted(old.keys() | new.keys()) if old and new else ():
        one, other = old.get(name), new.get(name)
        if one != other and not (name == "rope_theta" and None in (one, other)):
            raise _two_values(f"rope_scaling.{name}", one, f"rope_parameters.{name}", other)
    return {**old, **new}


def _one_of_two(
    config: Mapping[str, Any], key: str, parameters: Mapping[str, Any], name: str, default: float
) -> float:
    """A number that stands in `parameters` as `name`, or at the top as `key`.

    Both may be there; of two that differ one is the default, which an older transformers wrote
    without having read the other. UserError if neither is.
    """
    inner, outer = parameters.get(name), config.get(key)
    if inner is None or outer is None:
        found = outer if inner is None else inner
        return default if found is None else float(found)
    if float(inner) != float(outer) and float(outer) != default:
        raise _two_values(key, outer, f"rope_parameters.{name}", inner)
    return float(inner)


def _two_values(first: str, one: Any, second: str, other: Any) -> UserError:
    return UserError(
        f"config.json: {first} is {one!r} and {second} {other!r}; "
        "the model was trained with one of them: set both to it"
    )
