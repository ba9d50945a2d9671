"""A sweep file and its cells: names, seeds, overrides, shared first phases, states, plan; nothing is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megacode.cli.main import main
from megacode.errors import UserError
from megacode.files import write_text
from megacode.run.checkpoints import INFO
from megacode.studies.pool import Slots
from megacode.studies.state import state_of, unfinished
from megacode.studies.sweep import Cell, OpenSweep, is_sweep, open_sweep
from tests.good_recipe import GOOD

CODE = "phases.second.mixture.domains.code.ratio"
SHARES = f"""\
name: share
recipe: recipes/small.yaml
seeds: [1, 2, 3]
grid:
  code: {{{CODE}: [0, 0.5, 1], phases.second.mixture.domains.text.ratio: [1, 0.5, 0]}}
"""


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Opens a sweep of that text."""
    monkeypatch.chdir(tmp_path)

    def opened(text: str = SHARES, folder: Path = tmp_path) -> OpenSweep:
        write_text(folder / "recipes/small.yaml", GOOD + "\nmodel_seed: 9\n")
        write_text(folder / "sweep.yaml", text)
        return open_sweep(folder / "sweep.yaml")

    return opened


def test_a_grid_is_every_arm_with_every_seed(opened) -> None:
    sweep = opened()
    assert len(sweep.cells) == 9 and sweep.axis == "code" and sweep.runs == Path("runs/share")
    names = [cell.name.rpartition("_")[0] for cell in sweep.cells]
    assert names[:4] == ["code-0_seed-1", "code-0_seed-2", "code-0_seed-3", "code-0.5_seed-1"]
    for cell in sweep.cells:
        recipe, share = cell.recipe, float(cell.arm["code"])
        domains = recipe.phases[1].mixture.domains
        assert domains and (domains["code"].ratio, domains["text"].ratio) == (share, 1 - share)
        assert recipe.resolved_model_seed == recipe.resolved_data_seed and recipe.seed == 7
        assert recipe.name == cell.name == cell.folder.name


@pytest.mark.parametrize(
    ("seeds", "pairs"),
    [
        ("[1, 2]", [(1, 1), (2, 2)]),
        ("{model: [1, 2], data: [3, 4]}", [(1, 3), (2, 4)]),
        ("{model: [1, 2], data: [3], cross: true}", [(1, 3), (2, 3)]),
        ("{model: [1, 2]}", [(1, 7), (2, 7)]),
        ("{data: [1, 2]}", [(9, 1), (9, 2)]),
    ],
)
def test_seeds_of_model_and_data(opened, seeds: str, pairs: list[tuple[int, int]]) -> None:
    sweep = opened(f"name: s\nrecipe: recipes/small.yaml\nseeds: {seeds}\n")
    assert [
        (c.recipe.resolved_model_seed, c.recipe.resolved_data_seed) for c in sweep.cells
    ] == pairs


def test_cells_by_name_have_recipes_and_sets_of_their_own(opened) -> None:
    sweep = opened(
        "name: s\nrecipe: recipes/small.yaml\ncells:\n"
        "  - {name: plain}\n"
        "  - {name: longer, set: {phases.second.tokens: 200k, sources.docs.path: other/docs}}\n"
        "  - {name: other, recipe: other.yaml}\n"
    ) if write_text(Path.cwd() / "other.yaml", GOOD.replace("seed: 7", "seed: 8")) is None else None  # fmt: skip
    assert sweep.axis == "cell" and [cell.arm["cell"] for cell in sweep.cells] == [
        "plain",
        "longer",
        "other",
    ]
    plain, longer, other = sweep.cells
    assert longer.plan.total_tokens > plain.plan.total_tokens and other.recipe.seed == 8
    assert longer.recipe.sources["docs"].path == str(Path.cwd() / "other/docs"), (
        "relative to the file"
    )


def test_axes_are_multiplied_and_may_be_recipes(opened) -> None:
    text = (
        "name: s\naxis: size\ngrid:\n  base: {recipe: [recipes/small.yaml, recipes/b.yaml]}\n"
        "  size: {model.layers: [2, 4, 8]}\n"
    )
    write_text(Path("recipes/b.yaml"), GOOD.replace("seed: 7", "seed: 8"))
    sweep = opened(text)
    arms = [(cell.arm["base"], cell.arm["size"]) for cell in sweep.cells]
    assert arms == [(b, s) for b in ("small", "b") for s in ("2", "4", "8")]
    assert [cell.recipe.seed for cell in sweep.cells] == [7] * 3 + [8] * 3 and sweep.axis == "size"


