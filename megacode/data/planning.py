"""A plan over the data that is there: tokens and packs counted, what is missing estimated."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from megacode.data.indexed import chunks, read_manifest
from megacode.data.loss_marks import has_marks, trained
from megacode.data.pack_index import open_packs
from megacode.data.source import (
    TokenSource,
    has_data,
    matching_prefixes,
    open_source,
    pack_cache,
)
from megacode.data.tokenizer_check import check_tokenizers
from megacode.errors import UserError
from megacode.plan.plan import Plan, make_plan
from megacode.recipe.mixtures import mixture_entries
from megacode.recipe.schema import OF_PAIRS, LossOn, Recipe, Source


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
    """Sources of conversations, and what is held out of them.

    Raises:
        UserError: a source with `loss_on` has no loss marks, or conversations longer than a pack,
            which would cut them; or one with marks has a FIM rate.
    """
    lengths: dict[str, dict[int, None]] = {}
    for name, length in _reads(recipe):
        lengths.setdefault(name, {})[length] = None
    held_out = dict.fromkeys(phase.sequence_length for phase in recipe.phases)
    for name, source in recipe.sources.items():
        if source.loss_on == "all":
            continue
        if source.loss_on in OF_PAIRS:
            _check_pairs(recipe, name)
        for key, paths, read in (
            ("path", source.paths, lengths.get(name, {})),
            ("validation", source.validation_paths, held_out),
        ):
            if read and any(map(matching_prefixes, paths)):
                _check_marked(recipe, open_source(name, paths, key), f"sources.{name}.{key}", read)
    for phase in recipe.phases:
        for entry in mixture_entries(recipe, phase):
            source = recipe.sources[entry.source]
            if entry.fim_rate and any(map(has_marks, chain(*map(matching_prefixes, source.paths)))):
                raise UserError(
                    f"{entry.key}.fim_rate: {entry.fim_rate:g} of a source of conversations, "
                    "which are not rearranged; set it to 0"
                )


def _check_pairs(recipe: Recipe, name: str) -> None:
    """Whether a source of pairs is one, of the form that the objectives of its phases take."""
    source = recipe.sources[name]
    wanted = {"contrastive": "members", "weighted_tokens": "sequences"}
    for prefix in chain(*map(matching_prefixes, source.paths)):
        form = (read_manifest(prefix) or {}).get("pairs")
        if form is None:
            raise UserError(
                f"sources.{name}.loss_on: {source.loss_on} is of pairs, and {prefix} has none "
                "(`megacode preprocess --pairs` makes them); set all, answers or last_answer"
            )
        for phase in recipe.phases:
            if all(entry.source != name for entry in mixture_entries(recipe, phase)):
                continue
            for key, other in wanted.items():
                if phase.objective and getattr(phase.objective, key) and form != other:
                    raise UserError(
                        f"phases.{phase.name}.objective.{key}: takes pairs as {other}, and "
                        f"{prefix} has {form}; tokenize them again with `--pairs {other}`"
                    )


def _check_marked(recipe: Recipe, source: TokenSource, label: str, lengths: Iterable[int]) -> None:
    if source.marks is None:
        raise UserError(
            f"{label}: {source.shards[0].prefix} does not say which tokens are answers "
            f"(.loss.idx), for `loss_on: {recipe.sources[source.name].loss_on}`; make it with "
            "`megacode preprocess --conversations`"
        )
    for length in lengths:
        packing = recipe.packing(source.name)
        packs = open_packs(source.shards, length, pack_cache(recipe), packing)
        if packs.cut:
            raise UserError(
                f"{label}: {packs.cut:,} conversations are longer than {length + 1:,} tokens and "
                f"would be cut; tokenize it again with `--max-tokens {length + 1} --too-long drop` "
                "(or left, right), or raise sequence_length"
            )


def trained_counts(recipe: Recipe) -> dict[str, int]:
    """Tokens with a loss in each packed source of conversations that a phase weighs by tokens."""
    counts = {}
    for phase in recipe.phases:
        if phase.mixture.weight_by != "tokens":
            continue
        for name in dict.fromkeys(entry.source for entry in mixture_entries(recipe, phase)):
            given = recipe.sources[name]
            if recipe.packing(name) == "concatenate" or not has_data(given):
                continue
            marks = open_source(name, given.paths).marks
            if marks is not None and name not in counts:
                counts[name] = count_trained(marks, given.loss_on)
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
    """
    counts = {}
    for name, length in _reads(recipe):
        source, packing = recipe.sources[name], recipe.packing(name)
        if packing != "concatenate" and has_data(source):
            shards = open_source(name, source.paths).shards
            counts[name, length] = len(open_packs(shards, length, pack_cache(recipe), packing))
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
