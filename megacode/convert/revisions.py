"""Every checkpoint of a run as a folder of its own, named as LLM360 published theirs; what is there and whole is kept.

A folder's last file, `SHA256SUMS` (as `sha256sum -c` reads it), lists every other; `export.json` says what was exported how.
A folder whose files are those listed, made of the same checkpoint in the same way, is not made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacode.convert.export import ExportSource, Wanted, export
from megacode.errors import UserError
from megacode.recipe.load import load_recipe
from megacode.run.checkpoints import INFO, complete_checkpoints

SUMS = "SHA256SUMS"
ABOUT = "export.json"
PATTERN = "phase{n}_checkpoint_{step:06d}"


@dataclass(frozen=True)
class Revision:
    """A checkpoint and the name of its folder."""

    checkpoint: Path
    step: int
    name: str


@dataclass(frozen=True)
class Outcome:
    """What became of a revision: `written`, `kept` (there and whole), or why it was made again."""

    revision: Revision
    state: str
    notes: Sequence[str] = ()


def revisions(run: Path, pattern: str = PATTERN) -> list[Revision]:
    """The run's checkpoints with their names, oldest first.

    Args:
        pattern: Python's format string over `n` (the phase's number from 1), `phase` (its name), `step` (steps within the
            phase), `total` (steps of the run) and `model` (the recipe's name).

    Raises:
        UserError: it is no run, has no checkpoints, or the pattern is no pattern or gives one name twice.
    """
    if not (run / "recipe.yaml").is_file() or (run / INFO).is_file():
        raise UserError(
            f"{run}: is no run folder; --all exports the checkpoints of a run, such as runs/crystal-tiny"
        )
    found = complete_checkpoints(run / "checkpoints")
    if not found:
        raise UserError(f"{run / 'checkpoints'}: holds no complete checkpoint yet")
    named = []
    phases, model = _phases(run), load_recipe(run / "recipe.yaml").name
    for step, checkpoint in found:
        number, phase = next(
            (
                (n, p)
                for n, p in enumerate(phases, 1)
                if p["first_step"] < step <= p["first_step"] + p["steps"]
            ),
            (len(phases), phases[-1]),
        )
        fields = {
            "n": number,
            "phase": phase["name"],
            "step": step - phase["first_step"],
            "total": step,
            "model": model,
        }
        try:
            name = pattern.format(**fields)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise UserError(
                f"--name-pattern {pattern}: cannot be filled in ({error}); it may hold {{n}}, {{phase}}, {{step:06d}}, "
                "{total} and {model}"
            ) from None
        if not name or name.startswith(".") or "/" in name:
            raise UserError(
                f"--name-pattern {pattern}: gives {name!r}, which is no name of a folder"
            )
        named.append(Revision(checkpoint, step, name))
    names = [revision.name for revision in named]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(
            f"--name-pattern {pattern}: gives {twice} twice; let it hold {{n}} and {{step:06d}}, or {{total}}"
        )
    return named


def _phases(run: Path) -> list[dict[str, Any]]:
    """name, first_step and steps of every phase: as the run's start wrote them, else planned anew."""
    try:
        return list(json.loads((run / "plan.json").read_text(encoding="utf-8"))["phases"])
    except (OSError, ValueError, KeyError):
        from megacode.data.planning import plan_with_data

        plan = plan_with_data(load_recipe(run / "recipe.yaml"))
        return [{"name": p.name, "first_step": p.first_step, "steps": p.steps} for p in plan.phases]


def export_all(
    run: Path, out: Path, wanted: Wanted, pattern: str = PATTERN, again: bool = False,
    progress: Callable[[str, int], Any] | None = None, tell: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:  # fmt: skip
    """Export every checkpoint that is not there already.

    A folder that is a link is made where the link leads.

    Args:
        again: make also what is there and whole.
        progress: (title, bytes) -> context manager that gives the function to be told of bytes; of all exports together.
        tell: told of each outcome as it comes.
    """
    from megacode.terminal import progress_bar

    named = revisions(run, pattern)
    outcomes, to_do = [], []
    for revision in named:
        source = ExportSource.open(revision.checkpoint)
        about = _about(source, wanted)
        check_replaceable(place := (out / revision.name).resolve())
        reason = "asked for again" if again else _missing(place, about)
        if reason is None:
            outcomes.append(Outcome(revision, "kept"))
            tell(outcomes[-1])
        else:
            to_do.append((revision, source, about, reason, place))
    total = sum(wanted.nbytes(source) for _, source, *_ in to_do)
    with (progress or progress_bar)(
        f"{run.name}: {len(to_do)} of {len(named)} checkpoints", total
    ) as on_bytes:
        for revision, source, about, reason, place in to_do:
            _clear(place)

            def seal(folder: Path, about: dict[str, Any] = about) -> None:
                (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
                (folder / SUMS).write_text(_sums(folder), encoding="utf-8")

            notes = export(source, place, wanted, on_bytes, seal)
            outcomes.append(Outcome(revision, reason, notes))
            tell(outcomes[-1])
    return sorted(outcomes, key=lambda outcome: outcome.revision.step)


def _about(source: ExportSource, wanted: Wanted) -> dict[str, Any]:
    """What makes two exports the same: the checkpoint (by its description and the age and size of its files), and how."""
    identity = hashlib.sha256((source.checkpoint / INFO).read_bytes())
    for path in sorted(source.checkpoint.iterdir()):
        stat = path.stat()
        identity.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return {
        "step": int(source.info["step"]),
        "checkpoint": source.checkpoint.name,
        "identity": identity.hexdigest(),
        "family": wanted.family_of(source).name,
        "dtype": str(wanted.dtype_of(source)).removeprefix("torch."),
        "shard_bytes": wanted.shard_bytes,
        "tokenizer": wanted.tokenizer,
    }


def check_replaceable(folder: Path) -> None:
    """UserError: something stands there that no export made, such as a run."""
    if folder.is_dir():
        found = {path.name for path in folder.iterdir()}
        replaceable = not found or bool(found & {ABOUT, SUMS, "config.json"})
    else:
        replaceable = not folder.exists()
    if not replaceable:
        raise UserError(
            f"{folder}: is there and is no export; move it away, or choose another output folder"
        )


def _missing(folder: Path, about: dict[str, Any]) -> str | None:
    """None where the folder is whole and what is wanted; else why it has to be made."""
    if not folder.exists():
        return "written"
    if not (folder / SUMS).is_file():
        return f"made again: {SUMS} was missing"
    try:
        lines = (
            line.split("  ", 1) for line in (folder / SUMS).read_text(encoding="utf-8").splitlines()
        )
        listed = {name: digest for digest, name in lines}
    except ValueError:
        return f"made again: {SUMS} could not be read"
    for name, digest in listed.items():
        if not (folder / name).is_file():
            return f"made again: {name} was missing"
        if _sha256(folder / name) != digest:
            return f"made again: {name} was damaged"
    if ABOUT not in listed or json.loads((folder / ABOUT).read_text(encoding="utf-8")) != about:
        return "made again: it was made of another checkpoint, or in another way"
    return None


def _sums(folder: Path) -> str:
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    return "".join(f"{_sha256(folder / name)}  {name}\n" for name in names)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _clear(folder: Path) -> None:
    """Take away what is damaged, and what a killed export left half-made under a hidden name."""
    for left in (folder, *folder.parent.glob(f".{folder.name}.*.tmp")):
        shutil.rmtree(left, ignore_errors=True)
