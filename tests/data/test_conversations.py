"""Sources of conversations: what is trained on, boundaries, packs and rows, epochs, shares of tokens."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megacode.cli.main import main
from megacode.data.indexed import write_index
from megacode.data.loader import StepReader, validation_batches
from megacode.data.loss_marks import ANSWER, FIRST, LAST_ANSWER
from megacode.data.mixture import OpenMixture
from megacode.data.pack_index import open_packs
from megacode.data.planning import plan_with_data
from megacode.data.source import open_source
from megacode.errors import UserError
from megacode.plan.fingerprint import differences, fingerprint
from megacode.recipe.checks import check_recipe
from megacode.recipe.schema import Recipe
from tests.data.conftest import mixture_of, recipe_of, write_shard

S = 16


def conversation(number: int) -> tuple[list[int], list[int]]:
    """Ids (100 x number + place) and marks: two turns, answers of 2 and of `number % 4 + 1` tokens;
    token 2, which is also EOD, ends the first one."""
    marks = [FIRST, 0, 0, ANSWER, ANSWER, 0] + [ANSWER | LAST_ANSWER] * (number % 4 + 1)
    ids = [100 * (number + 1) + place for place in range(len(marks))]
    ids[4] = 2
    return ids, marks


CHATS = [conversation(number) for number in range(40)]


def write_chats(prefix: Path, chats: list[tuple[list[int], list[int]]]) -> None:
    write_shard(prefix, [ids for ids, _ in chats])
    Path(f"{prefix}.loss.bin").write_bytes(b"".join(bytes(marks) for _, marks in chats))
    lengths = np.array([len(ids) for ids, _ in chats], dtype=np.int32)
    write_index(Path(f"{prefix}.loss.idx"), lengths, np.dtype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder / "chats", CHATS)
    write_shard(folder / "text", [[7] * 9 + [2]] * 100)
    return folder


def recipe(folder: Path, phase: dict[str, Any] | None = None, **source: Any) -> Recipe:
    chats = {"path": str(folder / "chat*"), "packing": "best_fit", "loss_on": "answers", **source}
    given = {
        "steps": 4,
        "mixture": {"sources": {"chats": 1}},
        "reset_at_eod": True,
        **(phase or {}),
    }
    sources = {"chats": chats, "text": {"path": str(folder / "text")}}
    return recipe_of(sources, [given], tokenizer=None)


def batches(mixture: OpenMixture) -> list[Any]:
    """All batches of a run, in rows of one sample; the tokenizer's EOD is 2."""
    tokenizer: Any = SimpleNamespace(
        eod_id=2, pad_id=None, vocab_size=200_000, base=SimpleNamespace(eod_id=2)
    )
    reader = StepReader(mixture, micro_batch_size=1, tokenizer=tokenizer)
    steps = range(mixture.plan.total_steps)
    return [batch for step in steps for batch in reader.read(step).micro_batches]


def predictions(found: list[Any]) -> Counter[tuple[Any, ...]]:
    """(what is attended to, its positions, label) of every trained label."""
    out: Counter[tuple[Any, ...]] = Counter()
    for batch in found:
        for row in range(len(batch.tokens)):
            for place in np.flatnonzero(batch.loss_mask[row]):
                same = batch.segments[row, : place + 1] == batch.segments[row, place]
                seen = batch.tokens[row, : place + 1][same]
                positions = batch.position_ids[row, : place + 1][same]
                out[tuple(seen), tuple(positions), int(batch.labels[row, place])] += 1
    return out


@pytest.mark.parametrize("loss_on", ["all", "answers", "last_answer"])
@pytest.mark.parametrize("packing", ["best_fit", "one_document"])
def test_an_epoch_trains_every_marked_token_in_its_own_conversation(
    folder: Path, packing: str, loss_on: str
) -> None:
    """The same in packs as in a row each: context, positions and label of each trained token."""
    given = recipe(
        folder,
        {"steps": None, "epochs": 1, "batch_size": 1},
        packing=packing,
        loss_on=loss_on,
    )
    mixture = mixture_of(given)
    expected: Counter[tuple[Any, ...]] = Counter()
    bit = {"answers": ANSWER, "last_answer": LAST_ANSWER}.get(loss_on)
    for ids, marks in CHATS:
        for place in range(1, len(ids)):
            if bit is None or marks[place] & bit:
                expected[tuple(ids[:place]), tuple(range(place)), ids[place]] += 1
    assert predictions(batches(mixture)) == expected
    rows = mixture.plan.phases[0].samples
    assert rows == 40 if packing == "one_document" else rows < 30


