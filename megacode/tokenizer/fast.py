"""Documents to ids with gigatoken (Rust): the reference library's ids, several times faster.

gigatoken does not read the tokenizer's own file, because what it would make of it differs (below).
It gets a description of the vocabulary and the merges, without control tokens, so no text becomes
one. A tokenizer is taken if all that it does is on the lists of `fast_description`, and if a
self-check finds equal ids; else `load_fast` gives a reason. Some documents take the reference
library's path all the same (`FastEncoder.is_exact`).

What differs in gigatoken 0.10, found by comparing ids on hostile and random text:

- SentencePiece: it finds `<s>` and `</s>` in text, and lets merges spell `<unk>` or `<0x0A>` (which
  turns that text into a newline). Neither is in our description.
- SentencePiece: `remove_extra_whitespaces` strips tabs and newlines where SentencePiece strips
  spaces alone, and character maps (nmt_nfkc and others) work on grapheme clusters. Unigram,
  character and word models and those without byte fallback do not load. All are refused.
- SentencePiece: merges rank by score. Of equal scores SentencePiece takes the leftmost pair;
  refused. With distinct scores every piece has one way to be built, so the order of the ways does
  not matter.
- SentencePiece and JSON with byte fallback: a piece spelt like a byte, `<0x0a>`, counts as the
  byte; refused.
- User-defined symbols and added tokens that are not special are found in text by rules of each
  library (normalized, lstrip, rstrip, single_word): a document that holds one takes the exact path.
- Byte-level JSON: `behavior`, `invert` and unknown neighbours of a `Split` are ignored; no
  pre-tokenizer at all is read as GPT-2's; a character of the vocabulary outside the byte alphabet
  is read as UTF-8. Only the exact shapes are taken.
- cl100k: as tiktoken writes it, exact. In a tokenizer.json, digits are grouped otherwise (Oniguruma
  reads `{1,3}+` as a repeat); the older spelling without `\\s++$` ends a document otherwise. Both
  are refused.
- Letters, digits and marks newer than a library's Unicode tables split otherwise: a document takes
  the exact path if it has one of Unicode 15 or later, or one outside plane 0 and a few settled
  blocks.
- NFC: tokenizers orders marks by a table of about Unicode 9, gigatoken by one of 16. Text that is
  in NFC is the same for both; other text takes the exact path.
- Caches of byte-level tokenizers grow without bound: the backend is made anew after `_RENEW_BYTES`.

gigatoken takes bytes for well-formed UTF-8 without a check; the caller has to make sure.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.errors import UserError
from megacode.tokenizer.fast_description import Refused, describe
from megacode.tokenizer.tokenizer import Tokenizer, UnencodableError

FAST_MODULES = ("gigatoken", "awkward")
"""What encoding imports: half a second."""
_RENEW_BYTES = 2**30
_ASCII = bytes(range(0x80))

Ids = NDArray[np.uint32]


class _Backend:
    """gigatoken's tokenizer, made anew once its caches have seen enough text."""

    def __init__(self, contents: str) -> None:
        self.contents = contents
        self.renew()

    def renew(self) -> None:
        import awkward
        import gigatoken

        self.awkward: Any = awkward
        self.tokenizer, self.seen = gigatoken.Tokenizer.from_json(self.contents), 0

    def encode(self, texts: list[bytes]) -> tuple[Ids, NDArray[np.int64]]:
        """Ids one after another [tokens] and how many each document has [n], on this thread."""
        if not texts:
            return np.zeros(0, np.uint32), np.zeros(0, np.int64)
        if self.seen > _RENEW_BYTES:
            self.renew()
        self.seen += sum(map(len, texts))
        rows = self.tokenizer.encode_batch(texts, parallel=False)
        ids = self.awkward.to_numpy(self.awkward.flatten(rows))
        counts = self.awkward.to_numpy(self.awkward.num(rows))
        return ids.astype(np.uint32, copy=False), counts.astype(np.int64, copy=False)


@dataclass(frozen=True)
class FastEncoder:
    """Documents to ids on the calling thread; each worker process loads its own.

    Attributes:
        literals: found in documents that take the exact path.
        classes: text is split by Unicode classes.
        nfc: text is normalized to NFC first.
    """

    tokenizer: Tokenizer
    backend: _Backend
    literals: re.Pattern[bytes] | None
    classes: bool
    nfc: bool

    def encode_documents(self, texts: Sequence[bytes]) -> tuple[Ids, NDArray[np.int64]]:
        """Documents, well-formed UTF-8, to ids without BOS or EOD. Fastest for a megabyte and more.

        Raises:
            UnencodableError: the reference library, which some of them need, fails on them.

        Returns:
            ids of all documents one after another, uint32 [tokens]; where each begins and ends in
            them, int64 [n + 1], from 0.
        """
        exact = [i for i, text in enumerate(texts) if self.is_exact(text)]
        given = list(texts)
        for i in exact:
            given[i] = b""
        ids, counts = self.backend.encode(given)
        if exact:
            ends, parts, done = np.cumsum(counts), [], 0
            try:
                references = self.tokenizer.encode_batch([texts[i].decode() for i in exact])
            except UnencodableError as error:
                reasons = {exact[i]: reason for i, reason in error.reasons.items()}
                raise UnencodableError(error.path, reasons) from None
            counts = counts.copy()
            for i, reference in zip(exact, references, strict=True):
                parts += [ids[done : ends[i]], np.asarray(reference, np.uint32)]
                counts[i], done = len(reference), int(ends[i])
            ids = np.concatenate([*parts, ids[done:]])
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        return ids, offsets

    def is_exact(self, text: bytes) -> bool:
        """Whether this document takes the reference library's path."""
        if self.literals is not None and self.literals.search(text):
            return True
        if not self.classes or text.isascii():
            return False
        if _unsettled().search(text.translate(None, _ASCII).decode()):
            return True
        return self.nfc and not unicodedata.is_normalized("NFC", text.decode())


