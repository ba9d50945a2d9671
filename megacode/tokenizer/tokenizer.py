"""One small interface over SentencePiece, Hugging Face tokenizer.json and tiktoken.

Two laws hold for each library:

- Text never becomes a control token: a document that spells `<s>` or `<|fim_prefix|>` is encoded as
  those characters.
- Ids are the library's own: added tokens and lone surrogates never change how text is split.

Added tokens are control tokens that a recipe puts after the base vocabulary; the tokenizer's file
stays as it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.recipe import schema
from megacode.tokenizer.vocabularies import (
    Vocabulary,
    load_huggingface,
    load_sentencepiece,
    load_tiktoken,
)

CRYSTAL_TOKENS: tuple[str, ...] = (
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>"),
    *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>"),
    *("<commit_before>", "<commit_msg>", "<commit_after>", "<reponame>"),
    *("<|im_start|>", "<|im_end|>", "<|sys_start|>", "<|sys_end|>"),
    *(f"<|reserved_{i}|>" for i in range(10)),
)
"""Crystal's 22 added and 10 reserved tokens, in the order of ids (arXiv 2411.04156, its code)."""

_LOADERS: dict[str, Callable[[Path, Sequence[str]], Vocabulary]] = {
    "sentencepiece": load_sentencepiece,
    "huggingface": load_huggingface,
    "tiktoken": load_tiktoken,
}
_KIND_BY_ENDING = {".model": "sentencepiece", ".json": "huggingface", ".tiktoken": "tiktoken"}


