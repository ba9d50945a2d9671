"""On CUDA: Transformer Engine's layers are the same model as the local ones, checkpoints cross between CPU and CUDA, lower
precisions follow fp32. Skipped without a CUDA device."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megacode.megatron.hardware import detect
from megacode.plan.hardware import Hardware
from megacode.recipe.schema import Model, Precision, Recipe
from tests.e2e.conftest import corpora, megacode, recipe, steps_of  # noqa: F401  # fixtures
from tests.gpu.common import (
    LENGTH,
    LOW_RATE,
    NARROW,
    VOCAB,
    WIDE,
    engine_or_skip,
    options,
    settings,
    train,
)
from tests.processes import run_on

FP32 = Precision(compute="fp32")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
MODELS = {
    "llama": Model(layers=2, hidden_size=128, heads=4, kv_heads=2),
    "crystal": Model(layers=2, hidden_size=128, heads=4, normalization="layernorm", linear_bias=True,
                     rotary_fraction=0.25, rotary_interleaved=True, tie_embeddings=True),
    "qwen3": Model(layers=2, hidden_size=128, heads=4, kv_heads=2, head_dim=64, qk_norm=True),
}  # fmt: skip


def local_hardware() -> Hardware:
    """This device, as if Transformer Engine were not installed."""
    return dataclasses.replace(detect(), engine=None)


def build_local(recipe_of_one: Recipe, vocab_size: int) -> list:
    from megacode.megatron.config import megatron_config
    from megacode.megatron.model import build_model

    return build_model(recipe_of_one, vocab_size, megatron_config(recipe_of_one, local_hardware()))


def under_local_layers(function, *arguments):
    """Call a function of a step as if Transformer Engine were not installed."""
    from megacode.megatron import step

    detected = step.transformer_engine_available
    step.transformer_engine_available = lambda: False
    try:
        return function(*arguments)
    finally:
        step.transformer_engine_available = detected


def copy_weights(source, target, folder: str) -> None:
    """Through a checkpoint, as a run made with one kind of layers continues with the other."""
    from megacode.megatron.checkpoint import Checkpointer, load_checkpoint
    from megacode.recipe.schema import Checkpoints
    from megacode.run.checkpoints import find_checkpoint

    Checkpointer(Path(folder), Checkpoints(asynchronous=False)).save(0, source, None, {}, "")
    load_checkpoint(find_checkpoint(folder), target, None)


def logits_of_both_specs(world, model: Model, folder: str) -> tuple[np.ndarray, np.ndarray]:
    from megacode.megatron.model import build_model

    torch.backends.cuda.matmul.allow_tf32 = False
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1)).cuda()
    positions = torch.arange(LENGTH, device="cuda").expand(2, -1)
    engine = build_model(settings(model, FP32), VOCAB)
    local = build_local(settings(model, FP32), VOCAB)
    assert {type(m).__name__ for m in engine[0].modules()} != {
        type(m).__name__ for m in local[0].modules()
    }
    with torch.no_grad():  # biases and norms start at 0 and 1, where a mix-up would not show
        for parameter in engine[0].parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        copy_weights(engine, local, folder)
        return tuple(
            chunk[0].eval()(tokens, positions, None).cpu().numpy() for chunk in (engine, local)
        )


@pytest.mark.parametrize("model", MODELS)
def test_transformer_engine_and_local_layers_are_one_model(model: str, tmp_path: Path) -> None:
    engine_or_skip()
    ((engine, local),) = run_on(1, logits_of_both_specs, MODELS[model], str(tmp_path))
    np.testing.assert_allclose(engine[..., :VOCAB], local[..., :VOCAB], atol=2e-3)
    assert (engine[..., :VOCAB].argmax(-1) == local[..., :VOCAB].argmax(-1)).mean() > 0.99


@pytest.mark.parametrize(("precision", "distributed"), [("fp32", "true"), ("bf16", "false")])
def test_a_checkpoint_made_on_cpu_continues_on_cuda_and_back(
    precision: str, distributed: str, recipe: Path, tmp_path: Path
) -> None:  # fmt: skip
    """Steps 1 to 8 on the CPU, 9 to 14 on CUDA, 15 to 20 on the CPU, against all of them on the CPU; Adam's state travels."""
    straight, mixed = tmp_path / "cpu", tmp_path / "mixed"
    changes = (f"precision={precision}", f"parallel.distributed_optimizer={distributed}")
    train(recipe, straight, *changes, "phases.second.optimizer_state=keep", CUDA_VISIBLE_DEVICES="")
    phases = yaml.safe_load(recipe.read_text())["phases"]
    phases[1]["optimizer_state"] = "keep"
    for steps, cuda in ((8, False), (14, True), (20, False)):
        # The shares move over 12 steps, however many of them this start takes.
        part = copy.deepcopy(phases)
        if steps == 8:
            part = part[:1]
        else:
            part[1]["steps"] = steps - 8
            for ratio in part[1]["mixture"]["domains"].values():
                ratio["ratio"]["over"] = 12
            part[1]["learning_rate"]["decay_steps"] = 9  # after a warm-up of 3
        where = {} if cuda else {"CUDA_VISIBLE_DEVICES": ""}
        train(recipe, mixed, *changes, "phases=" + json.dumps(part), **where)
    expected, got = steps_of(straight), steps_of(mixed)
    assert got.batches == expected.batches
    np.testing.assert_allclose(
        got.losses, expected.losses, rtol=1e-3 if precision == "fp32" else 1e-2
    )


