"""Fields of a record, and of the file it is in."""

from __future__ import annotations

from typing import Any

from megacode.corpus.inputs import InputFile
from megacode.corpus.readers import TextDocument, lookup

FILE_FIELDS = ("file.name", "file.path", "file.suffix", "file.folder", "file.repository")


def field_value(file: InputFile, document: TextDocument, name: str) -> Any:
    """A field of the record, else what is known of the file it is in; None if it has no such field."""
    try:
        return lookup(document.values, name)
    except (LookupError, TypeError):
        pass
    path = file.path
    if name == "file.name":
        return path.name
    if name == "file.path":
        return path.relative_to(file.base).as_posix()
    if name == "file.suffix":
        return path.suffix
    if name == "file.folder":
        return path.parent.name
    if name == "file.repository":  # the first folder below the input
        inside = path.relative_to(file.base).parts
        return inside[0] if len(inside) > 1 else file.base.name
    return None
