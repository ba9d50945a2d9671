"""Training on pairs: losses and gradients of a plain loop over transformers, in any layout."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megacode.corpus.inspect import open_dataset
from megacode.data.loss_marks import EQUIVALENT, FIRST, OTHER, QUERY
from megacode.tokenizer.training import train_tokenizer
from tests.corpus.test_conversations import documents
from tests.e2e.conftest import megacode, steps_of
from tests.e2e.test_tuning import changes

RECIPE = """
name: paired
seed: 7
tokenizer: {{path: {data}/t.model, added_tokens: crystal, bos: true}}
model: {{layers: 4, hidden_size: 48, heads: 4, kv_heads: 2}}
precision: fp32
sources:
  pairs: {{path: {data}/members, domain: code, packing: best_fit, loss_on: query}}
  text: {{path: {data}/text, domain: text}}
phases:
  - name: paired
    steps: 4
    batch_size: 8
    sequence_length: 192
    reset_at_eod: true
    mixture: {{sources: {{pairs: 3, text: 1}}}}
    learning_rate: {{schedule: constant, peak: 0.003, warmup: 2}}
    objective: {{contrastive: {{weight: 0.5}}}}
parallel: {{micro_batch_size: 1}}
evaluation: {{tasks: [{data}/mean.yaml, {data}/last.yaml, {data}/likelihood.yaml, {data}/prompt.yaml]}}
logging: {{every: 1, tensorboard: false}}
"""
TASKS = {
    "mean": "{score: embedding}",
    "last": "{score: embedding, pooling: last, equivalent: [renamed]}",
    "likelihood": "{score: likelihood}",
    "prompt": "{score: prompt, prompt: '{query} is {candidate} is', labels: [' not', ' a']}",
}
PAIRS = 60
WORDS = ["add", "take", "sum", "list", "of", "the", "number", "is", "not", "a", "which", "and", "then", "after", "before", "code"]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of 20 to 190 tokens; some have two equivalent candidates, some two others."""
    folder = tmp_path_factory.mktemp("pairs")
    draw = random.Random(0)

    def text(most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(3 + int(most * draw.random() ** 2)))

    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as out:
        for number in range(PAIRS):
            kinds = [("renamed", True), ("lines-shuffled", False)]
            kinds += [("rewritten", True)] * (number % 3 == 0)
            kinds += [("tokens-shuffled", False)] * (number % 4 == 0)
            draw.shuffle(kinds)
            candidates = [{"kind": k, "equivalent": e, "text": text(20)} for k, e in kinds]
            record = {
                "id": str(number),
                "group": str(number // 2),
                "language": "python",
                "name": "f",
            }
            out.write(json.dumps({**record, "query": text(20), "candidates": candidates}) + "\n")
    for name, how in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"name: {name}\ndata: pairs.jsonl\nlecs: {how}\n")
    lines = [{"text": text(60)} for _ in range(300)]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train_tokenizer([line["text"] for line in lines], folder / "t.model", vocab_size=290)
    common = ("--tokenizer", folder / "t.model", "--added-tokens", "crystal", "--bos", "--workers", 1)  # fmt: skip
    megacode("preprocess", folder / "text.jsonl", "--output", folder / "text", *common)
    for form in ("members", "sequences"):
        megacode("preprocess", folder / "pairs.jsonl", "--pairs", form, "--output", folder / form, *common)  # fmt: skip
    path = folder / "paired.yaml"
    path.write_text(RECIPE.format(data=folder))
    return path


STILL = changes("phases.paired.learning_rate={schedule: constant, peak: 1e-30}", "optimizer.weight_decay=0")  # fmt: skip


@pytest.fixture(scope="module")
def single(recipe: Path) -> Path:
    """Trained in one process, from weights that the others start from too."""
    megacode("train", recipe, "--run", recipe.parent / "start", *STILL)
    start = changes(f"initialize_from={recipe.parent / 'start'}")
    megacode("train", recipe, "--run", recipe.parent / "run", *start)
    megacode("export", recipe.parent / "start", recipe.parent / "export", "--dtype", "fp32")
    return recipe.parent


