"""A tokenizer as gigatoken gets it: vocabulary and merges, and which documents it must not see.

`describe` takes what is on the lists below, which was compared with the reference library, and
refuses everything else with a reason. `fast` says what differs, and why the rest is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from megacode.tokenizer.tokenizer import Tokenizer
from megacode.tokenizer.vocabularies import (
    HuggingFaceVocabulary,
    SentencePieceVocabulary,
    TiktokenVocabulary,
)

_MARK = "\u2581"
"""SentencePiece's space."""


class Refused(Exception):
    """Why a tokenizer cannot take the fast path: one phrase."""


@dataclass(frozen=True)
class Description:
    """What gigatoken gets of a tokenizer, a tokenizer.json, and which documents it must not see."""

    contents: dict[str, Any]
    literals: tuple[str, ...] = ()
    """Regular expressions; a document in which one is found takes the exact path."""
    classes: bool = False
    """Text is split by Unicode classes (letters, digits)."""
    nfc: bool = False
    """Text is normalized to NFC first; only with `classes`."""


def describe(tokenizer: Tokenizer) -> Description:
    makers: dict[type, Callable[[Any], Description]] = {
        SentencePieceVocabulary: _describe_sentencepiece,
        HuggingFaceVocabulary: _describe_huggingface,
        TiktokenVocabulary: _describe_tiktoken,
    }
    return makers[type(tokenizer.base)](tokenizer.base)


def _refuse(*reasons: tuple[bool, str]) -> None:
    """Refused with the first reason whose condition holds."""
    for holds, reason in reasons:
        if holds:
            raise Refused(reason)


# --- SentencePiece

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BPE = 2
_BLANKS = set(_MARK + " \t\r\n")
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_LIKE_A_BYTE = re.compile(r"<0x..>", re.DOTALL)
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
_PREPEND = {"type": "Prepend", "prepend": _MARK}


def _describe_sentencepiece(vocabulary: SentencePieceVocabulary) -> Description:
    from sentencepiece import sentencepiece_model_pb2

    serialized = vocabulary.processor.serialized_model_proto()
    model = sentencepiece_model_pb2.ModelProto.FromString(serialized)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds: dict[int, dict[str, int]] = {kind: {} for kind in range(1, 7)}
    for i, piece in enumerate(model.pieces):
        kinds[piece.type][piece.piece] = i
    normal, symbols = kinds[_NORMAL], kinds[_USER_DEFINED]
    scores = {piece: model.pieces[i].score for piece, i in normal.items() if len(piece) > 1}
    unknown = {character for piece in normal for character in piece} - normal.keys()
    prefix = [_PREPEND] if normalizer.add_dummy_prefix else []
    charsmap = f"SentencePiece's normalizer {normalizer.name or 'of its own'}"
    _refuse(
        (trainer.model_type != _BPE, "a SentencePiece model that is not BPE"),
        (not trainer.byte_fallback, "a SentencePiece model without byte fallback"),
        (bool(normalizer.precompiled_charsmap), charsmap),
        (normalizer.remove_extra_whitespaces, "SentencePiece's remove_extra_whitespaces"),
        (not normalizer.escape_whitespaces, "SentencePiece without escape_whitespaces"),
        (trainer.treat_whitespace_as_suffix, "SentencePiece's treat_whitespace_as_suffix"),
        (bool(kinds[_UNUSED]), "a SentencePiece model with unused pieces"),
        (set(kinds[_BYTE]) != _BYTES, "a SentencePiece model without a piece for every byte"),
        (any(map(_LIKE_A_BYTE.fullmatch, normal)), "a piece spelt like a byte"),
        (any(not piece or " " in piece for piece in normal), "a piece with a blank in it"),
        (bool(unknown), "a piece of characters that are no pieces"),
        (len(set(scores.values())) != len(scores), "pieces of equal score"),
        (
            any(set(symbol) & _BLANKS for symbol in symbols),
            "a user-defined symbol with a blank in it",
        ),
    )
    contents = _tokenizer_json(
        vocab={**normal, **kinds[_BYTE]},
        merges=_merges(sorted(scores, key=lambda piece: -scores[piece]), normal),
        byte_fallback=True,
        normalizer={"type": "Sequence", "normalizers": [*prefix, _REPLACE]},
    )
    return Description(contents, tuple(map(re.escape, symbols)))


