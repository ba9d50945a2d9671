"""Text of a chat template -> ids, and where in the text each stands.

The tokenizer's own `encode` makes no control token of any text; here those that the template wrote
are found, as transformers finds them.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.errors import UserError
from megacode.tokenizer.chat import Span, alternatives
from megacode.tokenizer.fast import FastEncoder
from megacode.tokenizer.tokenizer import Tokenizer


class ChatEncoder:
    """Text of a chat template -> ids, with control tokens where the text spells them.

    The template writes control tokens. A turn that spells one would become one: ask
    `control_token_in` first. `fast`: used for vocabularies of bytes, whose ids have known widths.
    """

    def __init__(self, tokenizer: Tokenizer, fast: FastEncoder | None = None) -> None:
        self.tokenizer = tokenizer
        self._control = re.compile(f"({alternatives(frozenset(tokenizer.control_tokens))})")
        self._library = _with_control_tokens(tokenizer) if tokenizer.kind == "huggingface" else None
        self._fast, self._widths = fast, _widths(tokenizer, self._library) if fast else None

    def control_token_in(self, messages: Any) -> str | None:
        """A control token that a text of the messages spells."""
        if isinstance(messages, str):
            found = self._control.search(messages)
            return found[0] if found else None
        if isinstance(messages, Mapping):
            messages = list(messages.values())
        if isinstance(messages, (list, tuple)):
            return next(filter(None, map(self.control_token_in, messages)), None)
        return None

    def encode(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids [n], and the characters [start, end) of each, [n, 2]. As transformers encodes it."""
        if self._library is not None:
            encoding = self._library.encode(text, add_special_tokens=False)
            return _arrays(encoding.ids, encoding.offsets)
        ids: list[int] = []
        places: list[Span] = []
        position = 0
        for number, piece in enumerate(self._control.split(text)):
            if number % 2:
                ids.append(self.tokenizer.control_tokens[piece])
                places.append((position, position + len(piece)))
            elif piece:
                found, within = self._pieces(piece)
                ids += found
                places += [(position + start, position + end) for start, end in within]
            position += len(piece)
        return _arrays(ids, places)

    def encode_batch(
        self, texts: Sequence[str]
    ) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """`encode` of each text, on the calling thread; faster where there is a fast encoder."""
        if self._fast is None or self._widths is None or not texts:
            return [self.encode(text) for text in texts]
        plain: list[bytes] = []
        control: list[int] = []
        counts = []
        for text in texts:
            pieces = self._control.split(text)
            plain += [piece.encode() for piece in pieces[::2]]
            control += [self.tokenizer.control_tokens[piece] for piece in pieces[1::2]]
            counts.append(len(pieces) // 2)
        found, ends = self._fast.encode_documents(plain)
        # Control token k stands after the plain piece before it, of which each text has one more.
        before = np.arange(len(control)) + np.repeat(np.arange(len(texts)), counts)
        ids = np.insert(found.astype(np.int64), ends[before + 1], control)
        pieces_before = np.cumsum([0, *(count + 1 for count in counts)])
        edges = ends[pieces_before] + np.cumsum([0, *counts])
        out = []
        for text, first, end in zip(texts, edges.tolist(), edges[1:].tolist(), strict=False):
            own, data = ids[first:end], text.encode()
            after = np.cumsum(self._widths[own])
            if not len(own) or after[-1] != len(data):  # a normalizer changed the text
                out.append(self.encode(text))
                continue
            start = after - self._widths[own]
            if len(data) != len(text):  # bytes -> characters
                characters = np.cumsum(np.frombuffer(data, np.int8) >= -0x40, dtype=np.int64)
                start, after = characters[start] - 1, characters[after - 1]
            out.append((own, np.stack([start, after], axis=1)))
        return out

    def _pieces(self, text: str) -> tuple[list[int], list[Span]]:
        """Plain text with the other libraries, which give no places with the ids."""
        base: Any = self.tokenizer.base
        if self.tokenizer.kind == "sentencepiece":
            pieces = _sentencepieces(base.processor, text)
            return [piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces]
        ids = base.encoding.encode_ordinary(text)
        sizes = [len(base.encoding.decode_single_token_bytes(i)) for i in ids]
        ends = list(itertools.accumulate(sizes))
        # Characters before each byte of the text, as tokens are runs of bytes.
        characters = np.cumsum([(byte & 0xC0) != 0x80 for byte in text.encode()])
        return ids, [
            (int(characters[end - size]) - 1, int(characters[end - 1]))
            for end, size in zip(ends, sizes, strict=True)
        ]


def _widths(tokenizer: Tokenizer, library: Any) -> NDArray[np.int64] | None:
    """UTF-8 bytes of text that each id stands for, [vocab_size]; None if that is not fixed, or if
    control tokens take blanks around them too."""
    widths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    base: Any = tokenizer.base
    if tokenizer.kind == "tiktoken":
        for token in range(base.encoding.n_vocab):
            with contextlib.suppress(KeyError):
                widths[token] = len(base.encoding.decode_single_token_bytes(token))
    elif tokenizer.kind == "huggingface" and "ByteLevel" in str(base.tokenizer.pre_tokenizer):
        added = library.get_added_tokens_decoder()
        if any(one.lstrip or one.rstrip or one.single_word for one in added.values()):
            return None
        for name, token in library.get_vocab(with_added_tokens=False).items():
            widths[token] = len(name)  # a character for each byte
        for token, one in added.items():
            widths[token] = len(one.content.encode())
    else:
        return None
    for name, token in tokenizer.control_tokens.items():
        widths[token] = len(name.encode())
    return widths


def _sentencepieces(processor: Any, text: str) -> Any:
    """Pieces with `id`, `begin` and `end`; the argument's name changed after sentencepiece 0.2."""
    try:
        return processor.encode(text, return_type="proto").pieces
    except TypeError:
        return processor.encode(text, out_type="immutable_proto").pieces


def _with_control_tokens(tokenizer: Tokenizer) -> Any:
    """The `tokenizers` library set to find control tokens in text, the added ones too."""
    import tokenizers

    base: Any = tokenizer.base
    library = tokenizers.Tokenizer.from_str(base.tokenizer.to_str())
    library.encode_special_tokens = False
    added = [name for name in tokenizer.added_tokens if library.token_to_id(name) is None]
    library.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in added]
    )
    for name, token in tokenizer.added_tokens.items():
        if library.token_to_id(name) != token:
            raise UserError(
                f"{tokenizer.path}: ids of its vocabulary have gaps, so {name} cannot be added for "
                f"conversations as {token}; take it out of `tokenizer.added_tokens`"
            )
    return library


def _arrays(
    ids: Sequence[int], places: Sequence[Span]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.array(ids, dtype=np.int64), np.array(places, dtype=np.int64).reshape(-1, 2)
