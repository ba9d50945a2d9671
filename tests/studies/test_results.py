"""Results of finished cells, their comparison and the page, on run folders that are written by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from megacode.errors import UserError
from megacode.evaluate.statistics import bootstrap, bootstrap_difference, holm, mean_interval
from megacode.files import write_text
from megacode.run.checkpoints import INFO
from megacode.run.evaluations import add_to_curve
from megacode.studies.compare import compare
from megacode.studies.page import plot, write_page
from megacode.studies.results import CellResult, collect, write_results
from megacode.studies.sweep import Cell, OpenSweep, open_sweep
from megacode.studies.tables import notes, print_results
from megacode.terminal import table_console
from tests.good_recipe import GOOD

PEAK = "phases.first.learning_rate.peak"


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    write_text(Path("small.yaml"), GOOD)

    def opened(
        seeds: int = 3, grid: str = f"rate: {{{PEAK}: [1, 2, 4]}}", more: str = ""
    ) -> OpenSweep:
        text = f"name: s\nrecipe: small.yaml\nseeds: {list(range(1, seeds + 1))}\ngrid: {{{grid}}}\n{more}"
        write_text(Path("sweep.yaml"), text)
        return open_sweep(Path("sweep.yaml"))

    return opened


def loss_of(cell: Cell) -> float:
    return 3 - 0.5 * float(cell.arm.get("rate", 0)) + 0.01 * cell.recipe.resolved_data_seed**2


def scores_of(cell: Cell) -> list[float]:
    generator = np.random.default_rng(cell.recipe.resolved_data_seed)
    return (
        (generator.random(40) < 0.3 + 0.15 * float(cell.arm.get("rate", 0))).astype(float).tolist()
    )


def finish(cell: Cell, tasks: bool = True, items: bool = True) -> None:
    """A finished run: records of validation and tasks, and the last checkpoint's folder."""
    step, loss = cell.end, loss_of(cell)
    records = [
        {"kind": "train", "step": step, "loss": loss},
        {"kind": "validation", "step": 50, "loss_by_domain": {"code": 9.0}, "loss_by_source": {"python": 9.0}},
        {"kind": "validation", "step": step, "loss_by_domain": {"code": loss, "text": None},
         "loss_by_source": {"python": loss}, "bits_per_byte_by_domain": {"code": loss / 3}},
    ]  # fmt: skip
    if tasks:
        mean = float(np.mean(scores_of(cell)))
        scored = {
            name: {"accuracy": mean, "items": 40, "groups": {"deep": 0.5}} for name in ("a", "b")
        }
        records.append({"kind": "tasks", "step": step, "tasks": scored})
    text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
    write_text(cell.folder / "metrics.jsonl", text)
    write_text(cell.folder / f"checkpoints/step_{step:08d}" / INFO, json.dumps({"step": step}))
    write_text(cell.folder / "checkpoints/latest", f"step_{step:08d}")
    if tasks and items:
        lines = [
            {"item": n, "group": "", "cluster": f"t{n % 8}", "score": score}
            for n, score in enumerate(scores_of(cell))
        ]
        if cell.recipe.resolved_data_seed == 2:
            lines.reverse()  # the file's order is not trusted
        write_text(
            cell.folder / f"evaluations/step_{step:08d}/a.jsonl",
            "".join(json.dumps(line) + "\n" for line in lines),
        )


def page_of(sweep: OpenSweep) -> Path:
    results = collect(sweep)
    return write_page(sweep, results, compare(sweep, results))


def by_name(sweep: OpenSweep, results: list[CellResult]):
    return {metric.name: metric for metric in compare(sweep, results)}


