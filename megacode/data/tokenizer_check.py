"""Whether corpora were tokenized as a recipe says: their manifests against the recipe's tokenizer.

Ids of another tokenizer train without an error where its vocabulary is no larger, so `plan_with_data` asks before anything else.
Datasets without a manifest (Megatron-LM's) cannot be asked; `unknown_makers` counts them. Reads no tokens and imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
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
class _Made:
    """A dataset (or shard) of a source that is there. `made` is its manifest's `tokenizer`; None without a manifest."""

    source: str
    key: str
    manifest: Path
    made: Mapping[str, Any] | None
    vocab_size: int | None


def check_tokenizers(recipe: Recipe, base: Path = Path()) -> None:
    """Refuse a corpus (`path` or `validation`) that was made with another tokenizer, other added tokens, BOS or EOD.

    A recipe may have more added tokens than its corpora: text never becomes one, so ids are the same. Without `tokenizer:` in the
    recipe, corpora are compared with each other and with `model.vocab_size`.

    Raises:
        UserError: a line for each difference, with source, manifest, both values and what to do.
    """
    known = [corpus for corpus in _corpora(recipe, base) if corpus.made]
    found: dict[tuple[str, str], list[_Made]] = {}
    for corpus in known:
        for problem in _problems(corpus, recipe, base):
            found.setdefault((corpus.source, problem), []).append(corpus)
    problems = [
        f"{first.key}: {first.manifest}: {problem}{f' (and {len(more)} more of this source)' * bool(more)}"
        for (_, problem), (first, *more) in found.items()
    ]
    if not recipe.tokenizer or not _is_there(recipe.tokenizer, base):
        problems += _among_themselves(known)
    if problems:
        more = f"\nand {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError("\n".join(problems[:10]) + more)


def unknown_makers(recipe: Recipe, base: Path = Path()) -> str | None:
    """A line that says which sources' tokenizer cannot be compared, if any."""
    if recipe.tokenizer is None:
        return None
    corpora = list(_corpora(recipe, base))
    unknown = list(dict.fromkeys(corpus.source for corpus in corpora if corpus.made is None))
    if unknown:
        return (
            f"{len(unknown)} source{'s' * (len(unknown) > 1)} without a manifest ({', '.join(unknown[:5])}"
            f"{', ...' * (len(unknown) > 5)}): whether the recipe's tokenizer made them cannot be told"
        )
    if corpora and not _is_there(recipe.tokenizer, base):
        return f"{recipe.tokenizer.path} is not there: whether it made the corpora cannot be told"
    return None


def _corpora(recipe: Recipe, base: Path) -> Iterator[_Made]:
    read = {entry.source for phase in recipe.phases for entry in mixture_entries(recipe, phase)}
    for name, source in recipe.sources.items():
        for key, paths in (
            ("path", source.paths if name in read else []),
            ("validation", source.validation_paths),
        ):
            for prefix in (prefix for path in paths for prefix in matching_prefixes(path, base)):
                try:
                    manifest = read_manifest(prefix) or {}
                except UserError:  # a file of that name which is something else
                    manifest = {}
                made, size = manifest.get("tokenizer"), manifest.get("vocab_size")
                yield _Made(
                    name,
                    f"sources.{name}.{key}",
                    with_ending(prefix, ".json"),
                    made if isinstance(made, dict) and made.get("fingerprint") else None,
                    size if isinstance(size, int) else None,
                )


def _problems(corpus: _Made, recipe: Recipe, base: Path) -> Iterator[str]:
    made, given = corpus.made or {}, recipe.tokenizer
    if given is None:
        if (
            corpus.vocab_size
            and recipe.model.vocab_size
            and corpus.vocab_size > recipe.model.vocab_size
        ):
            yield (
                f"was made with a vocabulary of {corpus.vocab_size:,}, and model.vocab_size is "
                f"{recipe.model.vocab_size:,}; give the tokenizer ({made.get('path')}) or its size"
            )
        return
    for key, token in (("bos", "begin-of-sequence"), ("eod", "end-of-document")):
        before, now = made.get(key), getattr(given, key)
        if before is not None and before != now:
            yield (
                f"was made with `{key}: {str(before).lower()}` ({token} token), and the recipe's tokenizer.{key} is "
                f"{str(now).lower()}; set it to {str(before).lower()}, or tokenize it again"
            )
    if not _is_there(given, base):
        return
    tokenizer = _loaded(given, base)
    if tokenizer.fingerprint() == made["fingerprint"]:
        return
    as_made = _loaded_with(given, base, made.get("added_tokens"))
    if as_made is None or as_made.fingerprint() != made["fingerprint"]:
        yield (
            f"was made with another tokenizer, {made.get('path')} (fingerprint {str(made['fingerprint'])[:12]}), than the "
            f"recipe's {given.path} ({tokenizer.fingerprint()[:12]}); set tokenizer.path to that one, or tokenize it again"
        )
    elif not _extends(as_made, tokenizer):
        yield (
            f"was made with tokenizer.added_tokens {_listed(as_made)}, and the recipe has {_listed(tokenizer)}; keep "
            "those first and in their order, or tokenize it again"
        )


def _extends(old: Tokenizer, new: Tokenizer) -> bool:
    """Whether text has the same ids under both, and every control token of the old one has the id that it had."""
    added = new.control_tokens.keys() - old.control_tokens.keys()
    return (
        old.control_tokens.items() <= new.control_tokens.items()
        and not added & old.base.literal.keys()
    )


def _among_themselves(corpora: list[_Made]) -> Iterator[str]:
    by_maker: dict[str, _Made] = {}
    for corpus in corpora:
        by_maker.setdefault(str((corpus.made or {})["fingerprint"]), corpus)
    if len(by_maker) > 1:
        first, second = list(by_maker.values())[:2]
        one, other = (
            f"{corpus.manifest}: {(corpus.made or {}).get('path')}" for corpus in (first, second)
        )
        yield f"{second.key} was made with another tokenizer ({other}) than {first.key} ({one}); tokenize one of them again"


def _listed(tokenizer: Tokenizer) -> str:
    names = [f"{name} = {token}" for name, token in tokenizer.added_tokens.items()]
    return f"[{', '.join(names[:4])}{f', ... {len(names)} in all' if len(names) > 4 else ''}]"


def _is_there(given: schema.TokenizerSection, base: Path) -> bool:
    return (base / Path(given.path).expanduser()).exists()


def _loaded(given: schema.TokenizerSection, base: Path) -> Tokenizer:
    path = base / Path(given.path).expanduser()
    seen = os.stat(path)
    return _load(
        given.model_copy(update={"path": str(path)}).model_dump_json(),
        seen.st_mtime_ns,
        seen.st_size,
    )


def _loaded_with(given: schema.TokenizerSection, base: Path, added_tokens: Any) -> Tokenizer | None:
    """The recipe's tokenizer with the added tokens of a manifest; None if it cannot have them."""
    try:
        section = schema.TokenizerSection.model_validate(
            {**given.model_dump(), "added_tokens": added_tokens or "none"}
        )
        return _loaded(section, base)
    except (UserError, ValidationError):
        return None


@lru_cache(maxsize=8)
def _load(section: str, modified: int, size: int) -> Tokenizer:
    return load_tokenizer(schema.TokenizerSection.model_validate_json(section))
