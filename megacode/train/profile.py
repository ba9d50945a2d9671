"""`megacode train --profile A:B`: torch's profiler over some steps, into the run folder.

`RUN/profile/steps-A-B/rank-N.json.gz` is a trace for Perfetto (ui.perfetto.dev) or chrome://tracing; `rank-N.txt` beside it
has the operations that took longest, and every place where the host waited for the device.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import EventList

from megacode.megatron.distributed import World
from megacode.run.profile_steps import ProfileSteps

# What makes a CUDA host wait; `aten::item` and its kin are what asked for it.
_WAITS = re.compile(r"^cuda(Stream|Device|Event)Synchronize$|^cudaMemcpy$")
_ASKS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero")
_PYTHON = re.compile(r"\.py\(\d+\)|^<built-in|^nn\.Module")  # the stack, which the trace has
_ROWS = 40


@dataclass
class Profiler:
    """Profiles this rank while its steps are among the wanted ones; the loop tells it where each step begins and ends."""

    wanted: ProfileSteps | None
    folder: Path
    world: World
    say: Callable[[str], None] = print
    _running: Any = field(default=None, repr=False)
    _began: int = 0
    _ended: int = 0

    def before(self, step: int) -> None:
        """Step `step` (counted from 0) is about to begin."""
        wanted = self.wanted
        if wanted is None or self._running or not wanted.first <= step + 1 <= wanted.last:
            return
        if wanted.ranks is not None and self.world.rank not in wanted.ranks:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.world.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._began = step + 1
        self._running = torch.profiler.profile(
            activities=activities, with_stack=True, acc_events=True
        )
        self._running.__enter__()

    def after(self, step: int) -> None:
        """Step `step` has ended."""
        self._ended = step + 1
        if self._running and self.wanted and self._ended >= self.wanted.last:
            self.close()

    def close(self) -> None:
        """Write what was profiled so far, also where the run ends before the last of the wanted steps; nothing if nothing was."""
        if not self._running:
            return
        running, self._running = self._running, None
        running.__exit__(None, None, None)
        last = self._ended
        if last < self._began:  # an error in the first of them
            return
        folder = self.folder / f"steps-{self._began}-{last}"
        folder.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(folder / f"rank-{self.world.rank}.json.gz"))
        text = summary(running, steps=last - self._began + 1, cuda=self.world.device.type == "cuda")
        (folder / f"rank-{self.world.rank}.txt").write_text(text)
        if self.world.is_main or (self.wanted and self.wanted.ranks and 0 not in self.wanted.ranks):
            self.say(f"profile of steps {self._began} to {last}: {folder}")


def summary(profile: Any, steps: int, cuda: bool) -> str:
    """The longest operations, and where the host waits for the device, as text."""
    operations = EventList(
        [event for event in profile.key_averages() if not _PYTHON.search(event.key)],
        use_device="cuda" if cuda else None,
    )
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = operations.table(sort_by=order, row_limit=_ROWS, max_name_column_width=80)
    waits = [
        f"{event.key}: {event.count / steps:g} a step"
        for event in operations
        if _WAITS.match(event.key)
    ]
    asked = [f"{count / steps:g} a step: {where}" for where, count in _asked(profile).most_common()]
    lines = [
        f"Operations by {'device' if cuda else 'CPU'} time of their own, {steps} step{'s' * (steps > 1)}.",
        table,
        "",
        "Where the host waits for the device:",
        *(waits or ["no call that waits was seen"]),
        "",
        "Who asked for a number from a tensor (on CUDA the host waits for it):",
        *(asked or ["nobody"]),
        "",
    ]
    return "\n".join(lines)


def _asked(profile: Any) -> Counter[str]:
    """How often a tensor was turned into a number, by the innermost frame of Python that is somebody's own."""
    found: Counter[str] = Counter()
    for event in profile.events():
        if event.name in _ASKS:
            found[next(_frames(event), "torch itself")] += 1
    return found


def _frames(event: Any) -> Iterator[str]:
    """Python frames above an event, innermost first, without torch's and the stand-ins of `megatron/cpu.py`."""
    parent = event
    while parent is not None:
        name = parent.name
        if ".py(" in name and "torch/" not in name and "megacode/megatron/cpu.py" not in name:
            yield name
        parent = parent.cpu_parent
