"""The contents of a Hugging Face tokenizer.json that gives the ids of a megacode tokenizer.

Plain data, built without the `tokenizers` library; `tokenizer_files` writes it and proves it with
that library.
SentencePiece (arXiv 1808.06226) and tiktoken merge the pair whose *result* ranks first; a
tokenizer.json ranks pairs. So every way of splitting a piece in two becomes a merge, in the order
of the pieces.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.tokenizer.tokenizer import Tokenizer

_SPACE = "\u2581"
# sentencepiece_model.proto, SentencePiece.Type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2


def tokenizer_json(tokenizer: Tokenizer, bos: bool) -> dict[str, Any]:
    """tokenizer.json as data: the vocabulary, and control tokens as special added tokens.

    With `bos` each text begins with BOS.

    Raises:
        UserError: a kind or a setting that this format cannot say.
    """
    build = {
        "sentencepiece": _from_sentencepiece,
        "huggingface": _from_huggingface,
        "tiktoken": _from_tiktoken,
    }
    contents = build[tokenizer.kind](tokenizer)
    known = {token["content"]: token for token in contents["added_tokens"]}
    for name, token in sorted(tokenizer.control_tokens.items(), key=lambda item: item[1]):
        if name in known:
            known[name]["special"] = True
        else:
            contents["added_tokens"].append(_added(name, token, special=True))
    contents["added_tokens"].sort(key=lambda token: token["id"])
    contents["post_processor"] = _post_processor(contents.get("post_processor"), tokenizer, bos)
    return {"version": "1.0", "truncation": None, "padding": None} | contents


def _added(name: str, token: int, special: bool) -> dict[str, Any]:
    shape = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": name, **shape, "special": special}


def _post_processor(original: Any, tokenizer: Tokenizer, bos: bool) -> Any:
    """BOS in front of each text, or nothing; of the original only what trims offsets stays."""
    parts = [original] if original else []
    if original and original["type"] == "Sequence":
        parts = original["processors"]
    kept = [part for part in parts if part["type"] == "ByteLevel"]
    if bos:
        token = tokenizer.bos_id
        name = next(name for name, i in tokenizer.control_tokens.items() if i == token)
        first, second = ({"Sequence": {"id": part, "type_id": i}} for i, part in enumerate("AB"))
        starts = [{"SpecialToken": {"id": name, "type_id": i}} for i in (0, 1)]
        template = {
            "type": "TemplateProcessing",
            "single": [starts[0], first],
            "pair": [starts[0], first, starts[1], second],
            "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
        }
        kept.append(template)
    if len(kept) > 1:
        return {"type": "Sequence", "processors": kept}
    return kept[0] if kept else None


def _bpe(
    vocabulary: Mapping[str, int], merges: Iterable[tuple[str, str]], **keys: Any
) -> dict[str, Any]:
    # "left right" is read by every version of the library; pairs, needed where a piece holds a
    # blank, by newer ones.
    pairs: list[Any] = list(merges)
    if not any(" " in left or " " in right for left, right in pairs):
        pairs = [f"{left} {right}" for left, right in pairs]
    usual = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {"type": "BPE", **usual, **keys, "vocab": dict(vocabulary), "merges": pairs}


def _splits(ordered: Iterable[str], pieces: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Every split of each piece into two pieces; those with the longer left half first.

    SentencePiece and tiktoken take the leftmost of all splits of a piece, which no order of pairs
    says in every case: what a vocabulary makes of runs is part of the proof.
    """
    for piece in ordered:
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                yield left, right


# ----------------------------------------------------------------------------------- sentencepiece


