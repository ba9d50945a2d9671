"""A tokenizer as gigatoken is told of it: its vocabulary and merges alone, and which documents it must not see.

`describe` takes what is on the lists below, which were compared with the reference library (what differs, and why the rest is
refused: fast_tokenizer.py), and refuses everything else with a reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from megacode.tokenizer.tokenizer import Tokenizer
from megacode.tokenizer.vocabularies import (
    HuggingFaceVocabulary,
    SentencePieceVocabulary,
    TiktokenVocabulary,
)

_MARK = "\u2581"  # SentencePiece's space


class Refused(Exception):
    """Why a tokenizer cannot take the fast path: one phrase."""


@dataclass(frozen=True)
class Description:
    """What gigatoken is told of a tokenizer (a tokenizer.json), and which documents it must not see."""

    contents: dict[str, Any]
    literals: tuple[str, ...] = ()
    """Regular expressions; a document in which one is found takes the exact path."""
    classes: bool = False
    """Text is split by Unicode classes (letters, digits)."""
    nfc: bool = False
    """Text is normalized to NFC first; only with `classes`."""


# ------------------------------------------------------------------------------------------------------- sentencepiece

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BPE = 2
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_LIKE_A_BYTE = re.compile(r"<0x..>", re.DOTALL)


def _describe_sentencepiece(vocabulary: SentencePieceVocabulary) -> Description:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(
        vocabulary.processor.serialized_model_proto()
    )
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    _refuse(trainer.model_type != _BPE, "a SentencePiece model that is not BPE")
    _refuse(not trainer.byte_fallback, "a SentencePiece model without byte fallback")
    _refuse(
        bool(normalizer.precompiled_charsmap),
        f"SentencePiece's normalizer {normalizer.name or 'of its own'}",
    )
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
    _refuse(
        any(c not in normal for piece in normal for c in piece),
        "a piece of characters that are no pieces",
    )
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
    return Description(
        contents, tuple(_symbol_pattern(s, normalizer.add_dummy_prefix) for s in symbols)
    )


def _symbol_pattern(symbol: str, prefixed: bool) -> str:
    """A user-defined symbol in raw text: its blanks are SentencePiece's mark there or a space, its first one may be
    the blank that SentencePiece puts in front of a document.
    """
    _refuse(
        not symbol.strip(_MARK + " \t\r\n"),
        f"the user-defined symbol {symbol!r}, which is in nearly every document",
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
_QWEN35 = (
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _TAIL
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?"
    + _UPPER
    + "*"
    + _LOWER
    + "+{0}|"
    + r"[^\r\n\p{L}\p{N}]?"
    + _UPPER
    + "+"
    + _LOWER
    + "*{0}|"
)
_O200K = (
    _CASED.replace("{0}", _CONTRACTION + "?") + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
)
_NEMOTRON = _CASED.replace("{0}", "") + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
_PATTERNS = (_GPT2, _LLAMA3, _QWEN2, _QWEN35, _O200K, _NEMOTRON)
"""Splitting patterns that gigatoken knows and that gave the same pieces in Oniguruma and in tiktoken."""


def _describe_huggingface(vocabulary: HuggingFaceVocabulary) -> Description:
    contents = json.loads(vocabulary.tokenizer.to_str())
    model = contents["model"]
    _refuse(model["type"] != "BPE", f"a tokenizer.json of type {model['type']}")
    _refuse(bool(model.get("dropout")), "BPE dropout")
    _refuse(
        bool(model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")),
        "marks on parts of words",
    )
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
    contents: Mapping[str, Any],
    model: Mapping[str, Any],
    merges: list[Any],
    literals: tuple[str, ...],
) -> Description:
    """BPE as SentencePiece does it, in a tokenizer.json (Llama 2, Mistral, Gemma)."""
    vocab = model["vocab"]
    _refuse(bool(model.get("ignore_merges")), "ignore_merges together with byte fallback")
    bytes_there = all(
        name in vocab or (byte < 0x80 and chr(byte) in vocab)
        for byte, name in enumerate(sorted(_BYTES))
    )
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
        _refuse(
            steps not in ([replace], [prepend, replace]), "a normalizer that is not SentencePiece's"
        )
    else:
        _refuse(bool(steps), "a normalizer before the pre-tokenizer")
        shape = {"type": "Metaspace", "replacement": _MARK}
        _refuse(
            {k: splitter.get(k) for k in shape} != shape, f"the pre-tokenizer {splitter['type']}"
        )
    made = _tokenizer_json(vocab, merges, True, normalizer, splitter)
    return Description(made, literals)


def _byte_level(
    contents: Mapping[str, Any],
    model: Mapping[str, Any],
    merges: list[Any],
    literals: tuple[str, ...],
) -> Description:
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
        raise Refused("a pre-tokenizer that is not on the list: " + (", ".join(kinds) or "none"))
    letters = set(_letters().values())
    vocab = {piece: i for piece, i in model["vocab"].items() if letters.issuperset(piece)}
    _refuse(
        any(part not in vocab for a, b in merges for part in (a, b, a + b)),
        "a merge outside the byte alphabet",
    )
    made = _tokenizer_json(
        vocab, merges, False, None, _split(pattern, blank), bool(model.get("ignore_merges"))
    )
    return Description(made, literals, classes=True, nfc=bool(steps))


def _flat(step: Mapping[str, Any] | None, children: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, out of their Sequence."""
    if step is None:
        return []
    return (
        [part for child in step[children] for part in _flat(child, children)]
        if step["type"] == "Sequence"
        else [step]
    )


# ------------------------------------------------------------------------------------------------------------ tiktoken

_WRITTEN = {
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": _GPT2,
    _CL100K: _CL100K,
    _CL100K.removesuffix("+"): _CL100K,
    **{pattern: pattern for pattern in _PATTERNS},
}
"""How tiktoken writes a pattern, to how gigatoken knows it."""


def _describe_tiktoken(vocabulary: TiktokenVocabulary) -> Description:
    pattern = _WRITTEN.get(vocabulary.pattern)
    if pattern is None:
        raise Refused("a splitting pattern that is not on the list")
    letters = _letters()
    by_rank = sorted(vocabulary.ranks, key=vocabulary.ranks.__getitem__)
    vocab = {"".join(letters[byte] for byte in token): vocabulary.ranks[token] for token in by_rank}
    # tiktoken takes a piece that is a token as it stands, which others call ignore_merges.
    made = _tokenizer_json(
        vocab, _merges(vocab, vocab), False, None, _split(pattern, False), ignore_merges=True
    )
    return Description(made, classes=True)


# -------------------------------------------------------------------------------------------- tokenizer.json, written


def describe(tokenizer: Tokenizer) -> Description:
    makers: dict[type, Callable[[Any], Description]] = {
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
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    level = {
        "type": "ByteLevel",
        "add_prefix_space": blank,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {"type": "Sequence", "pretokenizers": [split, level]}


@cache
def _letters() -> dict[int, str]:
    """The byte alphabet of GPT-2: printable Latin-1 stands for itself, the other bytes from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(0x100 + i) for i, b in enumerate(others)}}


def _refuse(condition: bool, reason: str) -> None:
    if condition:
        raise Refused(reason)
