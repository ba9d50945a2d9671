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
from megacode.report.curves import MOST_POINTS, envelope, smooth, thin
from megacode.report.figures import TITLES, small_figures
from megacode.report.page import lead, page
from megacode.report.palette import css, hues, with_variables
from megacode.report.run_data import read_run, read_runs
from megacode.run.metrics import read_metrics
from tests.report.conftest import make_run


def test_the_page_is_one_file_that_needs_no_other(fake_run: Path) -> None:
    html = page([read_run(fake_run)])
    assert not re.search(r"<script|<link|@import|url\(http|src=|href=\"(?!#)", html)
    assert html.count("<svg") >= 8
    assert (
        "viewBox" in html and "#0101" not in html and "#0102" not in html
    )  # every placeholder became a variable
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
    picture = dict(small_figures(run))[TITLES["drift"]]
    compared = np.flatnonzero(np.isfinite(run.train["drift"])) + 1
    assert compared.tolist() == list(range(25, 501, 25))
    assert picture.count("fill: var(--ink); stroke: var(--paper)") == len(compared)  # a dot each
    unlike = replace(
        run, train=replace(run.train, numbers=run.train.numbers | {"drift": np.full(500, np.nan)})
    )
    assert TITLES["drift"] not in dict(small_figures(unlike))


def test_a_domain_has_one_colour_everywhere(fake_run: Path) -> None:
    html = page([read_run(fake_run)])
    hue = hues(["text", "code", "math"])
    for name in ("code", "text", "math"):
        chips = set(re.findall(rf'background: var\(--(hue\d)\)"></span>{name}<', html))
        assert chips == {f"hue{hue[name]}"}


def test_hues_differ_and_schemes_have_the_same_names() -> None:
    names = ["prose", "code", "text", "law", "math", "web", "logs"]
    assert len(set(hues(names).values())) == len(names)
    assert hues(["code"]) == {"code": hues(names)["code"]}
    assert set(css()["light"]) == set(css()["dark"])
    assert (
        with_variables("stroke: #010101; fill: #010200") == "stroke: var(--ink); fill: var(--hue0)"
    )


def test_validation_table_has_every_phase_end(fake_run: Path) -> None:
    run = read_run(fake_run)
    table = tables.validation(run)
    assert table and table.columns == ("", "text", "ramp", "python")
    expected = {r["step"]: r["loss_by_domain"]["code"] for r in run.validations}
    row = next(row for row in table.rows if row.name == "code")
    assert [cell.text for cell in row.cells] == [
        f"{expected[step]:.4f}" for step in (100, 400, 500)
    ]


def test_a_finished_run_consumed_what_was_planned(fake_run: Path) -> None:
    run = read_run(fake_run)
    for row in tables.sources(run).rows:
        planned, consumed = row.cells[1], row.cells[2]
        assert planned.text == consumed.text and consumed.note == "100%"


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
    assert not run.validations and "3 of 200 steps" in lead(
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
    assert sum(cell.best for row in table.rows for cell in row.cells) == 3  # one of each domain
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
    hue = hues(["text", "code", "math"])
    picture = differences(runs, hue) or ""
    assert ">code<" in picture and ">math<" not in picture
    nothing = [
        replace(
            runs[0], train=replace(runs[0].train, loss_by_domain={"math": np.full(500, np.nan)})
        ),
        runs[1],
    ]
    assert differences(nothing, hue) is None


def test_names_with_dollar_signs_are_no_formulas(fake_run: Path, tmp_path: Path) -> None:
    runs = read_runs(
        [Path(shutil.copytree(fake_run, tmp_path / name)) for name in ("a$_$", "b$^$")]
    )
    picture = losses(runs, hues(["text", "code", "math"]))
    assert ">a$_$<" in picture and ">b$^$<" in picture
    spike = np.where(np.arange(500) == 3, 5000.0, 5.0)
    wild = replace(
        runs[0], train=replace(runs[0].train, numbers=runs[0].train.numbers | {"grad_norm": spike})
    )
    assert "$" not in dict(small_figures(wild))[TITLES["grad_norm"]].replace(
        "a$_$", ""
    )  # nor those of a logarithmic axis


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
    assert main(["report", str(fake_run), "--output", str(tmp_path / "no" / "x.html")]) == 2
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


def test_long_curves_are_thinned_and_keep_their_extremes() -> None:
    x = np.arange(100_000.0)
    y = np.sin(x / 900)
    y[31_234], y[77_777] = 9.0, -9.0
    thin_x, raw = thin(x, y)[0], envelope(x, y)
    assert len(thin_x) <= MOST_POINTS and thin_x[0] == 0 and thin_x[-1] == x[-1]
    assert len(raw[0]) <= MOST_POINTS and raw[1].max() == 9.0 and raw[1].min() == -9.0
    assert (np.diff(raw[0]) >= 0).all()
