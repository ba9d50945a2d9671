"""Conversations -> ids with loss marks (see `megacode.data.loss_marks`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from megacode.corpus.conversations import (
    BadConversationError,
    Conversation,
    read_conversation,
    without_nulls,
)
from megacode.corpus.preprocess.request import Request
from megacode.corpus.readers import BadRecord, Item
from megacode.data.loss_marks import ANSWER, FIRST, LAST_ANSWER, join, trained
from megacode.errors import UserError
from megacode.tokenizer.chat import ChatTemplate, Span, TemplateError, load_chat_template
from megacode.tokenizer.chat_encoding import ChatEncoder
from megacode.tokenizer.fast import FastEncoder
from megacode.tokenizer.tokenizer import Tokenizer, well_formed


def as_conversations(items: Iterable[Item], from_parquet: bool) -> Iterator[Item]:
    """Whole records -> documents whose text is the conversation, as JSON (see `parse`)."""
    for item in items:
        if isinstance(item, BadRecord):
            yield item
            continue
        try:
            found = read_conversation(without_nulls(item.values) if from_parquet else item.values)
        except BadConversationError as error:
            yield BadRecord(str(error), item.record, item.raw)
            continue
        try:
            yield item._replace(raw=orjson.dumps(vars(found), default=str))
        except TypeError:  # lone surrogates, or numbers beyond 64 bits
            text = json.dumps(vars(found), ensure_ascii=False, default=str)
            whole = well_formed(text)
            yield item._replace(raw=whole.encode(), repaired=whole != text)


def parse(raw: bytes) -> Conversation:
    """The conversation of a document."""
    return Conversation(**orjson.loads(raw))


class SetAside(NamedTuple):
    """A conversation that gives no document. `harmless`: no sign that the corpus is damaged."""

    reason: str
    harmless: bool = False


TOO_LONG = "longer than --max-tokens"


class ConversationTokenizer:
    """Conversations to ids, by the chat template that a request names.

    `checked`: conversations whose ids were compared with the reference library's.
    """

    checked = 0

    def __init__(self, request: Request, tokenizer: Tokenizer, fast: FastEncoder | None) -> None:
        self.request, self.fast = request, fast
        self.template = template_of(request, tokenizer)
        self.encoder = ChatEncoder(tokenizer, fast)
        section = request.tokenizer
        self._begin = tokenizer.bos_id if section.bos else None
        self._end = tokenizer.eod_id if section.eod and not self.template.turn_end() else None

    def read(self, items: Iterable[Item], from_parquet: bool) -> Iterator[Item]:
        """See `as_conversations`."""
        return as_conversations(items, from_parquet)

    def documents(
        self, raws: Sequence[bytes]
    ) -> list[list[tuple[str, NDArray[np.uint32]]] | SetAside]:
        """`encode` of what `read` gave; a conversation is one document."""
        found = self.encode([parse(raw) for raw in raws])
        return [one if isinstance(one, SetAside) else [one] for one in found]

    def encode(
        self, conversations: Sequence[Conversation]
    ) -> list[tuple[str, NDArray[np.uint32]] | SetAside]:
        """Of each conversation its text and its ids joined with their marks, or why it has none."""
        rendered = [self._render(conversation) for conversation in conversations]
        shown = [one for one in rendered if not isinstance(one, SetAside)]
        batch = self.encoder.encode_batch([text for text, _ in shown])
        self._check([text for text, _ in shown], [ids for ids, _ in batch])
        encoded = iter(batch)
        out: list[tuple[str, NDArray[np.uint32]] | SetAside] = []
        for one in rendered:
            if isinstance(one, SetAside):
                out.append(one)
                continue
            document = self._document(*next(encoded), *one)
            out.append(document if isinstance(document, SetAside) else (one[0], document))
        return out

    def _check(self, texts: Sequence[str], ids: Sequence[NDArray[np.int64]]) -> None:
        """Compare one of a batch with the reference library."""
        if not texts or not self.fast:
            return
        chosen = len(texts) // 2
        if not np.array_equal(ids[chosen], self.encoder.encode(texts[chosen])[0]):
            raise UserError(
                "the fast tokenizer's ids of a conversation differ from the reference library's "
                f"({texts[chosen][:40]!r} ...); tokenize it anew with --exact, and keep the "
                "conversation for a report of the defect"
            )
        self.checked += 1

    def _render(self, conversation: Conversation) -> tuple[str, list[Span | None]] | SetAside:
        """The text, and the spans of answers; None for one that is not to be learned."""
        messages, tools = conversation.messages, conversation.tools
        if control := self.encoder.control_token_in([messages, tools, conversation.variables]):
            return SetAside(f"spells the control token {control}")
        try:
            text, found = self.template.render_answers(messages, tools, **conversation.variables)
        except TemplateError as error:
            return SetAside(str(error))
        spans: list[Span | None] = list(found)
        if not conversation.untrained:
            return text, spans
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) != len(answers):
            return SetAside("the chat template does not show each answer apart, to leave one out")
        left_out = conversation.untrained
        return text, [None if i in left_out else s for i, s in zip(answers, spans, strict=True)]

    def _document(
        self,
        ids: NDArray[np.int64],
        places: NDArray[np.int64],
        text: str,
        spans: list[Span | None],
    ) -> NDArray[np.uint32] | SetAside:
        marks = np.zeros(len(ids), dtype=np.uint8)
        for number, span in enumerate(spans):
            if span:
                inside = (places[:, 0] < span[1]) & (places[:, 1] > span[0])
                marks[inside] |= ANSWER | (LAST_ANSWER if number == len(spans) - 1 else 0)
        if self._begin is not None and (not len(ids) or ids[0] != self._begin):
            ids, marks = np.append(self._begin, ids), np.append(np.uint8(0), marks)
        if self._end is not None and (not len(ids) or ids[-1] != self._end):
            ends = bool(spans and spans[-1] and spans[-1][1] == len(text))
            ids = np.append(ids, self._end)
            marks = np.append(marks, np.uint8((ANSWER | LAST_ANSWER) if ends else 0))
        limit = self.request.max_tokens
        if limit is not None and len(ids) > limit:
            policy = self.request.too_long
            if policy in ("error", "drop"):
                return SetAside(TOO_LONG, harmless=True)
            kept = slice(-limit, None) if policy == "left" else slice(limit)
            ids, marks = ids[kept], marks[kept]
        if len(marks):
            marks[0] |= FIRST
        if not trained(marks, "answers").any():
            return SetAside("no token to train on", harmless=True)
        return join(ids, marks)


def notes_on(template: ChatTemplate) -> list[str]:
    """What a template writes that is in no record."""
    notes = []
    if system := template.default_system():
        notes.append(f"the chat template writes a system prompt of its own: {system!r}")
    if "strftime_now" in template.text:
        notes.append("the chat template writes the current date; another day gives other ids")
    return notes


def template_of(request: Request, tokenizer: Tokenizer) -> ChatTemplate:
    """UserError: there is no template, or it cannot be used."""
    return load_chat_template(tokenizer, request.template, "--template")
