"""Budgets: published totals, nested ratios, sentences about mistakes."""

from fractions import Fraction
from pathlib import Path

import pytest

from megacode.errors import UserError
from megacode.plan.plan import make_plan
from megacode.recipe.budgets import budget_tokens
from megacode.recipe.load import dump_recipe, load_recipe
from megacode.recipe.schema import Budget

STUDIES = Path(__file__).parents[2] / "recipes/studies"
BASE = """\
name: budgets
model: {layers: 2, hidden_size: 64, heads: 4, vocab_size: 256}
sources:
  c4: {path: data/c4, domain: text, tokens: 200B}
  github: {path: data/github, domain: code, tokens: 200B}
  books: {path: data/books, domain: books, tokens: 50B}
phases:
  - name: main
    BUDGET
    batch_size: 512
    sequence_length: 8192
    mixture: {MIXTURE}
    learning_rate: {peak: 1e-3}
"""


def text_of(budget: str, mixture: str = "domains: {text: {}, code: {}}") -> str:
    return BASE.replace("BUDGET", budget).replace("MIXTURE", mixture)


def planned(path: Path, *overrides: str) -> dict[str, int]:
    """Tokens of each source; checks that a step more than asked is the most."""
    recipe = load_recipe(path, overrides)
    plan = make_plan(recipe, {name: s.tokens or 0 for name, s in recipe.sources.items()})
    (phase,), asked = plan.phases, recipe.phases[0].tokens
    assert asked is not None
    assert 0 <= phase.tokens - asked < 512 * 8192
    return {stream.source: stream.tokens for stream in phase.streams}


@pytest.mark.parametrize(
    ("form", "code", "total"),
    [  # Petty et al.: 132 B of language; competitive keeps the sum, additive the language
        ("competitive: {total: 132B, m: 0, of: code}", 0, 132_000_000_000),
        ("competitive: {total: 132B, m: 0.5, of: code}", 66_000_000_000, 132_000_000_000),
        ("additive: {language: 132B, m: 0.5, of: code}", 132_000_000_000, 264_000_000_000),
        ("additive: {language: 132B, m: 0.1, of: code}", 14_666_666_667, 146_666_666_667),
        # Aryabumi et al.: 400 B, half of it code; 200 B at 10 %
        ("competitive: {total: 400B, m: 0.5, of: code}", 200_000_000_000, 400_000_000_000),
        ("competitive: {total: 200B, m: 0.1, of: code}", 20_000_000_000, 200_000_000_000),
    ],
)
def test_published_totals(write, form: str, code: int, total: int) -> None:
    recipe = load_recipe(write(text_of(f"budget: {{{form}}}")))
    assert recipe.phases[0].tokens == total
    share = code / total
    read = planned(write(text_of(f"budget: {{{form}}}")))
    whole = sum(read.values())
    assert abs(read["github"] - share * whole) <= 8192, "within a sequence of its share"


def test_totals_are_exact_fractions() -> None:
    tokens = budget_tokens(
        Budget.model_validate({"additive": {"language": 132 * 10**9, "m": 0.3, "of": "code"}}),
        {"text": 3, "math": 1, "code": 9},
    )
    assert tokens == {"code": Fraction(132 * 10**9 * 3, 7), "text": 99 * 10**9, "math": 33 * 10**9}


def test_nested_ratios_and_absolute_tokens(write) -> None:
    """Chen et al.: 48.3 B of general text, and 14.7 B that problems share with math 7:3."""
    three = "domains: {text: {}, code: {}, books: {}}"
    split = "budget: {split: {text: 48.3B, rest: {weight: 14.7B, split: {code: 7, books: 3}}}}"
    recipe = load_recipe(write(text_of(split, three)))
    ratios = {name: part.ratio for name, part in recipe.phases[0].mixture.domains.items()}
    assert recipe.phases[0].tokens == 63_000_000_000
    assert ratios == {"text": 48.3e9, "code": 10.29e9, "books": 4.41e9}
    weights = (
        split.replace("48.3B", "48.3")
        .replace("14.7B", "14.7")
        .replace("{split", "{total: 126B, split", 1)
    )
    twice = load_recipe(write(text_of(weights, three)))
    assert twice.phases[0].tokens == 126_000_000_000
    assert twice.phases[0].mixture.domains["code"].ratio == 20.58e9
    sources = load_recipe(
        write(text_of("budget: {split: {c4: 1B, github: 500M}}", "sources: {c4: {}, github: {}}"))
    )
    assert sources.phases[0].tokens == 1_500_000_000
    assert [entry.weight for entry in sources.phases[0].mixture.sources.values()] == [1e9, 5e8]


