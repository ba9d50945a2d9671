"""Every checkpoint of a run as a folder of its own, named as LLM360 published theirs.

A folder's last file, `SHA256SUMS` (as `sha256sum -c` reads it), lists every other; `export.json`
says what was exported how. A folder whose files are those listed, made of the same checkpoint in
the same way, is not made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacode.convert.export import ExportSource, Wanted, export
from megacode.convert.templates import OPTION
from megacode.errors import UserError
from megacode.recipe.load import load_recipe
from megacode.run.checkpoints import INFO, complete_checkpoints
from megacode.terminal import progress_bar
from megacode.tokenizer.chat import template_text

SUMS = "SHA256SUMS"
ABOUT = "export.json"
PATTERN = "phase{n}_checkpoint_{step:06d}"


@dataclass(frozen=True)
class Outcome:
    """What became of a checkpoint.

    Attributes:
        name: of its folder.
        state: `written`, `kept` (there and whole), or why it was made again.
        notes: what the user should know, in sentences.
    """

    name: str
    step: int
    state: str
    notes: tuple[str, ...] = ()


def revision_names(run: Path, pattern: str = PATTERN) -> dict[str, Path]:
    """Folder name -> checkpoint, for the checkpoints of a run, oldest first.

    Args:
        pattern: Python's format string over `n` (the phase's number from 1), `phase` (its name),
            `step` (steps within the phase), `total` (steps of the run) and `model` (the recipe's
            name).

    Raises:
        UserError: it is no run, has no checkpoints, or the pattern is no pattern or gives one name
            twice.
    """
    if not (run / "recipe.yaml").is_file() or (run / INFO).is_file():
        raise UserError(
            f"{run}: is no run folder; --all exports the checkpoints of a run, such as "
            "runs/crystal-tiny"
        )
    found = complete_checkpoints(run / "checkpoints")
    if not found:
        raise UserError(f"{run / 'checkpoints'}: holds no complete checkpoint yet")
    named: dict[str, Path] = {}
    phases, model = _phases(run), load_recipe(run / "recipe.yaml").name
    for step, checkpoint in found:
        begun = [number for number, (_, first) in enumerate(phases) if first < step]
        number = begun[-1] if begun else 0
        phase, first = phases[number]
        try:
            name = pattern.format(
                n=number + 1, phase=phase, step=step - first, total=step, model=model
            )
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise UserError(
                f"--name-pattern {pattern}: cannot be filled in ({error}); it may hold {{n}}, "
                "{phase}, {step:06d}, {total} and {model}"
            ) from None
        if not name or name.startswith(".") or "/" in name:
            raise UserError(
                f"--name-pattern {pattern}: gives {name!r}, which is no name of a folder"
            )
        if name in named:
            raise UserError(
                f"--name-pattern {pattern}: gives {name} twice; let it hold {{n}} and "
                "{step:06d}, or {total}"
            )
        named[name] = checkpoint
    return named


def _phases(run: Path) -> list[tuple[str, int]]:
    """Name and first step of every phase: as the run's start wrote them, else planned anew."""
    try:
        phases = json.loads((run / "plan.json").read_text(encoding="utf-8"))["phases"]
        return [(phase["name"], phase["first_step"]) for phase in phases]
    except (OSError, ValueError, KeyError):
        from megacode.data.planning import plan_with_data

        plan = plan_with_data(load_recipe(run / "recipe.yaml"))
        return [(phase.name, phase.first_step) for phase in plan.phases]


def export_all(
    run: Path, out: Path, wanted: Wanted, pattern: str = PATTERN, again: bool = False
) -> Iterator[Outcome]:
    """Export every checkpoint that is not there already; first yields those that are.

    A folder that is a link is made where the link leads.

    Args:
        again: make also what is there and whole.
    """
    to_do, total = [], 0
    names = revision_names(run, pattern)
    for name, checkpoint in names.items():
        source, place = ExportSource.open(checkpoint), (out / name).resolve()
        about = _about(source, wanted)
        check_replaceable(place)
        reason = "asked for again" if again else _missing(place, about)
        if reason is None:
            yield Outcome(name, about["step"], "kept")
        else:
            to_do.append((name, source, place, about, reason))
            total += wanted.nbytes(source)
    title = f"{run.name}: {len(to_do)} of {len(names)} checkpoints"
    with progress_bar(title, total) as on_bytes:
        for name, source, place, about, reason in to_do:
            # What is damaged, and what a killed export left half-made under a hidden name.
            for left in (place, *place.parent.glob(f".{place.name}.*.tmp")):
                shutil.rmtree(left, ignore_errors=True)

            def seal(folder: Path, about: dict[str, Any] = about) -> None:
                (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
                (folder / SUMS).write_text(_sums(folder), encoding="utf-8")

            notes = export(source, place, wanted, on_bytes, seal)
            yield Outcome(name, about["step"], reason, tuple(notes))


def _about(source: ExportSource, wanted: Wanted) -> dict[str, Any]:
    """What makes two exports the same: the checkpoint (by its description and the age and size of
    its files), and how."""
    asked = wanted.chat_template
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
        **({"chat_template": template_text(asked, OPTION)} if asked else {}),
    }


def check_replaceable(folder: Path) -> None:
    """UserError: something stands there that no export made, such as a run."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    exported = bool(found & {ABOUT, SUMS, "config.json"})
    if (found and not exported) or (folder.exists() and not folder.is_dir()):
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
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
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
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    return "".join(f"{_sha256(folder / name)}  {name}\n" for name in names)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
