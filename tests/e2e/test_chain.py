"""From a Hugging Face folder to a chat: continued on code with fill-in-the-middle, tuned on conversations, exported, and asked."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import yaml

transformers = pytest.importorskip("transformers")

from megacode import load_recipe, make_plan, open_mixture  # noqa: E402
from megacode.data.loader import StepReader  # noqa: E402
from megacode.run.metrics import read_metrics  # noqa: E402
from megacode.tokenizer.chat import template_text  # noqa: E402
from megacode.tokenizer.tokenizer import load_tokenizer  # noqa: E402
from tests.convert.test_harness import chatted  # noqa: E402
from tests.e2e.conftest import megacode, steps_of  # noqa: E402

SPECIAL = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"]
ADDED = ["<|im_start|>", "<|im_end|>"]
PROMPTS = ["add the numbers", "sort the list"]
LENGTH = 128
SHAPE = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=LENGTH, initializer_range=0.1,
    bos_token_id=0, eos_token_id=0,
)  # fmt: skip
MODEL = dict(layers=2, hidden_size=48, heads=4, kv_heads=2, ffn_size=96, context_length=LENGTH)
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"norm_epsilon": 1e-6}),
    "qwen2": (
        transformers.Qwen2Config,
        {"norm_epsilon": 1e-6, "qkv_bias": True},
    ),
    "starcoder2": (
        transformers.Starcoder2Config,
        {"normalization": "layernorm", "activation": "gelu-tanh", "linear_bias": True, "tie_embeddings": True},
    ),
}  # fmt: skip


def conversation(number: int) -> dict[str, Any]:
    verb, thing = (
        ("add", "sort", "print")[number % 3],
        ("numbers", "list", "lines")[number // 3 % 3],
    )
    code = f"def {verb}_{thing}(x):\n    return {verb}(x, {number % 7})"
    turns = [("user", f"{verb} the {thing}"), ("assistant", code)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes and some merges, code as text, and conversations, both tokenized."""
    folder = tmp_path_factory.mktemp("chain")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    talks = [conversation(number) for number in range(60)]
    code = [talk["messages"][1]["content"] * 4 for talk in talks]
    made.train_from_iterator(code, trainer)
    made.save(str(folder / "tokenizer.json"))
    config = {"eos_token": SPECIAL[0], "bos_token": SPECIAL[0], "tokenizer_class": "PreTrainedTokenizerFast"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    random.Random(0).shuffle(talks)
    for name, rows in (("code", [{"text": text} for text in code]), ("talks", talks)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--tokenizer", folder / "tokenizer.json", "--added-tokens", ",".join(ADDED), "--workers", 1]  # fmt: skip
    megacode("preprocess", folder / "code.jsonl", *common, "--output", folder / "code")
    megacode(
        "preprocess", folder / "talks.jsonl", *common, "--conversations", "--template", "chatml",
        "--validation", "0.1", "--output", folder / "talks",
    )  # fmt: skip
    return folder


def model_folder(data: Path, folder: Path, name: str) -> Path:
    """A random model with the tokenizer of `data`, as a Hugging Face folder."""
    torch.manual_seed(5)
    rows = tokenizers.Tokenizer.from_file(str(data / "tokenizer.json")).get_vocab_size()
    config = FAMILIES[name][0](**SHAPE, vocab_size=rows)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((data / file).read_bytes())
    return folder


def recipe_of(path: Path, data: Path, folder: Path, name: str) -> Path:
    rate = {"schedule": "constant", "peak": 3e-3, "warmup": 2}
    same = {"batch_size": 8, "sequence_length": LENGTH, "learning_rate": rate}
    recipe = {
        "name": name,
        "initialize_from": str(folder),
        "tokenizer": {"path": str(folder / "tokenizer.json"), "added_tokens": ADDED},
        "model": {**MODEL, **FAMILIES[name][1]},
        "precision": "fp32",
        "sources": {
            "code": {"path": str(data / "code"), "domain": "code"},
            "talks": {
                "path": str(data / "talks"), "domain": "chat", "packing": "best_fit", "loss_on": "answers",
                "validation": str(data / "talks_validation"),
            },
        },
        "phases": [
            {**same, "name": "code", "steps": 6, "fim_rate": 0.5, "mixture": {"sources": {"code": 1}}},
            {**same, "name": "tune", "epochs": 24, "reset_at_eod": True, "mixture": {"sources": {"talks": 1}}},
        ],
        "data": {"fim": {key: f"<fim_{key}>" for key in ("prefix", "middle", "suffix", "pad")}},
        "parallel": {"micro_batch_size": 4},
        "logging": {"every": 1, "tensorboard": False},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_becomes_a_chat(data: Path, tmp_path: Path, name: str) -> None:
    folder, run, out = (
        model_folder(data, tmp_path / "theirs", name),
        tmp_path / "run",
        tmp_path / "out",
    )
    recipe = recipe_of(tmp_path / "r.yaml", data, folder, name)
    done = megacode("train", recipe, "--run", run)
    assert f"importing {folder} ({name}" in done.stdout and "rows of the 2 new ones" in done.stdout

    loaded = load_recipe(recipe)
    tokenizer = load_tokenizer(loaded.tokenizer)
    reader = StepReader(open_mixture(make_plan(loaded)), rank=0, world=1, tokenizer=tokenizer)
    first = np.concatenate([part.tokens for part in reader.read(0).micro_batches])
    assert all((first == tokenizer.token_id(name)).any() for name in SPECIAL[1:4])
    losses, records = steps_of(run).losses, read_metrics(run)
    assert losses[-1] < 0.7 * losses[6], "tuning learns the answers"
    by_source = [r["loss_by_source"] for r in records if r["kind"] == "train"]
    assert set(by_source[0]) == {"code"} and set(by_source[-1]) == {"talks"}
    before, after = [r["loss_by_source"] for r in records if r["kind"] == "validation"]
    assert after["talks"] < 0.7 * before["talks"]
    if name == "llama":
        shown = megacode("plan", recipe).stdout
        assert re.search(r"talks +chat .* 2[3-6][.\d]* +loss on answers", shown)
        megacode("report", run)
        assert "talks (loss on answers)" in (run / "report.html").read_text()

    megacode("export", run, out)
    assert (out / "chat_template.jinja").read_text() == template_text("chatml")
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    expected = chatted(out, asked, 64)
    assert any("def" in text for text in expected) and len(set("".join(expected))) > 5
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    done = megacode("generate", run, "--chat", "--tokens", 64, *prompts)
    assert done.stdout == "".join(text + "\n" for text in expected)
