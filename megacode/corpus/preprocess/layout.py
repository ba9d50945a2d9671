"""Parts laid end to end while later ones are still being tokenized, so that no token lies on the disk twice.

`laid-G.bin` in the job's folder holds the tokens of group G's first parts, in order; `laid.jsonl` says, a line a part, what
lies where. Workers copy (`Lay`), and the coordinator keeps the lines. A part's own .bin goes after its line is written. Killed
at any moment, the lines tell what is there; the part's checksums tell whether it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from megacode.corpus.preprocess.copying import copy_range
from megacode.corpus.preprocess.counts import Group
from megacode.corpus.preprocess.finished_parts import (
    Finished,
    file_checksum,
    finished_part,
    part_file,
)
from megacode.corpus.preprocess.splitting import CorpusPart, Unit, unit_parts
from megacode.files import write_text


@dataclass(frozen=True)
class Lay:
    """Copying one part's tokens behind those of the parts before it: a task for any process, as it takes the time of a disk."""

    part: str
    moves: tuple[tuple[Path, Path, int, int], ...]
    """Of each group: the part's file, the file to lay it in, offset there, bytes."""
    remove: tuple[Path, ...]
    """Files of parts that are laid."""

    def copy(self) -> None:
        for source, laid, offset, size in self.moves:
            out = os.open(laid, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                copy_range(source, 0, out, offset, size)
            finally:
                os.close(out)
        for path in self.remove:
            path.unlink()


class Layout:
    """Where the tokens of finished parts are: in a file of their own, or laid."""

    def __init__(self, folder: Path, units: Sequence[Unit]) -> None:
        self.folder, self.units = folder, units
        self.places: dict[str, dict[Group, tuple[int, int]]] = {}
        """By part and group: offset and size in the group's laid file."""
        self.sizes: dict[Group, int] = {}
        self.broken = False
        """A laid part was found damaged: nothing more is laid, and all of it has to be copied at the end."""
        self._unit = self._chunk = 0
        self._under_way: dict[str, tuple[dict[Group, tuple[int, int]], list[Path]]] = {}
        self._ended: set[str] = set()
        self._copied: list[Path] = []
        """Files of laid parts that are not removed yet."""
        for line in self._lines():
            self.places[line["part"]] = {
                Group.parse(name): tuple(place) for name, place in line["groups"].items()
            }
            for group, (offset, size) in self.places[line["part"]].items():
                self.sizes[group] = offset + size
        for group, size in self.sizes.items():
            path = self._laid(group)
            if path.exists() and path.stat().st_size > size:  # killed between the data and its line
                os.truncate(path, size)

    def _lines(self) -> list[dict]:
        path = self.folder / "laid.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # killed in the middle of a line
            write_text(path, whole)
        return [json.loads(line) for line in whole.splitlines()]

    def _laid(self, group: Group) -> Path:
        return self.folder / f"laid-{xxhash.xxh3_64_hexdigest(str(group).encode())}.bin"

    def place(self, part: CorpusPart, finished: Finished, group: Group) -> tuple[Path, int]:
        """File that holds a group's tokens of a finished part, and where they begin in it (bytes)."""
        laid = self.places.get(part.name)
        if laid is not None:
            return self._laid(group), laid[group][0]
        return part_file(self.folder, part, f"{finished.groups[group]['number']}.bin"), 0

    def undamaged(self, part: CorpusPart, finished: Finished) -> bool:
        """Whether a part's files are what its checksums say; they need not be after a power cut."""
        try:
            for group, about in finished.groups.items():
                for ending, digest in about["checksums"].items():
                    path, start, size = (
                        part_file(self.folder, part, f"{about['number']}.{ending}"),
                        0,
                        None,
                    )
                    if ending == "bin":
                        (path, start), size = self.place(part, finished, group), about["bytes"]
                    if file_checksum(path, start, size) != digest:
                        return False
        except OSError:
            return False
        return True

    def forget(self, part: CorpusPart) -> None:
        """A part is to be done again."""
        part_file(self.folder, part, "json").unlink()
        self.broken = self.places.pop(part.name, None) is not None or self.broken

    def ready(self) -> Iterator[Lay]:
        """What can be laid next: parts that are finished, behind all that are laid. The caller does each, then says so (`done`);
        several may be under way."""
        while not self.broken and (part := self._next()):
            finished = None if part.name in self.places else finished_part(self.folder, part)
            if finished is None and part.name not in self.places:
                return
            self._chunk += 1
            if finished is not None:
                yield self._assign(part, finished)

    def _assign(self, part: CorpusPart, finished: Finished) -> Lay:
        """The part's place in each group's file; the next part's is behind it."""
        places: dict[Group, tuple[int, int]] = {}
        moves = []
        for group, about in finished.groups.items():
            offset, size = self.sizes.get(group, 0), about["bytes"]
            places[group] = (offset, size)
            self.sizes[group] = offset + size
            moves.append(
                (
                    part_file(self.folder, part, f"{about['number']}.bin"),
                    self._laid(group),
                    offset,
                    size,
                )
            )
        self._under_way[part.name] = (places, [move[0] for move in moves])
        remove, self._copied = tuple(self._copied), []
        return Lay(part.name, tuple(moves), remove)

    def done(self, name: str) -> None:
        """The copying of a part's tokens has ended. Its own copy goes with a later `Lay`, or with `finish`."""
        self._ended.add(name)
        while (
            self._under_way and (first := next(iter(self._under_way))) in self._ended
        ):  # lines stand in order
            places, files = self._under_way.pop(first)
            with open(self.folder / "laid.jsonl", "a", encoding="utf-8") as file:
                line = {
                    "part": first,
                    "groups": {str(group): place for group, place in places.items()},
                }
                file.write(json.dumps(line) + "\n")
            self.places[first] = places
            self._copied += files

    def finish(self) -> None:
        """Lay what is left, in this process."""
        for lay in self.ready():
            lay.copy()
            self.done(lay.part)
        for path in self._copied:
            path.unlink()
        self._copied = []

    def _next(self) -> CorpusPart | None:
        while self._unit < len(self.units):
            unit = self.units[self._unit]
            parts = unit_parts(self.folder, unit)
            if parts is None:
                return replace(unit.part, chunk=self._chunk)
            if self._chunk < len(parts):
                return parts[self._chunk]
            self._unit, self._chunk = self._unit + 1, 0
        return None

    def whole(self, parts: Sequence[tuple[CorpusPart, Finished]], group: Group) -> Path | None:
        """The file that holds all of a group's tokens in order, if there is one."""
        done = 0
        for part, finished in parts:
            if group in finished.groups:
                if self.broken or self.places.get(part.name, {}).get(group, (-1, 0))[0] != done:
                    return None
                done += finished.groups[group]["bytes"]
        return self._laid(group)
