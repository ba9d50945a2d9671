"""Tasks of EleutherAI's lm-evaluation-harness on a run, a checkpoint or a Hugging Face folder; `megacode evaluate --harness`.

The package is an optional extra. Tasks that come as local files (`--harness-tasks`) need no network.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacode.errors import UserError


@dataclass(frozen=True)
class TaskSettings:
    """What to run.

    Attributes:
        tasks: names or glob patterns of the harness' tasks.
        folder: further tasks as the harness' YAML files.
        shots: examples before each question; None is the task's own number.
        limit: questions of each task; None is all.
    """

    tasks: Sequence[str]
    folder: Path | None = None
    shots: int | None = None
    limit: int | None = None
    batch_size: int = 8
    trust_remote_code: bool = False
    """Whether Python files of a Hugging Face folder may run."""


def run_tasks(target: Path, settings: TaskSettings) -> dict[str, dict[str, float]]:
    """task -> {metric: value}, standard errors as `NAME_stderr`.

    Args:
        target: run folder, checkpoint folder, or a Hugging Face folder (it has a config.json).

    Raises:
        UserError: the harness is not installed, it does not know a task, a task's data cannot be loaded, the target is
            none of the three, or it has code of its own that is not trusted.
    """
    check_code(target, settings.trust_remote_code)
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--harness needs lm-evaluation-harness, and `import {error.name}` fails: pip install 'megacode[harness]'"
        ) from None
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if settings.folder is not None and not settings.folder.is_dir():
        raise UserError(
            f"--harness-tasks {settings.folder}: no such folder; give the one with the tasks' YAML files"
        )
    manager = TaskManager(include_path=str(settings.folder) if settings.folder else None)
    names: list[str] = []
    for task in settings.tasks:
        matched = manager.match_tasks([task])
        if not matched:
            raise UserError(
                f"--harness {task}: lm-evaluation-harness knows no such task; name one of its own, or give the folder of "
                "the task's YAML file with --harness-tasks"
            )
        names += [name for name in matched if name not in names]
    try:
        manager.load(names)
    except Exception as error:  # whatever the task's data set or its YAML raises
        raise UserError(
            f"--harness {', '.join(names)}: cannot be loaded: {_first_line(error)}"
        ) from error
    model = _model(target, settings)
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=names,
        num_fewshot=settings.shots,
        limit=settings.limit,
        batch_size=settings.batch_size,
        bootstrap_iters=1000,
        log_samples=False,
        task_manager=manager,
    )
    return {task: _numbers(values) for task, values in results["results"].items()}


def check_code(target: Path, trusted: bool) -> None:
    """UserError for a Hugging Face folder whose configuration asks for Python files, unless they are `trusted`; and for trust
    in a target that has none."""
    asks = [
        name
        for name in ("config.json", "tokenizer_config.json")
        if "auto_map" in _settings(target / name)
    ]
    if asks and not trusted:
        code = ", ".join(sorted(path.name for path in target.glob("*.py"))) or "from elsewhere"
        raise UserError(
            f"{target / asks[0]}: `auto_map` asks for Python code of the folder ({code}) to be run; look at it, and if you "
            "trust it, give --trust-remote-code"
        )
    if trusted and not asks:
        raise UserError(
            f"--trust-remote-code: {target} asks for no code of its own (`auto_map` of a config.json); leave it out"
        )


def _settings(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); download the file again") from None
    return value if isinstance(value, dict) else {}


def _model(target: Path, settings: TaskSettings) -> Any:
    if not (target / "config.json").is_file():
        from megacode.evaluate.harness_model import MegatronLM
        from megacode.megatron.inference import open_for_inference

        return MegatronLM(*open_for_inference(target), settings.batch_size)
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(
            f"--harness on a Hugging Face folder: `import {error.name}` fails: pip install 'megacode[harness]'"
        ) from None
    return HFLM(
        pretrained=str(target),
        trust_remote_code=settings.trust_remote_code,
        dtype="auto",
        device="cuda" if _cuda() else "cpu",
        batch_size=settings.batch_size,
        add_bos_token=_settings(target / "tokenizer_config.json").get("add_bos_token"),
    )


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """`acc,none` -> `acc`; other filters keep their name."""
    found = {}
    for key, value in values.items():
        name, _, kind = key.partition(",")
        if kind and isinstance(value, (int, float)):
            found[name if kind == "none" else f"{name} ({kind})"] = float(value)
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def print_results(title: str, results: dict[str, dict[str, float]]) -> None:
    """A table: task, metric, value, standard error."""
    from rich.table import Table

    from megacode.terminal import print_table, table_console

    table = Table(title=title, title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("± standard error", justify="right")
    for task, numbers in results.items():
        for name, value in numbers.items():
            if "_stderr" not in name:
                error = numbers.get(
                    name.replace(" (", "_stderr (", 1) if " (" in name else f"{name}_stderr"
                )
                table.add_row(
                    task, name, f"{value:.4f}", f"{error:.4f}" if error is not None else ""
                )
    print_table(table_console(), table)
