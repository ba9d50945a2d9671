"""A phase's objective: weights at each step, and what a recipe with one needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megacode.errors import UserError
from megacode.recipe.load import load_recipe
from megacode.recipe.objectives import objective_at
from megacode.recipe.schema import Contrastive, Objective, Schedule

RECIPE = """
name: paired
tokenizer: {path: t.model}
model: {layers: 2, hidden_size: 32, heads: 2}
sources:
  pairs: {path: pairs, packing: best_fit, loss_on: query, tokens: 10k}
  text: {path: text, tokens: 10k}
phases:
  - name: only
    steps: 10
    batch_size: 4
    sequence_length: 64
    reset_at_eod: true
    learning_rate: {peak: 1e-3}
    mixture: {sources: {pairs: 1, text: 1}}
    objective: {contrastive: {weight: 0.1}}
"""


def test_a_weight_on_a_schedule_takes_effect_at_its_step() -> None:
    schedule = Schedule(shape="stepwise", values=[0.0, 0.1])
    objective = Objective(next_token=0.5, contrastive=Contrastive(weight=schedule))
    weights = [objective_at(objective, step, 10).contrastive_weight for step in range(10)]
    assert weights == [0.0] * 5 + [0.1] * 5
    assert objective_at(objective, 3, 10).next_token == 0.5
    assert objective_at(objective, 3, 10).numbers == ("contrastive", "contrastive_accuracy")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sources.pairs.loss_on=all"], "the phase reads no pairs"),
        (["phases.only.mixture.sources.pairs=0", "phases.only.mixture.sources.text=1", "sources.pairs.loss_on=answers"], "reads no pairs"),
        (["phases.only.reset_at_eod=false"], "reset_at_eod"),
        (["model.dropout=0.1"], "set model.dropout and model.attention_dropout to 0"),
        (["phases.only.objective.contrastive.layer=3"], "3 is no layer of 1 to 2"),
        (["phases.only.objective.contrastive.layer=1", "parallel.pipeline=2"], "only `last` can be had"),
        (["phases.only.objective.contrastive.layer=1", "parallel.recompute=full"], "keep no hidden states"),
        (["phases.only.objective={contrastive: null, next_token: 0}"], "every loss has the weight 0"),
        (["phases.only.objective={contrastive: null, weighted_tokens: {}}", "phases.only.mixture.sources.text={weight: 1, loss_weight: 2}"],
         "needs a `loss_weight` of 1"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told(tmp_path: Path, overrides: list[str], words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    load_recipe(path)
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        load_recipe(path, overrides)