def test_results_are_the_last_of_each_finished_run(opened) -> None:
    sweep = opened()
    for cell in sweep.cells[:-1]:
        finish(cell)
    results = collect(sweep)
    assert [result.cell for result in results] == list(sweep.cells[:-1])
    first = results[0]
    assert first.step == first.cell.end and first.seed == (1, 1)
    assert first.metrics == {
        "loss.python": loss_of(first.cell), "loss.code": loss_of(first.cell), "bits_per_byte.code": loss_of(first.cell) / 3,
        "tasks.a/accuracy": np.mean(scores_of(first.cell)), "tasks.b/accuracy": np.mean(scores_of(first.cell)),
        "tasks.a/items": 40, "tasks.b/items": 40,
        "tasks.a": np.mean(scores_of(first.cell)), "tasks.b": np.mean(scores_of(first.cell)), "tasks.a/deep": 0.5, "tasks.b/deep": 0.5,
    }  # fmt: skip
    paths = write_results(sweep, results)
    rows = [json.loads(line) for line in paths[0].read_text().splitlines()]
    assert rows[0]["arm"] == {"rate": "1"} and rows[0]["metrics"] == first.metrics
    assert (sweep.runs / rows[0]["items"]["a"]).is_file() and "b" not in rows[0]["items"]
    table = list(csv.DictReader(paths[1].open()))
    assert [row["run"] for row in table] == [cell.name for cell in sweep.cells[:-1]]
    assert (
        float(table[3]["loss.code"]) == results[3].metrics["loss.code"] and table[3]["rate"] == "2"
    )


def test_arms_have_intervals_over_seeds_and_items_and_paired_differences(opened) -> None:
    sweep = opened()
    for cell in sweep.cells:
        finish(cell)
    metrics = by_name(sweep, collect(sweep))
    assert list(metrics) == ["loss.code", "tasks.a", "tasks.b"], (
        "losses by domain, tasks without groups"
    )
    (losses,) = metrics["loss.code"].series
    cells = {label: [c for c in sweep.cells if c.arm["rate"] == label] for label in ("1", "2", "4")}
    for arm in losses.arms:
        assert arm.interval == mean_interval([loss_of(cell) for cell in cells[arm.label]])
    difference = losses.arms[2].difference
    assert losses.arms[0].difference is None and difference
    assert (difference.mean, difference.high - difference.low) == pytest.approx(
        (-1.5, 0), abs=1e-9
    ), "paired by seed"
    assert losses.slope and losses.slope.mean == pytest.approx(-0.5) and losses.adjusted is None
    scores = {label: [np.array(scores_of(c)) for c in group] for label, group in cells.items()}
    clusters = np.array([f"t{n % 8}" for n in range(40)])
    (items,) = metrics["tasks.a"].series
    assert items.arms[1].interval == bootstrap(scores["2"], clusters)
    assert items.arms[1].difference == bootstrap_difference(scores["2"], scores["1"], clusters)
    (means,) = metrics["tasks.b"].series  # of which no run wrote its items
    assert means.arms[1].interval == mean_interval([float(s.mean()) for s in scores["2"]])
    assert items.slope and means.slope
    assert [items.adjusted, means.adjusted] == holm([items.slope.p or 0, means.slope.p or 0])


def test_arms_that_differ_on_another_axis_are_a_series_each(opened) -> None:
    sweep = opened(grid=f"rate: {{{PEAK}: [1, 2]}}, size: {{model.layers: [2, 4]}}")
    for cell in sweep.cells:
        finish(cell, tasks=False)
    (metric,) = compare(sweep, collect(sweep))
    assert [series.name for series in metric.series] == ["size 2", "size 4"]
    assert [[arm.label for arm in series.arms] for series in metric.series] == [["1", "2"]] * 2
    sizes = opened(
        grid=f"rate: {{{PEAK}: [1, 2]}}, size: {{model.layers: [2, 4]}}", more="axis: size\n"
    )
    (metric,) = compare(sizes, collect(sizes))
    assert [series.name for series in metric.series] == ["rate 1", "rate 2"]


def test_an_axis_of_words_has_no_slope(opened) -> None:
    sweep = opened(grid="kind: {model.activation: [swiglu, geglu]}")
    for cell in sweep.cells:
        finish(cell, tasks=False)
    (metric,) = compare(sweep, collect(sweep))
    assert metric.series[0].slope is None and "slope" not in " ".join(notes(sweep, metric))
    assert [tick.get_text() for tick in plot(sweep, metric).axes[0].get_xticklabels()] == [
        "swiglu",
        "geglu",
    ]