def test_file_order_is_the_order_of_the_file_in_every_epoch(folder: Path) -> None:
    given = recipe(
        folder,
        {"steps": None, "epochs": 2, "batch_size": 10},
        packing="one_document",
        order="file",
    )
    mixture = mixture_of(given)
    assert mixture.plan.total_steps == 8
    for step in range(8):
        parts = [part for origin in mixture.describe(step) for part in origin.parts]
        numbers = sorted(part.document.document for part in parts)
        assert numbers == list(range(10 * (step % 4), 10 * (step % 4) + 10))


def test_epochs_say_how_long_a_phase_is(folder: Path) -> None:
    def steps(epochs: float, batch_size: int, mixture: Any = None, **more: Any) -> int:
        phase = {"steps": None, "epochs": epochs, "batch_size": batch_size, **more}
        if mixture:
            phase["mixture"] = mixture
        return plan_with_data(recipe(folder, phase, packing="one_document")).total_steps

    assert steps(1, 40) == 1 and steps(3, 40) == 3 and steps(1, 7) == 6 and steps(0.5, 5) == 4
    both = {"sources": {"chats": 1, "text": 1}}  # 40 rows, and 62 windows of text
    assert steps(1, 2, both) == 62 and steps(1, 2, both, epochs_of="chats") == 40
    assert steps(2, 2, both, epochs_of="chats") == 80
    with pytest.raises(UserError, match="epochs: more than"):
        steps(1, 2, {"sources": {"chats": 1, "text": {"weight": {
            "shape": "linear", "start": 1, "end": 0, "over": 3}}}})  # fmt: skip


