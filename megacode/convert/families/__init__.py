"""Families of Hugging Face models, one file each, and how one is chosen."""

from __future__ import annotations

from megacode.convert.families import (
    crystalcoder,
    gpt_bigcode,
    gpt_neox,
    llama,
    stablelm,
    starcoder2,
)
from megacode.convert.family import Family
from megacode.errors import UserError
from megacode.recipe.schema import Model

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        llama.LLAMA,
        llama.MISTRAL,
        llama.QWEN2,
        llama.QWEN3,
        llama.SMOLLM3,
        stablelm.STABLELM,
        starcoder2.STARCODER2,
        gpt_neox.GPT_NEOX,
        gpt_bigcode.GPT_BIGCODE,
        crystalcoder.CRYSTALCODER,
    )
}


def choose(model: Model, name: str | None = None, where: str = "recipe") -> Family:
    """The family asked for, or the first that the model's own shape fits.

    Raises:
        UserError: the one asked for is unknown or does not fit, or none does; it says `where` the
            model stands and which field is in the way.
    """
    if name is not None and name not in FAMILIES:
        raise UserError(
            f"{where}: --format {name}: there is no such family; known are {', '.join(FAMILIES)}"
        )
    reasons = {}
    for family in [FAMILIES[name]] if name else FAMILIES.values():
        reason = family.fits(model)
        if reason is None:
            return family
        reasons[family.name] = reason
    if name:
        raise UserError(f"{where}: --format {name}: this model does not fit: {reasons[name]}")
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise UserError(f"{where}: no family of Hugging Face models has this shape ({told})")


def by_architecture(architectures: list[str], model_type: str, where: str) -> Family:
    """The family of a config.json. UserError: it is none of ours."""
    for family in FAMILIES.values():
        if family.architecture in architectures or (
            not architectures and family.name == model_type
        ):
            return family
    known = ", ".join(f"{family.architecture} ({family.name})" for family in FAMILIES.values())
    found = ", ".join(architectures) or model_type or "nothing"
    raise UserError(
        f"{where}: architectures says {found}, which cannot be imported; known are {known}"
    )