def test_a_folder_s_name_says_what_the_run_is_wherever_the_checkout_lies(
    opened, tmp_path: Path
) -> None:
    here = [cell.name for cell in opened().cells]
    assert len(set(here)) == 9 and here == [cell.name for cell in opened().cells]
    assert here == [cell.name for cell in opened(folder=tmp_path / "moved/checkout").cells]
    changed = opened(SHARES + "description: other words\nmetrics: [loss.code]\n")
    assert here == [cell.name for cell in changed.cells]
    small = Path("recipes/small.yaml")
    write_text(small, small.read_text().replace("heads: 4", "heads: 2"))
    assert not set(here) & {cell.name for cell in open_sweep(Path("sweep.yaml")).cells}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("grid:\n  code: {a: [1, 2], b: [1]}", "grid.code: every key needs as many values; there are 2 of a, 1 of b"),
        ("grid:\n  code: {a: []}", "grid.code: give keys of the recipe, each with its values"),
        ("grid:\n  code: {a: [{x: 1}]}", "grid.code: the values of the first key name the arms"),
        ("grid: {code: {a: [1]}}\ncells: [{name: x}]", "either `grid:` or `cells:`"),
        ("cells: [{name: x}, {name: x}]", "two have the same name"),
        ("axis: size\ngrid: {code: {a: [1]}}", "axis: there is no 'size'; there are: code"),
        ("seeds: {model: [1, 2], data: [1]}", "seeds: 2 model seeds and 1 data seeds cannot be paired"),
        ("seeds: []", "seeds: name at least one seed"),
        ("sets: {}", "sweep.yaml:3: sets: unknown key"),
        ("grid: {code: {model.layer: [2]}}", "cell with code 2: --set model.layer=2: model.layer: unknown key"),
        ("grid: {code: {model.heads: [3]}}", "cell with code 3:"),
        ("cells: [{name: x}, {name: y}]", "cell with cell y: is the same run as x"),
        ("seeds: [1, 1]", "is the same run as"),
        ("recipe: nowhere.yaml", "given twice"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_starts(opened, text: str, told: str, capsys) -> None:
    with pytest.raises(UserError) as error:
        opened(f"name: s\nrecipe: recipes/small.yaml\n{text}\n")
    assert told in str(error.value)
    assert main(["sweep", "sweep.yaml"]) == 2 and told in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_sweep_without_a_recipe_says_so(opened) -> None:
    with pytest.raises(UserError, match="recipe: is missing; name the recipe"):
        opened("name: s\ngrid: {code: {model.layers: [2]}}\n")


# ------------------------------------------------------------------------------------------- first phases that are shared


def test_cells_that_differ_in_the_second_phase_share_the_first(opened) -> None:
    sweep = opened()
    assert [cell.until for cell in sweep.shared] == ["first"] * 3, "one for each pair of seeds"
    for cell in sweep.cells:
        assert cell.parent and (cell.first, cell.parent.end) == (100, 100)
        assert cell.parent.recipe.seeds == cell.recipe.seeds
    assert sweep.steps_saved == 6 * 100


def test_prefixes_of_prefixes(opened) -> None:
    third = GOOD.split("phases:")[1].split("  - name: second")[0].replace("first", "third")
    text = "name: s\nrecipe: recipes/small.yaml\ngrid:\n" + f"  code: {{{CODE}: [0.1, 0.9]}}\n"
    text += "  rate: {phases.third.learning_rate.peak: [0.1, 0.2, 0.3]}\n"
    opened()
    write_text(Path("recipes/small.yaml"), GOOD + third.strip("\n") + "\n")
    write_text(Path("sweep.yaml"), text)
    sweep = open_sweep(Path("sweep.yaml"))
    first, *second = sweep.shared
    assert first.until == "first" and first.parent is None
    assert [cell.until for cell in second] == ["second"] * 2
    assert all(cell.parent is first for cell in second)
    assert [cell.parent for cell in sweep.cells] == [second[0]] * 3 + [second[1]] * 3
    assert sweep.steps_saved == 5 * 100 + 4 * sweep.cells[0].plan.phases[1].steps


@pytest.mark.parametrize(
    "key",
    [
        "phases.first.learning_rate.peak",
        "optimizer.weight_decay",
        "model_seed",
        "data_seed",
        "model.init_std",
    ],
)
def test_what_changes_the_first_phase_is_not_shared(opened, key: str) -> None:
    values = "[1, 2]" if "seed" in key else "[0.1, 0.2]"
    sweep = opened(f"name: s\nrecipe: recipes/small.yaml\ngrid: {{a: {{{key}: {values}}}}}\n")
    assert sweep.shared == () and sweep.steps_saved == 0


def test_a_longer_sequence_in_a_later_phase_makes_another_model(opened) -> None:
    """Its context length decides the size of learned positions, so the first phase is not the same."""
    keys = "phases.second.sequence_length: [128, 256], sources.docs.window: [256, 256], sources.python.window: [256, 256]"
    sweep = opened(f"name: s\nrecipe: recipes/small.yaml\ngrid: {{a: {{{keys}}}}}\n")
    assert len(sweep.cells) == 2 and sweep.shared == ()


# ------------------------------------------------------------------------------------------------------------ states, plan


def save(cell: Cell, step: int) -> None:
    """A checkpoint without tensors, and the step's record."""
    folder = cell.folder / "checkpoints" / f"step_{step:08d}"
    write_text(folder / INFO, json.dumps({"step": step}))
    write_text(folder.parent / "latest", folder.name)
    with (cell.folder / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"kind": "train", "step": step, "loss": 4.5}, separators=(",", ":")) + "\n"
        )


