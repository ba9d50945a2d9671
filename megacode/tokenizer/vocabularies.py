"""SentencePiece, Hugging Face tokenizers and tiktoken behind one small class.

Each library is imported only when a file of its kind is opened, and set so that text stays text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from megacode.errors import UserError

_USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>")
_USUAL_EOD = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer file as its library reads it, before added tokens.

    Attributes:
        size: highest id + 1.
        control: tokens that no text becomes.
        literal: tokens that look like control tokens, but that the library also finds in text.
    """

    size: int
    control: Mapping[str, int]
    literal: Mapping[str, int]
    bos_id: int | None
    eod_id: int | None
    pad_id: int | None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError


# --- SentencePiece


@dataclass(frozen=True)
class SentencePieceVocabulary(Vocabulary):
    processor: Any

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.processor.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode(list(ids)) if ids else ""


def load_sentencepiece(path: Path, control: Sequence[str]) -> SentencePieceVocabulary:
    """A .model file. SentencePiece finds user-defined symbols in text, so they are `literal`."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(path.read_bytes())
        size = processor.get_piece_size()
    except (RuntimeError, OSError):
        size = 0
    if size == 0:
        raise UserError(
            f"{path}: not a SentencePiece model; give the .model that its trainer wrote"
        )
    names = {
        processor.id_to_piece(i): i
        for i in range(size)
        if processor.is_control(i) or processor.is_unknown(i)
    }
    # This interface does not tell which pieces are user-defined. Such a piece is found in text
    # whatever stands around it, so a wanted control token that is any other piece counts as
    # literal.
    wanted = {name: processor.piece_to_id(name) for name in control}
    ids = (processor.bos_id(), processor.eos_id(), processor.pad_id())
    bos_id, eod_id, pad_id = (i if i >= 0 else None for i in ids)
    return SentencePieceVocabulary(
        size=size,
        control=names,
        literal={
            name: i
            for name, i in wanted.items()
            if i != processor.unk_id() and i not in names.values()
        },
        bos_id=bos_id,
        eod_id=eod_id,
        pad_id=pad_id,
        processor=processor,
    )


# --- Hugging Face


@dataclass(frozen=True)
class HuggingFaceVocabulary(Vocabulary):
    tokenizer: Any

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One at a time: the library's batches start a thread for each core, in each worker process.
        return [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False) if ids else ""


def load_huggingface(path: Path, control: Sequence[str]) -> HuggingFaceVocabulary:
    """A tokenizer.json; BOS, EOS, padding from tokenizer_config.json beside it, or by usual names.

    Some files list control tokens as not special (Qwen's `<|fim_prefix|>`), and the library then
    finds them in text. Those spelt `<|...|>`, and every one in `control`, are made special here, so
    that `encode_special_tokens` covers them."""
    import tokenizers

    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        added = contents.get("added_tokens") or []
        for token in added:
            name = token["content"]
            spelt = name.startswith("<|") and name.endswith("|>")
            token["special"] = token["special"] or name in control or spelt
        # A saved limit on length would cut documents silently, and padding would lengthen them.
        contents["truncation"] = contents["padding"] = None
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(contents))
    except Exception as error:  # the library raises bare Exception on a bad file
        raise UserError(f"{path}: not a Hugging Face tokenizer.json: {str(error)[:200]}") from None
    tokenizer.encode_special_tokens = True
    special = {token["content"]: token["id"] for token in added if token["special"]}
    config = _tokenizer_config(path)
    return HuggingFaceVocabulary(
        size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        control=special,
        literal={token["content"]: token["id"] for token in added if not token["special"]},
        bos_id=_special(config, "bos_token", _USUAL_BOS, special),
        eod_id=_special(config, "eos_token", _USUAL_EOD, special),
        pad_id=_special(config, "pad_token", (), special),
        tokenizer=tokenizer,
    )


def _tokenizer_config(path: Path) -> dict[str, Any]:
    config = path.with_name("tokenizer_config.json")
    try:
        return dict(json.loads(config.read_text(encoding="utf-8"))) if config.is_file() else {}
    except ValueError as error:
        raise UserError(f"{config}: not JSON ({error}); correct or remove it") from None


def _special(
    config: Mapping[str, Any], key: str, usual: Sequence[str], special: Mapping[str, int]
) -> int | None:
    if key in config:
        name = config[key]["content"] if isinstance(config[key], dict) else config[key]
        return special.get(name) if name is not None else None
    return next((special[name] for name in usual if name in special), None)


# --- tiktoken


@dataclass(frozen=True)
class TiktokenVocabulary(Vocabulary):
    encoding: Any
    pattern: str
    ranks: Mapping[bytes, int]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encoding.encode_ordinary(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode(list(ids))


def load_tiktoken(path: Path, control: Sequence[str]) -> TiktokenVocabulary:
    """A .tiktoken file of ranks.

    It does not hold the splitting pattern: that comes from `FILE.json` beside it, `{"pattern": ...,
    "special_tokens": {name: id}}`, or from the installed tiktoken if it knows the file by its hash.
    """
    try:
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe
    except ImportError:
        need = "this tokenizer needs `tiktoken`: pip install 'megacode[tiktoken]'"
        raise UserError(f"{path}: {need}") from None
    try:
        ranks = load_tiktoken_bpe(str(path))
    except Exception as error:
        raise UserError(
            f"{path}: not a tiktoken vocabulary (lines of base64 and rank): {error}"
        ) from None
    beside = path.with_name(path.name + ".json")
    if beside.is_file():
        try:
            given = json.loads(beside.read_text(encoding="utf-8"))
            pattern = str(given["pattern"])
            special = {str(name): int(i) for name, i in given["special_tokens"].items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            form = '{"pattern": "...", "special_tokens": {name: id}}'
            raise UserError(f"{beside}: expected {form} ({error!r})") from None
    else:
        pattern, special = _published(path, ranks)
    try:
        encoding = tiktoken.Encoding(
            path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
    except Exception as error:
        raise UserError(f"{beside}: tiktoken refuses it: {error}") from None
    return TiktokenVocabulary(
        size=encoding.max_token_value + 1,
        control=special,
        literal={},
        bos_id=_special({}, "", _USUAL_BOS, special),
        eod_id=_special({}, "", _USUAL_EOD, special),
        pad_id=None,
        encoding=encoding,
        pattern=pattern,
        ranks=ranks,
    )


def _published(path: Path, ranks: Mapping[bytes, int]) -> tuple[str, dict[str, int]]:
    """Pattern and special tokens of a vocabulary that tiktoken publishes, found by the file's hash.

    tiktoken's constructors know both, but download the ranks. Here each is called with a loader
    that gives `ranks` and notes the hash that the constructor expects."""
    from tiktoken_ext import openai_public

    seen: list[str | None] = []

    def loader(url: str, expected_hash: str | None = None) -> Mapping[bytes, int]:
        seen.append(expected_hash)
        return ranks

    wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    loaders: dict[str, Any] = {
        "load_tiktoken_bpe": loader,
        "data_gym_to_mergeable_bpe_ranks": lambda **_: ranks,
    }
    with mock.patch.multiple(openai_public, **loaders):
        for constructor in openai_public.ENCODING_CONSTRUCTORS.values():
            seen.clear()
            encoding = constructor()
            if seen == [wanted]:
                return encoding["pat_str"], dict(encoding["special_tokens"])
    form = '{"pattern": "...", "special_tokens": {"<|endoftext|>": ID}}'
    raise UserError(
        f"{path}: tiktoken does not know this vocabulary's splitting pattern; write it to "
        f"{path.name}.json beside it, {form}"
    )
