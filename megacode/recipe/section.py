"""What every part of a recipe is made of: an immutable section without unknown keys,
counts, shares."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
MOST = 10**18
"""Upper limit for counts; sums stay within int64."""
_COUNT = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+]?[0-9]+)?)\s*([kKmMbBtT]?)\s*$")


def parse_count(value: Any) -> Any:
    """`'344.8B'` -> 344_800_000_000. Integers pass; anything else is left for the type
    check to refuse."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    match = _COUNT.match(value)
    if not match:
        raise ValueError(
            f"expected a count such as 4000, 120k, 1.5M, 344.8B or 1.4T, not {value!r}"
        )
    number = float(match[1].replace("_", "")) * _SUFFIXES[match[2].lower()]
    if number > MOST:
        raise ValueError(f"expected a count of {MOST:,} at most, not {value!r}")
    return round(number)


Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0, le=MOST)]
CountOrZero = Annotated[int, BeforeValidator(parse_count), Field(ge=0, le=MOST)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def is_plain(value: Any) -> bool:
    """Text, a number, or a schedule of numbers."""
    return (isinstance(value, str | int | float) and not isinstance(value, bool)) or (
        isinstance(value, dict) and "shape" in value
    )


class Section(BaseModel):
    """Base of every part of a recipe: immutable, strict about types, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    short_for: ClassVar[str | None] = None
    """The key that a plain value in the section's place is short for: `precision: bf16` is
    `precision: {compute: bf16}`."""

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, value: Any) -> Any:
        """Short forms in full; a known key without a value is a key at its default."""
        if cls.short_for and is_plain(value):
            return {cls.short_for: value}
        if isinstance(value, dict):
            known = cls.model_fields
            return {k: item for k, item in value.items() if item is not None or k not in known}
        return value
