"""Mistakes in a request that can be told before any work."""

from __future__ import annotations

import json
from collections.abc import Sequence

from megacode.corpus.conversations import NO_CONVERSATION
from megacode.corpus.inputs import InputFile
from megacode.corpus.preprocess.chat import as_conversations, template_of
from megacode.corpus.preprocess.conditions import FILE_FIELDS, field_value
from megacode.corpus.preprocess.pairs import as_pairs
from megacode.corpus.preprocess.request import Request
from megacode.corpus.readers import BadRecord, read_input
from megacode.errors import UserError
from megacode.tokenizer.tokenizer import Tokenizer


def check_tokens(request: Request, tokenizer: Tokenizer) -> None:
    if request.tokenizer.bos:
        _ = tokenizer.bos_id
    if request.tokenizer.eod:
        _ = tokenizer.eod_id
    if request.repository:
        for name in ("<reponame>", "<filename>"):
            try:
                tokenizer.token_id(name)
            except UserError as error:
                raise UserError(f"--repository puts {name} in front: {error}") from None
        if not request.path:
            raise UserError(
                "--repository needs --path, the field with a file's path in its repository"
            )


def check_records(request: Request, tokenizer: Tokenizer) -> None:
    """UserError: the chat template cannot be used, or an option does not go with conversations or
    pairs."""
    if request.repository:
        kind = "--conversations" if request.conversations else "--pairs"
        raise UserError(f"--repository: joins files of code; take it away, or {kind}")
    if request.conversations:
        template_of(request, tokenizer)
        return
    if request.too_long in ("left", "right"):
        raise UserError(f"--too-long {request.too_long}: cuts a pair; give error or drop")
    if request.validation:
        raise UserError(
            "--validation: would part the pairs of a file; give it to `megacode pairs`, and "
            "tokenize both of its files"
        )
    if request.deduplicate:
        raise UserError("--deduplicate: compares whole records; take it away with --pairs")
    if not request.tokenizer.eod:
        raise UserError("--no-eod: members of a pair need it to stand apart; take it away")


def check_fields(files: Sequence[InputFile], request: Request) -> None:
    """UserError if the first hundred records show that a field's name is wrong."""
    text_field, columns = request.text_field, request.columns
    missing = NO_CONVERSATION if request.conversations else f"no field {text_field!r}"
    pairs = request.pairs is not None
    seen = 0
    found: set[str] = set()
    known: dict[str, None] = {}
    first: tuple[InputFile, BadRecord] | None = None
    for file in [
        *[f for f in files if f.form != "file"][:3],
        *[f for f in files if f.form == "file"][:3],
    ]:
        items = read_input(file, text_field, columns=columns)
        if request.conversations:
            items = as_conversations(items, file.form == "parquet")
        elif pairs:
            items = as_pairs(items)
        for _, item in zip(range(100), items, strict=False):
            if isinstance(item, BadRecord):
                first = first or (file, item)
                if item.reason != missing and not pairs:
                    seen += 1  # bad in another way: no reason to doubt the field
                if file.form == "jsonl" and item.raw.strip() in (b"[", b"{"):
                    raise UserError(
                        f"{file.path}: not JSON lines but one JSON value over many lines; "
                        "write one object a line"
                    )
                continue
            seen += 1
            found |= {name for name in columns if field_value(file, item, name) is not None}
            known |= dict.fromkeys(item.values)
    if first and not seen and request.conversations:
        raise UserError(f"{first[0].path}: no conversations: a record {missing}{_fields(*first)}")
    if first and not seen and pairs:
        raise UserError(
            f"{first[0].path}: no pairs: {first[1].reason}; `megacode pairs` makes them"
        )
    if first and not seen:
        raise UserError(
            f"{first[0].path}: no field {text_field!r} in its records{_fields(*first)}; "
            "give --text-field"
        )
    for name in columns:
        if seen and known and name not in found:
            raise UserError(
                f"{files[0].path}: no field {name!r} in the first records (they have "
                f"{', '.join(list(known)[:12])}; of every file there are {', '.join(FILE_FIELDS)})"
            )


def _fields(file: InputFile, bad: BadRecord) -> str:
    if file.form == "parquet":
        import pyarrow.parquet

        names = pyarrow.parquet.ParquetFile(file.path).schema_arrow.names
    else:
        record = json.loads(bad.raw)
        names = list(record) if isinstance(record, dict) else []
    return f" (they have {', '.join(map(str, names[:12]))})" if names else ""
