"""What makes a step fast changes no number, and the host never waits for the device but where Megatron-Core makes it."""

from __future__ import annotations

import gzip
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from megacode.recipe.schema import Fusion, Model, Precision, Recipe
from tests.e2e import test_average as average
from tests.e2e.conftest import Steps, corpora, megacode, recipe, steps_of  # noqa: F401  # fixtures
from tests.gpu.common import LENGTH, LOW_RATE, VOCAB, WIDE, engine_or_skip, options, settings, train
from tests.gpu.test_precisions import MODELS
from tests.processes import run_on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def made_ready(run: Recipe, world) -> tuple[list, object, list]:
    """(chunks, optimizer, micro-batches) of a step as the loop has them."""
    from megacode.data.batch import make_batch
    from megacode.megatron.config import megatron_config
    from megacode.megatron.model import build_model
    from megacode.megatron.optimizer import build_optimizer, wrap_data_parallel
    from megacode.megatron.step import prepare_model_for_training

    config = megatron_config(run, data_size=world.data_size)
    chunks = wrap_data_parallel(config, build_model(run, VOCAB, config))
    optimizer = build_optimizer(run, chunks)
    prepare_model_for_training(chunks, optimizer)
    windows = torch.randint(
        3, VOCAB, (4, LENGTH + 1), generator=torch.Generator().manual_seed(2)
    ).numpy()
    batches = [make_batch(windows[i : i + 2], np.zeros(2, np.int32), np.arange(2)) for i in (0, 2)]
    return chunks, optimizer, batches


def waits_in_steps(world, model: Model) -> list[str]:
    """Files and lines at which the host waited for the device in steps 4 to 6."""
    from megacode.megatron.optimizer import set_lr
    from megacode.megatron.step import train_step

    run = settings(model, Precision(compute="bf16"))
    chunks, optimizer, batches = made_ready(run, world)
    waits = []
    for step in range(6):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if step >= 3 else "default")
            set_lr(optimizer, 1e-3, 0.1)
            train_step(chunks, optimizer, batches, 1, run, world)
            torch.cuda.set_sync_debug_mode("default")
        waits += [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return waits


def test_the_host_waits_only_where_megatron_core_makes_it() -> None:
    """Once a step it asks whether there are tokens at all (`finalize_model_grads`), and once it makes the gradient's norm a
    number (`clip_grads`); nothing else waits."""
    (waits,) = run_on(1, waits_in_steps, MODELS["llama"])
    known = ("megatron/core/optimizer/", "megatron/core/distributed/finalize_model_grads.py")
    others = [where for where in waits if not any(name in where for name in known)]
    assert not others, others
    assert len(waits) <= 3 * 3, waits


def gradients(world, model: Model, fused: bool | None) -> dict[str, np.ndarray]:
    from megacode.megatron.model import global_parameter_names
    from megacode.megatron.step import forward_backward

    run = settings(model, Precision(compute="bf16")).model_copy(
        update={"fusion": Fusion(gradient_accumulation=fused)}
    )
    chunks, _, batches = made_ready(run, world)
    chunks[0].zero_grad_buffer()
    forward_backward(chunks, batches, 1, run, world)
    return {
        name: p.main_grad.float().cpu().numpy()
        for name, p in global_parameter_names(chunks).items()
    }


@pytest.mark.parametrize("model", ["llama", "crystal"])
def test_accumulating_in_products_gives_the_same_gradients(model: str) -> None:
    engine_or_skip()
    ((fused,), (plain,)) = (run_on(1, gradients, MODELS[model], on) for on in (None, False))
    assert fused.keys() == plain.keys()
    for name, expected in plain.items():
        scale = np.abs(expected).max()
        assert np.abs(fused[name] - expected).max() <= 0.02 * scale, name


BF16 = (*WIDE, *LOW_RATE, "precision=bf16")
SAME = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}


@pytest.fixture(scope="module")
def plain(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """The run that others are compared with."""
    engine_or_skip()
    run = tmp_path_factory.mktemp("plain") / "run"
    train(recipe, run, *BF16, **SAME)
    return steps_of(run)


@pytest.mark.parametrize(
    "changed",
    [
        ("fusion.cuda_graphs=true",),
        ("fusion={rope: false, cross_entropy: false, activation: false, bias_dropout: false}",),
    ],
    ids=["CUDA graphs", "nothing fused"],
)
def test_a_run_is_the_same_with_and_without(
    changed: tuple[str, ...], plain: Steps, recipe: Path, tmp_path: Path
) -> None:  # fmt: skip
    train(recipe, tmp_path / "changed", *BF16, *changed, **SAME)
    other = steps_of(tmp_path / "changed")
    assert other.batches == plain.batches
    np.testing.assert_allclose(other.losses, plain.losses, rtol=2e-3)


def test_a_precision_aware_optimizer_changes_no_weight_and_resumes(
    plain: Steps, recipe: Path, tmp_path: Path
) -> None:  # fmt: skip
    """Moments in fp32 and a master copy of 16 bits beside the weight's 16: the same updates, less memory. Its checkpoint holds
    whole master weights: a run goes on from it with either optimizer."""
    aware = (*BF16, "optimizer.megatron.use_precision_aware_optimizer=true")
    train(recipe, tmp_path / "aware", *aware, **SAME)
    sets = options(aware)
    megacode(
        "train", recipe, "--run", tmp_path / "stopped", "--until-phase", "first", *sets, **SAME
    )
    shutil.copytree(tmp_path / "stopped", tmp_path / "other")
    train(recipe, tmp_path / "stopped", *aware, **SAME)
    train(recipe, tmp_path / "other", *BF16, **SAME)
    lean, stopped, other = (
        steps_of(tmp_path / name).losses for name in ("aware", "stopped", "other")
    )
    np.testing.assert_allclose(lean, plain.losses, rtol=5e-4)
    np.testing.assert_allclose(stopped, lean, rtol=5e-4)
    np.testing.assert_allclose(other, lean, rtol=5e-4)


@pytest.mark.parametrize("aware", [False, True])
def test_an_ema_of_weights_on_a_stream_of_its_own_is_numpys(
    recipe: Path, tmp_path: Path, aware: bool
) -> None:
    """Of masters, also where these are 16 bits beside the weight's."""
    if aware:
        engine_or_skip()
    changes = (
        *BF16,
        f"optimizer.ema={average.DECAY}",
        f"optimizer.megatron.use_precision_aware_optimizer={str(aware).lower()}",
    )
    average.train(recipe, tmp_path, *changes)
    first = average.tensors(average.step(tmp_path, 1), average.EMA)
    average.check_ema(tmp_path, first, 2, 6, average.MASTER)


def test_a_profile_names_the_kernels(recipe: Path, tmp_path: Path) -> None:
    changes = options((*WIDE, "precision=bf16"))
    megacode("train", recipe, "--run", tmp_path / "run", "--profile", "5:7", *changes)
    folder = tmp_path / "run" / "profile" / "steps-5-7"
    assert (folder / "rank-0.json.gz").stat().st_size > 10_000
    with gzip.open(folder / "rank-0.json.gz", "rt") as trace:
        categories = {event.get("cat") for event in json.load(trace)["traceEvents"]}
    assert {"kernel", "cuda_runtime", "cpu_op"} <= categories, categories
    text = (folder / "rank-0.txt").read_text()
    assert "Self CUDA" in text and "Where the host waits" in text
