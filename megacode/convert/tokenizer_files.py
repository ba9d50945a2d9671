"""Tokenizer files of a Hugging Face folder: written from a recipe's tokenizer, read into a recipe.

In megacode no text becomes a control token. A Hugging Face tokenizer finds special tokens in text,
as its users expect; loaded or called with `split_special_tokens=True` it gives megacode's ids for
every text, and without it for every text that spells no control token. What was written is proven
before it is called written.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megacode.convert.kept import IDS, copy_companions, tokenizer_settings
from megacode.convert.tokenizer_json import tokenizer_json
from megacode.errors import UserError
from megacode.files import replace_file, write_json
from megacode.megatron.cpu import quiet
from megacode.recipe.schema import TokenizerSection
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer

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
    "Zero\u200bwidth\u200d\u200cjoiners\ufeff, naïve café, e\u0301, "
    "\u1100\u1161, ﬁ, Å \u212b, \u00a0nbsp\u3000wide",
    "\u2028\u2029\u0085\u00ad\u061c\u2066",
    "\0a\0",
    "\ufffd\ufffe\uffff",
    "".join(chr(plane << 16 | 0x1234) for plane in range(17)),
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0010ffff \U000e0001 "
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 العربية 日本語 हिन्दी ไทย ٣٤ Ⅷ ½",
    "\u2581\u2581a\u2581",
    "=" * 41 + " " * 67 + "\n" * 13 + "-" * 30 + "a" * 99,
    "<0x0A><0xFF>< s><|x|>",
)


# ------------------------------------------------------------------------------------------ export


def token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """`bos_token_id`, `eos_token_id`, `pad_token_id` for config.json; None where there is none."""
    if tokenizer is None:
        return dict.fromkeys(IDS)
    ids = (tokenizer.base.bos_id, tokenizer.base.eod_id, tokenizer.pad_id)
    return dict(zip(IDS, ids, strict=True))


def write_tokenizer(
    section: TokenizerSection, folder: Path, vocab_size: int, template: str | None = None
) -> None:
    """Write the tokenizer files of `FILES` into `folder`, and what `copy_companions` finds.

    Args:
        vocab_size: of the model (without padding); the tokenizer's may not be larger.
        template: the text of a chat template, instead of those beside the tokenizer.

    Raises:
        UserError: the tokenizer does not fit the vocabulary, or cannot be said exactly in a
            tokenizer.json; nothing is written then.
    """
    tokenizer = load_tokenizer(section)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer.path}: has {tokenizer.vocab_size:,} tokens and the model only "
            f"{vocab_size:,}; name the tokenizer that the model was trained with in the recipe's "
            "`tokenizer.path`"
        )
    contents = tokenizer_json(tokenizer, section.bos)
    text = json.dumps(contents, ensure_ascii=False, indent=1)
    prove(tokenizer, text, section.bos)
    names = {token: name for name, token in sorted(tokenizer.control_tokens.items())}
    special = {
        key.removesuffix("_id"): names[token]
        for key, token in token_ids(tokenizer).items()
        if token is not None
    }
    for name in ("<unk>", "[UNK]", "<|unk|>"):
        if name in tokenizer.control_tokens:
            special.setdefault("unk_token", name)
    others = [names[token] for token in sorted(names) if names[token] not in special.values()]
    with replace_file(folder / "tokenizer.json") as file:
        file.write(text.encode())
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
        # Converters to GGUF look for added tokens here.
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in contents["added_tokens"]
        },
        **tokenizer_settings(tokenizer, template),
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special | {"additional_special_tokens": others})
    copy_companions(tokenizer, folder, template)


def prove(tokenizer: Tokenizer, contents: str, bos: bool) -> None:
    """Compare a tokenizer.json with megacode's ids on hostile texts and on the vocabulary's pieces.

    Raises:
        UserError: a difference, with the text.
    """
    import tokenizers

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
        expected = start + tokenizer.encode(text)
        plain = not any(name in text for name in names)
        for split_special in (True, False) if plain else (True,):
            loaded.encode_special_tokens = split_special
            found = loaded.encode(text, add_special_tokens=True).ids
            if found != expected:
                raise _different(tokenizer, text, expected, found)


def _different(tokenizer: Tokenizer, text: str, expected: list[int], found: list[Any]) -> UserError:
    pairs = enumerate(zip(expected, found, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)))
    return UserError(
        f"{tokenizer.path}: cannot be said exactly in a tokenizer.json: {text[:60]!r} is "
        f"{expected[at : at + 6]} from token {at} on with it and {found[at : at + 6]} with the "
        "file that would be written; export with --no-tokenizer and ship the original file"
    )


def _sample(tokenizer: Tokenizer) -> Iterator[str]:
    """`SAMPLE`, the names of control tokens within text, and texts of the vocabulary's pieces."""
    yield from SAMPLE
    for character in "=-# *_.0a\n\t":  # runs, which can be split in many ways
        for length in (2, 3, 5, 6, 7, 9, 11, 15, 17, 21, 31, 33, 63, 77, 127):
            yield character * length
    for name in (*tokenizer.control_tokens, *tokenizer.base.literal):
        yield f" a  {name}  b{name}"
    draw = random.Random(1)
    control = set(tokenizer.control_tokens.values())
    for length in [3] * 400 + [40] * 100 + [1000] * 3:
        drawn = (draw.randrange(tokenizer.base.size) for _ in range(length))
        yield "".join(tokenizer.decode([token]) for token in drawn if token not in control)


