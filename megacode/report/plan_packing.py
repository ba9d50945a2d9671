"""What packing and cutting lose, as a table of the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from megacode.plan.plan import Plan


class Losses(Protocol):
    """See `megacode.data.packing_report.PackingLosses` (recipe/ knows nothing of data/)."""

    @property
    def source(self) -> str: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def packing(self) -> str: ...
    @property
    def documents(self) -> int: ...
    @property
    def measured(self) -> int: ...
    @property
    def cut(self) -> dict: ...
    @property
    def lost(self) -> float: ...
    @property
    def padding(self) -> float: ...
    @property
    def giant(self) -> float | None: ...


def packing_table(plan: Plan, losses: Sequence[Losses]) -> Table | None:
    """Both ways of packing for every source and length; None where no data is there and nothing was estimated."""
    estimated = sorted({s.source for phase in plan.phases for s in phase.streams if s.estimated})
    if not losses and not estimated:
        return None
    table = Table(
        title="Packing",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        header_style="dim",
    )
    heads = (
        "source",
        "length",
        "documents",
        "concatenate: cut",
        "lost",
        "best_fit: cut",
        "padding",
        "chosen",
    )
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if 0 < number < 7 else "left", no_wrap=number == 0)
    for one in losses:
        partly = one.measured < one.documents
        table.add_row(
            Text(one.source),
            f"{one.sequence_length:,}",
            f"{one.documents:,}" + (f" ({one.measured:,} measured)" if partly else ""),
            *(
                f"{100 * share:.3g} %"
                for share in (one.cut["concatenate"], one.lost, one.cut["best_fit"], one.padding)
            ),
            one.packing,
        )
    if estimated:
        table.caption = f"packs of {', '.join(estimated)}: estimated from `tokens` as if full; counted once the data is there"
        table.caption_justify = "left"
    return table