def numbers_of(run: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "train"]


def scores_of(run: Path) -> dict[str, dict[str, float]]:
    """Accuracy of each cell of each LECS task, at the run's end."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (record,) = [one for one in records if one["kind"] == "tasks"]
    return {name: numbers["groups"] for name, numbers in record["tasks"].items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, []),
        (2, ["parallel.tensor=2"]),
        (2, ["parallel.tensor=2", "parallel.sequence=true"]),
        (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
        (2, ["parallel.pipeline=2", "parallel.micro_batch_size=4", "parallel.recompute=full"]),
    ],
    ids=["dp2", "tp2", "tp2 sequence", "pp2, interleaved", "pp2, micro-batch 4, recomputed"],
)
def test_layouts_agree(
    recipe: Path, single: Path, tmp_path: Path, ranks: int, settings: list[str]
) -> None:
    start = changes(f"initialize_from={single / 'start'}", *settings)
    megacode("train", recipe, "--run", tmp_path / "run", *start, ranks=ranks)
    expected, got = steps_of(single / "run"), steps_of(tmp_path / "run")
    assert got.batches == expected.batches
    np.testing.assert_allclose(got.losses[0], expected.losses[0], rtol=1e-6)
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5)
    np.testing.assert_allclose(got.norms, expected.norms, rtol=1e-5)
    assert scores_of(tmp_path / "run") == scores_of(single / "run")
    for ours, theirs in zip(numbers_of(tmp_path / "run"), numbers_of(single / "run"), strict=True):
        assert ours["contrastive"] == pytest.approx(theirs["contrastive"], rel=1e-5)
        assert ours["contrastive_accuracy"] == theirs["contrastive_accuracy"]


# ------------------------------------------------------------------------------- by transformers


def members_of(tokens: list[int], marks: list[int]) -> Iterator[tuple[int, list[int]]]:
    """(role, ids) of each member of a pair, without its end-of-document token."""
    starts = [i for i, mark in enumerate(marks) if mark & FIRST]
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        yield marks[start] & ~FIRST, tokens[start : end - 1]


def embeddings(model: Any, data: Path, pooling: str) -> list[list[tuple[int, torch.Tensor]]]:
    """(role, unit vector) of every member of every pair, one forward pass each."""
    found = []
    for tokens, marks in documents(data / "members"):
        pair = []
        for role, ids in members_of(tokens, marks):
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
            vector = hidden.mean(0) if pooling == "mean" else hidden[-1]
            pair.append((role, vector / vector.norm()))
        found.append(pair)
    return found


def infonce(pairs: list[list[tuple[int, torch.Tensor]]], in_batch: bool) -> torch.Tensor:
    terms = []
    for pair in pairs:
        query = next(vector for role, vector in pair if role == QUERY)
        negatives = [vector for role, vector in pair if role == OTHER]
        if in_batch:
            negatives += [v for other in pairs if other is not pair for role, v in other if role != QUERY]  # fmt: skip
        away = torch.stack([torch.exp(query @ vector / 0.05) for vector in negatives]).sum()
        for role, vector in pair:
            if role == EQUIVALENT:
                near = torch.exp(query @ vector / 0.05)
                terms.append(-torch.log(near / (near + away)))
    return torch.stack(terms).mean()


def triplet(pairs: list[list[tuple[int, torch.Tensor]]]) -> torch.Tensor:
    terms = []
    for pair in pairs:
        query = next(vector for role, vector in pair if role == QUERY)
        for role, near in pair:
            for other, away in pair:
                if (role, other) == (EQUIVALENT, OTHER):
                    terms.append(torch.clamp(0.2 + query @ away - query @ near, min=0))
    return torch.stack(terms).mean()


def next_token(model: Any, prefix: Path, weight: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over tokens of what `weight` (of -log p and the role) gives, and over queries of -log p
    per token."""
    total, losses, count = (
        torch.zeros((), dtype=torch.double),
        torch.zeros((), dtype=torch.double),
        0,
    )
    for tokens, marks in documents(prefix):
        segments = members_of(tokens, marks) if prefix.name == "members" else [(0, tokens)]
        for _, ids in segments:
            own = torch.tensor(ids)
            each = torch.nn.functional.cross_entropy(model(own[None]).logits[0, :-1], own[1:], reduction="none").double()  # fmt: skip
            roles = [m & (QUERY | EQUIVALENT | OTHER) for m in marks] if prefix.name == "sequences" else [_] * len(ids)  # fmt: skip
            for loss, role in zip(each, roles[1:], strict=True):
                total = total + weight(loss, role)
                if role == QUERY:
                    losses, count = losses + loss, count + 1
    return total, losses / count


