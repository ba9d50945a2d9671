"""SentencePiece, Hugging Face tokenizers and tiktoken behind one small class.

Each library is imported only when a file of its kind is opened. Each is set so that plain text stays plain text.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacode.errors import UserError


def library(name: str, install: str, path: Path) -> Any:
    """The module `name`. UserError with what to install, for the tokenizer at `path`, if it does not import."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{path}: this tokenizer needs `{name}`: pip install '{install}'") from None


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer file as its library reads it, before added tokens."""

    size: int
    """Highest id + 1."""
    control: Mapping[str, int]
    """Tokens that no text becomes."""
    literal: Mapping[str, int]
    """Tokens that look like control tokens, but that the library also finds in text."""
    bos_id: int | None
    eod_id: int | None
    pad_id: int | None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------------ sentencepiece


@dataclass(frozen=True)
class SentencePieceVocabulary(Vocabulary):
    processor: Any

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.processor.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode(list(ids)) if ids else ""


def load_sentencepiece(path: Path, control: Sequence[str]) -> SentencePieceVocabulary:
    """A .model file. SentencePiece finds its user-defined symbols in text, so they are `literal`, not control."""
    sentencepiece = library("sentencepiece", "sentencepiece", path)
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(path.read_bytes())
        size = processor.get_piece_size()
    except (RuntimeError, OSError):
        size = 0
    if size == 0:
        raise UserError(
            f"{path}: not a SentencePiece model; give the .model file that its trainer wrote"
        )
    names = {
        i: processor.id_to_piece(i)
        for i in range(size)
        if processor.is_control(i) or processor.is_unknown(i)
    }
    # The model file does not say which pieces are user-defined through this interface, but such a piece is found in
    # text whatever stands around it; so a wanted control token that is a normal piece already counts as literal.
    wanted = {name: processor.piece_to_id(name) for name in control}
    literal = {name: i for name, i in wanted.items() if i != processor.unk_id() and i not in names}
    return SentencePieceVocabulary(
        size=size,
        control={name: i for i, name in names.items()},
        literal=literal,
        bos_id=_or_none(processor.bos_id()),
        eod_id=_or_none(processor.eos_id()),
        pad_id=_or_none(processor.pad_id()),
        processor=processor,
    )


def _or_none(token: int) -> int | None:
    return token if token >= 0 else None


# ------------------------------------------------------------------------------------------------------- hugging face


@dataclass(frozen=True)
class HuggingFaceVocabulary(Vocabulary):
    tokenizer: Any

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One at a time: the library's own batches start a thread for each core in each of our worker processes.
        return [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False) if ids else ""


_USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>")
_USUAL_EOD = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]")


def load_huggingface(path: Path, control: Sequence[str]) -> HuggingFaceVocabulary:
    """A tokenizer.json; BOS, EOS and padding as tokenizer_config.json beside it says, else by the usual names.

    Some files list control tokens as not special (Qwen's `<|fim_prefix|>`), and the library then finds them in text.
    Those spelt `<|...|>`, and every one in `control`, are made special here, so that `encode_special_tokens` covers
    them.
    """
    tokenizers = library("tokenizers", "tokenizers", path)
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        added = contents.get("added_tokens") or []
        for token in added:
            name = token["content"]
            token["special"] = (
                token["special"]
                or name in control
                or (name.startswith("<|") and name.endswith("|>"))
            )
        # A saved limit on length would cut documents without a word, and padding would lengthen them.
        contents["truncation"] = contents["padding"] = None
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(contents))
    except Exception as error:  # the library raises bare Exception on a bad file
        raise UserError(f"{path}: not a Hugging Face tokenizer.json: {str(error)[:200]}") from None
    tokenizer.encode_special_tokens = True
    special = {token["content"]: token["id"] for token in added if token["special"]}
    config = _tokenizer_config(path)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return HuggingFaceVocabulary(
        size=max(vocabulary.values()) + 1,
        control=special,
        literal={token["content"]: token["id"] for token in added if not token["special"]},
        bos_id=_special(config, "bos_token", _USUAL_BOS, special),
        eod_id=_special(config, "eos_token", _USUAL_EOD, special),
        pad_id=_special(config, "pad_token", (), special),
        tokenizer=tokenizer,
    )


def _tokenizer_config(path: Path) -> dict[str, Any]:
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return {}
    try:
        return dict(json.loads(config.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{config}: not JSON ({error}); mend it or take it away") from None


def _special(
    config: Mapping[str, Any], key: str, usual: Sequence[str], special: Mapping[str, int]
) -> int | None:
    if key in config:
        name = config[key]["content"] if isinstance(config[key], dict) else config[key]
        return special.get(name) if name is not None else None
    return next((special[name] for name in usual if name in special), None)


# ----------------------------------------------------------------------------------------------------------- tiktoken


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
    """A .tiktoken file of ranks. The file does not hold the splitting pattern: it comes from `FILE.json` beside it,
    `{"pattern": ..., "special_tokens": {name: id}}`, or from the installed tiktoken if it knows the file by its hash.
    """
    tiktoken = library("tiktoken", "megacode[tiktoken]", path)
    from tiktoken.load import load_tiktoken_bpe

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
            pattern, special = (
                str(given["pattern"]),
                {str(k): int(v) for k, v in given["special_tokens"].items()},
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f'{beside}: expected {{"pattern": "...", "special_tokens": {{name: id}}}} ({error!r})'
            ) from None
    else:
        pattern, special = _known_encoding(path, ranks)
    try:
        encoding = tiktoken.Encoding(
            path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
    except Exception as error:
        raise UserError(f"{beside}: tiktoken refuses it: {error}") from None
    eod = next((special[name] for name in _USUAL_EOD if name in special), None)
    bos = next((special[name] for name in _USUAL_BOS if name in special), None)
    return TiktokenVocabulary(
        size=encoding.max_token_value + 1,
        control=special,
        literal={},
        bos_id=bos,
        eod_id=eod,
        pad_id=None,
        encoding=encoding,
        pattern=pattern,
        ranks=ranks,
    )


def _known_encoding(path: Path, ranks: Mapping[bytes, int]) -> tuple[str, dict[str, int]]:
    """Pattern and special tokens of a vocabulary that tiktoken itself publishes, found by the file's hash.

    tiktoken's own constructors hold both, but also download; each is called here with a loader that compares hashes.
    """
    wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    seen: list[str | None] = []

    def loader(url: str, expected_hash: str | None = None) -> Mapping[bytes, int]:
        seen.append(expected_hash)
        return ranks

    published = library("tiktoken_ext.openai_public", "megacode[tiktoken]", path)
    names = dict(vars(published))
    names["load_tiktoken_bpe"] = loader
    names["data_gym_to_mergeable_bpe_ranks"] = lambda **_: ranks
    for name, value in vars(published).items():
        if isinstance(value, types.FunctionType) and value.__module__ == published.__name__:
            names[name] = types.FunctionType(value.__code__, names)  # they call one another
    for name in published.ENCODING_CONSTRUCTORS:
        seen.clear()
        encoding = names[name]()
        if seen == [wanted]:
            return encoding["pat_str"], dict(encoding["special_tokens"])
    raise UserError(
        f"{path}: tiktoken does not know this vocabulary's splitting pattern; write it to {path.name}.json beside it, "
        '{"pattern": "...", "special_tokens": {"<|endoftext|>": ID}}'
    )
