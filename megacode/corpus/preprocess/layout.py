"""Parts laid end to end while later ones are still being tokenized, so that no token lies on the disk twice.

`laid-G.bin` in the job's folder holds the tokens of group G's first parts, in order; `laid.jsonl` says, a line a part, what
lies where. A part's own .bin goes when its line is written. Killed at any moment, the lines tell what is there; the
part's checksums tell whether it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import xxhash

from megacode.corpus.preprocess.copying import copy_range
from megacode.corpus.preprocess.counts import Group
from megacode.corpus.preprocess.finished_parts import Finished, file_checksum, finished_part, part_file
from megacode.corpus.preprocess.splitting import CorpusPart, Unit, unit_parts
from megacode.files import write_text


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
        for line in self._lines():
            self.places[line["part"]] = {Group.parse(name): tuple(place) for name, place in line["groups"].items()}
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
                    path, start, size = part_file(self.folder, part, f"{about['number']}.{ending}"), 0, None
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

    def advance(self) -> None:
        """Lay whatever parts are next and finished."""
        while not self.broken and (part := self._next()):
            if part.name not in self.places:
                finished = finished_part(self.folder, part)
                if finished is None:
                    return
                self._lay(part, finished)
            self._chunk += 1

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

    def _lay(self, part: CorpusPart, finished: Finished) -> None:
        places: dict[Group, tuple[int, int]] = {}
        for group, about in finished.groups.items():
            offset, size = self.sizes.get(group, 0), about["bytes"]
            with open(self._laid(group), "ab", buffering=0) as file:
                file.truncate(offset)
            with open(self._laid(group), "r+b", buffering=0) as file:
                copy_range(part_file(self.folder, part, f"{about['number']}.bin"), 0, file.fileno(), offset, size)
            places[group] = (offset, size)
        with open(self.folder / "laid.jsonl", "a", encoding="utf-8") as file:
            line = {"part": part.name, "groups": {str(group): place for group, place in places.items()}}
            file.write(json.dumps(line) + "\n")
        self.places[part.name] = places
        for group, about in finished.groups.items():
            self.sizes[group] = sum(places[group])
            part_file(self.folder, part, f"{about['number']}.bin").unlink()

    def whole(self, parts: Sequence[tuple[CorpusPart, Finished]], group: Group) -> Path | None:
        """The file that holds all of a group's tokens in order, if there is one."""
        done = 0
        for part, finished in parts:
            if group in finished.groups:
                if self.broken or self.places.get(part.name, {}).get(group, (-1, 0))[0] != done:
                    return None
                done += finished.groups[group]["bytes"]
        return self._laid(group)
