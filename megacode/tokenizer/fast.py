"""Documents to ids with gigatoken (Rust), the same ids as the reference library, several times faster.

gigatoken never reads the tokenizer's own file here: what it loads by itself differs (below). It gets a description
made of the vocabulary and merges alone, without any control token, so no text can become one. A tokenizer is taken
only if everything that it does is on the lists of fast_description.py; whatever is not leads to
a reason instead of an encoder (`load_fast`). A few documents always take the exact path (`FastEncoder.is_exact`).

What differs in gigatoken 0.10, found by comparing ids on hostile and random text:

- SentencePiece: its reading of a .model finds `<s>` and `</s>` in text, and lets merges spell `<unk>` or `<0x0A>`
  (which turns that text into a newline). Neither is in our description.
- SentencePiece: `remove_extra_whitespaces` strips tabs and newlines where SentencePiece strips spaces alone, and
  character maps (nmt_nfkc and like) work on grapheme clusters; unigram, character and word models and those without
  byte fallback do not load. All are refused.
- SentencePiece: merges rank by score. With equal scores SentencePiece takes the leftmost pair; refused. With distinct
  scores every piece has one way to be built, so it does not matter in which order the ways are listed.
- SentencePiece and JSON with byte fallback: a piece spelt like a byte, `<0x0a>`, counts as the byte; refused.
- User-defined symbols and added tokens that are not special are found in text with rules of each library's own
  (normalized, lstrip, rstrip, single_word): a document that holds one takes the exact path.
- Byte-level JSON: `behavior`, `invert` and unknown neighbours of a `Split` are ignored, no pre-tokenizer at all is read
  as GPT-2's, a character outside the byte alphabet in the vocabulary as UTF-8. Only the exact shapes are taken.
- cl100k: as tiktoken writes it, exact; in a tokenizer.json, digits are grouped otherwise (Oniguruma reads `{1,3}+`
  as a repeat); the older spelling without `\\s++$` ends a document otherwise. Both are refused.
- Letters, digits and marks newer than a library's Unicode tables split otherwise: documents with one that Unicode 15
  or later brought, or outside the plane 0 and its best known neighbours, take the exact path.
- NFC: tokenizers orders marks by a table of about Unicode 9, gigatoken by one of 16. Python normalizes here, unless
  the text has a mark that Unicode 3.2 did not know (that table comes with Python): then the exact path.
- Caches of byte-level tokenizers grow without bound: the backend is made anew after `_RENEW_BYTES`.

gigatoken trusts bytes to be well-formed UTF-8 and does not look; so must the caller see to it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.errors import UserError
from megacode.tokenizer.fast_description import Refused, describe
from megacode.tokenizer.tokenizer import Tokenizer

FAST_MODULES = ("gigatoken", "awkward")
"""What encoding imports, half a second's worth."""
_RENEW_BYTES = 2**30
_ASCII = bytes(range(0x80))