def test_a_share_is_one_key_of_a_sweep_and_forms_replace_each_other(write) -> None:
    path = write(text_of("budget: {competitive: {total: 132B, m: 0.1, of: code}}"))
    more = planned(path, "phases.main.budget.competitive.m=0.25")
    assert more["github"] / sum(more.values()) == pytest.approx(0.25, abs=1e-6)
    other = load_recipe(path, ["phases.main.budget.additive={language: 132B, m: 0.5, of: code}"])
    assert other.phases[0].tokens == 264_000_000_000
    assert (
        load_recipe(
            path, ["phases.main.steps=10", "phases.main.mixture.domains={text: 1, code: 1}"]
        )
        .phases[0]
        .steps
        == 10
    )


def test_what_a_run_keeps_is_what_the_budget_came_to(write, tmp_path: Path) -> None:
    recipe = load_recipe(write(text_of("budget: {competitive: {total: 132B, m: 0.1, of: code}}")))
    assert recipe.phases[0].budget is None
    (tmp_path / "kept.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "kept.yaml") == recipe


def test_the_three_orders_of_the_code_stage_study_are_equal_to_the_record() -> None:
    totals = []
    for arm in ("uniform", "increase", "decrease"):
        recipe = load_recipe(STUDIES / f"code-stage/code-{arm}.yaml")
        plan = make_plan(recipe, {name: s.tokens or 0 for name, s in recipe.sources.items()})
        totals.append(
            {
                name: sum(
                    s.samples for phase in plan.phases for s in phase.streams if s.source == name
                )
                for name in ("text-tasks", "code-tasks")
            }
        )
    assert totals == [{"text-tasks": 250_000, "code-tasks": 150_000}] * 3


@pytest.mark.parametrize(
    ("budget", "mixture", "told"),
    [
        (
            "budget: {competitive: {total: 1B, m: 0.5, of: cod}}",
            "",
            ["budget.competitive.of", "no cod", "did you mean `code`"],
        ),
        ("budget: {split: {text: 1B}}", "", ["budget.split", "says nothing of code"]),
        ("budget: {split: {text: 1B, code: 1B, math: 1B}}", "", ["budget.split", "no math"]),
        ("budget: {split: {text: 0, code: 0}}", "", ["all tokens are zero"]),
        (
            "budget: {split: {text: 1B, rest: {weight: 1, split: {text: 1, code: 1}}}}",
            "",
            ["text is there twice"],
        ),
        ("budget: {total: 1B}", "", ["exactly one of"]),
        ("budget: {additive: {language: 1B, m: 1.0, of: code}}", "", ["additive.m", "less than 1"]),
        (
            "budget: {competitive: {total: 1B, m: 0.5, of: code}}",
            "domains: {text: 0, code: 1}",
            ["nothing beside code"],
        ),
        (
            "{steps: 5, budget: {split: {text: 1B, code: 1B}}}",
            "",
            ["take `steps` or the budget out"],
        ),
        ("steps: 5", "", ["domains.text.ratio: is missing"]),
    ],
)
def test_a_mistake_is_one_sentence(write, budget: str, mixture: str, told: list[str]) -> None:
    budget = (
        budget.replace("{steps: 5, ", "steps: 5\n    ").replace("}}}", "}}")
        if budget.startswith("{steps")
        else budget
    )
    with pytest.raises(UserError) as error:
        load_recipe(write(text_of(budget, mixture or "domains: {text: {}, code: {}}")))
    first = str(error.value).splitlines()[0]
    assert "recipe.yaml, line" in first or "recipe.yaml" in first
    for part in told:
        assert part in str(error.value)