def _from_sentencepiece(tokenizer: Tokenizer) -> dict[str, Any]:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.path.read_bytes())
    trainer, normalizer, path = proto.trainer_spec, proto.normalizer_spec, tokenizer.path
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise UserError(
            f"{path}: a word or character model of SentencePiece; "
            "only BPE and unigram have a tokenizer.json"
        )
    for wrong, name in (
        (trainer.treat_whitespace_as_suffix, "treat_whitespace_as_suffix"),
        (not normalizer.escape_whitespaces, "escape_whitespaces: false"),
        (any(piece.type == _UNUSED for piece in proto.pieces), "pieces marked as unused"),
    ):
        if wrong:
            raise UserError(
                f"{path}: {name} of SentencePiece cannot be said in a tokenizer.json; "
                "export with --no-tokenizer"
            )
    steps: list[dict[str, Any]] = []
    if normalizer.precompiled_charsmap:
        charsmap = base64.b64encode(normalizer.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if normalizer.remove_extra_whitespaces:
        # At the end SentencePiece also takes away its own mark.
        steps.append(_replace({"Regex": rf"\A +|[ {_SPACE}]+\z"}, ""))
        steps.append(_replace({"Regex": " {2,}"}, " "))
    if normalizer.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    steps.append(_replace({"String": " "}, _SPACE))
    decoding = [_replace({"String": _SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if normalizer.add_dummy_prefix:
        decoding.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    # User-defined pieces are looked for in normalised text, unless normalising would put a blank
    # before their names. Those with a blank are never found: SentencePiece has put its mark in
    # place of each.
    normalized = {"normalized": not normalizer.add_dummy_prefix}
    found_in_text = [
        _added(piece.piece, i, special=False) | normalized
        for i, piece in enumerate(proto.pieces)
        if piece.type == _USER_DEFINED and " " not in piece.piece
    ]
    return {
        "added_tokens": found_in_text,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoding},
        "model": _unigram_model(proto)
        if trainer.model_type == _UNIGRAM
        else _bpe_model(proto, path),
    }


def _unigram_model(proto: Any) -> dict[str, Any]:
    """The `model` of a SentencePiece unigram model."""
    # tokenizers would find control and byte pieces in text by their names; nothing likelier than
    # these scores is left out.
    lowest = min(piece.score for piece in proto.pieces if piece.type == _NORMAL) - 1000
    pieces = [[p.piece, p.score if p.type == _NORMAL else lowest] for p in proto.pieces]
    return {
        "type": "Unigram",
        "unk_id": next(i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN),
        "vocab": pieces,
        "byte_fallback": any(piece.type == _BYTE for piece in proto.pieces),
    }


def _bpe_model(proto: Any, path: Path) -> dict[str, Any]:
    """The `model` of a SentencePiece BPE model."""
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    byte_fallback = any(piece.type == _BYTE for piece in proto.pieces)
    alone = sorted({character for piece in scores for character in piece} - set(scores))
    if alone and byte_fallback:
        raise UserError(
            f"{path}: the piece of {alone[0]!r} is missing though longer pieces hold it, which a "
            "tokenizer.json cannot say; train the tokenizer with its characters "
            "(`megacode tokenizer train` does)"
        )
    ordered = sorted(scores, key=lambda piece: (-scores[piece], vocabulary[piece]))
    unknown = next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN)
    return _bpe(
        vocabulary,
        _splits(ordered, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=byte_fallback,
        ignore_merges=False,
    )


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


# ------------------------------------------------------------------------------------ hugging face


def _from_huggingface(tokenizer: Tokenizer) -> dict[str, Any]:
    """The file itself, with the control tokens special that megacode treats so."""
    contents = json.loads(tokenizer.path.read_text(encoding="utf-8"))
    contents["added_tokens"] = contents.get("added_tokens") or []
    contents["truncation"] = contents["padding"] = None
    return contents


# ---------------------------------------------------------------------------------------- tiktoken


def _byte_characters() -> list[str]:
    """The printable character for each byte in byte-level tokenizers (GPT-2's table)."""
    others = iter(range(256, 512))
    printable = (*range(33, 127), *range(161, 173), *range(174, 256))  # ! to ~, ¡ to ¬, ® to ÿ
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _from_tiktoken(tokenizer: Tokenizer) -> dict[str, Any]:
    base: Any = tokenizer.base
    characters = _byte_characters()
    vocabulary = {
        "".join(characters[byte] for byte in piece): rank for piece, rank in base.ranks.items()
    }
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    spaces = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    byte_level = {"type": "ByteLevel", **spaces}
    # What the pattern does not match tiktoken leaves out.
    pattern = {"pattern": {"Regex": base.pattern}, "behavior": "Removed", "invert": True}
    split = {"type": "Split", **pattern}
    return {
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": _bpe(
            vocabulary,
            _splits(ordered, vocabulary),
            unk_token=None,
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=True,
        ),
    }