@pytest.mark.parametrize(("seeds", "told"), [(1, "only one seed"), (2, "only 2 seeds"), (3, None)])
def test_few_seeds_are_told_in_words(
    opened, seeds: int, told: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = opened(seeds)
    for cell in sweep.cells:
        finish(cell, items=False)
    results = collect(sweep)
    page = write_page(sweep, results, compare(sweep, results)).read_text()
    print_results(sweep, compare(sweep, results), table_console())
    out = capsys.readouterr().out
    for text in (page, out):
        assert (f"an arm here has {told}" in text) is (told is not None)
        assert ("ewer than 3 seeds" in text) is (told is not None)
        assert ("none: one seed" in text) is (seeds == 1)


def test_the_page_shows_every_metric_with_its_intervals(opened) -> None:
    sweep = opened(more="description: <of rates>\n")
    for cell in sweep.cells[:-1]:
        finish(cell)
    write_text(sweep.cells[-1].failure, "exit code 1: no <memory>\n")
    page = page_of(sweep).read_text()
    assert (
        page.count("<svg") == 3 == page.count("Slope against rate") and "&lt;of rates&gt;" in page
    )
    assert "Not all cells are finished: what follows is of the 8 of 9" in page
    assert "failed: exit code 1: no &lt;memory&gt;" in page and "after Holm over the tasks" in page
    assert page.count("difference from 1") == 3 and "−0.5000" in page
    assert "script" not in page and "http" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize("more", ["", "metrics: [loss.code]"])
def test_a_page_without_results_says_so(opened, more: str) -> None:
    sweep = opened(more=more)
    page = page_of(sweep).read_text()
    assert "No finished cell has measured a metric yet" in page


def test_a_metric_that_nothing_measured_is_a_mistake(opened) -> None:
    sweep = opened(more="metrics: [loss.cod]\n")
    assert collect(sweep) == [], "nothing is finished yet"
    finish(sweep.cells[0])
    with pytest.raises(
        UserError, match=r"metrics: no cell has measured 'loss.cod'; did you mean `loss.code`"
    ):
        collect(sweep)


def test_cells_that_lack_a_metric_are_counted(opened) -> None:
    sweep = opened(more="metrics: [tasks.a/deep]\n")
    for cell in sweep.cells:
        finish(cell, tasks=cell != sweep.cells[0], items=False)
    (metric,) = compare(sweep, collect(sweep))
    assert metric.missing == 1 and "1 finished cells have not measured tasks.a/deep" in notes(
        sweep, metric
    )
    arm = metric.series[0].arms[1]
    assert len(arm.values) == 3 and arm.difference and arm.difference.seeds == 2, (
        "by the seeds that both have"
    )


def test_an_evaluation_before_the_end_is_told(opened) -> None:
    sweep = opened()
    for cell in sweep.cells:
        finish(cell, tasks=False)
    metrics = sweep.cells[0].folder / "metrics.jsonl"
    metrics.write_text("".join(line + "\n" for line in metrics.read_text().splitlines()[:2]))
    (metric,) = compare(sweep, collect(sweep))
    assert metric.series[0].arms[0].values[1, 1] == 9.0
    assert "1 cells were last evaluated before their end" in notes(sweep, metric)


def test_checkpoints_that_were_evaluated_later_count_by_their_step(opened) -> None:
    sweep = opened()
    cell = sweep.cells[0]
    finish(cell)
    late = {
        "step": cell.end,
        "tasks": {
            "late": {"accuracy": 0.75},
            "harness.x": {"acc,none": 0.5, "acc_stderr,none": 0.1},
        },
    }
    early = {"step": 50, "tasks": {"a": {"accuracy": 0.0}}}
    for record in (early, late):
        add_to_curve(cell.folder, record)
    (result,) = collect(sweep)
    assert result.metrics["tasks.late"] == 0.75 and result.metrics["tasks.harness.x"] == 0.5
    assert result.metrics["tasks.a"] == np.mean(scores_of(cell)), "the last by step"
    assert [metric.name for metric in compare(sweep, [result])] == [
        "loss.code",
        "tasks.a",
        "tasks.b",
        "tasks.late",
        "tasks.harness.x",
    ]


def test_scores_of_other_items_are_refused(opened) -> None:
    sweep = opened()
    for cell in sweep.cells:
        finish(cell)
    last = next((sweep.cells[-1].folder / "evaluations").rglob("a.jsonl"))
    last.write_text("".join(line + "\n" for line in last.read_text().splitlines()[:20]))
    with pytest.raises(UserError, match="has other items than"):
        compare(sweep, collect(sweep))
    last.write_text('{"item": 0}\n')
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read"):
        compare(sweep, collect(sweep))
