"""What `megacode plan` says of packing is what happens."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megacode.cli import plan as plan_command
from megacode.data import packing_report as losses_module
from megacode.data.packing_report import PackingLosses, packing_line, packing_losses
from megacode.data.planning import plan_with_data
from megacode.data.source import open_source
from megacode.recipe.load import dump_recipe
from megacode.recipe.schema import Recipe
from tests.data.conftest import recipe_of, write_shard

LENGTH = 16


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """`s`: 300 documents of 0 to 30 tokens in two shards; `gone` is not there."""
    sizes = np.random.default_rng(4).integers(0, 31, 300).tolist()
    for name, part in (("s0", sizes[:120]), ("s1", sizes[120:])):
        write_shard(tmp_path / name, [list(range(size)) for size in part])
    sources = {
        "s": {"path": str(tmp_path / "s?")},
        "gone": {"path": str(tmp_path / "g"), "tokens": 5000},
    }
    return recipe_of(sources, [{"steps": 3, "mixture": {"sources": {"s": 1, "gone": 1}}}])


def measured(recipe: Recipe) -> PackingLosses:
    (one,) = packing_losses(plan_with_data(recipe))
    return one


def test_cut_documents_are_those_that_no_sample_shows_whole(recipe: Recipe) -> None:
    source = open_source("s", recipe.sources["s"].paths)
    whole, seen, position = 0, 0, 0
    while position < source.tokens:
        document = source.document_at(position)
        position = document.start + document.tokens
        window = document.start // LENGTH * LENGTH
        whole += position <= window + LENGTH + 1
        seen += 1
    one = measured(recipe)
    assert one.cut["concatenate"] == pytest.approx(1 - whole / seen)
    assert one.lost == (source.tokens - 1) % LENGTH / source.tokens
    assert (one.documents, one.measured, one.packing) == (300, 300, "concatenate")


def test_padding_and_cuts_of_best_fit_are_those_of_its_packs(recipe: Recipe) -> None:
    packed = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"packing": "best_fit"})}
    )
    plan, one = plan_with_data(packed), measured(packed)
    source = open_source("s", recipe.sources["s"].paths)
    assert one.padding == pytest.approx(
        1 - source.tokens / (plan.phases[0].streams[0].windows * (LENGTH + 1))
    )
    sizes = np.concatenate([next(shard.document_lengths()) for shard in source.shards])
    assert one.cut["best_fit"] == pytest.approx((sizes > LENGTH + 1).sum() / (sizes > 0).sum())
    assert measured(recipe).padding == one.padding


def test_large_sources_are_measured_in_part_and_it_is_said(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = measured(recipe)
    monkeypatch.setattr(losses_module, "MEASURED", 200)
    part = measured(recipe)
    assert 100 < part.measured <= 200 < part.documents
    assert part.cut["concatenate"] == pytest.approx(exact.cut["concatenate"], abs=0.1)


def test_what_document_level_fim_leaves_alone_is_counted(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measured(recipe).giant is None
    monkeypatch.setattr(losses_module, "MAX_WINDOWS", 1)
    phase = recipe.phases[0].model_copy(update={"fim_rate": 0.5, "fim_level": "document"})
    source = open_source("s", recipe.sources["s"].paths)
    sizes = np.concatenate([next(shard.document_lengths()) for shard in source.shards])
    found = measured(recipe.model_copy(update={"phases": [phase]})).giant
    assert found == pytest.approx(sizes[sizes > LENGTH].sum() / sizes.sum())


def test_the_plan_and_the_start_of_a_run_say_both(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(dump_recipe(recipe))

    def run(*arguments: Any) -> str:
        parser = argparse.ArgumentParser()
        plan_command.add_arguments(parser)
        plan_command.run(parser.parse_args([str(path), *map(str, arguments)]))
        return capsys.readouterr().out

    out = run("--set", "data.packing=best_fit")
    assert (
        "concatenate: cut" in out and "best_fit: cut" in out and "packs of gone: estimated" in out
    )
    one = measured(recipe)
    assert f"{100 * one.cut['concatenate']:.3g} %" in out and f"{100 * one.padding:.3g} %" in out
    data = json.loads(run("--json"))
    assert data["packing"][0]["cut"]["concatenate"] == one.cut["concatenate"]
    assert packing_line([one]).startswith("packing: concatenate (concatenate cuts ")