def test_the_state_is_read_from_the_run_folders(opened, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = opened()
    first, second, third, fourth, *rest = sweep.cells
    shared = {cell.name: cell for cell in sweep.shared}
    assert len(unfinished(sweep)) == 12 and state_of(first).kind == "not begun"
    save(sweep.shared[0], 100)
    save(first, first.end)
    save(second, 101)
    third.folder.mkdir(parents=True)
    write_text(third.failure, "exit code 1: out of memory\n")
    states = [state_of(cell) for cell in (*sweep.shared[:1], first, second, third, fourth)]
    assert [state.kind for state in states] == [
        "finished",
        "finished",
        "interrupted",
        "failed",
        "not begun",
    ]
    assert (states[2].step, states[2].loss, states[3].failure) == (
        101,
        4.5,
        "exit code 1: out of memory",
    )
    # The shared phases of seeds 2 and 3 are still needed, by cells that have not begun.
    assert [c.name for c in unfinished(sweep)] == [
        *list(shared)[1:],
        *(c.name for c in (second, third, fourth, *rest)),
    ]
    for cell in sweep.cells[::3]:
        save(cell, 101)
    shutil.rmtree(sweep.shared[0].folder)
    assert sweep.shared[0] not in unfinished(sweep), "all that go on from it have begun"
    assert main(["sweep", "sweep.yaml", "--list"]) == 0
    out = capsys.readouterr().out
    assert f"{third.name}: exit code 1: out of memory (runs/share/logs/{third.name}.txt)" in out
    assert f"101 of {second.end}" in out and "1 failed" in out


def test_a_plan_of_a_sweep_adds_up(opened, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = opened(SHARES.replace("grid:", "grid:\n  size: {model.vocab_size: [3000, 300]}"))
    assert is_sweep(sweep.path) and not is_sweep(Path("recipes/small.yaml"))
    assert main(["plan", "sweep.yaml", "--price", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["cell"] for row in rows] == [cell.name for cell in sweep.all_cells]
    alone = sum(cell.plan.total_tokens for cell in sweep.cells)
    saved = (
        sum(cell.plan.phases[0].tokens for cell in sweep.cells)
        - 6 * sweep.cells[0].plan.phases[0].tokens
    )
    assert sum(row["tokens"] for row in rows) == alone - saved
    assert all(
        row["price"] == pytest.approx(row["device_days"] * 48) and row["price"] > 0 for row in rows
    )
    assert main(["plan", "sweep.yaml", "--price", "2", "--gpus", "4"]) == 0
    out = capsys.readouterr().out
    assert (
        "6 shared first phases" in out
        and f"{sweep.steps_saved:,} steps less" in out
        and "the whole" in out
    )
    assert main(["plan", "sweep.yaml", "--suggest"]) == 2
    assert "--suggest: sweep.yaml is a sweep" in capsys.readouterr().err


def test_slots_divide_devices_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    cpu = Slots(jobs=8, processes=2)
    assert cpu.environment(3)["OMP_NUM_THREADS"] == "1", "whatever else is trained"
    given = [Slots(4, 2, tuple("01234567")).environment(slot) for slot in range(4)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in given] == ["0,1", "2,3", "4,5", "6,7"]
    assert given[0]["OMP_NUM_THREADS"] == "2"
    assert Slots(2, 1, ("GPU-a",)).environment(1)["CUDA_VISIBLE_DEVICES"] == "GPU-a"


def test_a_cell_that_is_no_longer_in_the_file(opened, capsys: pytest.CaptureFixture[str]) -> None:
    opened()
    assert main(["sweep", "sweep.yaml", "--cell", "code-7"]) == 2
    assert "--cell code-7: sweep.yaml has no such cell" in capsys.readouterr().err
    assert main(["sweep", "sweep.yaml"]) == 2, "the corpora are not there"
    assert "there is no" in capsys.readouterr().err and not Path("runs").exists()
