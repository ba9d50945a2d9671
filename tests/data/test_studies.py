"""The arms sft and cpt of the study math-cpt read the same records; only the tokens that are learned differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megacode.data.trace import as_dict, open_trace
from tests.data.test_conversations import CHATS, write_chats

RECIPES = Path(__file__).parents[2] / "recipes/studies/math-cpt"


def records_of_an_epoch(recipe: Path, data: Path) -> tuple[list[list[Any]], int]:
    """Of every step, the documents of its sequences in their order; and how many tokens are learned."""
    sets = (
        "tokenizer=null", "model.vocab_size=10000", f"sources.problems.path={data}", "phases.tune.epochs=1",
        "phases.tune.sequence_length=16", "phases.tune.batch_size=4", "phases.tune.learning_rate.warmup=0",
    )  # fmt: skip
    steps, learned, step = [], 0, 1
    while True:
        trace = open_trace(recipe, step, sets)
        samples = [as_dict(trace, origin, with_text=False) for origin in trace.samples()]
        steps.append([[part["document"] for part in sample["documents"]] for sample in samples])
        learned += sum(part["trained_tokens"] for one in samples for part in one["documents"])
        if step == trace.mixture.plan.total_steps:
            return steps, learned
        step += 1


def test_tuning_and_continued_pretraining_read_the_same_records(tmp_path: Path) -> None:
    write_chats(tmp_path / "problems", CHATS)
    for ending in ("", "-tiny"):
        sft, cpt = (
            records_of_an_epoch(RECIPES / f"{arm}{ending}.yaml", tmp_path / "problems")
            for arm in ("sft", "cpt")
        )
        assert sft[0] == cpt[0]
        assert {document for step in sft[0] for row in step for document in row} == set(range(40))
        assert sft[1] < cpt[1]
