"""A plan over the data that is there: tokens and packs counted, what is missing estimated."""

from __future__ import annotations

from pathlib import Path

from megacode.data.pack_index import open_packs
from megacode.data.source import has_data, open_source, pack_cache
from megacode.data.tokenizer_check import check_tokenizers
from megacode.errors import UserError
from megacode.plan.plan import Plan, make_plan
from megacode.recipe.mixtures import mixture_entries
from megacode.recipe.schema import Recipe, Source


def plan_with_data(recipe: Recipe, path: Path | None = None) -> Plan:
    """The plan of a recipe, with sources counted where their data is there; see `make_plan`.

    UserError also for data that another tokenizer made (`check_tokenizers`).
    """
    check_tokenizers(recipe)
    return make_plan(recipe, token_counts(recipe), path, pack_counts(recipe))


def token_counts(recipe: Recipe) -> dict[str, int]:
    """Tokens of every source that a phase reads: counted, or the declared `tokens` without data.

    Reads index headers only. UserError if a source has neither, if some of its files are missing,
    or if one is damaged.
    """
    names = dict.fromkeys(name for name, _ in _reads(recipe))
    return {name: _tokens(name, recipe.sources[name]) for name in names}


def pack_counts(recipe: Recipe) -> dict[tuple[str, int], int]:
    """Packs of every source read with `packing: best_fit`, by (source, sequence length).

    Exact, from the documents' lengths. Makes the pack indexes that are missing. Sources without
    data are left out: a plan estimates them.
    """
    counts = {}
    for name, length in _reads(recipe):
        source = recipe.sources[name]
        if recipe.packing(name) == "best_fit" and has_data(source):
            shards = open_source(name, source.paths).shards
            counts[name, length] = len(open_packs(shards, length, pack_cache(recipe)))
    return counts


def _reads(recipe: Recipe) -> list[tuple[str, int]]:
    """(source, sequence length) of every stream of every phase, each once."""
    every = (
        (entry.source, phase.sequence_length)
        for phase in recipe.phases
        for entry in mixture_entries(recipe, phase)
    )
    return list(dict.fromkeys(every))


def _tokens(name: str, source: Source) -> int:
    if has_data(source):
        return open_source(name, source.paths).tokens
    if source.tokens is not None:
        return source.tokens
    if not source.paths:
        raise UserError(f"sources.{name}: give `path` (data) or `tokens` (its expected size)")
    raise UserError(
        f"sources.{name}.path: no data at {source.paths[0]} (.bin and .idx); tokenize it first, or "
        "give `tokens` to plan without it"
    )
