"""A plan over the data that is there: tokens and packs counted, what is missing estimated."""

from __future__ import annotations

from pathlib import Path

from megacode.data.indexed import chunks
from megacode.data.loss_marks import trained
from megacode.data.pack_index import SourcePacks, open_packs
from megacode.data.source import TokenSource, has_data, open_source, pack_cache
from megacode.data.tokenizer_check import check_tokenizers
from megacode.errors import UserError
from megacode.plan.plan import Plan, make_plan
from megacode.recipe.mixtures import mixture_entries
from megacode.recipe.schema import LossOn, Recipe, Source


def plan_with_data(recipe: Recipe, path: Path | None = None) -> Plan:
    """The plan of a recipe, with sources counted where their data is there; see `make_plan`.

    UserError also for data that another tokenizer made (`check_tokenizers`).
    """
    check_tokenizers(recipe)
    check_conversations(recipe)
    return make_plan(
        recipe, token_counts(recipe), path, pack_counts(recipe), trained_counts(recipe)
    )


def check_conversations(recipe: Recipe) -> None:
    """UserError: a source with `loss_on` has no loss marks, or one with marks a FIM rate."""
    for phase in recipe.phases:
        for entry in mixture_entries(recipe, phase):
            source = recipe.sources[entry.source]
            if not has_data(source):
                continue
            marked = open_source(entry.source, source.paths).marks is not None
            if source.loss_on != "all" and not marked:
                raise UserError(
                    f"sources.{entry.source}.loss_on: {source.paths[0]} does not say which tokens "
                    "are answers (.loss.idx); make it with `megacode preprocess --conversations`"
                )
            if marked and entry.fim_rate:
                raise UserError(
                    f"{entry.key}.fim_rate: {entry.fim_rate:g} of a source of conversations, "
                    "which are not rearranged; set it to 0"
                )


def trained_counts(recipe: Recipe) -> dict[str, int]:
    """Tokens with a loss in each packed source that a phase weighs by tokens."""
    counts = {}
    for phase in recipe.phases:
        if phase.mixture.weight_by != "tokens":
            continue
        for entry in mixture_entries(recipe, phase):
            name, given = entry.source, recipe.sources[entry.source]
            packing = recipe.packing(name)
            if name in counts or packing == "concatenate" or not has_data(given):
                continue
            source = open_source(name, given.paths)
            if source.marks is not None:
                counts[name] = count_trained(source.marks, given.loss_on)
            else:
                packs = _packs(recipe, name, phase.sequence_length)
                counts[name] = source.tokens - len(packs)
    return counts


def count_trained(marks: TokenSource, loss_on: LossOn) -> int:
    """Tokens with a loss in a source of conversations."""
    edges = chunks(marks.tokens)
    read = (
        marks.read_pieces([[(start, stop - start)]], stop - start, 0)[0] for start, stop in edges
    )
    return sum(int(trained(part, loss_on).sum()) for part in read)


def token_counts(recipe: Recipe) -> dict[str, int]:
    """Tokens of every source that a phase reads: counted, or the declared `tokens` without data.

    Reads index headers only. UserError if a source has neither, if some of its files are missing,
    or if one is damaged.
    """
    names = dict.fromkeys(name for name, _ in _reads(recipe))
    return {name: _tokens(name, recipe.sources[name]) for name in names}


def pack_counts(recipe: Recipe) -> dict[tuple[str, int], int]:
    """Packs of every packed source, by (source, sequence length).

    Exact, from the documents' lengths. Makes the pack indexes that are missing. Sources without
    data are left out: a plan estimates them.

    Raises:
        UserError: conversations with `loss_on` are longer than a pack, which would cut them.
    """
    counts = {}
    for name, length in _reads(recipe):
        source = recipe.sources[name]
        if recipe.packing(name) != "concatenate" and has_data(source):
            packs = _packs(recipe, name, length)
            if source.loss_on != "all" and packs.cut:
                raise UserError(
                    f"sources.{name}: {packs.cut:,} conversations are longer than {length + 1:,} "
                    "tokens and would be cut; tokenize it again with `--max-tokens "
                    f"{length + 1} --too-long drop` (or left, right), or raise sequence_length"
                )
            counts[name, length] = len(packs)
    return counts


def _packs(recipe: Recipe, name: str, length: int) -> SourcePacks:
    shards = open_source(name, recipe.sources[name].paths).shards
    return open_packs(shards, length, pack_cache(recipe), recipe.packing(name))


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
