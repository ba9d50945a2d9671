"""What a person sees while a run trains: on a terminal of any width, in a log, and in RUN/log.txt."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megacode.plan.plan import Plan, make_plan
from megacode.recipe.load import load_recipe
from megacode.train import progress as module
from megacode.train.progress import Progress, duration, phase_line

RECIPE = """
name: small
tokenizer: {path: tokenizer.model, added_tokens: crystal}
model: {layers: 2, hidden_size: 64, heads: 2, vocab_size: 512}
sources:
  python: {domain: code, tokens: 1M}
  rust: {domain: code, tokens: 1M}
  docs: {domain: text, tokens: 1M}
phases:
  - name: first
    steps: 10
    batch_size: {start: 4, end: 8, increment: 4, over: 5}
    sequence_length: 64
    mixture:
      domains:
        text: {shape: linear, start: 0.9, end: 0.5}
        code: {shape: linear, start: 0.1, end: 0.5}
    learning_rate: {peak: 1e-3}
  - name: second
    steps: 10
    batch_size: 8
    sequence_length: 64
    optimizer_state: fresh
    mixture: {domains: {code: {ratio: 1, fim_rate: 0.9}}}
    learning_rate: {peak: 1e-4}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE)
    recipe = load_recipe(path)
    return make_plan(recipe, {name: source.tokens or 0 for name, source in recipe.sources.items()})


def record(plan: Plan, step: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "phase": plan.phase_at(step - 1).name, "loss": 4.5, "grad_norm": 0.81,
        "learning_rate": 1e-3, "tokens": plan.tokens_before(step), "seconds": 0.5, "tokens_per_second": 1024.0,
        "tflops_per_device": 0.05, "mfu": None, "memory_gb": None, **more,
    }  # fmt: skip


def opened(
    run: Path, plan: Plan, first_step: int = 0, **console: Any
) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(run, plan, first_step, Console(file=out, highlight=False, **console)), out


def test_a_log_gets_one_plain_line_a_report(plan: Plan, tmp_path: Path) -> None:
    progress, out = opened(tmp_path, plan, width=40)
    progress.steps([record(plan, step) for step in (1, 2, 3, 4, 5)])
    progress.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 1 and lines[0].startswith(
        "step  5/20  first  loss 4.500  rate 1.00e-03  norm 0.81  1,024 tok/s"
    )
    assert lines[0].endswith("left") and "\x1b" not in lines[0]
    assert lines[0] in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_the_live_line_fits_the_terminal(plan: Plan, tmp_path: Path, width: int) -> None:
    progress, out = opened(tmp_path, plan, force_terminal=True, width=width)
    full = record(plan, 3, mfu=0.41, memory_gb=61.0)
    progress.steps([full])
    progress.say("checkpoint step_00000003")
    progress.close()
    shown = progress.line(full, 100.0, width - 17)
    assert len(shown) <= width - 17
    assert (
        "loss 4.500" in shown
        and "loss 4.500" in out.getvalue()
        and "checkpoint step_00000003" in out.getvalue()
    )
    assert "\x1b" not in (tmp_path / "log.txt").read_text()


def test_time_left_is_by_tokens_and_the_clock(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    progress, out = opened(tmp_path, plan)
    progress.steps(
        [record(plan, 1, seconds=60.0), record(plan, 2)]
    )  # the first step warms up and does not count
    now += 10.0  # with an evaluation in between
    progress.steps([record(plan, 10)])
    rate = (plan.tokens_before(10) - plan.tokens_before(1)) / 10.5
    left = (plan.total_tokens - plan.tokens_before(10)) / rate
    assert out.getvalue().splitlines()[-1].endswith(f"{duration(left)} left")
    progress.close()


def test_a_loss_that_is_not_finite_is_said(plan: Plan, tmp_path: Path) -> None:
    progress, out = opened(tmp_path, plan)
    progress.steps([record(plan, 1, loss=float("nan"), grad_norm=float("inf"))])
    assert "loss not finite" in out.getvalue() and "norm not finite" in out.getvalue()
    progress.close()


def test_validation_is_a_table_by_source_with_changes(plan: Plan, tmp_path: Path) -> None:
    progress, out = opened(tmp_path, plan)
    losses = {"python": 2.0, "rust": 3.0, "docs": 4.0}
    first = {"kind": "validation", "step": 10, "phase": "first", "loss_by_source": losses,
             "loss_by_domain": {"code": 2.5, "text": 4.0}, "samples": 64}  # fmt: skip
    progress.validation(first)
    assert "change" not in out.getvalue().splitlines()[2]
    progress.validation(
        {
            **first,
            "step": 20,
            "loss_by_source": {**losses, "python": 1.5},
            "loss_by_domain": {"code": 2.25},
        }
    )
    lines = out.getvalue().splitlines()
    assert lines[0] == "validation after step 10 (first), 64 sequences a source"
    assert [line.split() for line in lines[-4:]] == [
        ["code", "python", "1.5000", "-0.5000"],
        ["code", "rust", "3.0000", "+0.0000"],
        ["text", "docs", "4.0000", "+0.0000"],
        ["code", "(all)", "2.2500", "-0.2500"],
    ]
    progress.close()


def test_a_phase_says_what_changes(plan: Plan) -> None:
    assert phase_line(plan.phases[0], 2) == (
        "phase 1 of 2, first: steps 1 to 10, batch 4 → 8 × 64 tokens, text 90 → 50 %, code 10 → 50 %, rate up to 0.001"
    )
    assert phase_line(plan.phases[1], 2) == (
        "phase 2 of 2, second: steps 11 to 20, batch 8 × 64 tokens, code 100 %, FIM 0.9, rate up to 0.0001, optimizer state fresh"
    )


def test_the_end_is_summed_up_also_after_a_resume(plan: Plan, tmp_path: Path) -> None:
    progress, out = opened(tmp_path, plan, first_step=15)
    progress.steps([record(plan, step) for step in range(16, 21)])
    progress.finished()
    progress.close()
    last = out.getvalue().splitlines()[-1]
    assert last.startswith("finished: 20 steps, 8,960 tokens") and "5 of the steps" in last
    assert (tmp_path / "log.txt").read_text().splitlines()[-1].endswith(last)


def test_nothing_left_to_do_still_ends_well(plan: Plan, tmp_path: Path) -> None:
    progress, out = opened(tmp_path, plan, first_step=20)
    progress.finished()
    progress.close()
    assert out.getvalue().startswith("finished: 20 steps")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (42.4, "0:42"), (725, "12:05"), (11050, "3:04:10"), (190_800, "2 d 5 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