def test_a_plan_without_data_counts_declared_documents() -> None:
    """Of a document a row; packs are estimated from tokens, as if full."""
    declared = {"tokens": 16_000, "documents": 3_000, "loss_on": "answers"}
    phase = {"steps": None, "epochs": 2, "batch_size": 10, "reset_at_eod": True}
    phase["mixture"] = {"sources": {"chats": 1}}
    for packing, steps in (("one_document", 600), ("best_fit", 2 * 942 // 10 + 1)):
        sources = {"chats": {**declared, "packing": packing}}
        assert plan_with_data(recipe_of(sources, [phase])).total_steps == steps


def test_shares_of_tokens_are_shares_of_trained_tokens(folder: Path) -> None:
    """Half of the tokens from each: many more sequences of conversations, of which few tokens count."""
    mixture = {"weight_by": "tokens", "sources": {"chats": 1, "text": 1}}
    phase = {"mixture": mixture, "steps": 500, "batch_size": 32, "reset_at_eod": True}
    plan = plan_with_data(recipe(folder, phase))
    taken = dict(
        zip(
            ("chats", "text"),
            plan.phases[0].counts_before(500).tolist(),
            strict=True,
        )
    )
    packs = len(open_packs(open_source("chats", [str(folder / "chats")]).shards, S))
    each = sum(bool(mark & ANSWER) for _, marks in CHATS for mark in marks) / packs
    assert taken["chats"] * each == pytest.approx(taken["text"] * S, rel=1e-3)
    plain = plan_with_data(
        recipe(folder, {**phase, "mixture": {"sources": {"chats": 1, "text": 1}}})
    )
    assert differences(fingerprint(plain, 1), fingerprint(plan, 1)), "noticed on a resume"
    last = plan_with_data(recipe(folder, phase, loss_on="last_answer"))
    assert last.phases[0].counts_before(500)[0] > taken["chats"]


def test_loss_on_is_a_fact_of_the_past(folder: Path) -> None:
    one, other = (
        fingerprint(plan_with_data(recipe(folder, loss_on=on)), 2)
        for on in ("answers", "last_answer")
    )
    assert "loss_on: 'answers' before, 'last_answer' now" in " ".join(differences(one, other))


def test_held_out_conversations_are_packed_and_masked(folder: Path) -> None:
    source = open_source("chats", [str(folder / "chats")], key="validation")
    source.packs[S] = open_packs(source.shards, S)
    found = [
        batch
        for rank in range(2)
        for batch in validation_batches(
            source, S, 1000, rank=rank, world=2, eod_id=2, reset_at_eod=True, loss_on="answers"
        )
    ]
    trained = sum(int(batch.loss_mask.sum()) for batch in found)
    assert trained == sum(bool(mark & ANSWER) for _, marks in CHATS for mark in marks)


@pytest.mark.parametrize(
    ("phase", "source", "expected"),
    [
        ({}, {"packing": "concatenate"}, "sources.chats.loss_on: `packing: concatenate` would cut"),
        ({"reset_at_eod": False}, {}, "would see each other"),
        ({}, {"order": "file"}, "sources.chats.order: `packing: best_fit`"),
        ({"epochs_of": "chats"}, {}, "epochs_of: chats is no source of the phase, or it has no"),
        (
            {"steps": None, "epochs": 1, "mixture": {"sources": {"chats": {"weight": {
                "shape": "linear", "start": 1, "end": 2}}}}},
            {},
            "give the schedule `over`",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_sentence(
    folder: Path, phase: dict[str, Any], source: dict[str, Any], expected: str
) -> None:
    assert expected in " ".join(check_recipe(recipe(folder, phase, **source)))


def test_data_that_cannot_be_read_so_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    for given, expected in (
        (recipe(folder, path=str(folder / "text")), "does not say which tokens are answers"),
        (recipe(folder, {"fim_rate": 0.5}, loss_on="all"), r"fim_rate: 0\.5 of a source of conv"),
        (recipe(folder, {"sequence_length": 8}), r"sources\.chats\.path: 10 conversations are"),
        (
            recipe(folder, validation=str(folder / "text")),
            r"sources\.chats\.validation: .* does not say which tokens are answers",
        ),
        (
            recipe(
                folder,
                {"sequence_length": 8},
                validation=str(folder / "chats"),
                path=None,
                tokens=9,
            ),
            r"sources\.chats\.validation: 10 conversations are longer than 9 tokens",
        ),
    ):
        with pytest.raises(UserError, match=expected):
            plan_with_data(given)
    write_chats(tmp_path / "chats", CHATS)
    write_chats(tmp_path / "short", CHATS[1:])
    for ending in ("bin", "idx"):
        (tmp_path / f"short.loss.{ending}").replace(tmp_path / f"chats.loss.{ending}")
    with pytest.raises(UserError, match="one of the two is from another run"):
        plan_with_data(recipe(tmp_path))
    (tmp_path / "chats.loss.idx").unlink()
    with pytest.raises(UserError, match=r"chats\.loss\.idx is missing"):
        plan_with_data(recipe(tmp_path))
    (tmp_path / "chats.loss.bin").unlink()
    write_chats(tmp_path / "chat-b", CHATS)
    with pytest.raises(UserError, match="has no loss marks"):
        plan_with_data(recipe(tmp_path, path=str(tmp_path / "chat[s-]*")))


def test_trace_shows_conversation_answers_and_trained_tokens(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = recipe(folder).model_dump(exclude_none=True, exclude_defaults=True)
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(given))
    assert main(["trace", str(path), "--step", "1", "--json"]) == 0
    for sample in json.loads(capsys.readouterr().out)["samples"]:
        for part in sample["documents"]:
            assert part["answers"] == 2 and part["first"] == 0
            assert part["trained_tokens"] == 2 + part["document"] % 4 + 1
    assert main(["trace", str(path), "--step", "1"]) == 0
    assert "answers  trained on" in capsys.readouterr().out
