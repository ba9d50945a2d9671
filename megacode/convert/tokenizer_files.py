"""Tokenizer files of a Hugging Face folder: written from a recipe's tokenizer with identical ids, and read into a recipe.

In megacode no text becomes a control token. A Hugging Face tokenizer finds special tokens in text, as its users expect;
loaded or called with `split_special_tokens=True` it gives megacode's ids for every text, and without it for every text
that spells no control token. What was written is proven before it is called written.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacode.convert.kept import IDS, copy_companions, tokenizer_settings
from megacode.convert.tokenizer_json import tokenizer_json
from megacode.errors import UserError
from megacode.files import replace_file, write_json
from megacode.megatron.cpu import quiet
from megacode.recipe import schema
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer
from megacode.tokenizer.vocabularies import library

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

SAMPLE: tuple[str, ...] = (
    "",
    " ",
    "   ",
    "\n",
    " a",
    "  a  b   c  ",
    "\tdef f(x):\n\t\treturn x  # 12345 67.8e-9\n\n\n",
    "\r\nCRLF\r\n\rCR\n\x0b\x0c",
    "Zero\u200bwidth\u200d\u200cjoiners\ufeff, naïve café, e\u0301, \u1100\u1161, ﬁ, Å \u212b, \u00a0nbsp\u3000wide",
    "\u2028\u2029\u0085\u00ad\u061c\u2066",
    "\0a\0",
    "\ufffd\ufffe\uffff",
    "".join(chr(plane << 16 | 0x1234) for plane in range(17)),
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0010ffff \U000e0001 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 العربية 日本語 हिन्दी ไทย ٣٤ Ⅷ ½",
    "\u2581\u2581a\u2581",
    "=" * 41 + " " * 67 + "\n" * 13 + "-" * 30 + "a" * 99,
    "<0x0A><0xFF>< s><|x|>",
)


# -------------------------------------------------------------------------------------------------------------- export


def token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """`bos_token_id`, `eos_token_id`, `pad_token_id` for config.json; None where there is none."""
    if tokenizer is None:
        return dict.fromkeys(IDS)
    return dict(
        zip(IDS, (tokenizer.base.bos_id, tokenizer.base.eod_id, tokenizer.pad_id), strict=True)
    )


def write_tokenizer(section: schema.TokenizerSection, folder: Path, vocab_size: int) -> None:
    """Write the tokenizer files of `FILES` into `folder`, and what else belongs to the tokenizer (`copy_companions`).

    Args:
        vocab_size: of the model (without padding); the tokenizer's may not be larger.

    Raises:
        UserError: the tokenizer does not fit the vocabulary, or cannot be said exactly in a tokenizer.json; nothing is
            written then.
    """
    tokenizer = load_tokenizer(section)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer.path}: has {tokenizer.vocab_size:,} tokens and the model only {vocab_size:,}; this is not the "
            "tokenizer that the model was trained with: name that one in the recipe's `tokenizer.path`"
        )
    contents = json.dumps(tokenizer_json(tokenizer, section.bos), ensure_ascii=False, indent=1)
    prove(tokenizer, contents, section.bos)
    names = {token: name for name, token in tokenizer.control_tokens.items()}
    special = {
        key.removesuffix("_id"): names[token]
        for key, token in token_ids(tokenizer).items()
        if token is not None
    }
    unknown = [name for name in ("<unk>", "[UNK]", "<|unk|>") if name in names.values()]
    if unknown:
        special["unk_token"] = unknown[0]
    others = [name for _, name in sorted(names.items()) if name not in special.values()]
    with replace_file(folder / "tokenizer.json") as file:
        file.write(contents.encode())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{key}_token": special.get(f"{key}_token") for key in ("bos", "eos", "unk", "pad")},
        "additional_special_tokens": others,
        "add_bos_token": section.bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "added_tokens_decoder": _decoder(contents),
        **tokenizer_settings(tokenizer),
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special | {"additional_special_tokens": others})
    copy_companions(tokenizer, folder)


def _decoder(contents: str) -> dict[str, dict[str, Any]]:
    """Added tokens of a tokenizer.json by id, as tokenizer_config.json has them: converters to GGUF look for them there."""
    return {
        str(token["id"]): {k: v for k, v in token.items() if k != "id"}
        for token in json.loads(contents)["added_tokens"]
    }


def prove(tokenizer: Tokenizer, contents: str, bos: bool) -> None:
    """Compare a tokenizer.json with megacode's ids on a sample of hostile texts and of the vocabulary's own pieces.

    Raises:
        UserError: a difference, with the text.
    """
    tokenizers = library("tokenizers", "tokenizers", tokenizer.path)
    try:
        loaded = tokenizers.Tokenizer.from_str(contents)
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{tokenizer.path}: cannot be said in a tokenizer.json: {str(error)[:200]}"
        ) from None
    start = [tokenizer.bos_id] if bos else []
    names = tokenizer.control_tokens
    for name, token in names.items():
        if loaded.token_to_id(name) != token:
            raise _different(tokenizer, name, [token], [loaded.token_to_id(name)])
    for text in _sample(tokenizer):
        expected = tokenizer.encode(text)
        plain = not any(name in text for name in names)
        for split_special in (True, False) if plain else (True,):
            loaded.encode_special_tokens = split_special
            found = loaded.encode(text, add_special_tokens=True).ids
            if found != start + expected:
                raise _different(tokenizer, text, start + expected, found)


def _different(tokenizer: Tokenizer, text: str, expected: list[int], found: list[Any]) -> UserError:
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b),
        min(len(expected), len(found)),
    )
    return UserError(
        f"{tokenizer.path}: cannot be said exactly in a tokenizer.json: {text[:60]!r} is {expected[at : at + 6]} from "
        f"token {at} on with it and {found[at : at + 6]} with the file that would be written; export with --no-tokenizer "
        "and ship the original file"
    )


def _sample(tokenizer: Tokenizer) -> Iterator[str]:
    """`SAMPLE`, the names of control tokens within text, and texts put together from the vocabulary's own pieces."""
    yield from SAMPLE
    for character in "=-# *_.0a\n\t":  # runs, which can be split in many ways
        yield from (
            character * length for length in (2, 3, 5, 6, 7, 9, 11, 15, 17, 21, 31, 33, 63, 77, 127)
        )
    for name in (*tokenizer.control_tokens, *tokenizer.base.literal):
        yield f" a  {name}  b{name}"
    draw = random.Random(1)
    size = tokenizer.base.size
    control = set(tokenizer.control_tokens.values())
    for length in [3] * 400 + [40] * 100 + [1000] * 3:
        ids = [
            token for token in (draw.randrange(size) for _ in range(length)) if token not in control
        ]
        yield "".join(tokenizer.decode([token]) for token in ids)


