"""Whether a checkpoint lies on the way of a run: its past against a recipe's, difference by difference.

`megacode.plan.past` compares two recipes and `megacode.plan.fingerprint` what decides the batches; here they meet what a
checkpoint says of itself (`megacode.json`, `recipe.yaml`), and what follows from it for the run's folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.plan.fingerprint import differences, fingerprint
from megacode.plan.past import Change, accepts, changed_function, changed_past, check_accepted
from megacode.plan.plan import Plan
from megacode.recipe.load import load_recipe
from megacode.recipe.schema import Recipe
from megacode.run.checkpoints import complete_checkpoints, find_checkpoint, read_info
from megacode.run.metrics import FILE as METRICS
from megacode.tokenizer.tokenizer import load_tokenizer


def past_changes(
    checkpoint: Path, info: Mapping[str, Any], plan: Plan
) -> tuple[list[str], list[Change]]:
    """How the steps before a checkpoint differ from those of a plan: (in their batches, in model, tokenizer and training).

    UserError if the recipe beside the checkpoint cannot be read.
    """
    step, recipe_file = int(info["step"]), checkpoint / "recipe.yaml"
    batches = differences(info["facts"], json.loads(json.dumps(fingerprint(plan, step))))
    if not recipe_file.is_file():
        raise UserError(
            f"{recipe_file}: is missing, so the run's past cannot be compared; copy it here from where the run was"
        )
    before = load_recipe(recipe_file)
    return batches, [
        *changed_past(before, plan, step),
        *tokenizer_changes(info, before, plan.recipe),
    ]


def acceptable(change: Change) -> bool:
    return (
        change.key != "model.vocab_size"
    )  # rows of embeddings and of Adam's state cannot come or go in a run


def is_accepted(change: Change, keys: Iterable[str]) -> bool:
    return acceptable(change) and accepts(keys, change)


def initial_changes(recipe: Recipe, accept: Sequence[str] = ()) -> tuple[Change, ...]:
    """Accepted changes between the model of `initialize_from` and the recipe's; none without `initialize_from`.

    UserError if its weights would compute something else here, naming every difference that is not accepted.
    """
    check_accepted(accept)
    if not recipe.initialize_from:
        return ()
    checkpoint = find_checkpoint(recipe.initialize_from, say=lambda line: None)
    if not (checkpoint / "recipe.yaml").is_file():
        raise UserError(
            f"{checkpoint}: has no recipe.yaml, so its model is not known; copy the one of its run into it"
        )
    info, before = read_info(checkpoint), load_recipe(checkpoint / "recipe.yaml")
    changes = changed_function(before, recipe)
    changes += [
        change for change in tokenizer_changes(info, before, recipe) if not only_grows(change)
    ]
    if refused := [change for change in changes if not is_accepted(change, accept)]:
        keys = " ".join(f"--accept-change {change.key}" for change in changes)
        remedy = f", or accept that its weights then compute something else ({keys})" * all(
            map(acceptable, changes)
        )
        raise UserError(
            f"initialize_from: {checkpoint} was trained as another model: {'; '.join(map(str, refused[:6]))}"
            + (f"; and {len(refused) - 6} more" if len(refused) > 6 else "")
            + f"; take these from its recipe.yaml{remedy}"
        )
    return tuple(changes)


def came_with_weights(recipe: Recipe, resumed: Mapping[str, Any] | None) -> dict[str, Any]:
    """What every checkpoint hands on where the run's first weights were imported: `imported`, for exports.

    Args:
        resumed: megacode.json of the checkpoint that the run goes on from.
    """
    info = resumed
    if info is None and recipe.initialize_from:
        info = read_info(find_checkpoint(recipe.initialize_from, say=lambda line: None))
    return {"imported": info["imported"]} if info and info.get("imported") else {}


def tokenizer_changes(info: Mapping[str, Any], before: Recipe, now: Recipe) -> list[Change]:
    """How the tokenizer that a checkpoint was trained with differs from a recipe's, by contents: a file may have moved.

    Checkpoints that do not tell (`tokenizer` in megacode.json) are compared by the file that their recipe names, if it is still
    there, else by what the recipe says of it.
    """
    old, new = info.get("tokenizer") or _tokenizer_facts(before), _tokenizer_facts(now)
    vocabulary = info.get("vocab_size") or before.model.vocab_size
    pairs: list[tuple[str, Any, Any]] = [
        (
            "model.vocab_size",
            vocabulary,
            new["vocab_size"] if new else now.model.vocab_size or vocabulary,
        )
    ]
    if old and new:
        pairs += [
            ("tokenizer.path", f"contents {old['file'][:12]}", f"contents {new['file'][:12]}"),
            ("tokenizer.kind", old["kind"], new["kind"]),
            ("tokenizer.added_tokens", old["added_tokens"], new["added_tokens"]),
        ]
    if before.tokenizer and now.tokenizer:
        keys = ("bos", "eod") if old and new else ("bos", "eod", "added_tokens")
        pairs += [
            (f"tokenizer.{key}", getattr(before.tokenizer, key), getattr(now.tokenizer, key))
            for key in keys
        ]
    elif before.tokenizer or now.tokenizer:
        pairs += [
            ("tokenizer", "given" if before.tokenizer else None, "given" if now.tokenizer else None)
        ]
    return [Change(key, a, b) for key, a, b in pairs if a != b]


def only_grows(change: Change) -> bool:
    """Whether a tokenizer only gets more tokens, or a recipe tells more or less of it: no reason not to start from weights."""
    if change.key == "model.vocab_size":
        return change.before is None or change.now >= change.before
    if change.key == "tokenizer.added_tokens" and isinstance(change.before, dict):
        return change.before.items() <= change.now.items()
    return change.key in ("tokenizer", "tokenizer.bos", "tokenizer.eod")


def _tokenizer_facts(recipe: Recipe) -> dict[str, Any] | None:
    """None where the recipe names no tokenizer or its file is not there."""
    if recipe.tokenizer is None or not Path(recipe.tokenizer.path).exists():
        return None
    return load_tokenizer(recipe.tokenizer).facts()


def is_own(checkpoint: Path, plan: Plan, accepted: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a checkpoint lies on this run's way: its past is this plan's, but for changes that were accepted after it."""
    try:
        info = read_info(checkpoint)
        batches, others = past_changes(checkpoint, info, plan)
    except (UserError, KeyError, TypeError):
        return False  # what cannot be read is nobody's to remove
    keys = [change["key"] for change in accepted if change["step"] >= info["step"]]
    return not batches and all(accepts(keys, change) for change in others)


def put_other_futures_aside(
    run: Path, plan: Plan, done: int, accepted: Sequence[Mapping[str, Any]]
) -> str | None:
    """Move checkpoints after step `done` that this run would not come to, and a copy of the metrics, to
    `RUN/checkpoints.before-N`; a line that says so. They are never removed."""
    later = [path for step, path in complete_checkpoints(run / "checkpoints") if step > done]
    others = [path for path in later if not is_own(path, plan, accepted)]
    if not others:
        return None
    number = 1
    while (aside := run / f"checkpoints.before-{number}").exists():
        number += 1
    aside.mkdir()
    if (run / METRICS).is_file():
        shutil.copy2(run / METRICS, aside / METRICS)
    for path in others:
        os.rename(path, aside / path.name)
    names = ", ".join(path.name for path in others[:5]) + (", ..." if len(others) > 5 else "")
    return f"checkpoints of another future, put aside in {aside}: {names}"
