"""What a synthesis leaves: rows, rejects with their reasons, a manifest, the journal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megacode.corpus.preprocess.existing import inputs_digest
from megacode.corpus.preprocess.finished_parts import file_checksum
from megacode.errors import UserError
from megacode.files import replace_file, write_json
from megacode.synthesize.checks import row_text
from megacode.synthesize.served import Totals
from megacode.synthesize.templates import steps
from megacode.version import __version__

if TYPE_CHECKING:
    from megacode.synthesize.make import Counts, Judged, OpenSynthesis

FORMAT = 1
"""Of the rows: raised when equal settings and replies would give others."""


@dataclass(frozen=True)
class Row:
    """An accepted record: `messages` for tuning, the same as `text` for continued pre-training.

    Attributes:
        fields: the record as JSON.
        steps: lines of the answer that are not blank.
    """

    id: str
    fields: Mapping[str, Any]
    steps: int

    @staticmethod
    def of(judged: Judged, opened: OpenSynthesis) -> Row | None:
        made = judged.outcome.row
        if made is None:
            return None
        one = judged.candidate
        messages = made.get("messages")
        text = row_text(made)
        answer = messages[-1]["content"] if messages else text
        identity = f"{one.parent}#{one.sample}"
        origin = {
            "operator": opened.file.operator,
            "parent": one.parent,
            "sample": one.sample,
            "models": {role: model.model for role, model in opened.file.models.items()},
        }
        fields = {"id": identity, **made, "text": text, "synthesis": origin}
        return Row(identity, fields, len(steps(answer)))


@dataclass(frozen=True)
class Files:
    """Names within the folder; those of a shard carry its number."""

    folder: Path
    rows: Path
    rejects: Path
    manifest: Path
    journal: Path

    @staticmethod
    def of(folder: Path, shard: tuple[int, int]) -> Files:
        ending = "" if shard[1] == 1 else f"-{shard[0]:05}-of-{shard[1]:05}"
        names = ("rows{}.jsonl", "rejects{}.jsonl", "manifest{}.json", "journal{}.sqlite")
        return Files(folder, *(folder / name.format(ending) for name in names))

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Rows and rejects appear whole, when the block ends."""
        with replace_file(self.rows) as rows, replace_file(self.rejects) as rejects:
            yield Writer(rows, rejects)


@dataclass(frozen=True)
class Writer:
    rows: BinaryIO
    rejects: BinaryIO

    def accept(self, row: Row) -> None:
        self.rows.write(_line(row.fields))

    def reject(self, one: Judged, reason: str, detail: str) -> None:
        told = {
            "parent": one.candidate.parent,
            "sample": one.candidate.sample,
            "reason": reason,
            **({"detail": detail} if detail else {}),
            "replies": one.replies,
        }
        self.rejects.write(_line(told))


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def is_made(opened: OpenSynthesis, files: Files, overwrite: bool) -> bool:
    """Whether the folder holds what is asked for, whole.

    Raises:
        UserError: it holds what other settings made.
    """
    try:
        note = json.loads(files.manifest.read_text(encoding="utf-8"))
        made, sums = note["settings"], note["outputs"]
    except (OSError, ValueError, KeyError, TypeError):
        # With its journal, a synthesis was killed between its rows and its manifest.
        if files.rows.exists() and not files.journal.exists() and not overwrite:
            raise UserError(
                f"{files.rows}: already there, without the manifest of a synthesis; choose another "
                "output or give --overwrite"
            ) from None
        return False
    asked = settings(opened)
    different = [key for key in asked if asked[key] != made.get(key)]
    if different and not overwrite:
        raise UserError(
            f"{files.rows}: already there, made from other settings ({', '.join(different)} "
            "differ); choose another output or give --overwrite (replies are kept)"
        )
    paths = (files.rows, files.rejects)
    return not different and all(
        path.exists() and file_checksum(path) == sums.get(path.name) for path in paths
    )


def settings(opened: OpenSynthesis) -> dict[str, Any]:
    """Everything that decides the rows beside the replies, as JSON."""
    file = opened.file
    models = {
        role: {"model": model.model, "parameters": model.parameters}
        for role, model in file.models.items()
    }
    chosen = {
        "format": FORMAT,
        "inputs": inputs_digest(opened.inputs),
        "operator": opened.operator.digest,
        "models": models,
        "shard": list(opened.shard),
        **file.model_dump(include={"fields", "samples", "target", "candidates", "checks"}),
    }
    return dict(json.loads(json.dumps(chosen)))


def write_manifest(
    opened: OpenSynthesis,
    files: Files,
    counts: Counts,
    totals: Mapping[str, Totals],
    journal: str,
) -> None:
    """Comes last: with it the outputs are whole."""
    write_json(
        files.manifest,
        {
            "kind": "megacode synthesis",
            "megacode": __version__,
            "name": opened.file.name,
            "settings": settings(opened),
            "operator": opened.file.operator,
            "prompts": opened.operator.prompt_digests,
            "prices": {role: one.price.model_dump() for role, one in opened.file.models.items()},
            "counts": {
                "candidates": counts.candidates,
                "accepted": counts.accepted,
                "rejected": dict(counts.rejected.most_common()),
                "records passed over": dict(counts.skipped.most_common()),
            },
            "usage": {role: asdict(one.everything) for role, one in totals.items()},
            "journal": journal,
            "outputs": {path.name: file_checksum(path) for path in (files.rows, files.rejects)},
        },
    )
