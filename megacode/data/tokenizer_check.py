"""Whether corpora were tokenized as a recipe says: their manifests against the recipe's tokenizer.

Ids of another tokenizer train without an error where its vocabulary is no larger, so
`plan_with_data` checks this first. Datasets without a manifest (Megatron-LM's) cannot be checked;
`unknown_makers` counts them. Reads no tokens and imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megacode.data.indexed import read_manifest, with_ending
from megacode.data.source import matching_prefixes
from megacode.errors import UserError
from megacode.recipe import schema
from megacode.recipe.mixtures import mixture_entries
from megacode.recipe.schema import Recipe
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class _Corpus:
    """A dataset (or shard) of a source.

    Attributes:
        key: `sources.NAME.path` or `sources.NAME.validation`.
        made: `tokenizer` of its manifest, and the manifest's `vocab_size`; empty without one.
    """

    source: str
    key: str
    manifest: Path
    made: dict[str, Any]


def check_tokenizers(recipe: Recipe) -> None:
    """Refuse a corpus (`path`, `validation`) made with another tokenizer, added tokens, BOS or EOD.

    A recipe may have more added tokens than its corpora: text never becomes one, so ids are the
    same. Without `tokenizer:` in the recipe, corpora are compared with each other and with
    `model.vocab_size`.

    Raises:
        UserError: a line for each difference, with source, manifest, both values and what to do.
    """
    alike: dict[tuple[str, str], list[_Corpus]] = {}
    for corpus in _corpora(recipe):
        if corpus.made:
            maker = json.dumps(corpus.made, sort_keys=True)
            alike.setdefault((corpus.source, maker), []).append(corpus)
    given = recipe.tokenizer
    tokenizer = load_tokenizer(given) if given and alike and _is_there(given) else None
    problems = [
        f"{first.key}: {first.manifest}: {problem}"
        + (f" (and {len(more)} more of this source)" if more else "")
        for first, *more in alike.values()
        for problem in _problems(first.made, recipe, tokenizer)
    ]
    if tokenizer is None:
        problems += _among_themselves([first for first, *_ in alike.values()])
    if problems:
        more = f"\nand {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError("\n".join(problems[:10]) + more)


def unknown_makers(recipe: Recipe) -> str | None:
    """A line that says which sources' tokenizer cannot be compared, if any."""
    if recipe.tokenizer is None:
        return None
    corpora = list(_corpora(recipe))
    unknown = list(dict.fromkeys(corpus.source for corpus in corpora if not corpus.made))
    if unknown:
        names = ", ".join([*unknown[:5], *(["..."] if len(unknown) > 5 else [])])
        return (
            f"{len(unknown)} source{'s' * (len(unknown) > 1)} without a manifest ({names}): "
            "whether the recipe's tokenizer made them cannot be told"
        )
    if corpora and not _is_there(recipe.tokenizer):
        return f"{recipe.tokenizer.path} is not there: whether it made the corpora cannot be told"
    return None


def _corpora(recipe: Recipe) -> Iterator[_Corpus]:
    read = {entry.source for phase in recipe.phases for entry in mixture_entries(recipe, phase)}
    for name, source in recipe.sources.items():
        keys = {
            "path": source.paths if name in read else [],
            "validation": source.validation_paths,
        }
        for key, path in ((key, path) for key, paths in keys.items() for path in paths):
            for prefix in matching_prefixes(path):
                try:
                    manifest = read_manifest(prefix) or {}
                except UserError:  # a file of that name which is something else
                    manifest = {}
                made = manifest.get("tokenizer", {})
                made = {**made, "vocab_size": manifest.get("vocab_size")} if made else {}
                yield _Corpus(name, f"sources.{name}.{key}", with_ending(prefix, ".json"), made)


def _problems(made: dict[str, Any], recipe: Recipe, tokenizer: Tokenizer | None) -> Iterator[str]:
    """How the maker of a corpus differs from `tokenizer`, the recipe's if its file is there."""
    given, size = recipe.tokenizer, recipe.model.vocab_size
    if given is None:
        if made["vocab_size"] and size and made["vocab_size"] > size:
            yield (
                f"was made with a vocabulary of {made['vocab_size']:,}, and model.vocab_size is "
                f"{size:,}; give the tokenizer ({made.get('path')}) or its size"
            )
        return
    for key, token in (("bos", "begin-of-sequence"), ("eod", "end-of-document")):
        before, now = made.get(key), getattr(given, key)
        if before not in (None, now):
            yield (
                f"was made with `{key}: {str(before).lower()}` ({token} token), and the recipe's "
                f"tokenizer.{key} is {str(now).lower()}; set it to {str(before).lower()}, or "
                "tokenize it again"
            )
    if tokenizer is None or tokenizer.fingerprint() == made["fingerprint"]:
        return
    as_made = _with_added_tokens(given, made.get("added_tokens"))
    if as_made is None or as_made.fingerprint() != made["fingerprint"]:
        yield (
            f"was made with another tokenizer, {made.get('path')} (fingerprint "
            f"{made['fingerprint'][:12]}), than the recipe's {given.path} "
            f"({tokenizer.fingerprint()[:12]}); set tokenizer.path to that one, or tokenize it "
            "again"
        )
    elif not _extends(as_made, tokenizer):
        yield (
            f"was made with tokenizer.added_tokens {_listed(as_made)}, and the recipe has "
            f"{_listed(tokenizer)}; keep those first and in their order, or tokenize it again"
        )


def _with_added_tokens(given: schema.TokenizerSection, added_tokens: Any) -> Tokenizer | None:
    """The recipe's tokenizer with the added tokens of a manifest; None if it cannot have them."""
    try:
        return load_tokenizer(
            schema.TokenizerSection.model_validate(
                {**given.model_dump(), "added_tokens": added_tokens or "none"}
            )
        )
    except (UserError, ValidationError):
        return None


def _extends(old: Tokenizer, new: Tokenizer) -> bool:
    """Whether text has the same ids under both, and the old one's control tokens keep theirs."""
    added = new.control_tokens.keys() - old.control_tokens.keys()
    return (
        old.control_tokens.items() <= new.control_tokens.items()
        and not added & old.base.literal.keys()
    )


def _among_themselves(corpora: list[_Corpus]) -> Iterator[str]:
    first = corpora[0] if corpora else None
    for other in corpora:
        if first and other.made["fingerprint"] != first.made["fingerprint"]:
            yield (
                f"{other.key} was made with another tokenizer ({other.manifest}: "
                f"{other.made.get('path')}) than {first.key} ({first.manifest}: "
                f"{first.made.get('path')}); tokenize one of them again"
            )
            return


def _listed(tokenizer: Tokenizer) -> str:
    names = [f"{name} = {token}" for name, token in tokenizer.added_tokens.items()]
    return f"[{', '.join(names[:4])}{f', ... {len(names)} in all' if len(names) > 4 else ''}]"


def _is_there(given: schema.TokenizerSection) -> bool:
    return Path(given.path).expanduser().exists()