@pytest.fixture(scope="module")
def in_fp32(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs: `start`, whose weights others begin from, and `full`, that began from them."""
    folder = tmp_path_factory.mktemp("fp32")
    train(recipe, folder / "start", *NARROW, "phases.first.steps=1", "phases.second.steps=1")
    train(recipe, folder / "full", *NARROW, *LOW_RATE, f"initialize_from={folder / 'start'}")
    return folder


@pytest.mark.parametrize("compute", ["bf16", "delayed", "tensorwise", "blockwise"])
def test_lower_precisions_follow_fp32(
    compute: str, in_fp32: Path, recipe: Path, tmp_path: Path
) -> None:
    if compute != "bf16":
        engine_or_skip()
    precision = (
        ("precision=bf16",)
        if compute == "bf16"
        else ("precision=fp8", f"precision.fp8_recipe={compute}")
    )
    train(
        recipe,
        tmp_path / "low",
        *NARROW,
        *LOW_RATE,
        f"initialize_from={in_fp32 / 'start'}",
        *precision,
    )
    low, full = steps_of(tmp_path / "low"), steps_of(in_fp32 / "full")
    assert low.batches == full.batches
    np.testing.assert_allclose(low.losses, full.losses, rtol=0.005)


def packed_and_masked(world, folder: str) -> tuple[list[float], list[float], list[float]]:
    """Loss sums by sample: Transformer Engine's packed rows (bf16), the local mask (fp32), and no boundaries at all."""
    from megacode.data.batch import make_batch
    from megacode.megatron.model import build_model
    from megacode.megatron.step import forward_backward

    windows = torch.randint(
        3, VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(2)
    ).numpy()
    windows[0, 20] = windows[0, 41] = windows[1, 9] = 2
    stream, positions = np.array([0, 1], np.int32), np.arange(2)
    bounded = make_batch(windows, stream, positions, eod_id=2, reset_at_eod=True)
    plain = make_batch(windows, stream, positions)

    def sums(chunks, batch, run) -> list[float]:
        with torch.no_grad():
            return forward_backward(chunks, [batch], 2, run, world, forward_only=True)[0].tolist()

    strong = MODELS["llama"].model_copy(
        update={"init_std": 0.2}
    )  # so that what a token may look at matters
    half, full = settings(strong, Precision(compute="bf16")), settings(strong, FP32)
    engine = build_model(half, VOCAB)
    packed = sums(engine, bounded, half)
    local = build_local(full, VOCAB)
    copy_weights(engine, local, folder)
    return (
        packed,
        under_local_layers(sums, local, bounded, full),
        under_local_layers(sums, local, plain, full),
    )


def test_document_boundaries_as_packed_sequences_equal_the_mask(tmp_path: Path) -> None:
    engine_or_skip()
    ((packed, masked, plain),) = run_on(1, packed_and_masked, str(tmp_path))
    np.testing.assert_allclose(packed, masked, rtol=1e-2)
    assert np.abs(np.subtract(packed, masked)).max() < np.abs(np.subtract(plain, masked)).max()


def test_cuda_and_gloo_read_the_same_batches(recipe: Path, tmp_path: Path) -> None:
    alone = {"CUDA_VISIBLE_DEVICES": ""}
    train(
        recipe,
        tmp_path / "start",
        *WIDE,
        "precision=fp32",
        "phases.first.steps=1",
        "phases.second.steps=1",
        **alone,
    )
    begin = (
        f"initialize_from={tmp_path / 'start'}"  # the two kinds of devices draw different weights
    )
    changes = options((*WIDE, *LOW_RATE, "precision=fp32", begin))
    megacode("train", recipe, "--run", tmp_path / "cpu", "--processes", 2, *changes, **alone)
    megacode("train", recipe, "--run", tmp_path / "cuda", *changes)
    cpu, cuda = steps_of(tmp_path / "cpu"), steps_of(tmp_path / "cuda")
    assert cuda.batches == cpu.batches
    np.testing.assert_allclose(cuda.losses, cpu.losses, rtol=1e-3)