def _merges(pieces: Iterable[str], parts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to build each piece of two others, in the order of `pieces`."""
    return [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in parts and piece[i:] in parts
    ]


# --- tokenizer.json

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SHORT}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}{_TAIL}"
_QWEN2 = rf"{_SHORT}|{_WORD}\p{{L}}+|\p{{N}}|{_SIGNS}{_TAIL}"
_QWEN35 = rf"{_SHORT}|{_WORD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (f"{_WORD}{_UPPER}*{_LOWER}+", f"{_WORD}{_UPPER}+{_LOWER}*")
_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_O200K = rf"{_CASED[0]}{_SHORT}?|{_CASED[1]}{_SHORT}?|\p{{N}}{{1,3}}|{_SLASHES}{_TAIL}"
_NEMOTRON = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHES}{_TAIL}"
_PATTERNS = (_GPT2, _LLAMA3, _QWEN2, _QWEN35, _O200K, _NEMOTRON)
"""Splitting patterns that give the same pieces in gigatoken, Oniguruma and tiktoken."""


def _describe_huggingface(vocabulary: HuggingFaceVocabulary) -> Description:
    contents = json.loads(vocabulary.tokenizer.to_str())
    model = contents["model"]
    parts = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    _refuse(
        (model["type"] != "BPE", f"a tokenizer.json of type {model['type']}"),
        (bool(model.get("dropout")), "BPE dropout"),
        (bool(parts), "marks on parts of words"),
    )
    literals = _found_in_text(contents)
    describe_model = _byte_fallback if model["byte_fallback"] else _byte_level
    return describe_model(contents, model, literals)


def _found_in_text(contents: Mapping[str, Any]) -> tuple[str, ...]:
    """Added tokens that are not special, as patterns: the library finds only these in text."""
    plain = [token for token in contents["added_tokens"] if not token["special"]]
    for token in plain:
        name = token["content"]
        # A normalizer changes what such a token is compared with. No other character becomes one of
        # ASCII but for these four.
        known = name.isascii() and not set(name) & set(";`K ")
        normalized = contents["normalizer"] is not None and token["normalized"]
        _refuse(
            (not name.strip(), f"the added token {name!r}, which is in nearly every document"),
            (normalized and not known, f"the added token {name!r}, found in normalized text"),
        )
    return tuple(re.escape(token["content"]) for token in plain)


def _byte_fallback(
    contents: Mapping[str, Any], model: Mapping[str, Any], literals: tuple[str, ...]
) -> Description:
    """BPE as SentencePiece does it, in a tokenizer.json (Llama 2, Mistral, Gemma)."""
    vocab, merges = model["vocab"], model["merges"]
    absent = [
        byte
        for byte, name in enumerate(sorted(_BYTES))
        if name not in vocab and (byte >= 0x80 or chr(byte) not in vocab)
    ]
    pieces = {part for a, b in merges for part in (a, b, a + b)}
    like_a_byte = any(map(_LIKE_A_BYTE.fullmatch, pieces | (vocab.keys() - _BYTES)))
    normalizer, splitter = contents["normalizer"], contents["pre_tokenizer"]
    steps = _flat(normalizer, "normalizers")
    usual = steps in ([_REPLACE], [_PREPEND, _REPLACE])
    kind = splitter and (splitter["type"], splitter.get("replacement"))
    _refuse(
        (bool(model.get("ignore_merges")), "ignore_merges together with byte fallback"),
        (bool(absent), "a vocabulary without a piece for every byte"),
        (like_a_byte, "a piece spelt like a byte"),
        (splitter is None and not usual, "a normalizer that is not SentencePiece's"),
        (splitter is not None and bool(steps), "a normalizer before the pre-tokenizer"),
        (kind not in (None, ("Metaspace", _MARK)), f"the pre-tokenizer {kind and kind[0]}"),
    )
    return Description(_tokenizer_json(vocab, merges, True, normalizer, splitter), literals)


def _byte_level(
    contents: Mapping[str, Any], model: Mapping[str, Any], literals: tuple[str, ...]
) -> Description:
    """BPE of bytes (GPT-2, Llama 3, Qwen)."""
    steps = _flat(contents["normalizer"], "normalizers")
    splitters = _flat(contents["pre_tokenizer"], "pretokenizers")
    kinds = [splitter["type"] for splitter in splitters]
    _refuse((steps not in ([], [{"type": "NFC"}]), "a normalizer that is not NFC"))
    pattern, blank = _GPT2, False
    if kinds == ["ByteLevel"] and splitters[0]["use_regex"]:
        blank = splitters[0]["add_prefix_space"]
    elif kinds == ["Split", "ByteLevel"]:
        split, after = splitters
        pattern = split["pattern"].get("Regex", "")
        isolates = split["behavior"] == "Isolated" and not split["invert"]
        _refuse(
            (not isolates, "a Split that does not isolate"),
            (after["use_regex"] or after["add_prefix_space"], "a Split followed by another"),
            (pattern not in _PATTERNS, "a splitting pattern that is not on the list"),
        )
    else:
        raise Refused("a pre-tokenizer that is not on the list: " + (", ".join(kinds) or "none"))
    letters = set(_letters().values())
    vocab = {piece: i for piece, i in model["vocab"].items() if letters.issuperset(piece)}
    merges = model["merges"]
    outside = any(part not in vocab for a, b in merges for part in (a, b, a + b))
    _refuse((outside, "a merge outside the byte alphabet"))
    contents = _tokenizer_json(
        vocab,
        merges,
        pre_tokenizer=_split(pattern, blank),
        ignore_merges=bool(model.get("ignore_merges")),
    )
    return Description(contents, literals, classes=True, nfc=bool(steps))


def _flat(step: Mapping[str, Any] | None, children: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, out of their Sequence."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [part for child in step[children] for part in _flat(child, children)]


# --- tiktoken

_WRITTEN = {
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": _GPT2,
    _CL100K: _CL100K,
    _CL100K.removesuffix("+"): _CL100K,
    **{pattern: pattern for pattern in _PATTERNS},
}
"""How tiktoken writes a pattern -> how gigatoken knows it."""


def _describe_tiktoken(vocabulary: TiktokenVocabulary) -> Description:
    pattern = _WRITTEN.get(vocabulary.pattern, "")
    _refuse((not pattern, "a splitting pattern that is not on the list"))
    letters, ranks = _letters(), vocabulary.ranks
    by_rank = sorted(ranks, key=ranks.__getitem__)
    vocab = {"".join(letters[byte] for byte in token): ranks[token] for token in by_rank}
    # tiktoken takes a piece that is a token as it stands, which others call ignore_merges.
    made = _tokenizer_json(
        vocab, _merges(vocab, vocab), pre_tokenizer=_split(pattern, False), ignore_merges=True
    )
    return Description(made, classes=True)


# --- the tokenizer.json that gigatoken gets


def _tokenizer_json(
    vocab: Mapping[str, int],
    merges: Iterable[Iterable[str]],
    byte_fallback: bool = False,
    normalizer: Any = None,
    pre_tokenizer: Any = None,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    pieces = {"vocab": dict(vocab), "merges": [list(merge) for merge in merges]}
    flags = {"byte_fallback": byte_fallback, "ignore_merges": ignore_merges}
    steps = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    model = {"type": "BPE", **pieces, **flags}
    return {"version": "1.0", "added_tokens": [], **steps, "model": model}


def _split(pattern: str, blank: bool) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    level = {"type": "ByteLevel", "add_prefix_space": blank, "trim_offsets": True}
    steps = [{**split, "invert": False}, {**level, "use_regex": False}]
    return {"type": "Sequence", "pretokenizers": steps}


@cache
def _letters() -> dict[int, str]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, other bytes from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(0x100 + i) for i, b in enumerate(others)}}
