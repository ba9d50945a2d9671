"""What a start of a run goes on from, and whether a checkpoint's past is the past of a recipe.

`megacode.plan.past` compares two recipes and `megacode.plan.fingerprint` what decides the batches.
Here they meet what a checkpoint says of itself (`megacode.json`, `recipe.yaml`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.plan.fingerprint import differences, fingerprint
from megacode.plan.past import Change, accepts, changed_function, changed_past, check_accepted
from megacode.plan.plan import Plan
from megacode.plan.trajectory import continued
from megacode.recipe.load import load_recipe
from megacode.recipe.schema import Recipe
from megacode.run.checkpoints import find_checkpoint, latest_checkpoint, read_info
from megacode.run.metrics import FILE as METRICS
from megacode.run.metrics import read_metrics
from megacode.tokenizer.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Origin:
    """Weights that a new run can begin with.

    Attributes:
        path: a checkpoint, or a folder of another format.
        info: a checkpoint's megacode.json, or what it would be.
        recipe: that the weights were trained with; of another format, the model alone.
        note: what the user should know of it.
    """

    path: Path
    info: Mapping[str, Any]
    recipe: Recipe
    note: str = ""


def open_checkpoint(path: Path) -> Origin:
    """A checkpoint, or a run's latest one. UserError: there is none that is whole."""
    notes: list[str] = []
    expected = "initialize_from a run, a checkpoint or a Hugging Face model's folder"
    checkpoint = find_checkpoint(path, notes.append, expected)
    return Origin(checkpoint, read_info(checkpoint), recipe_of(checkpoint), "".join(notes))


@dataclass(frozen=True)
class Start:
    """What a start of a run loads.

    Attributes:
        step: finished steps; 0 in a new run.
        checkpoint: a new run loads only its weights (`initialize_from`), and it may be a folder of
            another format; None: weights are drawn.
        info: the checkpoint's megacode.json; empty without one.
        changes: accepted ones, against the recipe that made the checkpoint.
        note: why it is not the checkpoint that `latest` names; empty where it is.
    """

    step: int = 0
    checkpoint: Path | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    changes: Sequence[Change] = ()
    note: str = ""

    def facts(self) -> dict[str, Any]:
        """What later checkpoints hand on: accepted changes, and what imported weights came with."""
        earlier = self.info.get("accepted", []) if self.step else []
        accepted = [*earlier, *({"step": self.step, **asdict(change)} for change in self.changes)]
        imported = self.info.get("imported")
        return {"accepted": accepted, **({"imported": imported} if imported else {})}


def find_start(
    run: Path,
    plan: Plan,
    accept: Sequence[str] = (),
    open_origin: Callable[[Path], Origin] = open_checkpoint,
) -> Start:
    """The latest checkpoint of a run, or what a new run begins with.

    Args:
        accept: keys of the recipe whose change the user accepts (`--accept-change`).
        open_origin: reads what `initialize_from` names.

    Raises:
        UserError: the checkpoint's past differs from what this recipe would have done, naming every
            difference; or the run had checkpoints and has none.
    """
    check_accepted(accept)
    checkpoint, note = latest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        _refuse_lost_checkpoints(run)
        return initial_start(plan.recipe, accept, open_origin)
    info = read_info(checkpoint)
    step = int(info["step"])
    if step > plan.total_steps:
        raise UserError(
            f"{run}: has {step} finished steps and the recipe ends after {plan.total_steps}; "
            "lengthen the last phase, add one, or choose another --run"
        )
    batches, changes = past_changes(checkpoint, info, plan)
    keys = (*accept, *_accepted_by_fork(run, step))
    if refused := [*batches, *(change for change in changes if not _is_accepted(change, keys))]:
        options = "" if batches else _accept_options(changes)
        remedy = f", go on from here with the change ({options})" if options else ""
        raise UserError(
            f"{run}: its first {step} steps were not trained as this recipe says: "
            f"{shown(refused)}; undo the change{remedy}, or choose another --run (with "
            "`initialize_from` to start from these weights)"
        )
    return Start(step, checkpoint, info, changes, note)


def initial_start(
    recipe: Recipe,
    accept: Sequence[str] = (),
    open_origin: Callable[[Path], Origin] = open_checkpoint,
) -> Start:
    """What a new run begins with: the weights of `initialize_from`, or none.

    Raises:
        UserError: the weights would compute something else in this recipe's model or tokenizer,
            naming every difference that is not accepted.
    """
    if not recipe.initialize_from:
        return Start()
    origin = open_origin(Path(recipe.initialize_from))
    trained_as = origin.recipe.model_in(origin.info.get("phase"))
    before = origin.recipe.model_copy(update={"model": trained_as})
    changes = [
        *changed_function(before, recipe),
        *(c for c in tokenizer_changes(origin.info, before, recipe) if not _only_grows(c)),
    ]
    if refused := [change for change in changes if not _is_accepted(change, accept)]:
        options = _accept_options(changes)
        remedy = f", or accept that its weights then compute something else ({options})"
        if not options:
            remedy = (
                ". No row of a vocabulary is dropped: name rows without a token in "
                "tokenizer.added_tokens, as the recipe of `megacode import` does"
            )
        raise UserError(
            f"initialize_from: {origin.path} is another model: {shown(refused)}; set these keys as "
            f"they were before{remedy}"
        )
    return Start(0, origin.path, origin.info, changes, origin.note)


