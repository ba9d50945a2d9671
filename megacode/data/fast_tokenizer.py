"""Documents to ids with gigatoken (Rust), the same ids as the reference library, several times faster.

gigatoken never reads the tokenizer's own file here: what it loads by itself differs (below). It gets a description
made of the vocabulary and merges alone, without any control token, so no text can become one. A tokenizer is taken
only if everything that it does is on the lists below, which were compared with the reference; whatever is not leads to
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.data.tokenizer import Tokenizer
from megacode.data.vocabularies import HuggingFaceVocabulary, SentencePieceVocabulary, TiktokenVocabulary
from megacode.errors import UserError

FAST_MODULES = ("gigatoken", "awkward")
"""What encoding imports, half a second's worth."""
_MARK = "\u2581"  # SentencePiece's space
_RENEW_BYTES = 2**30
_ASCII = bytes(range(0x80))


class _Refused(Exception):
    """Why a tokenizer cannot take the fast path: one phrase."""


@dataclass(frozen=True)
class _Description:
    """What gigatoken is told of a tokenizer (a tokenizer.json), and which documents it must not see."""

    contents: dict[str, Any]
    literals: tuple[str, ...] = ()
    """Regular expressions; a document in which one is found takes the exact path."""
    classes: bool = False
    """Text is split by Unicode classes (letters, digits)."""
    nfc: bool = False
    """Text is normalized to NFC first; only with `classes`."""


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

    def encode_documents(self, texts: Sequence[bytes]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
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
        if self.nfc and _composing().search(others) and not unicodedata.is_normalized("NFC", decoded := text.decode()):
            return None if _young_marks().search(decoded) else unicodedata.normalize("NFC", decoded).encode()
        return text

    @property
    def _looks(self) -> bool:
        return self.literals is not None or self.classes

    def _spliced(
        self, texts: Sequence[bytes], exact: list[int], ids: NDArray[np.uint32], counts: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """`ids` with the exact documents' put in where `counts` has an empty one."""
        ends = np.cumsum(counts)
        parts: list[NDArray[np.uint32]] = []
        counts, done = counts.copy(), 0
        for i, reference in zip(exact, self.tokenizer.encode_batch([texts[i].decode() for i in exact]), strict=True):
            parts += [ids[done : ends[i]], np.asarray(reference, np.uint32)]
            counts[i], done = len(reference), int(ends[i])
        return np.concatenate([*parts, ids[done:]]), counts


def load_fast(tokenizer: Tokenizer) -> FastEncoder | str:
    """The fast encoder of a tokenizer, or in one phrase why it can only take the exact path."""
    try:
        import awkward  # noqa: F401
        import gigatoken  # noqa: F401

        description = _describe(tokenizer)
        encoder = FastEncoder(
            tokenizer=tokenizer,
            backend=_Backend(json.dumps(description.contents)),
            literals=re.compile("|".join(description.literals).encode()) if description.literals else None,
            classes=description.classes,
            nfc=description.nfc,
        )
    except _Refused as refused:
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
_LATER = (
    "\u0897\u088f\u0c5c\u0cdc\u0cf3\u0ece\u1acf-\u1aeb\u1b4e\u1b4f\u1b7f\u1c89\u1c8a"
    "\ua7cb-\ua7d2\ua7d4\ua7da-\ua7dc\ua7f1"
)
"""Letters and marks of plane 0 that Unicode 15 to 17 brought, which Python's own table may or may not know."""


@cache
def _unsettled() -> re.Pattern[str]:
    """Finds a character that two libraries may see as different classes: unassigned or young."""
    unassigned = [c for c in range(0x80, 0x10000) if unicodedata.category(chr(c)) == "Cn"]
    spans = [(c, c) for c in unassigned]
    gaps = [0xFFFF, *(edge for span in _SETTLED_PLANES for edge in span), 0x110000]
    spans += [(low + 1, high - 1) for low, high in zip(gaps[::2], gaps[1::2], strict=True)]
    return re.compile("[" + _LATER + "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in spans) + "]")


_PLANE = [chr(c) for c in range(0x80, 0x10000) if not 0xD800 <= c < 0xE000]


@cache
def _composing() -> re.Pattern[str]:
    """Finds a character of plane 0 that text in NFC may not have, or not everywhere."""
    pairs = (unicodedata.decomposition(c).split() for c in _PLANE)
    second = {chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and not pair[0].startswith("<")}
    found = [c for c in _PLANE if unicodedata.combining(c) or not unicodedata.is_normalized("NFC", c) or c in second]
    return re.compile("[\u1160-\u11ff" + "".join(found) + "]")


@cache
def _young_marks() -> re.Pattern[str]:
    """Finds a character of plane 0 whose part in NFC came after Unicode 3.2."""
    partakes = [c for c in _PLANE if unicodedata.combining(c) or unicodedata.decomposition(c)]
    young = [c for c in partakes if unicodedata.ucd_3_2_0.category(c) == "Cn"]
    return re.compile("[" + "".join(young) + "]")


# ------------------------------------------------------------------------------------------------------- sentencepiece

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BPE = 2
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_LIKE_A_BYTE = re.compile(r"<0x..>", re.DOTALL)


def _describe_sentencepiece(vocabulary: SentencePieceVocabulary) -> _Description:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.processor.serialized_model_proto())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    _refuse(trainer.model_type != _BPE, "a SentencePiece model that is not BPE")
    _refuse(not trainer.byte_fallback, "a SentencePiece model without byte fallback")
    _refuse(bool(normalizer.precompiled_charsmap), f"SentencePiece's normalizer {normalizer.name or 'of its own'}")
    _refuse(normalizer.remove_extra_whitespaces, "SentencePiece's remove_extra_whitespaces")
    _refuse(not normalizer.escape_whitespaces, "SentencePiece without escape_whitespaces")
    _refuse(trainer.treat_whitespace_as_suffix, "SentencePiece's treat_whitespace_as_suffix")
    kinds: dict[int, dict[str, int]] = {kind: {} for kind in range(1, 7)}
    for i, piece in enumerate(model.pieces):
        kinds[piece.type][piece.piece] = i
    normal = kinds[_NORMAL]
    _refuse(bool(kinds[_UNUSED]), "a SentencePiece model with unused pieces")
    _refuse(set(kinds[_BYTE]) != _BYTES, "a SentencePiece model without a piece for every byte")
    _refuse(any(_LIKE_A_BYTE.fullmatch(piece) for piece in normal), "a piece spelt like a byte")
    _refuse(any(not piece or " " in piece for piece in normal), "a piece with a blank in it")
    _refuse(any(c not in normal for piece in normal for c in piece), "a piece of characters that are no pieces")
    scores = {piece: model.pieces[i].score for piece, i in normal.items() if len(piece) > 1}
    _refuse(len(set(scores.values())) != len(scores), "pieces of equal score")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
    prefix = [{"type": "Prepend", "prepend": _MARK}] if normalizer.add_dummy_prefix else []
    by_score = sorted(scores, key=lambda piece: -scores[piece])
    contents = _tokenizer_json(
        vocab={**normal, **kinds[_BYTE]},
        merges=_merges(by_score, normal),
        byte_fallback=True,
        normalizer={"type": "Sequence", "normalizers": [*prefix, replace]},
    )
    symbols = kinds[_USER_DEFINED]
    return _Description(contents, tuple(_symbol_pattern(s, normalizer.add_dummy_prefix) for s in symbols))


def _symbol_pattern(symbol: str, prefixed: bool) -> str:
    """A user-defined symbol in raw text: its blanks are SentencePiece's mark there or a space, its first one may be
    the blank that SentencePiece puts in front of a document.
    """
    _refuse(
        not symbol.strip(_MARK + " \t\r\n"), f"the user-defined symbol {symbol!r}, which is in nearly every document"
    )
    raw = re.escape(symbol).replace(_MARK, f"(?:{_MARK}| )").replace("\\ ", f"(?:{_MARK}| )")
    return raw if not (prefixed and symbol[0] == _MARK) else f"{raw}|\\A{re.escape(symbol[1:])}"


def _merges(pieces: Iterable[str], parts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to build each piece of two others, in the order of `pieces`."""
    return [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in parts and piece[i:] in parts
    ]


# ------------------------------------------------------------------------------------------------- tokenizer.json, read

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_QWEN2 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_QWEN35 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+{0}|" + r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*{0}|"
)
_O200K = _CASED.replace("{0}", _CONTRACTION + "?") + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
_NEMOTRON = _CASED.replace("{0}", "") + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
_PATTERNS = (_GPT2, _LLAMA3, _QWEN2, _QWEN35, _O200K, _NEMOTRON)
"""Splitting patterns that gigatoken knows and that gave the same pieces in Oniguruma and in tiktoken."""


def _describe_huggingface(vocabulary: HuggingFaceVocabulary) -> _Description:
    contents = json.loads(vocabulary.tokenizer.to_str())
    model = contents["model"]
    _refuse(model["type"] != "BPE", f"a tokenizer.json of type {model['type']}")
    _refuse(bool(model.get("dropout")), "BPE dropout")
    _refuse(bool(model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")), "marks on parts of words")
    merges = [tuple(merge) for merge in model["merges"]]
    literals = _found_in_text(contents)
    describe = _byte_fallback if model["byte_fallback"] else _byte_level
    return describe(contents, model, merges, literals)


def _found_in_text(contents: Mapping[str, Any]) -> tuple[str, ...]:
    """Added tokens that are not special, as patterns. The library finds these in text, the special ones nowhere."""
    plain = [token for token in contents["added_tokens"] if not token["special"]]
    for token in plain:
        name = token["content"]
        _refuse(not name.strip(), f"the added token {name!r}, which is in nearly every document")
        # A normalizer changes what such a token is compared with. These ASCII characters come out of no other one.
        known = (
            contents["normalizer"] is None
            or not token["normalized"]
            or (name.isascii() and not set(name) & set(";`K "))
        )
        _refuse(not known, f"the added token {name!r}, which is found in normalized text")
    return tuple(re.escape(token["content"]) for token in plain)


def _byte_fallback(
    contents: Mapping[str, Any], model: Mapping[str, Any], merges: list[Any], literals: tuple[str, ...]
) -> _Description:
    """BPE as SentencePiece does it, in a tokenizer.json (Llama 2, Mistral, Gemma)."""
    vocab = model["vocab"]
    _refuse(bool(model.get("ignore_merges")), "ignore_merges together with byte fallback")
    bytes_there = all(name in vocab or (byte < 0x80 and chr(byte) in vocab) for byte, name in enumerate(sorted(_BYTES)))
    _refuse(not bytes_there, "a vocabulary without a piece for every byte")
    _refuse(
        any(_LIKE_A_BYTE.fullmatch(piece) and piece not in _BYTES for piece in vocab)
        or any(_LIKE_A_BYTE.fullmatch(part) for a, b in merges for part in (a, b, a + b)),
        "a piece spelt like a byte",
    )
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
    prepend = {"type": "Prepend", "prepend": _MARK}
    normalizer, splitter = contents["normalizer"], contents["pre_tokenizer"]
    steps = _flat(normalizer, "normalizers")
    if splitter is None:
        _refuse(steps not in ([replace], [prepend, replace]), "a normalizer that is not SentencePiece's")
    else:
        _refuse(bool(steps), "a normalizer before the pre-tokenizer")
        shape = {"type": "Metaspace", "replacement": _MARK}
        _refuse({k: splitter.get(k) for k in shape} != shape, f"the pre-tokenizer {splitter['type']}")
    made = _tokenizer_json(vocab, merges, True, normalizer, splitter)
    return _Description(made, literals)


def _byte_level(
    contents: Mapping[str, Any], model: Mapping[str, Any], merges: list[Any], literals: tuple[str, ...]
) -> _Description:
    """BPE of bytes (GPT-2, Llama 3, Qwen)."""
    steps = _flat(contents["normalizer"], "normalizers")
    _refuse(steps not in ([], [{"type": "NFC"}]), "a normalizer that is not NFC")
    splitters = _flat(contents["pre_tokenizer"], "pretokenizers")
    kinds = [splitter["type"] for splitter in splitters]
    pattern, blank = _GPT2, False
    if kinds == ["ByteLevel"] and splitters[0]["use_regex"]:
        blank = splitters[0]["add_prefix_space"]
    elif kinds == ["Split", "ByteLevel"]:
        split, after = splitters
        pattern = split["pattern"].get("Regex", "")
        _refuse(split["behavior"] != "Isolated" or split["invert"], "a Split that does not isolate")
        _refuse(after["use_regex"] or after["add_prefix_space"], "a Split followed by another")
        _refuse(pattern not in _PATTERNS, "a splitting pattern that is not on the list")
    else:
        raise _Refused("a pre-tokenizer that is not on the list: " + (", ".join(kinds) or "none"))
    letters = set(_letters().values())
    vocab = {piece: i for piece, i in model["vocab"].items() if letters.issuperset(piece)}
    _refuse(any(part not in vocab for a, b in merges for part in (a, b, a + b)), "a merge outside the byte alphabet")
    made = _tokenizer_json(vocab, merges, False, None, _split(pattern, blank), bool(model.get("ignore_merges")))
    return _Description(made, literals, classes=True, nfc=bool(steps))


def _flat(step: Mapping[str, Any] | None, children: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, out of their Sequence."""
    if step is None:
        return []
    return (
        [part for child in step[children] for part in _flat(child, children)] if step["type"] == "Sequence" else [step]
    )


# ------------------------------------------------------------------------------------------------------------ tiktoken

_WRITTEN = {
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": _GPT2,
    _CL100K: _CL100K,
    _CL100K.removesuffix("+"): _CL100K,
    **{pattern: pattern for pattern in _PATTERNS},
}
"""How tiktoken writes a pattern, to how gigatoken knows it."""


def _describe_tiktoken(vocabulary: TiktokenVocabulary) -> _Description:
    pattern = _WRITTEN.get(vocabulary.pattern)
    if pattern is None:
        raise _Refused("a splitting pattern that is not on the list")
    letters = _letters()
    by_rank = sorted(vocabulary.ranks, key=vocabulary.ranks.__getitem__)
    vocab = {"".join(letters[byte] for byte in token): vocabulary.ranks[token] for token in by_rank}
    # tiktoken takes a piece that is a token as it stands, which others call ignore_merges.
    made = _tokenizer_json(vocab, _merges(vocab, vocab), False, None, _split(pattern, False), ignore_merges=True)
    return _Description(made, classes=True)


# -------------------------------------------------------------------------------------------- tokenizer.json, written


def _describe(tokenizer: Tokenizer) -> _Description:
    makers: dict[type, Callable[[Any], _Description]] = {
        SentencePieceVocabulary: _describe_sentencepiece,
        HuggingFaceVocabulary: _describe_huggingface,
        TiktokenVocabulary: _describe_tiktoken,
    }
    return makers[type(tokenizer.base)](tokenizer.base)


def _tokenizer_json(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    byte_fallback: bool,
    normalizer: Any = None,
    pre_tokenizer: Any = None,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "model": {
            "type": "BPE",
            "vocab": dict(vocab),
            "merges": [list(merge) for merge in merges],
            "byte_fallback": byte_fallback,
            "ignore_merges": ignore_merges,
        },
    }


def _split(pattern: str, blank: bool) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": blank, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


@cache
def _letters() -> dict[int, str]:
    """The byte alphabet of GPT-2: printable Latin-1 stands for itself, the other bytes from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(0x100 + i) for i, b in enumerate(others)}}


def _refuse(condition: bool, reason: str) -> None:
    if condition:
        raise _Refused(reason)
