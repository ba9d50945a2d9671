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
            raise UserError(
                f"--profile: expected FIRST:LAST step, such as 10:12 (counted from 1), not {steps!r}"
            )
        if ranks == "all":
            return cls(int(match[1]), int(match[2]), None)
        if not re.fullmatch(r"\d+(,\d+)*", ranks):
            raise UserError(f"--profile-ranks: expected ranks such as 0,3 or `all`, not {ranks!r}")
        return cls(int(match[1]), int(match[2]), frozenset(map(int, ranks.split(","))))

    def check(self, done: int, until: int, processes: int) -> None:
        """Whether a start that goes on after `done` finished steps, and ends with `until`, has these steps and ranks.

        Raises:
            UserError: it has none of the steps, or not all of the ranks.
        """
        asked = f"--profile {self.first}:{self.last}"
        if self.last <= done:
            raise UserError(
                f"{asked}: these steps are done, and this start goes on with step {done + 1}; choose later ones"
            )
        if self.first > until:
            raise UserError(f"{asked}: this start ends with step {until}; choose earlier ones")
        if missing := sorted(rank for rank in self.ranks or () if rank >= processes):
            raise UserError(
                f"--profile-ranks: there is no rank {missing[0]} among {processes} process{'es' * (processes > 1)}; they count "
                "from 0"
            )
