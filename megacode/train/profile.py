"""`megacode train --profile A:B`: torch's profiler over some steps, into the run folder.

`RUN/profile/steps-A-B/rank-N.json.gz` is a trace for Perfetto (ui.perfetto.dev). `rank-N.txt`
beside it has the operations that took longest, and every place where the host waited for the
device. torch is imported late: the command line parses `--profile` before it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacode.errors import UserError

if TYPE_CHECKING:
    from megacode.megatron.distributed import World

# What makes a CUDA host wait; `aten::item` and its kin are what asked for it.
_WAITS = re.compile(r"^cuda(Stream|Device|Event)Synchronize$|^cudaMemcpy$")
_ASKS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero")
_PYTHON = re.compile(r"\.py\(\d+\)|^<built-in|^nn\.Module")  # the stack, which the trace has
_ROWS = 40


@dataclass(frozen=True)
class ProfileSteps:
    """Steps (counted from 1, both ends included) on some ranks; `ranks` None: all."""

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
                f"--profile: expected FIRST:LAST, such as 10:12 (counted from 1), not {steps!r}"
            )
        if ranks != "all" and not re.fullmatch(r"\d+(,\d+)*", ranks):
            raise UserError(f"--profile-ranks: expected ranks such as 0,3 or `all`, not {ranks!r}")
        among = None if ranks == "all" else frozenset(map(int, ranks.split(",")))
        return cls(int(match[1]), int(match[2]), among)

    def check(self, done: int, until: int, processes: int) -> None:
        """Check that a start has these steps and ranks.

        Args:
            done: finished steps before it.
            until: finished steps after it.

        Raises:
            UserError: it has none of the steps, or not all of the ranks.
        """
        asked = f"--profile {self.first}:{self.last}"
        if self.last <= done:
            raise UserError(
                f"{asked}: these steps are done, and this start goes on with step {done + 1}; "
                "choose later ones"
            )
        if self.first > until:
            raise UserError(f"{asked}: this start ends with step {until}; choose earlier ones")
        if missing := sorted(rank for rank in self.ranks or () if rank >= processes):
            raise UserError(
                f"--profile-ranks: there is no rank {missing[0]} among {processes} "
                f"process{'es' * (processes > 1)}; they count from 0"
            )


class Profiler:
    """Profiles this rank while its steps are among the wanted ones.

    The loop calls `before` and `after` with every step, counted from 0, and `close` at the end.
    """

    def __init__(
        self,
        wanted: ProfileSteps | None,
        folder: Path,
        world: World,
        say: Callable[[str], None] = print,
    ) -> None:
        self.wanted = wanted
        if wanted and wanted.ranks is not None and world.rank not in wanted.ranks:
            self.wanted = None
        self.folder, self.world, self.say = folder, world, say
        self._running: Any = None
        self._first = self._done = 0

    def before(self, step: int) -> None:
        wanted = self.wanted
        if not wanted or self._running or not wanted.first <= step + 1 <= wanted.last:
            return
        from torch.profiler import ProfilerActivity, profile

        cuda = [ProfilerActivity.CUDA] if self.world.device.type == "cuda" else []
        self._first = step + 1
        self._running = profile(
            activities=[ProfilerActivity.CPU, *cuda], with_stack=True, acc_events=True
        )
        self._running.__enter__()

    def after(self, step: int) -> None:
        self._done = step + 1
        if self.wanted and self._done >= self.wanted.last:
            self.close()

    def close(self) -> None:
        """Write what was profiled, also where the run ends before the last of the wanted steps."""
        if not self._running:
            return
        running, self._running = self._running, None
        running.__exit__(None, None, None)
        first, last, rank = self._first, self._done, self.world.rank
        if last < first:  # an error in the first of them
            return
        folder = self.folder / f"steps-{first}-{last}"
        folder.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(folder / f"rank-{rank}.json.gz"))
        text = summary(running, steps=last - first + 1, cuda=self.world.device.type == "cuda")
        (folder / f"rank-{rank}.txt").write_text(text)
        self.say(f"profile of steps {first} to {last}: {folder}")


def summary(profile: Any, steps: int, cuda: bool) -> str:
    """The longest operations, and where the host waits for the device, as text."""
    from torch.autograd.profiler_util import EventList

    operations = EventList(
        [event for event in profile.key_averages() if not _PYTHON.search(event.key)],
        use_device="cuda" if cuda else None,
    )
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = operations.table(sort_by=order, row_limit=_ROWS, max_name_column_width=80)
    waits = [f"{e.key}: {e.count / steps:g} a step" for e in operations if _WAITS.match(e.key)]
    # By the innermost frame of Python that is neither torch's nor a stand-in.
    asked = Counter(
        next(_frames(event), "torch itself") for event in profile.events() if event.name in _ASKS
    )
    kind = "device" if cuda else "CPU"
    lines = [
        f"Operations by {kind} time of their own, {steps} step{'s' * (steps > 1)}.",
        table,
        "",
        "Where the host waits for the device:",
        *(waits or ["no call that waits was seen"]),
        "",
        "Who asked for a number from a tensor (on CUDA the host waits for it):",
        *([f"{n / steps:g} a step: {where}" for where, n in asked.most_common()] or ["nobody"]),
        "",
    ]
    return "\n".join(lines)


def _frames(event: Any) -> Iterator[str]:
    """Python frames above an event, innermost first, without torch's and `megatron/cpu.py`'s."""
    parent = event
    while parent is not None:
        name = parent.name
        if ".py(" in name and "torch/" not in name and "megacode/megatron/cpu.py" not in name:
            yield name
        parent = parent.cpu_parent
