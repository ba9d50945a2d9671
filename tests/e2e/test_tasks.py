"""Tasks while a run trains: any layout gives the same scores and texts, which are those of a plain loop over transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megacode.recipe.load import load_recipe
from megacode.run.evaluations import read_curve
from megacode.run.metrics import read_metrics
from megacode.tokenizer.tokenizer import load_tokenizer
from tests.e2e.conftest import megacode
from tests.e2e.test_tuning import STILL as SLOW_STILL
from tests.e2e.test_tuning import WORDS, changes, recipe  # noqa: F401

pytestmark = pytest.mark.slow
STILL = (*SLOW_STILL, *changes("phases.tune.epochs=null", "phases.tune.steps=1"))
TASKS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "label": (
        {"ranking": {"normalise": "token"}},
        [
            {"prompt": "the number is " * (1 + n % 4), "choices": [WORDS[n], f"{WORDS[-n]} {WORDS[n - 3]}"], "answer": n % 2, "group": f"g{n % 3}"}
            for n in range(14)
        ],
    ),
    "channel": (
        {"ranking": {"preset": "channel"}},
        [{"prompt": "which ", "choices": ["add", "code"], "continuation": f" then {word}", "answer": 1} for word in WORDS],
    ),
    "whole": (
        {"ranking": {"score": "whole", "normalise": "byte"}},
        [{"prompt": "", "choices": [f"{word} of", f"{word} the list"], "answer": 0} for word in WORDS[:5]],
    ),
    "write": (
        {"generation": {"max_tokens": 7, "stop": [" then"]}},
        [{"prompt": " ".join(WORDS[: 1 + n]), "answer": "x", "group": "odd" if n % 2 else "even"} for n in range(9)],
    ),
    "draw": (
        {"generation": {"max_tokens": 4, "temperature": 1.0, "samples": 2, "k": [1, 2]}},
        [{"prompt": word, "answer": "x"} for word in WORDS[:3]],
    ),
}  # fmt: skip


def write_tasks(folder: Path) -> Path:
    folder.mkdir()
    for name, (how, items) in TASKS.items():
        task = {"name": name, "data": f"{name}.jsonl", **how}
        (folder / f"{name}.yaml").write_text(json.dumps(task))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


@pytest.fixture(scope="module")
def started(recipe: Path) -> Path:
    """A run of one process that scores before the first step and at the end; weights stay as they are."""
    tasks = write_tasks(recipe.parent / "tasks")
    scored = changes(
        f"evaluation.tasks=[{tasks}]",
        "evaluation.at_start=true",
        "model.init_std=0.3",
        "model.layers=4",
    )
    megacode("train", recipe, "--run", recipe.parent / "scored", *STILL, *scored)
    return recipe.parent


def records(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run) if record["kind"] == "tasks"]


def items(run: Path, step: str, name: str) -> list[dict[str, Any]]:
    lines = (run / "evaluations" / step / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, ["parallel.micro_batch_size=2"]),
        (2, ["parallel.tensor=2", "parallel.sequence=true"]),
        (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    ],
    ids=["dp2", "tp2 and sequence parallel", "interleaved pipeline"],
)
def test_layouts_give_the_same_scores(
    recipe: Path,
    started: Path,
    tmp_path: Path,
    ranks: int,
    settings: list[str],
) -> None:
    settings = ["model.layers=4", *settings]
    start = [f"initialize_from={started / 'scored'}", f"evaluation.tasks=[{started / 'tasks'}]"]
    megacode("train", recipe, "--run", tmp_path / "run", *STILL, *changes(*start, *settings), ranks=ranks)  # fmt: skip
    (expected, last), (got,) = records(started / "scored"), records(tmp_path / "run")
    assert expected["step"] == 0 and last["step"] == got["step"]
    for name, numbers in last["tasks"].items():
        mine = got["tasks"][name]
        assert mine.pop("groups", {}) == pytest.approx(numbers.pop("groups", {})), name
        assert mine == pytest.approx(numbers, rel=1e-5), name
        step = f"step_{got['step']:08d}"
        assert items(tmp_path / "run", step, name) == items(started / "scored", step, name)


def test_scores_are_those_of_a_plain_loop(started: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    megacode("export", started / "scored", tmp_path / "export", "--dtype", "fp32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def nats(context: str, text: str) -> tuple[float, int]:
        blanks = len(context) - len(context.rstrip())
        context, text = (context[:-blanks], context[-blanks:] + text) if blanks else (context, text)
        before = ids(context) if context else [tokenizer.bos_token_id]
        scored = ids(context + text)[len(before) :] if context else ids(text)
        with torch.no_grad():
            logits = model(torch.tensor([[*before, *scored]])).logits[0].log_softmax(-1)
        found = [logits[len(before) - 1 + n, token] for n, token in enumerate(scored)]
        return -float(sum(found)), len(scored)

    last = records(started / "scored")[-1]
    for name, parts in {
        "label": lambda item, choice: (item["prompt"], choice),
        "channel": lambda item, choice: (item["prompt"] + choice, item["continuation"]),
        "whole": lambda item, choice: ("", item["prompt"] + choice),
    }.items():
        right, losses, tokens = [], 0.0, 0
        for item in TASKS[name][1]:
            values = []
            for number, choice in enumerate(item["choices"]):
                context, text = parts(item, choice)
                loss, count = nats(context, text)
                values.append(loss / (len(text.encode()) if name == "whole" else count))
                if number == item["answer"]:
                    losses, tokens = losses + loss, tokens + count
            right.append(values.index(min(values)) == item["answer"])
        assert last["tasks"][name]["accuracy"] == pytest.approx(sum(right) / len(right)), name
        assert last["tasks"][name]["answer_loss"] == pytest.approx(losses / tokens, rel=1e-4)
    section = load_recipe(started / "tuned.yaml").tokenizer
    assert section
    own = load_tokenizer(section)
    for item, one in zip(TASKS["write"][1], items(started / "scored", f"step_{last['step']:08d}", "write"), strict=True):  # fmt: skip
        prompt = torch.tensor([ids(item["prompt"])])
        made = model.generate(prompt, max_new_tokens=7, do_sample=False, pad_token_id=0)[0].tolist()
        # Libraries decode bytes that are no UTF-8 each in their own way: megacode's tokenizer does it here.
        text = own.decode(made)[len(own.decode(prompt[0].tolist())) :]
        assert one["given"] == [text.split(" then")[0]]


def test_checkpoints_score_as_the_run_did(started: Path) -> None:
    run = started / "scored"
    told = megacode("evaluate", run, "--all-checkpoints", "--json")
    evaluated = [json.loads(line) for line in told.stdout.splitlines() if line.startswith("{")]
    assert read_curve(run) == evaluated
    last = records(run)[-1]
    assert [one["step"] for one in evaluated] == [last["step"]]
    for name, numbers in last["tasks"].items():
        mine = evaluated[-1]["tasks"][name]
        assert mine.pop("groups", {}) == pytest.approx(numbers.pop("groups", {})), name
        assert mine == pytest.approx(numbers, rel=1e-5), name
    assert (run / "evaluations" / "checkpoints.png").stat().st_size > 10_000


HARNESS = {
    "dataset_path": "json", "test_split": "test", "num_fewshot": 0, "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}],
}  # fmt: skip


def test_the_harness_on_two_ranks_while_training(
    recipe: Path, started: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    items = started / "tasks" / "label.jsonl"
    data = {"dataset_kwargs": {"data_files": {"test": str(items)}}}
    (tmp_path / "local.yaml").write_text(json.dumps({"task": "local", **data, **HARNESS}))
    settings = [f"initialize_from={started / 'scored'}", "model.layers=4", "parallel.tensor=2"]
    asked = [f"evaluation.harness={{tasks: [local], folder: {tmp_path}}}"]
    run = tmp_path / "run"
    megacode("train", recipe, "--run", run, *STILL, *changes(*settings, *asked), ranks=2)
    (record,) = records(run)
    told = megacode("evaluate", run, "--harness", "local", "--harness-tasks", tmp_path, "--json")
    alone = json.loads(told.stdout.splitlines()[-1])
    assert record["tasks"]["harness.local"] == pytest.approx(alone["local"])
