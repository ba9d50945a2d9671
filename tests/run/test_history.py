"""What a start makes of the checkpoints in its run folder: which one it goes on from, what it refuses, what it leaves alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megacode.errors import UserError
from megacode.plan.fingerprint import fingerprint
from megacode.plan.plan import Plan, make_plan
from megacode.recipe.load import dump_recipe, load_recipe
from megacode.recipe.schema import TokenizerSection
from megacode.run.checkpoints import (
    INFO,
    checkpoint_name,
    find_checkpoint,
    latest_checkpoint,
)
from megacode.run.folder import put_other_futures_aside
from megacode.run.history import Start, find_start, initial_start, is_own, past_changes
from megacode.run.metrics import FILE as METRICS
from megacode.tokenizer.tokenizer import load_tokenizer
from tests.good_recipe import GOOD

TOKENS = {"python": 1_000_000, "docs": 500_000}
PLAIN = ("tokenizer=null", "model.vocab_size=300")


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    return path


def plan_of(path: Path, *overrides: str) -> Plan:
    return make_plan(load_recipe(path, overrides), TOKENS)


def save(run: Path, plan: Plan, step: int, **more: object) -> Path:
    """A checkpoint's folder without its tensors."""
    checkpoint = run / "checkpoints" / checkpoint_name(step)
    checkpoint.mkdir(parents=True)
    info = {
        "step": step,
        "facts": fingerprint(plan, step),
        "vocab_size": plan.recipe.model.vocab_size,
        **more,
    }
    (checkpoint / INFO).write_text(json.dumps(info))
    (checkpoint / "recipe.yaml").write_text(dump_recipe(plan.recipe))
    (run / "checkpoints/latest").write_text(checkpoint.name + "\n")
    return checkpoint


@pytest.fixture
def run(tmp_path: Path, recipe_file: Path) -> Path:
    folder = tmp_path / "run"
    for step in (10, 20, 30):
        save(folder, plan_of(recipe_file, *PLAIN), step)
    return folder


# ------------------------------------------------------------------------------------------------------ which one