def loads_differently(section: schema.TokenizerSection, folder: Path) -> str | None:
    """What to tell the user if `AutoTokenizer` of the installed transformers makes something else of the finished folder.

    For a few families (Qwen2) transformers 5 takes a class of its own, whatever the files say, and that class has its own
    way of splitting text. None where all is well, or transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        return None
    quiet()
    tokenizer = load_tokenizer(section)
    loaded = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    for text in _sample(tokenizer):
        found = loaded(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if list(found) != tokenizer.encode(text):
            return (
                f"AutoTokenizer of transformers {transformers.__version__} ignores tokenizer.json of this model's family "
                f"and gives other ids ({text[:30]!r}); load the tokenizer with PreTrainedTokenizerFast.from_pretrained"
            )
    return None


# -------------------------------------------------------------------------------------------------------------- import


@dataclass(frozen=True)
class ImportedTokenizer:
    """A recipe's `tokenizer` section (plain data) for a Hugging Face folder, and what the user should know about it."""

    section: dict[str, Any]
    note: str | None


def read_tokenizer(folder: Path, vocab_size: int) -> ImportedTokenizer:
    """The tokenizer of a Hugging Face folder for a model of `vocab_size` rows.

    A model with more rows than tokens (padding that its makers kept) gets reserved control tokens for the rest, so that
    recipe, weights and tokenizer agree.

    Raises:
        UserError: no tokenizer there, or one that is larger than the model's vocabulary.
    """
    tokenizer = load_tokenizer(schema.TokenizerSection(path=str(folder)))
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer.path}: has {tokenizer.vocab_size:,} tokens, but config.json says vocab_size {vocab_size:,}; the "
            "folder's tokenizer is not the model's"
        )
    bos = tokenizer.base.bos_id is not None and _starts_with_bos(tokenizer)
    section: dict[str, Any] = {
        "path": str(tokenizer.path),
        "bos": bos,
        "eod": tokenizer.base.eod_id is not None,
    }
    missing = vocab_size - tokenizer.vocab_size
    if not missing:
        return ImportedTokenizer(section, None)
    reserved = (f"<|unused_{i}|>" for i in range(missing + len(tokenizer.control_tokens)))
    free = [
        name
        for name in reserved
        if name not in tokenizer.control_tokens and name not in tokenizer.base.literal
    ]
    section["added_tokens"] = free[:missing]
    return ImportedTokenizer(
        section,
        f"{tokenizer.path}: has {tokenizer.vocab_size:,} tokens and the model {vocab_size:,} rows; the last {missing:,} are "
        f"named {free[0]} to {free[missing - 1]}",
    )


def _starts_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether the folder's own tokenizer puts BOS before a text."""
    config = tokenizer.path.with_name("tokenizer_config.json")
    says = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if isinstance(says.get("add_bos_token"), bool):
        return says["add_bos_token"]
    if tokenizer.kind == "huggingface":
        loaded: Any = tokenizer.base
        return loaded.tokenizer.encode("a", add_special_tokens=True).ids[:1] == [
            tokenizer.base.bos_id
        ]
    return (
        "llama" in str(says.get("tokenizer_class", "")).lower()
    )  # LlamaTokenizer's default without the key
