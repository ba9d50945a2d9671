"""Use of an export: the greedy text is megacode's, and lm-evaluation-harness gives a run and its export the same numbers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

transformers = pytest.importorskip("transformers")
import torch  # noqa: E402

from megacode.cli.main import main  # noqa: E402
from megacode.convert.export import (  # noqa: E402
    ExportSource,
    Wanted,
    export,
)
from megacode.errors import UserError  # noqa: E402
from megacode.recipe.load import dump_recipe, load_recipe  # noqa: E402
from megacode.recipe.schema import Model, Parallel, TokenizerSection  # noqa: E402
from tests.convert.runs import CRYSTAL, make_run  # noqa: E402
from tests.megatron.test_transformers_parity import LENGTH, small  # noqa: E402

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
PROMPTS = ["def add(a, b):", "The quick brown", "for i in range(100):\r\n    naïve café"]
MODELS = {
    "crystalcoder": (CRYSTAL, True),
    "llama": (Model(layers=2, hidden_size=64, heads=4, kv_heads=2, ffn_size=90), False),
}


def lay_out(path: Path) -> None:
    """The recipe as if the checkpoint, which fits any layout, came from pipeline stages of unequal depth."""
    recipe = load_recipe(path)
    uneven = {"num_layers_in_first_pipeline_stage": 1, "account_for_loss_in_pipeline_split": False}
    changes = {
        "parallel": Parallel(pipeline=2),
        "model": recipe.model.model_copy(update={"megatron": uneven}),
    }
    path.write_text(dump_recipe(recipe.model_copy(update=changes)))


@pytest.fixture(scope="module", params=MODELS)
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and its export."""
    folder = tmp_path_factory.mktemp(request.param)
    model, bos = MODELS[request.param]
    run = make_run(folder, model, steps=(9,), bos=bos)
    lay_out(run / "checkpoints" / "step_00000009" / "recipe.yaml")
    export(ExportSource.open(run), folder / "export", Wanted(request.param))
    return run, folder / "export"


RUN = """
import json, sys
from megacode.cli.main import main
for arguments in json.loads(sys.argv[1]):
    print("=====", flush=True)
    if main(arguments):
        sys.exit(1)
"""


