"""On two CUDA devices: layouts agree with one device over NCCL. Skipped without a second one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megacode.recipe.schema import Model, Parallel, Precision
from tests.e2e.conftest import corpora, megacode, recipe, steps_of  # noqa: F401  # fixtures
from tests.gpu.common import (
    LENGTH,
    LOW_RATE,
    NARROW,
    PHASES,
    VOCAB,
    engine_or_skip,
    options,
    settings,
    train,
)
from tests.processes import run_on

EOD = 2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def train_on_two(recipe_path: Path, run: Path, *changes: str) -> None:
    megacode("train", recipe_path, "--run", run, "--processes", 2, *options(changes))


def one_device_and(recipe_path: Path, folder: Path, *changes: str) -> list[str]:
    """Train on one device, from initial weights that a run of two steps at rate ~0 left; the changes of a run to compare."""
    still = [
        f"{phase}.{key}" for phase in PHASES for key in ("steps=1", "learning_rate.peak=1e-30")
    ]
    train(recipe_path, folder / "start", *changes, *still, "optimizer.weight_decay=0")
    shared = [*changes, f"initialize_from={folder / 'start'}"]
    train(recipe_path, folder / "one", *shared)
    return shared


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor=2"],
        [
            "parallel.tensor=2",
            "parallel.sequence=true",
            "precision=bf16",
        ],  # userbuffers hold no fp32
        ["parallel.tensor=2", "parallel.sequence=true"],
        ["parallel.pipeline=2"],
        [],
        ["parallel.distributed_optimizer=false"],
    ],
    ids=[
        "tp2",
        "sequence parallel, userbuffers",
        "sequence parallel",
        "pp2",
        "dp2 distributed optimizer",
        "dp2",
    ],
)
def test_layouts_on_two_devices_agree_with_one(
    layout: list[str], recipe: Path, tmp_path: Path
) -> None:
    precision = [change for change in layout if change.startswith("precision")]
    shared = one_device_and(recipe, tmp_path, *NARROW, *LOW_RATE, *precision)
    train_on_two(recipe, tmp_path / "two", *shared, *layout)
    one, two = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert two.batches == one.batches
    assert len(two.losses) == 20 and two.losses[-1] < 0.99 * two.losses[0], (
        "the model does not learn"
    )
    # bf16; or fp32, but Transformer Engine may multiply it as TF32, and parts of a matrix round otherwise than the whole.
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-3)
    np.testing.assert_allclose(two.norms, one.norms, rtol=2e-2)


def test_saves_change_nothing_in_a_run_with_fp8_parameters(recipe: Path, tmp_path: Path) -> None:
    """They gather weights outside a training step; their copies for the backward pass must follow (`step.gathered_weights`)."""
    engine_or_skip()
    in_fp8 = "precision={compute: fp8, fp8_recipe: tensorwise, fp8_params: true}"
    for every in (1, 1000):
        train_on_two(
            recipe, tmp_path / str(every), *NARROW, *LOW_RATE, in_fp8, f"checkpoints.every={every}"
        )
    often, seldom = steps_of(tmp_path / "1"), steps_of(tmp_path / "1000")
    np.testing.assert_allclose(often.losses, seldom.losses, rtol=1e-4)
    np.testing.assert_allclose(often.norms, seldom.norms, rtol=2e-3)


def test_context_parallel_trains_as_one_device_does(recipe: Path, tmp_path: Path) -> None:
    """In bf16: Transformer Engine's context parallel attention is flash or fused attention, which know no fp32."""
    engine_or_skip()
    lengths = [f"{phase}.sequence_length=128" for phase in PHASES]
    shared = one_device_and(recipe, tmp_path, *NARROW, *LOW_RATE, *lengths, "precision=bf16")
    train_on_two(recipe, tmp_path / "two", *shared, "parallel.context=2")
    one, two = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert two.batches == one.batches
    assert len(two.losses) == 20 and two.losses[-1] < 0.99 * two.losses[0], (
        "the model does not learn"
    )
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-3)
    np.testing.assert_allclose(two.norms, one.norms, rtol=2e-2)


def losses_by_sample(
    world, folder: str, resets: bool
) -> tuple[list[float], list[float], list[float]]:
    """Loss sums and label counts of four samples, over all context-parallel ranks, from the checkpoint in `folder` (made where
    there is none); and the sums once more with the first half of every sample changed."""
    from megacode.data.batch import make_batch
    from megacode.megatron.checkpoint import Checkpointer, load_checkpoint
    from megacode.megatron.model import build_model
    from megacode.megatron.step import forward_backward
    from megacode.recipe.schema import Checkpoints
    from megacode.run.checkpoints import find_checkpoint

    strong = Model(
        layers=2, hidden_size=128, heads=4, kv_heads=2, init_std=0.2
    )  # so that what a token may look at matters
    run = settings(strong, Precision(compute="bf16"))
    run = run.model_copy(
        update={"parallel": Parallel(context=world.context_size, micro_batch_size=4)}
    )
    chunks = build_model(run, VOCAB)
    if (Path(folder) / "latest").exists():
        load_checkpoint(find_checkpoint(folder), chunks, None)
    else:
        Checkpointer(Path(folder), Checkpoints(asynchronous=False)).save(0, chunks, None, {}, "")
    windows = torch.randint(
        3, VOCAB, (4, LENGTH + 1), generator=torch.Generator().manual_seed(3)
    ).numpy()
    changed = windows.copy()
    changed[:, : LENGTH // 2] = windows[::-1, : LENGTH // 2]
    if resets:  # documents of lengths that no slices divide; the last one begins in the first half
        for row in (windows, changed):
            row[:, [6, LENGTH // 3]] = EOD
    out = []
    for rows in (windows, changed):
        # The loss of the second half only: there, both ranks have a quarter that looks back at the other one's keys.
        batch = make_batch(
            rows, np.arange(4, dtype=np.int32), np.arange(4), eod_id=EOD, reset_at_eod=resets
        )
        batch.loss_mask[:, : LENGTH // 2] = 0
        with torch.no_grad():
            sums = forward_backward(chunks, [batch], 4, run, world, forward_only=True)
        torch.distributed.all_reduce(sums)
        out.append(sums.tolist())
    return out[0][0], out[0][1], out[1][0]


@pytest.mark.parametrize("resets", [False, True], ids=["plain", "documents"])
def test_context_parallel_attention_looks_at_the_whole_sample(resets: bool, tmp_path: Path) -> None:
    engine_or_skip()
    ((one, counts, changed),) = run_on(1, losses_by_sample, str(tmp_path), resets)
    first, second = run_on(2, losses_by_sample, str(tmp_path), resets, parallel=Parallel(context=2))
    assert first == second and first[1] == counts == [LENGTH / 2] * 4
    np.testing.assert_allclose(first[0], one, rtol=1e-2)
    np.testing.assert_allclose(first[2], changed, rtol=1e-2)
    off = np.abs(np.subtract(first[0], one)).max()
    assert off < 0.2 * np.abs(np.subtract(changed, one)).max(), (
        "what stands in the other half must matter more than rounding"
    )