def packs(prefix: Path) -> int:
    from megacode.data.pack_index import open_packs

    return len(open_packs(open_dataset(prefix).shards, 192))


def one_step(recipe: Path, run: Path, source: str, *settings: str) -> tuple[float, float, dict[str, float]]:  # fmt: skip
    """Loss, gradient norm and numbers of a step that reads all pairs."""
    data = recipe.parent
    megacode(
        "train", recipe, "--run", run, *STILL,
        *changes(
            f"initialize_from={data / 'start'}", f"sources.pairs.path={data / source}", "phases.paired.steps=1",
            f"phases.paired.batch_size={packs(data / source)}", "phases.paired.mixture.sources.text=0", *settings,
        ),
    )  # fmt: skip
    found = steps_of(run)
    return found.losses[0], found.norms[0], numbers_of(run)[0]


def norm_of(model: Any, loss: torch.Tensor) -> float:
    model.zero_grad()
    loss.backward()
    return math.sqrt(
        sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", ["infonce", "own negatives", "last token", "triplet"])
def test_a_step_over_all_pairs_is_that_of_transformers(
    recipe: Path, single: Path, tmp_path: Path, case: str
) -> None:
    from transformers import AutoModelForCausalLM

    how = {
        "infonce": [],
        "own negatives": ["in_batch=false"],
        "last token": ["pooling=last"],
        "triplet": ["in_batch=false", "loss=triplet"],
    }[case]
    key = "phases.paired.objective.contrastive"
    loss, norm, numbers = one_step(
        recipe, tmp_path / "run", "members", *(f"{key}.{setting}" for setting in how)
    )
    model = AutoModelForCausalLM.from_pretrained(single / "export", dtype=torch.float32)
    pairs = embeddings(model, single, "last" if case == "last token" else "mean")
    contrastive = triplet(pairs) if case == "triplet" else infonce(pairs, case != "own negatives")
    _, expected = next_token(model, single / "members", lambda loss, role: 0 * loss)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert numbers["contrastive"] == pytest.approx(contrastive.item(), rel=1e-5)
    assert norm == pytest.approx(norm_of(model, expected + 0.5 * contrastive), rel=1e-5)


@pytest.mark.slow
def test_weighted_tokens_are_those_of_transformers(
    recipe: Path, single: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    weights = {QUERY: 0.25, EQUIVALENT: 1.0, OTHER: 0.5}
    objective = "{next_token: 0.5, contrastive: null, weighted_tokens: {weight: 2, query: 0.25, other: 0.5}}"
    loss, norm, numbers = one_step(
        recipe, tmp_path / "run", "sequences", f"phases.paired.objective={objective}"
    )
    model = AutoModelForCausalLM.from_pretrained(single / "export", dtype=torch.float32)

    def weigh(loss: torch.Tensor, role: int) -> torch.Tensor:
        loss = -torch.log(1 - torch.exp(-loss)) if role == OTHER else loss
        return weights.get(role, 0.0) * loss

    total, expected = next_token(model, single / "sequences", weigh)
    roles = [mark & ~FIRST for _, marks in documents(single / "sequences") for mark in marks[1:]]
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    counted = sum(weights.get(role, 0.0) for role in roles)
    assert numbers["weighted_tokens"] == pytest.approx(total.item() / counted, rel=1e-5)
    queries = sum(role == QUERY for role in roles)
    assert norm == pytest.approx(norm_of(model, 0.5 * expected + 2 * total / queries), rel=1e-5)


@pytest.mark.slow
def test_selection_is_that_of_transformers_on_a_run_and_on_its_export(
    single: Path, tmp_path: Path
) -> None:
    """What every candidate scores, by embeddings and by likelihood."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = [single / f"{name}.yaml" for name in TASKS]
    found = {}
    for place in ("start", "export"):
        out = tmp_path / place
        done = megacode("evaluate", single / place, "--tasks", *files, "--out", out, "--json")
        for name, numbers in json.loads(done.stdout)["tasks"].items():
            low, high = numbers["intervals"][""]
            assert low <= numbers["accuracy"] <= high and len(numbers["groups"]) >= 2
            assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        found[place] = {
            name: [json.loads(line)["given"] for line in (out / f"{name}.jsonl").open()]
            for name in TASKS
        }
    model = AutoModelForCausalLM.from_pretrained(single / "export", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(single / "export")
    bos = tokenizer.bos_token_id

    @torch.no_grad()
    def hidden(text: str) -> torch.Tensor:
        ids = [bos, *tokenizer.encode(text, add_special_tokens=False)]
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        return torch.nn.functional.normalize(torch.stack([states.mean(0), states[-1]]), dim=-1)

    @torch.no_grad()
    def likelihood(before: str, text: str) -> tuple[float, int]:
        context = [bos, *tokenizer.encode(before.rstrip(), add_special_tokens=False)]
        whole = [bos, *tokenizer.encode(before + text, add_special_tokens=False)]
        logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        places = range(len(context), len(whole))
        return sum(float(logs[i - 1, whole[i]]) for i in places), len(places)

    wanted: dict[str, list[list[float]]] = {name: [] for name in TASKS}
    for line in (single / "pairs.jsonl").open():
        record = json.loads(line)
        query = hidden(record["query"])
        right, wrong = (
            [one for one in record["candidates"] if one["equivalent"] == equal]
            for equal in (True, False)
        )
        for both in ((a, b) for a in right for b in wrong):
            cosines = [(query * hidden(one["text"])).sum(-1).tolist() for one in both]
            wanted["mean"].append([one[0] for one in cosines])
            if both[0]["kind"] == "renamed":
                wanted["last"].append([one[1] for one in cosines])
            each = [likelihood(f"{record['query']}\n\n", one["text"]) for one in both]
            wanted["likelihood"].append([total / count for total, count in each])
            asked = [f"{record['query']} is {one['text']} is" for one in both]
            yes, no = ([likelihood(text, label)[0] for text in asked] for label in (" not", " a"))
            wanted["prompt"].append([a - b for a, b in zip(yes, no, strict=True)])
    for place, by_task in found.items():
        for name, given in by_task.items():
            np.testing.assert_allclose(
                given, wanted[name], rtol=1e-4, atol=1e-5, err_msg=f"{place} {name}"
            )


@pytest.mark.slow
def test_a_phase_of_pairs_goes_on_bit_for_bit_and_trace_shows_its_members(
    recipe: Path, single: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    start = changes(f"initialize_from={single / 'start'}")
    megacode("train", recipe, "--run", run, *start, *changes("phases.paired.steps=2"))
    megacode("train", recipe, "--run", run, *start)
    assert steps_of(run) == steps_of(single / "run")
    keys = ("contrastive", "contrastive_accuracy")
    ours, theirs = ([[r[k] for k in keys] for r in numbers_of(one)] for one in (run, single / "run"))  # fmt: skip
    assert ours == theirs
    traced = json.loads(megacode("trace", run, "--step", 3, "--check", "--json").stdout)
    assert traced["equal"]
    pairs = [s["documents"] for s in traced["samples"] if s["stream"] == "pairs"]
    assert pairs and all(part["members"] >= 3 and part["trained_tokens"] for parts in pairs for part in parts)  # fmt: skip
    assert "members" in megacode("trace", run, "--step", 3).stdout
    facts = json.loads(megacode("inspect", single / "members", "--json").stdout)
    assert "tokens of equivalent candidates" in json.dumps(facts)