def load_fast(tokenizer: Tokenizer) -> FastEncoder | str:
    """The fast encoder of a tokenizer, or in one phrase why it can only take the exact path."""
    try:
        found = describe(tokenizer)
        literals = re.compile("|".join(found.literals).encode()) if found.literals else None
        backend = _Backend(json.dumps(found.contents))
    except Refused as refused:
        return str(refused)
    except ImportError as error:
        return f"{error.name} is not installed"
    except Exception as error:
        return f"gigatoken does not load it: {str(error).strip()[:200]}"
    encoder = FastEncoder(tokenizer, backend, literals, found.classes, found.nfc)
    return _difference(encoder) or encoder


def check_sample(tokenizer: Tokenizer, document: str, text: bytes, ids: NDArray[np.uint32]) -> bool:
    """Compare a document's ids from the fast path with the reference library's.

    `document` names it in the error; `text` is well-formed UTF-8.

    Returns:
        Whether they were compared: not where that library fails on the text.

    Raises:
        UserError: they differ.
    """
    try:
        reference = np.asarray(tokenizer.encode(text.decode()), np.uint32)
    except UnencodableError:
        return False
    if np.array_equal(reference, ids):
        return True
    shared = min(len(reference), len(ids))
    unequal = np.flatnonzero(reference[:shared] != ids[:shared])
    at = int(unequal[0]) if len(unequal) else shared
    shown = [str(row[at]) if at < len(row) else "nothing" for row in (ids, reference)]
    raise UserError(
        f"{document}: the fast tokenizer's ids differ from the reference library's at position "
        f"{at} ({shown[0]} instead of {shown[1]}); what it wrote cannot be trusted: tokenize this "
        "corpus anew with --exact, and keep this document for a report of the defect"
    )


# --- self-check

_HOSTILE: tuple[str, ...] = (
    *("", " ", "   ", "\t", "\n", "\r\n", "\0", "a", " a", "a ", "  a  b  ", "\n\n\n", " \n \n  "),
    *("a\n \n", "\t\tx\n\t", "<s></s><unk><pad>", "<0x0A>", "<0x41>", "a<s>b</s>", "<|endoftext|>"),
    *("<|fim_prefix|>x<|im_end|>", "\u2581", "\u2581a\u2581\u2581b \u2581", "\ufffd", "\ufeffx"),
    *("a\u200bb\u200dc\u00adx\u2028y\u0085z\u00a0w\u3000v", "e\u0301 \u1100\u1161 \u212b \u0344"),
    *("naïve café ÜBUNG ſtraße ǅ", "I'm you'LL we'Ve it'ſ 'd'S 's's", "'t", "it'"),
    *("1234567890 12 ٣٤ Ⅷ ½ x²", "日本語テキスト。中文，한국어", "العربية עברית हिन्दी ไทย"),
    *("👨\u200d👩\u200d👧 🇩🇪 𝔘𝔫𝔦", "if (x==y){return\tfoo[i++];}//---=====\n"),
    *('print(f"{a!r}")\r\n    # ...\r\n', "snake_case CamelCase HTTPServer2", "/a/b.c?d=e&f=%20"),
    *("!!!\n\n/x", "a.b,c;d:e!f?g)h\"i", "x" * 300, " " * 300, "=" * 300, "ab" * 200, "\n" * 99),
    *("\U0010ffff\U000e0001\uffff\ufdd0\u0378\u088f\u1e9e", "\u0300\u0300x", "9" * 50),
    *("word " * 50, "\u2581" * 40),
)  # fmt: skip


def _difference(encoder: FastEncoder) -> str | None:
    """Encode hostile texts both ways, twice because of caches; the first difference as a reason."""
    tokenizer = encoder.tokenizer
    names = list(tokenizer.control_tokens)[:300]
    texts = [*_HOSTILE, *names, *(f"x{name} {name}y" for name in names), "".join(_HOSTILE)]
    reference = tokenizer.encode_batch(texts)
    for _ in range(2):
        ids, offsets = encoder.encode_documents([text.encode() for text in texts])
        for i, text in enumerate(texts):
            if ids[offsets[i] : offsets[i + 1]].tolist() != reference[i]:
                return f"gigatoken gives other ids than the reference library for {text[:40]!r}"
    return None


# --- unsettled characters

_SETTLED_PLANES = ((0x1D400, 0x1D7FF), (0x1F000, 0x1FAFF), (0x20000, 0x2A6D6))
"""Mathematical letters, pictographs and CJK extension B: settled, and frequent outside plane 0."""
_LATER = (
    "\u0897\u088f\u0c5c\u0cdc\u0cf3\u0ece\u1acf-\u1aeb\u1b4e\u1b4f\u1b7f\u1c89\u1c8a"
    "\ua7cb-\ua7d2\ua7d4\ua7da-\ua7dc\ua7f1"
)
"""Letters and marks of plane 0 in Unicode 15 to 17, which Python's table may or may not have."""


@cache
def _unsettled() -> re.Pattern[str]:
    """Finds a character that two libraries may put into different classes: unassigned or young."""
    unassigned = [chr(c) for c in range(0x80, 0x10000) if unicodedata.category(chr(c)) == "Cn"]
    gaps = [0xFFFF, *(edge for span in _SETTLED_PLANES for edge in span), 0x110000]
    spans = zip(gaps[::2], gaps[1::2], strict=True)
    outside = "".join(f"{chr(low + 1)}-{chr(high - 1)}" for low, high in spans)
    return re.compile(f"[{_LATER}{''.join(unassigned)}{outside}]")
