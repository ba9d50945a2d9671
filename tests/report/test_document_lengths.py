"""A histogram of document lengths is exact, adds up, and its picture shows what it holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.patches import StepPatch

from megacode.data.lengths import BINS, EDGES, length_histogram, log_edges, merged
from megacode.errors import UserError
from megacode.report.document_lengths import lengths_figure, plot_lengths


def lengths(seed: int, count: int = 5000) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(6, 2, count)).astype(np.int64)


def test_every_length_is_in_the_bin_of_its_edges() -> None:
    assert EDGES[0] == 0 and EDGES[-1] == 2**31 and (np.diff(EDGES) > 0).all()
    for power in range(32):
        assert 2**power in EDGES
    of_an_octave = EDGES[(EDGES >= 2**20) & (EDGES < 2**21)]
    assert len(of_an_octave) == 8 and np.allclose(np.diff(np.log2(of_an_octave)), 1 / 8, atol=1e-5)
    for n in (*range(40), 2047, 2048, 2049, 2**31 - 1):
        (bin_,) = np.flatnonzero(length_histogram(np.array([n]))[0])
        assert EDGES[bin_] <= n < EDGES[bin_ + 1]
        assert length_histogram(np.array([n]))[1, bin_] == n
    assert length_histogram(np.array([2**40]))[1, BINS - 1] == 2**40


def test_histograms_of_shards_add_up() -> None:
    every = [lengths(seed) for seed in range(3)]
    whole = length_histogram(np.concatenate(every))
    assert whole.shape == (2, BINS) and whole.dtype == np.int64
    assert (whole == sum(length_histogram(part) for part in every)).all()
    assert whole.sum(axis=1).tolist() == [15000, np.concatenate(every).sum()]
    values, times = np.unique(np.concatenate(every), return_counts=True)
    assert (length_histogram(values, times) == whole).all()
    assert not length_histogram(np.zeros(0, dtype=np.int32)).any()


@pytest.mark.parametrize("per_octave", [1, 2, 4])
def test_wider_bins_hold_the_same(per_octave: int) -> None:
    edges = log_edges(per_octave)
    assert np.isin(edges, EDGES).all()
    n = lengths(1)
    assert (merged(length_histogram(n), edges)[0] == np.histogram(n, bins=edges)[0]).all()


def test_the_picture_shows_shares_of_documents_and_of_tokens() -> None:
    a, b = np.full(300, 100), np.repeat([16, 4096], [90, 10])
    figure = lengths_figure({"a": length_histogram(a), "b": length_histogram(b)})
    lines = [
        [p for p in axes.patches if isinstance(p, StepPatch) and not p.get_fill()]
        for axes in figure.axes
    ]
    assert [len(panel) for panel in lines] == [2, 2]

    def height(panel: int, dataset: int, length: int) -> float:
        values, edges, _ = lines[panel][dataset].get_data()
        bin_ = np.searchsorted(edges, length, side="right") - 1
        width = (
            np.log2(edges[bin_ + 1] / edges[bin_]) * 2
        )  # 1 (two bins to a doubling), but for rounding
        return float(values[bin_] * width)

    assert height(0, 0, 100) == pytest.approx(1) and height(1, 0, 100) == pytest.approx(1)
    assert height(0, 1, 16) == pytest.approx(0.9) and height(0, 1, 4096) == pytest.approx(0.1)
    tokens = 90 * 16 + 10 * 4096
    assert height(1, 1, 16) == pytest.approx(90 * 16 / tokens) and height(
        1, 1, 4096
    ) == pytest.approx(40960 / tokens)
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["a: 300 documents, 30,000 tokens", "b: 100 documents, 42,400 tokens"]
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert low <= 16 and high >= 4097


def test_short_documents_are_not_exaggerated_by_their_wide_bins() -> None:
    """Lengths 1 to 7 each have a bin, which is wider on the axis than others: the area is what counts."""
    figure = lengths_figure({"a": length_histogram(np.repeat([1, 64], [50, 50]))})
    values, edges, _ = next(p for p in figure.axes[0].patches if not p.get_fill()).get_data()
    areas = np.asarray(values) * np.diff(np.log2(edges))
    filled = areas[areas > 0]
    assert filled[0] == pytest.approx(filled[1], rel=0.05)  # 64 to 90 is not quite half an octave


def test_a_file_of_the_asked_kind_in_the_light_scheme(tmp_path: Path) -> None:
    histograms = {f"dataset {n}": length_histogram(lengths(n)) for n in range(9)} | {
        "none": np.zeros((2, BINS), int)
    }
    plot_lengths(histograms, tmp_path / "a.png")
    image = imread(tmp_path / "a.png")
    assert image.shape[1] == 1600 and image[:, :, :3].std() > 0.05
    assert (image[0, 0, :3] == 1).all()
    plot_lengths(histograms, tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text()
    assert "dataset 8: 5,000 documents" in svg and "#0072b2" in svg
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    some = {"a": length_histogram(lengths(1))}
    with pytest.raises(UserError, match="nothing to draw: a: no document with a token"):
        plot_lengths({"a": length_histogram(np.zeros(3, dtype=np.int64))}, tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.docx: cannot be drawn .*give FILE\.png"):
        plot_lengths(some, tmp_path / "a.docx")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be drawn"):
        plot_lengths(some, tmp_path / "file" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_counting_needs_no_matplotlib() -> None:
    """The preprocessor and `megacode inspect` count lengths in every process."""
    code = "import sys, megacode.corpus.preprocess, megacode.cli.inspect; print({'matplotlib', 'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