class UnencodableError(UserError):
    """Texts that the reference library cannot encode. `reasons`: number of the text -> why."""

    def __init__(self, path: str, reasons: Mapping[int, str]) -> None:
        super().__init__(f"{path}: {next(iter(reasons.values()))}; leave this text out")
        self.path, self.reasons = path, dict(reasons)


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back: `base` is the file's vocabulary, `added_tokens` has each name's id."""

    path: Path
    kind: str
    base: Vocabulary
    added_tokens: Mapping[str, int]

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Every token that no text becomes: the base vocabulary's and the added ones."""
        return {**self.base.control, **self.added_tokens}

    @cached_property
    def vocab_size(self) -> int:
        """Base vocabulary + added tokens, before any padding for tensor parallelism."""
        return max(self.base.size, *(i + 1 for i in self.added_tokens.values()), 0)

    @property
    def bos_id(self) -> int:
        """Begin of sequence. UserError if the tokenizer has none."""
        if self.base.bos_id is None:
            raise UserError(
                f"{self.path}: this tokenizer has no begin-of-sequence token; "
                "set `tokenizer.bos: false`"
            )
        return self.base.bos_id

    @property
    def eod_id(self) -> int:
        """End of document (the library calls it EOS). UserError if the tokenizer has none."""
        if self.base.eod_id is None:
            raise UserError(
                f"{self.path}: this tokenizer has no end-of-document token (eos); name it in "
                "tokenizer_config.json beside tokenizer.json, or train a tokenizer with "
                "`megacode tokenizer train`"
            )
        return self.base.eod_id

    @property
    def pad_id(self) -> int | None:
        return self.base.pad_id

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without BOS or EOD. Lone surrogates count as U+FFFD
        (`well_formed`)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[encode(t) for t in texts]`, on the calling thread.

        Raises:
            UnencodableError: the library fails on some of them.
        """
        texts = list(map(well_formed, texts))
        found = self._encoded(texts)
        if not isinstance(found, str):
            return found
        each = [self._encoded([text]) for text in texts]
        if reasons := {i: one for i, one in enumerate(each) if isinstance(one, str)}:
            raise UnencodableError(str(self.path), reasons)
        return [one[0] for one in each if not isinstance(one, str)]

    def _encoded(self, texts: list[str]) -> list[list[int]] | str:
        """Ids, or why the library fails: its Rust code panics, which is no Exception in Python."""
        try:
            return self.base.encode_batch(texts)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            return f"{self.kind} fails on it: {str(error)[:80]}"

    def decode(self, ids: Sequence[int], control: bool = False) -> str:
        """Text of ids, without control tokens or, with `control`, with their names.

        Ids beyond the vocabulary, which a padded output layer can give, become U+FFFD.
        decode(encode(text)) == text with tokenizers from `megacode tokenizer train`, but for
        U+2581: SentencePiece writes a space so, and it comes back as one."""
        parts: list[str] = []
        run: list[int] = []
        for token in map(int, ids):
            name = self._control_names.get(token)
            if name is None and 0 <= token < self.base.size:
                run.append(token)
                continue
            if name is not None and not control:
                continue
            parts += [self.base.decode(run), "\ufffd" if name is None else name]
            run = []
        return "".join(parts) + (self.base.decode(run) if run else "")

    def token_id(self, name: str) -> int:
        """Id of a control token. UserError if there is none of that name, or if text can become
        it."""
        if name in self.control_tokens:
            return self.control_tokens[name]
        if name in self.base.literal:
            raise UserError(
                f"{self.path}: {name} is an ordinary piece of this tokenizer, so a document that "
                "spells it would become the control token; name another one"
            )
        raise UserError(
            f"{self.path}: no control token {name}; add it with `tokenizer.added_tokens` "
            "(`crystal`, or a list with it)"
        )

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that maps text to ids: equal fingerprints, equal ids."""
        digest = hashlib.sha256(self.path.read_bytes())
        ids = [self.base.bos_id, self.base.eod_id, sorted(self.control_tokens.items())]
        digest.update(json.dumps([self.kind, *ids]).encode())
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """What maps text to ids, as JSON-able data; `file` is its SHA-256. Equal facts, equal
        ids."""
        return {
            "file": hashlib.sha256(self.path.read_bytes()).hexdigest(),
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "bos_id": self.base.bos_id,
            "eod_id": self.base.eod_id,
            "added_tokens": dict(self.added_tokens),
        }

    @cached_property
    def _control_names(self) -> dict[int, str]:
        return {token: name for name, token in self.control_tokens.items()}


def load_tokenizer(section: schema.TokenizerSection) -> Tokenizer:
    """The tokenizer that a recipe's `tokenizer` section names.

    A folder stands for the tokenizer.json or tokenizer.model in it. An added token that the base
    vocabulary already has keeps its id there; the others follow it in the order given.

    Raises:
        UserError: its file or library is not there, or a name cannot be a control token.
    """
    path = _tokenizer_file(Path(section.path).expanduser())
    kind = section.kind or _KIND_BY_ENDING.get(path.suffix)
    if kind is None:
        raise UserError(
            f"{path}: cannot tell the kind of tokenizer from the ending; set `tokenizer.kind` to "
            "sentencepiece, huggingface or tiktoken"
        )
    names = _added_names(section.added_tokens)
    base = _LOADERS[kind](path, names)
    added: dict[str, int] = {}
    for name in names:
        if name in base.literal:
            raise UserError(
                f"{path}: {name} is already an ordinary piece of this vocabulary, so text that "
                "spells it becomes it; take it out of `tokenizer.added_tokens`"
            )
        following = base.size + len(added.keys() - base.control.keys())
        added[name] = base.control.get(name, following)
    return Tokenizer(path=path, kind=kind, base=base, added_tokens=added)


def model_vocab_size(recipe: schema.Recipe, tokenizer: Tokenizer | None) -> int:
    """Size of the tokenizer's vocabulary, or `model.vocab_size` if there is no tokenizer.

    Raises:
        UserError: they differ, or neither is there.
    """
    stated, found = recipe.model.vocab_size, tokenizer.vocab_size if tokenizer else None
    size = found or stated
    if size is None:
        raise UserError(
            "tokenizer: the recipe names none and has no model.vocab_size; give one of the two"
        )
    if tokenizer and stated not in (None, size):
        raise UserError(
            f"model.vocab_size: is {stated}, and the tokenizer {tokenizer.path} has {size}; "
            "remove the key or give that number"
        )
    return size


def well_formed(text: str) -> str:
    """`text` with lone surrogates (halves of UTF-16 pairs) as U+FFFD; halves that meet join."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        raise UserError(
            f"{path}: no tokenizer.json or tokenizer.model in this folder; give the file itself"
        )
    if not path.is_file():
        raise UserError(
            f"{path}: no such tokenizer file; give a SentencePiece .model, a tokenizer.json or a "
            ".tiktoken file"
        )
    return path


def _added_names(added: Any) -> tuple[str, ...]:
    names = CRYSTAL_TOKENS if added == "crystal" else () if added == "none" else tuple(added)
    if len(set(names)) != len(names) or not all(names):
        raise UserError("tokenizer.added_tokens: every name must be there once and not be empty")
    return names
