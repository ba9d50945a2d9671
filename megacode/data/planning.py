"""A plan over the data that is there: tokens and packs counted, what is not there estimated."""

from __future__ import annotations

from pathlib import Path

from megacode.data.pack_index import open_packs
from megacode.data.source import has_data, open_source, pack_cache, token_counts
from megacode.data.tokenizer_check import check_tokenizers
from megacode.plan.plan import Plan, make_plan
from megacode.recipe.mixtures import mixture_entries
from megacode.recipe.schema import Recipe


def pack_counts(recipe: Recipe, base: Path = Path()) -> dict[tuple[str, int], int]:
    """Packs of every source that a phase reads with `packing: best_fit`, by (source, sequence length).

    Exact, from the documents' lengths; makes the pack indexes that are not there yet. Sources whose data is not there are
    left out: a plan estimates them.
    """
    counts: dict[tuple[str, int], int] = {}
    for phase in recipe.phases:
        for entry in mixture_entries(recipe, phase):
            source, key = recipe.sources[entry.source], (entry.source, phase.sequence_length)
            if (
                recipe.packing(entry.source) == "best_fit"
                and key not in counts
                and has_data(source, base)
            ):
                shards = open_source(entry.source, source.paths, base).shards
                counts[key] = len(
                    open_packs(shards, phase.sequence_length, pack_cache(recipe, base))
                )
    return counts


def plan_with_data(recipe: Recipe, path: Path | None = None, base: Path = Path()) -> Plan:
    """The plan of a recipe whose sources are counted where their data is there; see `make_plan`.

    UserError also for data that another tokenizer made (`check_tokenizers`).
    """
    check_tokenizers(recipe, base)
    return make_plan(recipe, token_counts(recipe, base), path, pack_counts(recipe, base))