@dataclass
class _Backend:
    """gigatoken's tokenizer, made anew once its caches have seen enough."""

    contents: str
    tokenizer: Any = field(init=False)
    seen: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        import gigatoken

        self.tokenizer, self.seen = gigatoken.Tokenizer.from_json(self.contents), 0

    def encode(self, texts: list[bytes]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Ids one after another [tokens] and how many each document has [n], on this thread."""
        import awkward

        if not texts:
            return np.zeros(0, np.uint32), np.zeros(0, np.int64)
        if self.seen > _RENEW_BYTES:
            self.renew()
        self.seen += sum(map(len, texts))
        rows = self.tokenizer.encode_batch(texts, parallel=False)
        ids, counts = awkward.to_numpy(awkward.flatten(rows)), awkward.to_numpy(awkward.num(rows))
        return ids.astype(np.uint32, copy=False), counts.astype(np.int64, copy=False)


@dataclass(frozen=True)
class FastEncoder:
    """Documents to ids on the calling thread; each worker process loads its own."""

    tokenizer: Tokenizer
    backend: _Backend
    literals: re.Pattern[bytes] | None
    classes: bool
    nfc: bool

    def encode_documents(
        self, texts: Sequence[bytes]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Documents, well-formed UTF-8, to their ids one after another (uint32 [tokens]) and where each begins and
        ends (int64 [n + 1], from 0). No BOS or EOD. Batches of a megabyte and more are fastest.
        """
        given = [self._given(text) for text in texts] if self._looks else list(texts)
        exact = [i for i, text in enumerate(given) if text is None] if self._looks else []
        ids, counts = self.backend.encode([text or b"" for text in given])
        if exact:
            ids, counts = self._spliced(texts, exact, ids, counts)
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        return ids, offsets

    def is_exact(self, text: bytes) -> bool:
        """Whether this document takes the reference library's path."""
        return self._given(text) is None

    def _given(self, text: bytes) -> bytes | None:
        """What gigatoken gets for a document; None if it takes the exact path."""
        if self.literals is not None and self.literals.search(text) is not None:
            return None
        if not self.classes or text.isascii():
            return text
        others = text.translate(None, _ASCII).decode()
        if _unsettled().search(others) is not None:
            return None
        # Without a character that composes, text is NFC already; most is.
        if (
            self.nfc
            and _composing().search(others)
            and not unicodedata.is_normalized("NFC", decoded := text.decode())
        ):
            return (
                None
                if _young_marks().search(decoded)
                else unicodedata.normalize("NFC", decoded).encode()
            )
        return text

    @property
    def _looks(self) -> bool:
        return self.literals is not None or self.classes

    def _spliced(
        self,
        texts: Sequence[bytes],
        exact: list[int],
        ids: NDArray[np.uint32],
        counts: NDArray[np.int64],
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """`ids` with the exact documents' put in where `counts` has an empty one."""
        ends = np.cumsum(counts)
        parts: list[NDArray[np.uint32]] = []
        counts, done = counts.copy(), 0
        for i, reference in zip(
            exact, self.tokenizer.encode_batch([texts[i].decode() for i in exact]), strict=True
        ):
            parts += [ids[done : ends[i]], np.asarray(reference, np.uint32)]
            counts[i], done = len(reference), int(ends[i])
        return np.concatenate([*parts, ids[done:]]), counts


def load_fast(tokenizer: Tokenizer) -> FastEncoder | str:
    """The fast encoder of a tokenizer, or in one phrase why it can only take the exact path."""
    try:
        import awkward  # noqa: F401
        import gigatoken  # noqa: F401

        description = describe(tokenizer)
        encoder = FastEncoder(
            tokenizer=tokenizer,
            backend=_Backend(json.dumps(description.contents)),
            literals=re.compile("|".join(description.literals).encode())
            if description.literals
            else None,
            classes=description.classes,
            nfc=description.nfc,
        )
    except Refused as refused:
        return str(refused)
    except ImportError as error:
        return f"{error.name} is not installed"
    except Exception as error:
        return f"gigatoken does not load it: {str(error).strip()[:200]}"
    return _difference(encoder) or encoder


def check_sample(tokenizer: Tokenizer, document: str, text: bytes, ids: NDArray[np.uint32]) -> None:
    """Compare a document's ids from the fast path with the reference library's. UserError at the first difference.

    `document` names it in the error; `text` is well-formed UTF-8.
    """
    reference = np.asarray(tokenizer.encode(text.decode()), np.uint32)
    if np.array_equal(reference, ids):
        return
    shared = min(len(reference), len(ids))
    unequal = np.flatnonzero(reference[:shared] != ids[:shared])
    at = int(unequal[0]) if len(unequal) else shared
    shown = [str(row[at]) if at < len(row) else "nothing" for row in (ids, reference)]
    raise UserError(
        f"{document}: the fast tokenizer's ids differ from the reference library's at position {at} "
        f"({shown[0]} instead of {shown[1]}); what it wrote cannot be trusted: tokenize this corpus anew on the exact "
        "path, and keep this document for a report of the defect"
    )


# --------------------------------------------------------------------------------------------------------- self-check

_HOSTILE: tuple[str, ...] = (
    *("", " ", "   ", "\t", "\n", "\r\n", "\0", "a", " a", "a ", "  a  b  ", "\n\n\n", " \n \n  ", "a\n \n", "\t\tx\n\t"),
    *("<s></s><unk><pad>", "<0x0A>", "<0x41>", "a<s>b</s>", "<|endoftext|>", "<|fim_prefix|>x<|im_end|>"),
    *("\u2581", "\u2581a\u2581\u2581b \u2581", "\ufffd", "\ufeffx", "a\u200bb\u200dc\u00adx\u2028y\u0085z\u00a0w\u3000v"),
    *("e\u0301 \u1100\u1161 \u212b \u0344", "naïve café ÜBUNG ſtraße ǅ", "I'm you'LL we'Ve it'ſ 'd'S 's's", "'t", "it'"),
    *("1234567890 12 ٣٤ Ⅷ ½ x²", "日本語テキスト。中文，한국어", "العربية עברית हिन्दी ไทย", "👨\u200d👩\u200d👧 🇩🇪 𝔘𝔫𝔦"),
    *("if (x==y){return\tfoo[i++];}//---=====\n", 'print(f"{a!r}")\r\n    # ...\r\n', "snake_case CamelCase HTTPServer2"),
    *("/a/b.c?d=e&f=%20", "!!!\n\n/x", "a.b,c;d:e!f?g)h\"i", "x" * 300, " " * 300, "=" * 300, "ab" * 200, "\n" * 99),
    *("\U0010ffff\U000e0001\uffff\ufdd0\u0378\u088f\u1e9e", "\u0300\u0300x", "9" * 50, "word " * 50, "\u2581" * 40),
)  # fmt: skip


def _difference(encoder: FastEncoder) -> str | None:
    """Encode hostile texts both ways, twice for what caches change; the first difference as a reason."""
    tokenizer = encoder.tokenizer
    names = [name for i, name in enumerate(tokenizer.control_tokens) if i < 300]
    texts = [*_HOSTILE, *names, *(f"x{name} {name}y" for name in names), "".join(_HOSTILE)]
    reference = tokenizer.encode_batch(texts)
    for _ in range(2):
        ids, offsets = encoder.encode_documents([text.encode() for text in texts])
        for i, text in enumerate(texts):
            if ids[offsets[i] : offsets[i + 1]].tolist() != reference[i]:
                return f"gigatoken gives other ids than the reference library for {text[:40]!r}"
    return None


# ------------------------------------------------------------------------------------------------- unsettled characters

_SETTLED_PLANES = ((0x1D400, 0x1D7FF), (0x1F000, 0x1FAFF), (0x20000, 0x2A6D6))
"""Mathematical letters, pictographs and CJK extension B: what text has of the higher planes, and does not change."""
_LATER = "\u0897\u088f\u0c5c\u0cdc\u0cf3\u0ece\u1acf-\u1aeb\u1b4e\u1b4f\u1b7f\u1c89\u1c8a\ua7cb-\ua7d2\ua7d4\ua7da-\ua7dc\ua7f1"
"""Letters and marks of plane 0 that Unicode 15 to 17 brought, which Python's own table may or may not know."""


@cache
def _unsettled() -> re.Pattern[str]:
    """Finds a character that two libraries may see as different classes: unassigned or young."""
    unassigned = [c for c in range(0x80, 0x10000) if unicodedata.category(chr(c)) == "Cn"]
    spans = [(c, c) for c in unassigned]
    gaps = [0xFFFF, *(edge for span in _SETTLED_PLANES for edge in span), 0x110000]
    spans += [(low + 1, high - 1) for low, high in zip(gaps[::2], gaps[1::2], strict=True)]
    return re.compile(
        "[" + _LATER + "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in spans) + "]"
    )


_PLANE = [chr(c) for c in range(0x80, 0x10000) if not 0xD800 <= c < 0xE000]


@cache
def _composing() -> re.Pattern[str]:
    """Finds a character of plane 0 that text in NFC may not have, or not everywhere."""
    pairs = (unicodedata.decomposition(c).split() for c in _PLANE)
    second = {
        chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and not pair[0].startswith("<")
    }
    found = [
        c
        for c in _PLANE
        if unicodedata.combining(c) or not unicodedata.is_normalized("NFC", c) or c in second
    ]
    return re.compile("[\u1160-\u11ff" + "".join(found) + "]")


@cache
def _young_marks() -> re.Pattern[str]:
    """Finds a character of plane 0 whose part in NFC came after Unicode 3.2."""
    partakes = [c for c in _PLANE if unicodedata.combining(c) or unicodedata.decomposition(c)]
    young = [c for c in partakes if unicodedata.ucd_3_2_0.category(c) == "Cn"]
    return re.compile("[" + "".join(young) + "]")
