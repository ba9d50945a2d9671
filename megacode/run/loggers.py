"""Numbers of a run for Weights & Biases and MLflow, beside TensorBoard: the same tags.

Training never waits for a logger and never fails with one: each has a thread of its own, and the
first error is said once and ends that logger. The ids of the run over there are kept in the run's
folder, so that a resumed run goes on in the same one. After a resume, steps that were logged beyond
the checkpoint come again with the same numbers.
"""

from __future__ import annotations

import json
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.files import write_json
from megacode.recipe.schema import Logging, MlflowLogging, Recipe, WandbLogging

FILE = "loggers.json"
_PATIENCE = 60.0
"""Seconds that the end of a run waits for what is not sent yet."""
Values = Mapping[str, float]
Send = Callable[[int, Values], None]
Sender = tuple[Send, Callable[[], None]]
"""What sends the values of a step, and what ends the run over there."""


def check_loggers(logging: Logging) -> None:
    """UserError if the recipe names a logger whose package is not installed."""
    for name in ("wandb", "mlflow"):
        if getattr(logging, name) is not None and find_spec(name) is None:
            raise UserError(
                f"logging.{name}: the package {name} is not installed; pip install "
                f"'megacode[{name}]', or take the key out"
            )


def open_loggers(run: Path, recipe: Recipe, say: Callable[[str], None]) -> list[Logger]:
    """The loggers that a recipe names, each on its way to start.

    Args:
        say: shows a line; called from other threads.
    """
    given = recipe.logging
    loggers = []
    if given.wandb is not None:
        wandb = given.wandb
        loggers.append(Logger("wandb", lambda: _wandb(run, recipe, wandb), say))
    if given.mlflow is not None:
        mlflow = given.mlflow
        loggers.append(Logger("mlflow", lambda: _mlflow(run, recipe, mlflow), say))
    return loggers


class Logger:
    """Sends values in a thread. `start` makes what sends them, there."""

    def __init__(self, name: str, start: Callable[[], Sender], say: Callable[[str], None]) -> None:
        self._name, self._start, self._say = name, start, say
        self._waiting: queue.SimpleQueue[tuple[int, Values] | None] = queue.SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)
        self._thread.start()

    def add(self, step: int, values: Values) -> None:
        """Send the values of a step soon."""
        if values and not self._failed:
            self._waiting.put((step, values))

    def close(self) -> None:
        """Wait until all is sent, a minute at most."""
        self._waiting.put(None)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            self._say(
                f"note: logging.{self._name}: not all was sent in {_PATIENCE:.0f} seconds; "
                f"{self._waiting.qsize():,} records are left out"
            )

    def _work(self) -> None:
        try:
            send, end = self._start()
            while (item := self._waiting.get()) is not None:
                send(*item)
            end()
        except Exception as error:  # whatever a service or its package raises
            self._failed = True
            about = " ".join(str(error).split())[:300] or type(error).__name__
            self._say(f"note: logging.{self._name} stopped ({about}); training goes on without it")


def _wandb(run: Path, recipe: Recipe, given: WandbLogging) -> Sender:
    import wandb

    # Its service's process would take signals that are meant for the run.
    os.environ.setdefault("WANDB_SILENT", "true")
    known = _known(run, "wandb", lambda: secrets.token_hex(8))
    session = wandb.init(
        project=given.project,
        entity=given.entity,
        mode=given.mode,
        id=known,
        resume="allow",
        name=recipe.name,
        dir=str(run),
        config=recipe.model_dump(mode="json"),
        settings=wandb.Settings(console="off", login_timeout=30, init_timeout=60),
    )
    # Not W&B's own step, which refuses steps before its last one: those after a resume.
    session.define_metric("step")
    session.define_metric("*", step_metric="step")
    return lambda step, values: session.log({"step": step, **values}), session.finish


def _mlflow(run: Path, recipe: Recipe, given: MlflowLogging) -> Sender:
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=given.tracking_uri)

    def new() -> str:
        found = client.get_experiment_by_name(given.experiment)
        number = found.experiment_id if found else client.create_experiment(given.experiment)
        made: str = client.create_run(number, run_name=recipe.name).info.run_id
        params = [Param(key, value[:500]) for key, value in _flat(recipe.model_dump(mode="json"))]
        for first in range(0, len(params), 100):
            client.log_batch(made, params=params[first : first + 100])
        return made

    known = _known(run, "mlflow", new)
    client.update_run(known, status="RUNNING")

    def send(step: int, values: Values) -> None:
        now = int(1000 * time.time())
        metrics = [Metric(_mlflow_name(k), value, now, step) for k, value in values.items()]
        client.log_batch(known, metrics=metrics)

    return send, lambda: client.set_terminated(known)


def _known(run: Path, name: str, make: Callable[[], str]) -> str:
    """The id of this run at a service, made and written down once."""
    path = run / FILE
    with _LOCK:
        ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if name not in ids:
            ids[name] = make()
            write_json(path, ids)
    return str(ids[name])


_LOCK = threading.Lock()


def _mlflow_name(tag: str) -> str:
    """MLflow takes letters, digits and `_-. :/`."""
    return re.sub(r"[^\w\-. :/]", "_", tag)


def _flat(value: Any, above: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and text of every value of a recipe that is given."""
    items: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(item.get("name", i), item) for i, item in enumerate(value)]
    elif value is not None:
        yield _mlflow_name(above), str(value)
    for key, item in items:
        yield from _flat(item, f"{above}.{key}" if above else str(key))
