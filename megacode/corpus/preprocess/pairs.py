"""Pair records (see `megacode.corpus.pairs.records`) -> ids with marks of their members' roles.

`members`: a document is a pair, each member a text of its own with begin- and end-of-document
tokens. `sequences`: a document is a query and one candidate after it, as one text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import orjson
from numpy.typing import NDArray

from megacode.corpus.pairs.records import PairRecord, pair_record
from megacode.corpus.preprocess.chat import TOO_LONG, SetAside
from megacode.corpus.preprocess.request import Request
from megacode.corpus.readers import BadRecord, Item
from megacode.data.loss_marks import EQUIVALENT, FIRST, OTHER, QUERY, join
from megacode.tokenizer.fast import FastEncoder, check_sample
from megacode.tokenizer.tokenizer import Tokenizer

BETWEEN = "\n\n"
"""Between the query and the candidate of a sequence; part of the query."""
_Member = tuple[str, int]
"""Text and role."""


def as_pairs(items: Iterable[Item]) -> Iterator[Item]:
    """Whole records -> documents whose text is the record, as JSON."""
    for item in items:
        if isinstance(item, BadRecord):
            yield item
            continue
        try:
            yield item._replace(raw=pair_record(item.values).line())
        except ValueError as error:
            yield BadRecord(str(error), item.record, item.raw)
        except TypeError:
            yield BadRecord("a text has a lone surrogate", item.record, item.raw)


class PairTokenizer:
    """Pairs to ids. `checked`: texts whose ids were compared with the reference library's."""

    checked = 0

    def __init__(self, request: Request, tokenizer: Tokenizer, fast: FastEncoder | None) -> None:
        self.request, self.tokenizer, self.fast = request, tokenizer, fast
        self._begin = [tokenizer.bos_id] if request.tokenizer.bos else []
        self._end = [tokenizer.eod_id]

    def read(self, items: Iterable[Item], from_parquet: bool) -> Iterator[Item]:
        """See `as_pairs`."""
        return as_pairs(items)

    def documents(
        self, raws: Sequence[bytes]
    ) -> list[list[tuple[str, NDArray[np.uint32]]] | SetAside]:
        """Of each record its documents, text and ids joined with marks, or why it has none."""
        documents = [list(self._documents(pair_record(orjson.loads(raw)))) for raw in raws]
        members = [one for own in documents for document in own for one in document]
        ids = iter(self._encode([text for text, _ in members]))
        out: list[list[tuple[str, NDArray[np.uint32]]] | SetAside] = []
        for own in documents:
            made = [("".join(text for text, _ in one), self._joined(one, ids)) for one in own]
            limit = self.request.max_tokens
            short = [one for one in made if limit is None or len(one[1]) <= limit]
            out.append(short if len(short) == len(made) else SetAside(TOO_LONG, harmless=True))
        return out

    def _documents(self, record: PairRecord) -> Iterator[list[_Member]]:
        candidates = [
            (one.text, EQUIVALENT if one.equivalent else OTHER) for one in record.candidates
        ]
        if self.request.pairs == "members":
            yield [(record.query, QUERY), *candidates]
            return
        for candidate in candidates:
            yield [(record.query + BETWEEN, QUERY), candidate]

    def _joined(
        self, document: Sequence[_Member], ids: Iterator[NDArray[np.uint32]]
    ) -> NDArray[np.uint32]:
        """Ids of a document with their marks. End-of-document tokens have no role."""
        apart = self.request.pairs == "members"
        parts: list[NDArray[np.uint32]] = []
        for number, (_, role) in enumerate(document):
            own = next(ids)
            if apart or number == 0:
                own = np.concatenate([np.array(self._begin, np.uint32), own])
            marks = np.full(len(own), role, dtype=np.uint8)
            if apart or number == 0:
                marks[:1] |= FIRST
            parts.append(join(own, marks))
            if apart or number == len(document) - 1:
                parts.append(np.array(self._end, np.uint32))
        return np.concatenate(parts)

    def _encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        if self.fast is None:
            return [np.array(own, np.uint32) for own in self.tokenizer.encode_batch(list(texts))]
        found, ends = self.fast.encode_documents([text.encode() for text in texts])
        ids = [found[a:b].astype(np.uint32) for a, b in itertools.pairwise(ends)]
        if texts:
            chosen = len(texts) // 2
            check_sample(self.tokenizer, "a pair", texts[chosen].encode(), ids[chosen])
            self.checked += 1
        return ids
