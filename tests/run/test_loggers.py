"""Loggers beside TensorBoard: the same tags, one run over there for one run here, no harm to training."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

from megacode.errors import UserError
from megacode.recipe.load import load_recipe
from megacode.recipe.schema import Recipe
from megacode.run import loggers
from megacode.run.metrics import MetricsWriter, scalars

RECORD = {
    "kind": "train", "loss": 2.5, "tokens": 1000, "mfu": None,
    "loss_by_source": {"docs[0.0-0.5]": 2.0}, "ratio_by_domain": {"code": 0.25},
}  # fmt: skip


def recipe_with(write, logging: str) -> Recipe:
    return load_recipe(write(), [f"logging={logging}"])


def write_steps(run: Path, recipe: Recipe, steps: range, said: list[str]) -> None:
    opened = loggers.open_loggers(run, recipe, said.append)
    with MetricsWriter(run, False, steps.start, opened) as writer:
        for step in steps:
            writer.write({**RECORD, "step": step + 1, "loss": 5 - step / 10})


def test_a_missing_package_is_one_sentence(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    recipe = recipe_with(write, "{wandb: {project: p}}")
    with pytest.raises(UserError, match=r"logging.wandb: .* pip install 'megacode\[wandb\]'"):
        loggers.check_loggers(recipe.logging)
    loggers.check_loggers(recipe_with(write, "{}").logging)


def test_a_failing_logger_is_said_once_and_dropped(tmp_path: Path) -> None:
    said: list[str] = []

    def start() -> loggers.Sender:
        def send(step: int, values: loggers.Values) -> None:
            raise ConnectionError("nobody\nthere")

        return send, lambda: None

    logger = loggers.Logger("wandb", start, said.append)
    with MetricsWriter(tmp_path, False, 0, [logger]) as writer:
        for step in range(20):
            writer.write({**RECORD, "step": step})
    assert said == ["note: logging.wandb stopped (nobody there); training goes on without it"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 20


def test_training_does_not_wait_for_a_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    gate = threading.Event()
    monkeypatch.setattr(loggers, "_PATIENCE", 0.1)

    def start() -> loggers.Sender:
        gate.wait()
        return lambda step, values: None, lambda: None

    logger = loggers.Logger("mlflow", start, said.append)
    began = time.monotonic()
    for step in range(1000):
        logger.add(step, {"loss/train": 1.0})
    logger.close()
    assert time.monotonic() - began < 5
    assert "1,001 records are left out" in said[0]
    gate.set()


def test_mlflow_has_the_same_tags_and_a_resumed_run_goes_on(write, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient

    store, said = f"sqlite:///{tmp_path / 'mlflow.db'}", []
    recipe = recipe_with(write, f"{{mlflow: {{tracking_uri: '{store}', experiment: e}}}}")
    write_steps(tmp_path / "run", recipe, range(10), said)
    write_steps(tmp_path / "run", recipe, range(8, 15), said)
    assert said == []
    client = MlflowClient(tracking_uri=store)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    tags = {loggers._mlflow_name(tag) for tag in scalars({**RECORD, "step": 1})}
    assert set(run.data.metrics) == tags and run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss/train")
    assert {m.step: m.value for m in history} == {s + 1: 5 - s / 10 for s in range(15)}
    assert run.data.params["model.layers"] == "4" and run.data.params["phases.first.steps"] == "100"


def test_wandb_offline_writes_the_tags_under_one_id(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    said: list[str] = []
    recipe = recipe_with(write, "{wandb: {project: p, mode: offline}}")
    write_steps(tmp_path / "run", recipe, range(10), said)
    write_steps(tmp_path / "run", recipe, range(8, 15), said)
    assert said == []
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert files and len({path.name for path in files}) == 1, "one id"
    content = b"".join(path.read_bytes() for path in files)
    for tag in scalars({**RECORD, "step": 1}):
        assert tag.encode() in content
    assert b"hidden_size" in content


def test_loggers_import_nothing_until_they_are_asked_for() -> None:
    import subprocess

    code = "import sys, megacode.run.metrics; assert not {'wandb', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