def loads_differently(section: TokenizerSection, folder: Path) -> str | None:
    """What to tell the user if `AutoTokenizer` makes something else of the finished folder.

    For a few families (Qwen2) transformers 5 takes a class of its own, whatever the files say, with
    its own way of splitting text. None where all is well, or transformers is not installed.
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
                f"AutoTokenizer of transformers {transformers.__version__} ignores tokenizer.json "
                f"of this model's family and gives other ids ({text[:30]!r}); load the tokenizer "
                "with PreTrainedTokenizerFast.from_pretrained"
            )
    return None


# ------------------------------------------------------------------------------------------ import


def has_tokenizer(folder: Path) -> bool:
    """Whether a Hugging Face folder has a tokenizer that can be read."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def difference(theirs: Tokenizer, ours: Tokenizer) -> str | None:
    """How `ours` is another tokenizer than `theirs`; None where it has added tokens at most."""
    texts = list(_sample(theirs))
    others = [text for text in texts if theirs.encode(text) != ours.encode(text)]
    control = theirs.control_tokens.items() - ours.control_tokens.items()
    said = []
    if others:
        said.append(f"{len(others)} of {len(texts)} texts get other ids ({others[0][:30]!r})")
    if control:
        names = ", ".join(sorted(name for name, _ in control)[:4])
        said.append(f"{len(control)} control tokens are missing or have other ids ({names})")
    return f"{ours.path} and {theirs.path}: {'; '.join(said)}" if said else None


def read_tokenizer(folder: Path, vocab_size: int) -> tuple[TokenizerSection, str | None]:
    """The recipe's tokenizer for a Hugging Face folder, and what the user should know about it.

    A model with more rows than tokens (padding that its makers kept) gets reserved control tokens
    for the rest, so that recipe, weights and tokenizer agree.

    Args:
        vocab_size: rows of the model.

    Raises:
        UserError: no tokenizer there, or one that is larger than the model's vocabulary.
    """
    tokenizer = load_tokenizer(TokenizerSection(path=str(folder)))
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer.path}: has {tokenizer.vocab_size:,} tokens, but config.json says "
            f"vocab_size {vocab_size:,}; the folder's tokenizer is not the model's"
        )
    section = TokenizerSection(
        path=str(tokenizer.path),
        bos=tokenizer.base.bos_id is not None and _starts_with_bos(tokenizer),
        eod=tokenizer.base.eod_id is not None,
    )
    missing = vocab_size - tokenizer.vocab_size
    if not missing:
        return section, None
    taken = tokenizer.control_tokens.keys() | tokenizer.base.literal.keys()
    names = (f"<|unused_{i}|>" for i in range(missing + len(taken)))
    free = [name for name in names if name not in taken][:missing]
    return section.model_copy(update={"added_tokens": free}), (
        f"{tokenizer.path}: has {tokenizer.vocab_size:,} tokens and the model {vocab_size:,} rows; "
        f"the last {missing:,} are named {free[0]} to {free[-1]}"
    )


def _starts_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether the folder's own tokenizer puts BOS before a text."""
    config = tokenizer.path.with_name("tokenizer_config.json")
    says = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if isinstance(says.get("add_bos_token"), bool):
        return says["add_bos_token"]
    if tokenizer.kind == "huggingface":
        loaded: Any = tokenizer.base
        ids = loaded.tokenizer.encode("a", add_special_tokens=True).ids
        return ids[:1] == [tokenizer.base.bos_id]
    # LlamaTokenizer's default without the key
    return "llama" in str(says.get("tokenizer_class", "")).lower()