def megacode(*commands: list[Any], typed: str = "") -> list[str]:
    """What each command prints; all in one process, which imports Megatron-Core once.

    The export comes first: in a process that plays CUDA on the CPU transformers 5 does not fill its rotary tables.
    """
    asked = json.dumps([[str(argument) for argument in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", RUN, asked], cwd=ROOT, capture_output=True, input=typed.encode()
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout.decode().split("=====\n")[1:]


def written(export: Path, prompts: list[str], count: int) -> list[str]:
    """What transformers writes greedily."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(export, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True).eval()
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)[0]
        fresh = ids[inputs["input_ids"].shape[1] :]
        assert len(set(fresh.tolist())) > 2, "nothing to tell apart"
        texts.append(tokenizer.decode(fresh, skip_special_tokens=True))
    return texts


TASKS = {
    "local_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "local_answer": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{written}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12}, "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


def write_tasks(folder: Path, export: Path) -> None:
    """Tasks as local files; the answers of `local_answer` are what the export writes, to half of the questions."""
    folder.mkdir()
    questions = [f"{'def f(x):' if n % 3 else 'The lazy dog'} {n} =" for n in range(8)]
    lines = []
    for n, (question, answer) in enumerate(
        zip(questions, written(export, questions, 12), strict=True)
    ):
        first = answer.split("\n\n")[0]
        lines.append(
            {
                "question": question, "choices": [" return a", " print(i)", " fox jumps over", " 12"], "answer": n % 4,
                "text": f"It was the best of times {n}, " * (1 + n), "written": first if n % 2 else first + "?",
            }
        )  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, task in TASKS.items():
        files = {"test": str(folder / "data.jsonl")}
        about = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(
            json.dumps(about | {"num_fewshot": 0} | task)
        )  # JSON is YAML


def write_own_task(folder: Path, data: Path) -> None:
    """`local_choice` as a task of megacode; the harness puts a blank before a choice."""
    folder.mkdir()
    (folder / "own.yaml").write_text("name: own\ndata: own.jsonl\nranking: {score: label}\n")
    with open(folder / "own.jsonl", "w") as out:
        for line in data.read_text().splitlines():
            item = json.loads(line)
            choices = [f" {choice}" for choice in item["choices"]]
            one = {"prompt": item["question"], "choices": choices, "answer": item["answer"]}
            out.write(json.dumps(one) + "\n")


def chatted(export: Path, conversations: list[list[dict[str, str]]], count: int) -> list[str]:
    """What transformers answers greedily, by the export's chat template; it ends as the export says."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(export, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True).eval()
    texts = []
    for messages in conversations:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)[0]
        fresh = ids[inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(fresh, skip_special_tokens=True))
    return texts


def test_a_run_and_its_export_chat_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """One turn each, and a conversation that is read from standard input."""
    run, chat = pair[0], tmp_path / "chat"
    family = json.loads((pair[1] / "config.json").read_text())["model_type"]
    made = [
        "export",
        str(run),
        str(chat),
        "--chat-template",
        "chatml",
        "--format",
        family,
    ]
    assert main(made) == 0
    system = {"role": "system", "content": "Be brief"}
    asked = [[system, {"role": "user", "content": prompt}] for prompt in PROMPTS]
    expected = chatted(chat, asked, 24)
    prompts = [a for prompt in PROMPTS for a in ("--prompt", prompt)]
    command = ["generate", run, "--tokens", 24, "--chat", "chatml", "--system", "Be brief"]
    (text,) = megacode([*command, *prompts])
    assert text == "".join(more + "\n" for more in expected)

    talk, answers = [system], []
    for prompt in PROMPTS[:2]:
        talk = [*talk, {"role": "user", "content": prompt}]
        answers += chatted(chat, [talk], 12)
        talk = [*talk, {"role": "assistant", "content": answers[-1]}]
    command[command.index(24)] = 12
    (text,) = megacode(command, typed="".join(prompt + "\n" for prompt in PROMPTS[:2]))
    assert text == "".join(more + "\n" for more in answers)


def test_a_run_and_its_export_write_and_score_the_same(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    run, export = pair
    commands = [
        ["generate", run, "--tokens", 24, *(a for prompt in PROMPTS for a in ("--prompt", prompt))]
    ]
    if harness := importlib.util.find_spec("lm_eval"):
        write_tasks(tmp_path / "tasks", export)
        asked = [
            "--harness",
            ",".join(TASKS),
            "--harness-tasks",
            tmp_path / "tasks",
            "--json",
            "--batch-size",
            5,
            "--trust-remote-code",
        ]
        own = tmp_path / "own"
        write_own_task(own, tmp_path / "tasks" / "data.jsonl")
        commands = [
            *(["evaluate", target, *asked] for target in (export, run)),
            ["evaluate", run, "--tasks", own, "--json"],
            *commands,
        ]
    *results, text = megacode(*commands)
    expected = "".join(
        prompt + more + "\n"
        for prompt, more in zip(PROMPTS, written(export, PROMPTS, 24), strict=True)
    )
    assert text == expected
    if not harness:
        pytest.skip("lm-eval is not installed; the text is equal")
    exported, direct, own_scores = (json.loads(result.splitlines()[-1]) for result in results)
    assert own_scores["tasks"]["own"]["accuracy"] == exported["local_choice"]["acc"]
    assert direct.keys() == exported.keys() == TASKS.keys()
    for task, numbers in direct.items():
        assert numbers.keys() == exported[task].keys() and numbers
        for name, value in numbers.items():
            assert value == pytest.approx(exported[task][name], rel=1e-4), (task, name)
    assert direct["local_answer"]["exact_match"] == 0.5
    assert 0 <= direct["local_choice"]["acc"] <= 1 and direct["local_text"]["byte_perplexity"] > 1


def test_an_answer_leaves_room_for_the_question(monkeypatch: Any) -> None:
    pytest.importorskip("lm_eval")
    from megacode.evaluate import harness_model
    from megacode.evaluate.model import LoadedModel

    recipe = small(Model(layers=1, hidden_size=64, heads=4))
    recipe = recipe.model_copy(update={"tokenizer": TokenizerSection(path="none")})
    letters: Any = SimpleNamespace(
        base=SimpleNamespace(bos_id=None), eod_id=0, vocab_size=256, encode=lambda text: list(text.encode()),
        decode=lambda ids: bytes(ids).decode(),
    )  # fmt: skip
    monkeypatch.setattr(
        harness_model,
        "continue_batch",
        lambda model, prompts, *settings: [list(p) for p in prompts],
    )
    model = harness_model.MegatronLM(LoadedModel(recipe, letters, [], cast(Any, None), LENGTH), 1)
    question = "".join(map(chr, range(40, 40 + LENGTH)))
    asked = [
        SimpleNamespace(task_name="some", args=(question, {"until": [], "max_gen_toks": n}))
        for n in (8, LENGTH - 1)
    ]
    assert model.generate_until(asked, disable_tqdm=True) == [question[8:], question[-1]]
    for more in ({"max_gen_toks": LENGTH}, {}):
        asked[1].args = (question, {"until": []} | more)
        with pytest.raises(
            UserError, match=f"--harness some: .* context of {LENGTH} .* smaller max_gen_toks"
        ):
            model.generate_until(asked, disable_tqdm=True)


def test_mistakes_are_sentences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    broken = {
        "task": "broken",
        "dataset_path": "json",
        "output_type": "multiple_choice",
        "test_split": "test",
    }
    broken["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "nowhere.jsonl")}}
    (tmp_path / "tasks" / "broken.yaml").write_text(json.dumps(broken))
    given = ["--harness-tasks", str(tmp_path / "tasks")]
    for arguments, words in (
        (["--harness", ","], "--harness: names no task"),
        (["--harness", "no_such_task_anywhere"], "knows no such task"),
        (["--harness", "broken", *given], "--harness broken: cannot be loaded"),
        (["--harness", "broken", "--harness-tasks", str(tmp_path / "no")], "no such folder"),
        (["--harness", "broken", "--limit", "0"], "--limit: expected 1 or more"),
        (["--harness", "broken", "--shots", "-1"], "--shots: expected 0 or more"),
    ):
        assert main(["evaluate", str(tmp_path), *arguments]) == 2
        told = capsys.readouterr().err
        assert words in told and "Traceback" not in told, told
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", str(tmp_path), "--harness", "arc_easy"]) == 2
    assert "pip install 'megacode[harness]'" in capsys.readouterr().err
