"""`megacode evaluate --harness`: tasks of EleutherAI's lm-evaluation-harness, an optional extra.

They run on a run, a checkpoint or a Hugging Face folder. Tasks that come as local files
(`--harness-tasks`) need no network.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.terminal import print_table, table_console, table_of


def run_tasks(
    target: Path,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, float]]:
    """task -> {metric: value}, standard errors as `NAME_stderr`.

    Args:
        target: run folder, checkpoint folder, or a Hugging Face folder (it has a config.json).
        tasks: names or glob patterns of the harness' tasks.
        folder: further tasks as the harness' YAML files.
        shots: examples before each question; None is the task's own number.
        limit: questions of each task; None is all.
        trust_remote_code: whether Python files of a Hugging Face folder may run.

    Raises:
        UserError: the harness is not installed, it does not know a task, a task's data cannot be
            loaded, the target is none of the three, or it has code of its own that is not trusted.
    """
    if not trust_remote_code:
        _check_code(target)
    names, manager = find_tasks(tasks, folder)
    model = _model(target, batch_size, trust_remote_code)
    return ask(model, names, manager, shots, limit, batch_size)


def find_tasks(tasks: Sequence[str], folder: Path | None = None) -> tuple[list[str], Any]:
    """(names of tasks, the harness' manager of tasks), loaded; errors as of `run_tasks`."""
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise _not_installed(error) from None
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if folder is not None and not folder.is_dir():
        raise UserError(
            f"--harness-tasks {folder}: no such folder; give the one with the tasks' YAML files"
        )
    manager = lm_eval.tasks.TaskManager(include_path=str(folder) if folder else None)
    matches = {task: manager.match_tasks([task]) for task in tasks}
    if unknown := [task for task, names in matches.items() if not names]:
        raise UserError(
            f"--harness {unknown[0]}: lm-evaluation-harness knows no such task; name one of its "
            "own, or give the folder of the task's YAML file with --harness-tasks"
        )
    names = list(dict.fromkeys(name for found in matches.values() for name in found))
    try:
        manager.load(names)
    except Exception as error:  # whatever the task's data set or its YAML raises
        first = (str(error).strip().splitlines() or ["no message"])[0][:200]
        raise UserError(
            f"--harness {', '.join(names)}: cannot be loaded: {type(error).__name__}: {first}"
        ) from error
    return names, manager


def ask(
    model: Any, names: list[str], manager: Any, shots: int | None, limit: int | None, size: int
) -> dict[str, dict[str, float]]:
    """What `find_tasks` found, asked of a model of the harness; as of `run_tasks`.

    Nothing on ranks that are not the first of their node: the harness has results there only.
    """
    import lm_eval

    results = lm_eval.simple_evaluate(
        model=model,
        tasks=names,
        num_fewshot=shots,
        limit=limit,
        batch_size=size,
        bootstrap_iters=1000,
        log_samples=False,
        task_manager=manager,
    )
    found = results["results"] if results else {}
    return {task: _numbers(values) for task, values in found.items()}


def _check_code(target: Path) -> None:
    """UserError if a Hugging Face folder's configuration asks for Python files to be run."""
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in _settings(target / name):
            code = ", ".join(sorted(path.name for path in target.glob("*.py"))) or "from elsewhere"
            raise UserError(
                f"{target / name}: `auto_map` asks for Python code of the folder ({code}) to be "
                "run; look at it, and if you trust it, give --trust-remote-code"
            )


def _settings(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); download the file again") from None
    return value if isinstance(value, dict) else {}


def _not_installed(error: ImportError) -> UserError:
    return UserError(
        f"--harness needs lm-evaluation-harness, and `import {error.name}` fails: pip install "
        "'megacode[harness]'"
    )


def _model(target: Path, batch_size: int, trust_remote_code: bool) -> Any:
    if not (target / "config.json").is_file():
        from megacode.evaluate.harness_model import MegatronLM
        from megacode.evaluate.model import open_model

        return MegatronLM(open_model(target), batch_size)
    import torch

    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise _not_installed(error) from None
    return HFLM(
        pretrained=str(target),
        trust_remote_code=trust_remote_code,
        dtype="auto",
        device="cuda" if torch.cuda.is_available() else "cpu",
        batch_size=batch_size,
        add_bos_token=_settings(target / "tokenizer_config.json").get("add_bos_token"),
    )


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """`acc,none` -> `acc`; other filters keep their name."""
    found = {}
    for key, value in values.items():
        name, _, kind = key.partition(",")
        if kind and isinstance(value, (int, float)):
            found[name if kind == "none" else f"{name} ({kind})"] = float(value)
    return found


def print_results(title: str, results: dict[str, dict[str, float]]) -> None:
    """A table: task, metric, value, standard error."""
    table = table_of(title, "task", "metric", "value", "± standard error", left=2)
    for task, numbers in results.items():
        for name, value in numbers.items():
            if "_stderr" not in name:
                metric, space, kind = name.partition(" (")
                error = numbers.get(f"{metric}_stderr{space}{kind}")
                shown = "" if error is None else f"{error:.4f}"
                table.add_row(task, name, f"{value:.4f}", shown)
    print_table(table_console(), table)
