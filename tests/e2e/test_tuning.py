"""Tuning on conversations: the loss and gradient of a plain loop over transformers, in packs as in rows, in any layout."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megacode.corpus.inspect import open_dataset
from megacode.data.loss_marks import trained
from megacode.tokenizer.training import train_tokenizer
from tests.corpus.test_conversations import documents
from tests.e2e.conftest import megacode, steps_of

RECIPE = """
name: tuned
seed: 7
tokenizer: {{path: {data}/t.model, added_tokens: crystal}}
model: {{layers: 2, hidden_size: 48, heads: 4, kv_heads: 2}}
precision: fp32
sources:
  chats: {{path: {data}/chats, domain: chat, packing: best_fit, loss_on: answers, validation: {data}/chats}}
  same: {{path: {data}/chats, domain: text, packing: best_fit}}
phases:
  - name: tune
    epochs: 2
    batch_size: 8
    sequence_length: 192
    reset_at_eod: true
    mixture: {{sources: {{chats: 1}}}}
    learning_rate: {{schedule: constant, peak: 0.003, warmup: 3}}
parallel: {{micro_batch_size: 1}}
evaluation: {{samples: 64}}
logging: {{every: 1, tensorboard: false}}
"""
CONVERSATIONS = 90
WORDS = ["add", "take", "sum", "list", "of", "the", "number", "is", "not", "a", "which", "and", "then", "after", "before", "code"]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of 6 to 190 tokens, most of them short: answers of one token beside some of 150."""
    folder = tmp_path_factory.mktemp("tuning")
    draw = random.Random(0)

    def text(most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(1 + int(most * draw.random() ** 4)))

    with open(folder / "chats.jsonl", "w", encoding="utf-8") as out:
        for _ in range(CONVERSATIONS):
            turns = [
                {"role": role, "content": text(most)}
                for _ in range(draw.randint(1, 2))
                for role, most in (("user", 12), ("assistant", 70))
            ]
            out.write(json.dumps({"messages": turns}) + "\n")
    train_tokenizer([text(70) for _ in range(300)], folder / "t.model", vocab_size=290)
    megacode(
        "preprocess", folder / "chats.jsonl", "--conversations", "--template", "crystal", "--tokenizer", folder / "t.model",
        "--added-tokens", "crystal", "--output", folder / "chats", "--max-tokens", 193, "--too-long", "right", "--workers", 1,
    )  # fmt: skip
    path = folder / "tuned.yaml"
    path.write_text(RECIPE.format(data=folder))
    return path


STILL = ("--set", "phases.tune.learning_rate={schedule: constant, peak: 1e-30}", "--set", "optimizer.weight_decay=0")  # fmt: skip


def changes(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


@pytest.fixture(scope="module")
def single(recipe: Path) -> Path:
    """Trained in one process, from weights that the others start from too."""
    megacode("train", recipe, "--run", recipe.parent / "start", *STILL)
    start = changes(f"initialize_from={recipe.parent / 'start'}")
    megacode("train", recipe, "--run", recipe.parent / "run", *start)
    return recipe.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, []),
        (2, ["parallel.tensor=2"]),
        (2, ["parallel.pipeline=2"]),
        (0, ["parallel.micro_batch_size=4"]),
    ],
    ids=["dp2", "tp2", "pp2", "micro-batch 4"],
)
def test_layouts_agree_on_conversations_of_very_unequal_length(
    recipe: Path, single: Path, tmp_path: Path, ranks: int, settings: list[str]
) -> None:
    start = changes(f"initialize_from={single / 'start'}", *settings)
    megacode("train", recipe, "--run", tmp_path / "run", *start, ranks=ranks)
    expected, got = steps_of(single / "run"), steps_of(tmp_path / "run")
    assert got.batches == expected.batches and got.losses[-1] < got.losses[0]
    # Before an update, sums alone differ; after it, updates do.
    np.testing.assert_allclose(got.losses[0], expected.losses[0], rtol=1e-6)
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5)
    np.testing.assert_allclose(got.norms, expected.norms, rtol=1e-5)


def by_transformers(folder: Path, data: Path, loss_on: Any) -> tuple[float, float]:
    """Mean loss over the trained tokens of all conversations, and the norm of its gradient: one
    conversation after another, nothing packed or padded."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = torch.zeros(()), 0
    for tokens, marks in documents(data / "chats"):
        ids = torch.tensor(tokens)
        logits = model(ids[None]).logits[0, :-1]
        learned = trained(np.array(marks, dtype=np.uint8), loss_on)
        labels = torch.where(torch.from_numpy(learned), ids, -100)[1:]
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        count += int((labels != -100).sum())
    (total / count).backward()
    squares = sum(float(p.grad.double().square().sum()) for p in model.parameters())
    return float(total.detach()) / count, squares**0.5


@pytest.mark.slow
@pytest.mark.parametrize("loss_on", ["answers", "last_answer", "all"])
def test_a_step_over_all_conversations_is_that_of_transformers(
    recipe: Path, single: Path, tmp_path: Path, loss_on: str
) -> None:
    """The same loss and gradient in packs, in a row each, and in a plain loop over the export."""
    if not (single / "export").exists():
        megacode("export", single / "start", single / "export", "--dtype", "fp32")
    loss, norm = by_transformers(single / "export", single, loss_on)
    one = [f"initialize_from={single / 'start'}", f"sources.chats.loss_on={loss_on}"]
    for packing in ("best_fit", "one_document"):
        # The steps' batches differ in size and order, their sums do not: all in one step.
        size = CONVERSATIONS if packing == "one_document" else _packs(single)
        run = tmp_path / packing
        megacode(
            "train", recipe, "--run", run, *STILL,
            *changes(*one, f"sources.chats.packing={packing}", f"phases.tune.batch_size={size}", "phases.tune.epochs=1"),
        )  # fmt: skip
        found = steps_of(run)
        assert len(found.losses) == 1
        assert found.losses[0] == pytest.approx(loss, rel=1e-5)
        assert found.norms[0] == pytest.approx(norm, rel=1e-5)


def _packs(folder: Path) -> int:
    from megacode.data.pack_index import open_packs

    return len(open_packs(open_dataset(folder / "chats").shards, 192))


@pytest.mark.slow
def test_a_tuning_phase_goes_on_bit_for_bit_in_its_middle(
    recipe: Path, single: Path, tmp_path: Path
) -> None:
    """One epoch, then a second one: the run of two epochs. The same records as text too."""
    start = changes(
        f"initialize_from={single / 'start'}", "phases.tune.mixture.sources={chats: 3, same: 1}"
    )
    run, straight = tmp_path / "run", tmp_path / "straight"
    megacode("train", recipe, "--run", run, *start, *changes("phases.tune.epochs=1"))
    before = len(steps_of(run).losses)
    megacode("train", recipe, "--run", run, *start)
    megacode("train", recipe, "--run", straight, *start)
    assert 0 < before < len(steps_of(run).losses) and steps_of(run) == steps_of(straight)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [
        record["loss_by_source"]["chats"] for record in records if record["kind"] == "validation"
    ]
    assert (held_out and held_out[-1] < held_out[0]) or len(held_out) == 1
    traced = json.loads(megacode("trace", run, "--step", 2, "--check", "--json").stdout)
    assert traced["equal"]
    parts = [part for sample in traced["samples"] for part in sample["documents"]]
    assert all(part["answers"] and part["trained_tokens"] for part in parts)
