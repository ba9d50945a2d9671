"""Text of a chat template -> ids, and where in the text each stands.

The tokenizer's own `encode` makes no control token of any text; here those that the template wrote
are found, as transformers finds them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.errors import UserError
from megacode.tokenizer.chat import Span, alternatives
from megacode.tokenizer.tokenizer import Tokenizer


class ChatEncoder:
    """Text of a chat template -> ids, with control tokens where the text spells them.

    The template writes control tokens. A turn that spells one would become one: ask
    `control_token_in` first.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._control = re.compile(f"({alternatives(frozenset(tokenizer.control_tokens))})")
        self._library = _with_control_tokens(tokenizer) if tokenizer.kind == "huggingface" else None

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