@pytest.mark.parametrize(
    "damage",
    [None, "", "step_00000040", "../elsewhere/step_00000010", "/tmp/step_00000010", "\x00?"],
)
def test_without_a_latest_that_fits_a_run_goes_on_from_the_newest_and_says_so(
    damage: str | None, run: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never from step 0, and never from a folder beside its own."""
    latest = run / "checkpoints/latest"
    shutil.copytree(run / "checkpoints", run / "elsewhere")
    latest.unlink()
    if damage is not None:
        latest.write_text(damage)
    resume = find_start(run, plan_of(recipe_file, *PLAIN))
    assert resume.step == 30
    assert "going on from the newest complete one, step_00000030" in resume.note
    assert find_checkpoint(run) == run / "checkpoints/step_00000030"
    assert "the newest complete one" in capsys.readouterr().err


def test_an_incomplete_newest_one_is_left_aside(run: Path) -> None:
    (run / "checkpoints/step_00000030" / INFO).unlink()
    path, note = latest_checkpoint(run / "checkpoints")
    assert path == run / "checkpoints/step_00000020" and "not a complete checkpoint" in note


@pytest.mark.parametrize("pointer", [True, False])
def test_checkpoints_of_which_none_is_complete_are_no_new_run(
    pointer: bool, run: Path, recipe_file: Path
) -> None:
    for info in run.glob(f"checkpoints/*/{INFO}"):
        info.unlink()
    if not pointer:
        (run / "checkpoints/latest").unlink()
    with pytest.raises(UserError, match=r"no complete checkpoint .*--restart"):
        find_start(run, plan_of(recipe_file, *PLAIN))


def test_a_wish_for_an_earlier_one_that_is_gone_is_no_wish_for_the_newest(
    run: Path, recipe_file: Path
) -> None:
    (run / "checkpoints/latest").write_text("step_00000015\n")
    with pytest.raises(
        UserError, match=r"step_00000015.*there are later ones.*step_00000010, step_00000020"
    ):
        find_start(run, plan_of(recipe_file, *PLAIN))


def test_metrics_that_tell_of_a_checkpoint_are_no_new_run(run: Path, recipe_file: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / METRICS).write_text('{"kind":"event","step":0,"event":"start"}\n')
    assert find_start(run, plan_of(recipe_file, *PLAIN)) == Start()
    (run / METRICS).write_text('{"kind":"event","step":20,"event":"checkpoint","path":"x"}\n')
    with pytest.raises(UserError, match=r"checkpoint at step 20.*--restart"):
        find_start(run, plan_of(recipe_file, *PLAIN))


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.rotary_base=500", r"model\.rotary_base: 10000 before, 500 now"),
        ("optimizer.beta2=0.9", r"optimizer\.beta2: 0\.95 before, 0\.9 now"),
        (
            "phases.first.learning_rate.peak=1",
            r"phases\.first\.learning_rate: 0\.0001 before, 0\.1 now in step 2",
        ),
        ("model.tie_embeddings=true", r"model\.tie_embeddings: False before, True now"),
        ("precision=fp32", r"precision\.compute: bf16 before, fp32 now"),
    ],
)
def test_a_changed_past_is_refused_unless_accepted(
    override: str, said: str, run: Path, recipe_file: Path
) -> None:
    plan, key = (
        plan_of(recipe_file, *PLAIN, override),
        override.partition("=")[0].removesuffix(".peak"),
    )
    with pytest.raises(UserError, match=rf"first 30 steps .*{said}.*--accept-change {key}"):
        find_start(run, plan)
    resume = find_start(run, plan, [key])
    assert [change.key.startswith(key) for change in resume.changes] == [True]


@pytest.mark.parametrize("override", ["seed=8", "model.vocab_size=200", "model.vocab_size=400"])
def test_what_cannot_be_accepted(override: str, run: Path, recipe_file: Path) -> None:
    plan = plan_of(recipe_file, *PLAIN, override)
    with pytest.raises(UserError, match=f"{override.partition('=')[0]}: ") as told:
        find_start(run, plan, ["model"])
    assert "--accept-change" not in str(told.value)


def test_a_tokenizer_is_known_by_its_contents(run: Path, recipe_file: Path, tmp_path: Path) -> None:
    import sentencepiece

    def trained(name: str, text: str) -> Path:
        (tmp_path / f"{name}.txt").write_text(text * 50)
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / f"{name}.txt"), model_prefix=str(tmp_path / name), vocab_size=60, hard_vocab_limit=False,
            minloglevel=2,
        )  # fmt: skip
        return tmp_path / f"{name}.model"

    first, other = (
        trained("a", "def add(left, right): return left + right\n"),
        trained("b", "the quick brown fox jumps\n"),
    )
    shutil.copy(first, tmp_path / "moved.model")
    tokenizer = load_tokenizer(TokenizerSection(path=str(first), added_tokens=["<x>", "<y>"]))
    size = f"model.vocab_size={tokenizer.vocab_size}"
    named = ("tokenizer.added_tokens=[<x>, <y>]", size)
    plan = plan_of(recipe_file, f"tokenizer.path={first}", *named)
    for info in ({}, {"tokenizer": tokenizer.facts()}):  # as checkpoints were, and as they are
        shutil.rmtree(run)
        checkpoint = save(run, plan, 10, **info)
        assert find_start(
            run, plan_of(recipe_file, f"tokenizer.path={tmp_path}/moved.model", *named)
        )
        for override, key in (
            (f"tokenizer.path={other}", "tokenizer.path"), ("tokenizer.added_tokens=[<y>, <x>]", "tokenizer.added_tokens"),
            ("tokenizer.bos=true", "tokenizer.bos"), ("tokenizer.added_tokens=[<x>]", "model.vocab_size"),
        ):  # fmt: skip
            changed = plan_of(recipe_file, f"tokenizer.path={first}", *named, override)
            with pytest.raises(UserError, match=f"{key}: "):
                find_start(run, changed)
        # More tokens after the old ones are no other model to start from; another file or order is.
        start = (
            f"initialize_from={checkpoint}",
            f"tokenizer.path={first}",
            "model.vocab_size=null",
        )
        more = load_recipe(recipe_file, [*start, "tokenizer.added_tokens=[<x>, <y>, <z>]"])
        assert not initial_start(more).changes
        for override in (f"tokenizer.path={other}", "tokenizer.added_tokens=[<y>, <x>]"):
            with pytest.raises(UserError, match=override.partition("=")[0]):
                initial_start(
                    load_recipe(
                        recipe_file, [*start, "tokenizer.added_tokens=[<x>, <y>]", override]
                    )
                )


def test_weights_start_only_the_model_that_they_are_of(run: Path, recipe_file: Path) -> None:
    start = (*PLAIN, f"initialize_from={run}")
    same = load_recipe(
        recipe_file,
        [*start, "optimizer.beta2=0.9", "seed=9", "model.dropout=0.1", "model.init_std=0.1"],
    )
    assert not initial_start(same).changes
    for override in (
        "model.activation=geglu",
        "model.heads=8",
        "model.rotary_base=1",
        "model.qk_norm=true",
    ):
        changed = load_recipe(recipe_file, [*start, override])
        key = override.partition("=")[0]
        with pytest.raises(UserError, match=f"initialize_from: .*{key}: .*--accept-change {key}"):
            initial_start(changed)
        assert next(change.key for change in initial_start(changed, ["model"]).changes) == key


def test_how_new_rows_began_is_a_fact_of_the_past(tmp_path: Path, recipe_file: Path) -> None:
    start = (*PLAIN, f"initialize_from={tmp_path}")
    save(tmp_path / "other", plan_of(recipe_file, *start), 5)
    drawn = plan_of(recipe_file, *start, "initialize_new_rows=init")
    with pytest.raises(UserError, match="initialize_new_rows: mean before, init now"):
        find_start(tmp_path / "other", drawn)
    with pytest.raises(UserError, match="initialize_new_rows: has no effect without"):
        plan_of(recipe_file, *PLAIN, "initialize_new_rows=init")


# ------------------------------------------------------------------------------------------------- other futures


def test_checkpoints_of_another_future_are_put_aside_and_never_removed(
    run: Path, recipe_file: Path
) -> None:
    (run / METRICS).write_text("{}\n")
    (run / "checkpoints/latest").write_text("step_00000010\n")
    plan = plan_of(recipe_file, *PLAIN)
    assert put_other_futures_aside(run, plan, 10, []) is None, "the same future: they are made anew"
    lower = plan_of(
        recipe_file, *PLAIN, "phases.first.learning_rate={peak: 1e-3, warmup: 10, schedule: linear}"
    )
    line = put_other_futures_aside(run, lower, 10, [])
    aside = run / "checkpoints.before-1"
    assert line and str(aside) in line and "step_00000020, step_00000030" in line
    assert sorted(path.name for path in aside.iterdir()) == [
        METRICS,
        "step_00000020",
        "step_00000030",
    ]
    assert [path.name for path in sorted(run.glob("checkpoints/step_*"))] == ["step_00000010"]


def test_whose_a_checkpoint_is(run: Path, recipe_file: Path) -> None:
    checkpoint = run / "checkpoints/step_00000020"
    assert is_own(checkpoint, plan_of(recipe_file, *PLAIN), [])
    beta = plan_of(recipe_file, *PLAIN, "optimizer.beta2=0.9")
    assert not is_own(checkpoint, beta, [])
    assert is_own(checkpoint, beta, [{"key": "optimizer.beta2", "step": 25}]), "accepted after it"
    assert not is_own(checkpoint, beta, [{"key": "optimizer.beta2", "step": 15}]), (
        "it should have it"
    )
    (checkpoint / "recipe.yaml").unlink()
    assert not is_own(checkpoint, plan_of(recipe_file, *PLAIN), [])


def test_a_checkpoint_without_its_recipe_is_not_taken_on_trust(
    run: Path, recipe_file: Path
) -> None:
    (run / "checkpoints/step_00000030/recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"recipe\.yaml: is missing"):
        find_start(run, plan_of(recipe_file, *PLAIN))
    info = json.loads((run / f"checkpoints/step_00000020/{INFO}").read_text())
    assert past_changes(run / "checkpoints/step_00000020", info, plan_of(recipe_file, *PLAIN)) == (
        [],
        [],
    )
