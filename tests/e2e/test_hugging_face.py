"""`initialize_from` a Hugging Face folder: trained in a layout, exported, and read by transformers again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from megacode import load_recipe, make_plan, open_mixture  # noqa: E402
from megacode.data.loader import StepReader  # noqa: E402
from tests.e2e.conftest import VOCAB, megacode, steps_of  # noqa: E402

THEIRS, LENGTH = 290, 32
SHAPE = dict(
    vocab_size=THEIRS, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
OURS = dict(
    layers=2, hidden_size=48, heads=4, kv_heads=2, ffn_size=72, vocab_size=VOCAB, context_length=64
)
FAMILIES: dict[str, tuple[Any, dict[str, Any], dict[str, int]]] = {
    "llama": (
        transformers.LlamaConfig(**SHAPE, rms_norm_eps=1e-5),
        dict(OURS),
        {"tensor": 2},
    ),
    "qwen2": (
        transformers.Qwen2Config(**SHAPE, rms_norm_eps=1e-6, tie_word_embeddings=True),
        dict(OURS, qkv_bias=True, norm_epsilon=1e-6, tie_embeddings=True),
        {"pipeline": 2},
    ),
    "starcoder2": (
        transformers.Starcoder2Config(**SHAPE, tie_word_embeddings=False, use_bias=True),
        dict(OURS, normalization="layernorm", activation="gelu-tanh", linear_bias=True),
        {"tensor": 2},
    ),
}  # fmt: skip


def made(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A random model, with biases and norms that matter, as transformers saves it."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name][0])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(folder)
    return folder


def recipe_of(path: Path, corpora: Path, name: str, origin: Path, **more: Any) -> Path:
    """A recipe of two steps that starts from a folder; its rate is too small to change fp32 weights."""
    phase = {
        "name": "on", "steps": 2, "batch_size": 4, "sequence_length": LENGTH, "mixture": {"sources": {"code": 1}},
        "learning_rate": {"schedule": "constant", "peak": 1e-30},
    }  # fmt: skip
    recipe = {
        "name": "on", "model": FAMILIES[name][1], "precision": "fp32", "sources": {"code": {"path": str(corpora / "code")}},
        "phases": [phase], "initialize_from": str(origin), "logging": {"every": 1, "tensorboard": False},
        "optimizer": {"weight_decay": 0},
    }  # fmt: skip
    path.write_text(yaml.safe_dump({**recipe, **more}))
    return path


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(THEIRS, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


def step_loss(recipe: Path, folder: Path) -> float:
    """The loss of the first step's batch, by transformers."""
    plan = make_plan(load_recipe(recipe))
    batch = StepReader(open_mixture(plan), rank=0, world=1).read(0).micro_batches
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(torch.tensor(part.tokens)).logits.flatten(0, 1),
                torch.tensor(part.labels).flatten(),
            )
            for part in batch
        ]
    return float(sum(losses) / len(losses))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_begins_with_the_weights_of_a_folder(
    name: str, corpora: Path, tmp_path: Path
) -> None:
    folder, run, out = made(tmp_path / "theirs", name), tmp_path / "run", tmp_path / "out"
    layout = {"micro_batch_size": 2, **FAMILIES[name][2]}
    recipe = recipe_of(tmp_path / "r.yaml", corpora, name, folder, parallel=layout)
    for left in ("imported", ".imported.0.tmp"):  # of a start that was killed
        (run / left).mkdir(parents=True)
    done = megacode("train", recipe, "--run", run, ranks=2)
    assert f"importing {folder} ({name}, 0.00 GB)" in done.stdout
    assert (
        "has 290 tokens, the tokenizer 300: rows of the 10 new ones start as the mean"
        in done.stdout
    )
    assert not list(run.glob("*imported*")) and not list(run.glob(".imported*"))
    megacode("export", run, out)
    theirs, ours = logits(folder), logits(out)
    assert float(theirs.std()) > 0.5, "nothing to tell apart"
    assert float((ours[..., :THEIRS] - theirs).abs().max()) < 1e-5
    assert step_loss(recipe, out) == pytest.approx(steps_of(run).losses[0], rel=1e-5)
    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    grown = [key for key, value in before.items() if after[key].shape != value.shape]
    assert before.keys() == after.keys() and len(grown) == (1 if name == "qwen2" else 2)
    for key in grown:
        mean = before[key].numpy().astype(np.float64).mean(0).astype(np.float32)
        np.testing.assert_array_equal(after[key][:THEIRS], before[key])
        np.testing.assert_array_equal(after[key][THEIRS:], np.broadcast_to(mean, (10, 48)))


@pytest.mark.slow
def test_a_folder_in_bf16_starts_a_run_in_fp32_and_another_model_is_refused(
    corpora: Path, tmp_path: Path
) -> None:
    folder = made(tmp_path / "theirs", "llama", torch.bfloat16)
    recipe = recipe_of(tmp_path / "r.yaml", corpora, "llama", folder, initialize_new_rows="init")
    others = ("model.heads=8", "model.activation=geglu", "model.vocab_size=280")
    wrong = [word for other in others for word in ("--set", other)]
    done = megacode("train", recipe, "--run", tmp_path / "wrong", *wrong, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for said in ("model.heads: 4 before, 8 now", "model.activation: swiglu before, geglu now",
                 "model.vocab_size: 290 before, 280 now", "tokenizer.added_tokens"):  # fmt: skip
        assert said in done.stderr
    assert "initialize_from" in done.stderr and not (tmp_path / "wrong/recipe.yaml").exists()

    run = tmp_path / "run"
    done = megacode("train", recipe, "--run", run)
    assert "imported as bfloat16, for a run in fp32" in done.stdout
    assert "rows of the 10 new ones are drawn as the recipe draws" in done.stdout
    megacode("export", run, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    for key, value in before.items():
        np.testing.assert_array_equal(after[key][: len(value)], value.float())
    drawn = after["lm_head.weight"][THEIRS:]
    assert 0.015 < float(drawn.std()) < 0.025 and not torch.equal(drawn[0], drawn[1])
    (event,) = [
        record
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if (record := json.loads(line)).get("event") == "initialize"
    ]
    assert event["checkpoint"] == str(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][1:]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    done = megacode("train", recipe, "--run", tmp_path / "cut", check=False, ranks=2)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "model.norm.weight has shape (47,)" in done.stderr
    assert not list((tmp_path / "cut").glob("*imported*"))
    (tmp_path / "empty").mkdir()
    done = megacode(
        "train",
        recipe,
        "--run",
        tmp_path / "none",
        "--set",
        f"initialize_from={tmp_path / 'empty'}",
        check=False,
    )
    assert (
        done.returncode == 2
        and "or a Hugging Face model's folder" in done.stderr
        and "empty: no" in done.stderr
    )