def nothing_to_do(
    run: Path, plan: Plan, phase: str | None = None, accept: Sequence[str] = ()
) -> str | None:
    """A line that says so if the run, or its part up to the end of `phase`, is finished.

    Raises:
        UserError: as `find_start`.
    """
    checkpoint, _ = latest_checkpoint(run / "checkpoints")
    end = plan.phase_end(phase)
    if checkpoint is None or int(read_info(checkpoint)["step"]) < end:
        return None
    find_start(run, plan, accept)
    if end == plan.total_steps:
        what = f"{checkpoint} is the end of this run (step {end:,})"
        return f"nothing to do: {what}; --restart starts over"
    return f"nothing to do: {phase} ends at step {end:,}, and {checkpoint} is there or further"


def past_changes(
    checkpoint: Path, info: Mapping[str, Any], plan: Plan
) -> tuple[list[str], list[Change]]:
    """How the steps before a checkpoint differ from those of a plan.

    Returns:
        (differences in the batches, changes of model, tokenizer and training).

    Raises:
        UserError: the checkpoint's recipe cannot be read, or it holds weights alone.
    """
    if "facts" not in info:
        raise UserError(
            f"{checkpoint}: holds weights alone (imported or averaged), so no run resumes from it; "
            "move it elsewhere, and start a new run with `initialize_from`"
        )
    step, before = int(info["step"]), recipe_of(checkpoint)
    plan = continued(plan, before)
    batches = differences(info["facts"], json.loads(json.dumps(fingerprint(plan, step))))
    tokenizer = tokenizer_changes(info, before, plan.recipe)
    return batches, [*changed_past(before, plan, step), *tokenizer]


def tokenizer_changes(info: Mapping[str, Any], before: Recipe, now: Recipe) -> list[Change]:
    """How a checkpoint's tokenizer differs from a recipe's, by contents: a file may have moved.

    A checkpoint whose megacode.json has no `tokenizer` is compared by the file that its recipe
    names if it is still there, else by what the recipe says of it.
    """
    old, new = info.get("tokenizer") or _tokenizer_facts(before), _tokenizer_facts(now)
    size = info.get("vocab_size") or before.model.vocab_size
    sizes = (size, new["vocab_size"] if new else now.model.vocab_size or size)
    pairs: dict[str, tuple[Any, Any]] = {"model.vocab_size": sizes}
    if old and new:
        files = (f"contents {old['file'][:12]}", f"contents {new['file'][:12]}")
        pairs |= {"tokenizer.path": files}
        pairs |= {f"tokenizer.{key}": (old[key], new[key]) for key in ("kind", "added_tokens")}
    if before.tokenizer and now.tokenizer:
        for key in ("bos", "eod") if old and new else ("bos", "eod", "added_tokens"):
            pairs[f"tokenizer.{key}"] = getattr(before.tokenizer, key), getattr(now.tokenizer, key)
    elif before.tokenizer or now.tokenizer:
        pairs["tokenizer"] = ("given", None) if before.tokenizer else (None, "given")
    return [Change(key, a, b) for key, (a, b) in pairs.items() if a != b]


def is_own(checkpoint: Path, plan: Plan, accepted: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a checkpoint's past is this plan's, but for changes that were accepted after it."""
    try:
        info = read_info(checkpoint)
        batches, changes = past_changes(checkpoint, info, plan)
    except (UserError, KeyError, TypeError):
        return False  # never remove what cannot be read
    keys = [change["key"] for change in accepted if change["step"] >= info["step"]]
    return not batches and all(accepts(keys, change) for change in changes)


def shown(differences: Sequence[object]) -> str:
    """Differences as text of an error, at most six of them."""
    more = f"; and {len(differences) - 6} more" if len(differences) > 6 else ""
    return "; ".join(map(str, differences[:6])) + more


# ------------------------------------------------------------------------------------------ inside


def recipe_of(checkpoint: Path) -> Recipe:
    """The recipe that a checkpoint was trained by. UserError if it is missing."""
    if not (path := checkpoint / "recipe.yaml").is_file():
        raise UserError(
            f"{path}: is missing, so the checkpoint cannot be compared with the recipe; copy it "
            "here from where the run was"
        )
    return load_recipe(path)


def _acceptable(change: Change) -> bool:
    """Rows of embeddings and of Adam's state cannot come or go in a run."""
    return change.key != "model.vocab_size"


def _is_accepted(change: Change, keys: Iterable[str]) -> bool:
    return _acceptable(change) and accepts(keys, change)


def _accept_options(changes: Sequence[Change]) -> str:
    """The command line's options that accept these changes; empty if one cannot be accepted."""
    if not all(map(_acceptable, changes)):
        return ""
    return " ".join(f"--accept-change {change.key}" for change in changes)


def _only_grows(change: Change) -> bool:
    """Whether a tokenizer only gets more tokens, or a recipe says more or less of it."""
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


def _accepted_by_fork(run: Path, step: int) -> list[str]:
    """Keys that a fork changes on purpose: accepted where its own steps begin."""
    path = run / "fork.json"
    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return list(facts["accepted"]) if facts.get("step") == step else []


def _refuse_lost_checkpoints(run: Path) -> None:
    """UserError if the metrics tell of checkpoints: a start at step 0 would drop the records."""
    if not (run / METRICS).is_file():
        return
    saved = [r["step"] for r in read_metrics(run) if r.get("event") == "checkpoint"]
    if saved:
        raise UserError(
            f"{run / 'checkpoints'}: is empty, and {METRICS} tells of a checkpoint at step "
            f"{max(saved):,}; copy it here from where it is, or start over with --restart, which "
            "puts this run aside"
        )
