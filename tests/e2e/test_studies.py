"""From records to a tuned model: data made, tokenized, a base trained, tuned on answers from it.

The other studies' commands are run by `test_documented.py`."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from megacode.data.trace import as_dict, open_trace
from megacode.quickstart import corpora, studies
from megacode.tokenizer.training import train_tokenizer
from tests.e2e.conftest import ROOT, megacode, steps_of

SMALL = ("model.layers=2", "model.hidden_size=48", "model.heads=2", "model.ffn_size=128")


def sets(*changes: str) -> list[str]:
    return [part for change in (*SMALL, *changes) for part in ("--set", change)]


@pytest.mark.slow
def test_the_chat_study_tunes_on_answers_from_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes")
    monkeypatch.setattr(corpora, "gather", _two_small_corpora)
    monkeypatch.setattr(corpora, "train_tokenizer", _small_tokenizer)
    console = Console(file=io.StringIO(), width=120)
    studies.make("chat", Path("data/studies"), console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "repeated, left out" in said and "data/studies/chat" in said

    cut = ("phases.phase1.steps=6", "evaluation.samples=8", "logging.every=1")
    others = ("phases.phase2=null", "phases.phase3=null")
    run = "runs/crystal-tiny"
    base = tmp_path / "recipes/crystal-tiny.yaml"
    megacode("train", base, "--run", tmp_path / run, *sets(*cut, *others))
    short = ("phases.chat.epochs=null", "phases.chat.steps=16", *cut[1:])
    arm = tmp_path / "recipes/crystal-chat-tiny.yaml"
    tuned = megacode("train", arm, "--run", tmp_path / "tuned", *sets(*short))
    losses = steps_of(tmp_path / "tuned").losses
    assert sum(losses[-4:]) < sum(losses[:4]) - 1, tuned.stdout
    assert f"{run}/checkpoints/step_00000006" in (tmp_path / "tuned/log.txt").read_text()

    trace = open_trace(tmp_path / "tuned", 1)
    samples = [as_dict(trace, origin, with_text=False) for origin in trace.samples()]
    parts = [part for sample in samples for part in sample["documents"]]
    learned = sum(part["trained_tokens"] for part in parts)
    assert 0 < learned < 0.85 * sum(part["document_tokens"] for part in parts), "answers alone"


def _two_small_corpora(folder: Path, console: Console) -> dict[str, Path]:
    """In place of the installation's: a few of its functions."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [(name, summary, code) for name, _, summary, code in studies._functions()][:400]
    for kind, column in (("code", 2), ("text", 1)):
        lines = [json.dumps({"text": " ".join(one[column:]) + "\n"}) for one in texts]
        (folder / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")
    return {kind: folder / f"{kind}.jsonl" for kind in ("code", "text")}


def _small_tokenizer(documents, path, vocab_size):  # type: ignore[no-untyped-def]
    train_tokenizer(documents, path, 800)
