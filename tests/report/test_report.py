"""The page holds everything, needs nothing, and tells what is missing in a sentence."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megacode.cli.main import main
from megacode.errors import UserError
from megacode.report import tables
from megacode.report.comparison import differences, losses
from megacode.report.curves import smooth
from megacode.report.drawing import svg
from megacode.report.figures import TITLES, small_figures
from megacode.report.page import page
from megacode.report.palette import DARK, LIGHT, css_variables, domain_colours
from megacode.report.run_data import read_run, read_runs
from megacode.run.metrics import read_metrics
from tests.report.conftest import make_run


def test_the_page_is_one_file_that_needs_no_other(fake_run: Path) -> None:
    html = page([read_run(fake_run)])
    assert not re.search(r"<script|<link|@import|url\(http|src=|href=\"(?!#)", html)
    assert html.count("<svg") >= 8
    drawn = html[html.index("</style>") :]
    assert "viewBox" in drawn and not any(colour in drawn for colour in LIGHT.values())
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for reference in re.findall(r"url\(#([^)]+)\)", html):
        assert reference in ids


def test_what_a_run_wrote_is_shown_as_text(fake_run: Path) -> None:
    html = page([read_run(fake_run)])
    assert "&lt;b&gt;not bold&lt;/b&gt;" in html and "<b>not bold" not in html
    assert "seed: 1234" in html  # the recipe
    assert "1.245 B parameters" in html and "NVIDIA H100 80GB HBM3" in html


def test_drift_is_drawn_where_fp8_was_compared(fake_run: Path) -> None:
    run = read_run(fake_run)
    picture = svg(dict(small_figures([run]))[TITLES["drift"]])
    compared = np.flatnonzero(np.isfinite(run.train["drift"])) + 1
    assert compared.tolist() == list(range(25, 501, 25))
    assert picture.count("fill: var(--ink); stroke: var(--paper)") == len(compared)  # a dot each
    unlike = replace(
        run, train=replace(run.train, numbers=run.train.numbers | {"drift": np.full(500, np.nan)})
    )
    assert TITLES["drift"] not in dict(small_figures([unlike]))


def test_a_domain_has_one_colour_everywhere(fake_run: Path) -> None:
    html = page([read_run(fake_run)])
    colours = domain_colours(["text", "code", "math"])
    for name in ("code", "text", "math"):
        chips = set(re.findall(rf'background: (var\(--\w+\))"></span>{name}<', html))
        assert chips == {css_variables(colours[name])}


def test_colours_differ_and_schemes_have_the_same_names() -> None:
    names = ["prose", "code", "text", "law", "math", "web", "logs"]
    assert len(set(domain_colours(names).values())) == len(names)
    assert domain_colours(["code"]) == {"code": domain_colours(names)["code"]}
    assert set(LIGHT) == set(DARK) and len(set(LIGHT.values())) == len(LIGHT)
    style = f"stroke: {LIGHT['ink']}; fill: {LIGHT['blue']}"
    assert css_variables(style) == "stroke: var(--ink); fill: var(--blue)"


def test_validation_table_has_every_phase_end(fake_run: Path) -> None:
    run = read_run(fake_run)
    table = tables.validation(run)
    assert table and table.columns == ("", "text", "ramp", "python")
    expected = {r["step"]: r["loss_by_domain"]["code"] for r in run.validations}
    row = next(row for row in table.rows if row.name == "code")
    assert [cell.split("<")[0] for cell in row.cells] == [
        f"{expected[step]:.4f}" for step in (100, 400, 500)
    ]


def test_a_finished_run_consumed_what_was_planned(fake_run: Path) -> None:
    run = read_run(fake_run)
    for row in tables.sources(run).rows:
        planned, consumed = row.cells[1], row.cells[2]
        assert consumed == f"{planned}<small>100%</small>"


def test_planned_shares_agree_with_consumed_ones(fake_run: Path) -> None:
    run = read_run(fake_run)
    for phase in run.phases:
        part = slice(phase["first_step"], phase["first_step"] + phase["steps"])
        for stream, shares in zip(phase["streams"], phase["curves"]["shares"], strict=True):
            at = np.interp(np.arange(part.start, part.stop), phase["curves"]["share_steps"], shares)
            planned = (at * run.train["batch_size"][part]).sum()
            same = [s for s in phase["streams"] if s["source"] == stream["source"]]
            assert (
                len(same) == 1
                and abs(planned - stream["samples"]) < 1.5 + 0.001 * stream["samples"]
            )


def test_an_unfinished_run_without_plan_environment_and_validation_still_has_a_page(
    tmp_path: Path,
) -> None:
    make_run(tmp_path / "short", steps=40, done=3)
    for name in ("plan.json", "environment.json", "samples.txt"):
        (tmp_path / "short" / name).unlink()
    run = read_run(tmp_path / "short")
    assert not run.validations and "3 of 200 steps" in tables.lead(
        run
    )  # planned anew from the declared tokens
    html = page([run])
    assert "Validation loss at" not in html and "What it writes" not in html


def test_one_step_is_enough(tmp_path: Path) -> None:
    make_run(tmp_path / "one", steps=5, done=1)
    assert "1 of 25 steps" in page([read_run(tmp_path / "one")])


def test_several_runs_are_compared(fake_run: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "ramp-90", ratio=0.9, steps=50)
    runs = read_runs([fake_run, tmp_path / "ramp-90"])
    html = page(runs)
    assert "2 runs compared" in html and "Difference from ramp-60" in html
    table = tables.comparison(runs)
    assert table and [row.name for row in table.rows] == ["ramp-60", "ramp-90"]
    assert sum("<b>" in cell for row in table.rows for cell in row.cells) == 3  # one of each domain
    assert "phases differ" in html


def test_a_domain_without_a_loss_in_the_first_run_has_no_difference(
    fake_run: Path, tmp_path: Path
) -> None:
    diverged = shutil.copytree(fake_run, tmp_path / "diverged")
    records = read_metrics(diverged)
    for record in records:
        if "math" in record.get("loss_by_domain", {}):
            record["loss_by_domain"]["math"] = None
    (diverged / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    runs = read_runs([diverged, fake_run])
    colours = domain_colours(["text", "code", "math"])
    figure = differences(runs, colours)
    assert figure is not None
    picture = svg(figure)
    assert ">code<" in picture and ">math<" not in picture
    nothing = [
        replace(
            runs[0], train=replace(runs[0].train, loss_by_domain={"math": np.full(500, np.nan)})
        ),
        runs[1],
    ]
    assert differences(nothing, colours) is None


def test_names_with_dollar_signs_are_no_formulas(fake_run: Path, tmp_path: Path) -> None:
    runs = read_runs(
        [Path(shutil.copytree(fake_run, tmp_path / name)) for name in ("a$_$", "b$^$")]
    )
    picture = svg(losses(runs, domain_colours(["text", "code", "math"])))
    assert ">a$_$<" in picture and ">b$^$<" in picture
    spike = np.where(np.arange(500) == 3, 5000.0, 5.0)
    wild = replace(
        runs[0], train=replace(runs[0].train, numbers=runs[0].train.numbers | {"grad_norm": spike})
    )
    norms = svg(dict(small_figures([wild]))[TITLES["grad_norm"]])
    assert "$" not in norms.replace("a$_$", "")  # nor those of a logarithmic axis


def test_runs_of_one_name_are_told_apart_by_their_folders(fake_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(fake_run, tmp_path / "other" / fake_run.name)
    assert [run.label for run in read_runs([fake_run, copy])] == [str(fake_run), str(copy)]


def test_the_verb_writes_the_page(
    fake_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    assert main(["report", str(fake_run), "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out and output.read_text().startswith(
        "<!doctype html>"
    )
    assert not list(tmp_path.glob(".*"))
    assert main(["report", str(fake_run)]) == 0
    assert (fake_run / "report.html").exists()


def test_a_mistake_is_one_sentence(
    fake_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, said in [(tmp_path / "none", "no such folder"), (tmp_path, "has no recipe.yaml")]:
        with pytest.raises(UserError, match=said):
            read_run(folder)
    for name, content, said in [
        ("empty", "", "no finished step yet"),
        ("gone", None, "cannot be read"),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(fake_run / "recipe.yaml", folder)
        if content is not None:
            (folder / "metrics.jsonl").write_text(content)
        with pytest.raises(UserError, match=said):
            read_run(folder)
    assert main(["report", str(fake_run), "--output", str(tmp_path)]) == 2
    inside_a_file = tmp_path / "empty" / "metrics.jsonl" / "x.html"
    assert main(["report", str(fake_run), "--output", str(inside_a_file)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_report_needs_no_torch(fake_run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from megacode.cli.main import main;"
        f"main(['report', {str(fake_run)!r}, '--output', {str(tmp_path / 'x.html')!r}]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_smoothing_stays_inside_a_phase_and_keeps_constants(fake_run: Path) -> None:
    train = read_run(fake_run).train
    steps_of_two = np.where(train["step"] <= 100, 7.0, 3.0)
    assert np.allclose(smooth(steps_of_two, train), steps_of_two)
    holes = np.where(train["step"] % 3 == 0, np.nan, 5.0)
    assert np.allclose(smooth(holes, train), 5.0)
    nothing = np.full(len(train), np.nan)
    assert np.isnan(smooth(nothing, train)).all()


def test_long_curves_stay_small_and_keep_their_extremes(fake_run: Path) -> None:
    run = read_run(fake_run)
    steps = np.arange(1, 100_001.0)
    noise = np.random.default_rng(0).normal(3, 0.2, len(steps))
    noise[31_234], noise[77_777] = 5.0, 1.0
    numbers = dict.fromkeys(run.train.numbers, steps) | {"grad_norm": noise}
    train = replace(run.train, numbers=numbers, phase=np.full(len(steps), "text"))
    figure = dict(small_figures([replace(run, train=train)]))[TITLES["grad_norm"]]
    drawn = svg(figure)
    assert len(drawn) < 150_000
    (axes,) = figure.axes
    heights = axes.transData.transform([(0, 5.0), (0, 1.0)])[:, 1] / figure.dpi * 72
    points = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", drawn), dtype=float)
    bottom = 72 * figure.get_size_inches()[1]
    for height in heights:
        assert np.abs(bottom - height - points[:, 1]).min() < 1
