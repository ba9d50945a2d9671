"""Which steps and ranks `megacode train --profile` looks at. No torch: the command line is read before it is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megacode.errors import UserError


@dataclass(frozen=True)
class ProfileSteps:
    """Which finished steps (counted from 1, both ends included) on which ranks; `ranks` None: all."""

    first: int
    last: int
    ranks: frozenset[int] | None = frozenset({0})

    @classmethod
    def parse(cls, steps: str, ranks: str = "0") -> ProfileSteps:
        """From `--profile 10:12 --profile-ranks 0,3` (or `all`).

        Raises:
            UserError: not of that form.
        """
        match = re.fullmatch(r"(\d+):(\d+)", steps)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--profile: expected FIRST:LAST step, such as 10:12 (counted from 1), not {steps!r}")
        if ranks == "all":
            return cls(int(match[1]), int(match[2]), None)
        if not re.fullmatch(r"\d+(,\d+)*", ranks):
            raise UserError(f"--profile-ranks: expected ranks such as 0,3 or `all`, not {ranks!r}")
        return cls(int(match[1]), int(match[2]), frozenset(map(int, ranks.split(","))))
