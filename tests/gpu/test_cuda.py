"""On CUDA: Transformer Engine's layers are the same model as the local ones, checkpoints cross between CPU and CUDA, FP8
trains; on two devices, layouts agree over NCCL. Skipped without a CUDA device, or without a second one."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megacode.recipe.hardware import Hardware
from megacode.recipe.schema import LearningRate, Mixture, Model, Parallel, Phase, Precision, Recipe
from megacode.runtime.hardware import detect
from tests.e2e.conftest import corpora, megacode, recipe, steps_of  # noqa: F401  # fixtures
from tests.gpu.common import LOW_RATE, PHASES, train
from tests.processes import run_on

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
VOCAB, LENGTH = 1000, 64


def engine_or_skip() -> None:
    pytest.importorskip("transformer_engine.pytorch")


def small(model: Model, precision: Precision | None = None) -> Recipe:
    phase = Phase(
        name="p", steps=1, batch_size=4, sequence_length=LENGTH, mixture=Mixture(sources={"a": 1.0}),
        learning_rate=LearningRate(peak=1e-3),
    )  # fmt: skip
    return Recipe(
        name="t", model=model, sources={}, phases=[phase], precision=precision or Precision(compute="fp32"),
        parallel=Parallel(micro_batch_size=2),
    )  # fmt: skip


MODELS = {
    "llama": Model(layers=2, hidden_size=128, heads=4, kv_heads=2),
    "crystal": Model(layers=2, hidden_size=128, heads=4, normalization="layernorm", linear_bias=True,
                     rotary_fraction=0.25, rotary_interleaved=True, tie_embeddings=True),
    "qwen3": Model(layers=2, hidden_size=128, heads=4, kv_heads=2, head_dim=64, qk_norm=True),
}  # fmt: skip


def local_hardware() -> Hardware:
    """This device, as if Transformer Engine were not installed."""
    return dataclasses.replace(detect(), engine=None)


def build_local(settings: Recipe, vocab_size: int) -> list:
    from megacode.model.gpt import build_model

    return build_model(settings, vocab_size, hardware=local_hardware())


def under_local_layers(function, *arguments):
    """Call a function of a step as if Transformer Engine were not installed."""
    from megacode.train import step

    detected = step.transformer_engine_available
    step.transformer_engine_available = lambda: False
    try:
        return function(*arguments)
    finally:
        step.transformer_engine_available = detected


def copy_weights(source, target, folder: str) -> None:
    """Through a checkpoint, as a run made with one kind of layers continues with the other."""
    from megacode.recipe.schema import Checkpoints
    from megacode.train.checkpoint import Checkpointer, find_checkpoint, load_checkpoint

    Checkpointer(Path(folder), Checkpoints(asynchronous=False)).save(0, source, None, {}, "")
    load_checkpoint(find_checkpoint(folder), target, None)


def logits_of_both_specs(world, model: Model, folder: str) -> tuple[np.ndarray, np.ndarray]:
    from megacode.model.gpt import build_model

    torch.backends.cuda.matmul.allow_tf32 = False
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1)).cuda()
    positions = torch.arange(LENGTH, device="cuda").expand(2, -1)
    engine = build_model(small(model), VOCAB)
    local = build_local(small(model), VOCAB)
    assert {type(m).__name__ for m in engine[0].modules()} != {type(m).__name__ for m in local[0].modules()}
    with torch.no_grad():  # biases and norms start at 0 and 1, where a mix-up would not show
        for parameter in engine[0].parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        copy_weights(engine, local, folder)
        return tuple(chunk[0].eval()(tokens, positions, None).cpu().numpy() for chunk in (engine, local))


@pytest.mark.parametrize("model", MODELS)
def test_transformer_engine_and_local_layers_are_one_model(model: str, tmp_path: Path) -> None:
    engine_or_skip()
    ((engine, local),) = run_on(1, logits_of_both_specs, MODELS[model], str(tmp_path))
    np.testing.assert_allclose(engine[..., :VOCAB], local[..., :VOCAB], atol=2e-3)
    assert (engine[..., :VOCAB].argmax(-1) == local[..., :VOCAB].argmax(-1)).mean() > 0.99


@pytest.mark.parametrize(("precision", "distributed"), [("fp32", "true"), ("bf16", "false")])
def test_a_checkpoint_made_on_cpu_continues_on_cuda_and_back(
    precision: str, distributed: str, recipe: Path, tmp_path: Path  # noqa: F811
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
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-3 if precision == "fp32" else 1e-2)


NARROW = ("model.hidden_size=128", "model.vocab_size=304", "model.ffn_size=256")


@pytest.fixture(scope="module")
def in_fp32(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A folder with two runs: `start`, whose weights others begin from, and `full`, that began from them."""
    folder = tmp_path_factory.mktemp("fp32")
    train(recipe, folder / "start", *NARROW, "phases.first.steps=1", "phases.second.steps=1")
    train(recipe, folder / "full", *NARROW, *LOW_RATE, f"initialize_from={folder / 'start'}")
    return folder


@pytest.mark.parametrize("compute", ["bf16", "delayed", "tensorwise", "blockwise"])
def test_lower_precisions_follow_fp32(compute: str, in_fp32: Path, recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    if compute != "bf16":
        engine_or_skip()
    precision = ("precision=bf16",) if compute == "bf16" else ("precision=fp8", f"precision.fp8_recipe={compute}")
    train(recipe, tmp_path / "low", *NARROW, *LOW_RATE, f"initialize_from={in_fp32 / 'start'}", *precision)
    low, full = steps_of(tmp_path / "low"), steps_of(in_fp32 / "full")
    assert low.batches == full.batches
    np.testing.assert_allclose(low.losses, full.losses, rtol=0.005)


def packed_and_masked(world, folder: str) -> tuple[list[float], list[float], list[float]]:
    """Loss sums by sample: Transformer Engine's packed rows (bf16), the local mask (fp32), and no boundaries at all."""
    from megacode.data.batch import make_batch
    from megacode.model.gpt import build_model
    from megacode.train.step import forward_backward

    windows = torch.randint(3, VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(2)).numpy()
    windows[0, 20] = windows[0, 41] = windows[1, 9] = 2
    stream, positions = np.array([0, 1], np.int32), np.arange(2)
    bounded = make_batch(windows, stream, positions, eod_id=2, reset_at_eod=True)
    plain = make_batch(windows, stream, positions)

    def sums(chunks, batch, settings) -> list[float]:
        with torch.no_grad():
            return forward_backward(chunks, [batch], 2, settings, world, forward_only=True)[0].tolist()

    strong = MODELS["llama"].model_copy(update={"init_std": 0.2})  # so that what a token may look at matters
    half, full = small(strong, Precision(compute="bf16")), small(strong)
    engine = build_model(half, VOCAB)
    packed = sums(engine, bounded, half)
    local = build_local(full, VOCAB)
    copy_weights(engine, local, folder)
    return packed, under_local_layers(sums, local, bounded, full), under_local_layers(sums, local, plain, full)


def test_document_boundaries_as_packed_sequences_equal_the_mask(tmp_path: Path) -> None:
    engine_or_skip()
    ((packed, masked, plain),) = run_on(1, packed_and_masked, str(tmp_path))
    np.testing.assert_allclose(packed, masked, rtol=1e-2)
    assert np.abs(np.subtract(packed, masked)).max() < np.abs(np.subtract(plain, masked)).max()


# ------------------------------------------------------------------------------------------------------- two devices

two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def train_on_two(recipe_path: Path, run: Path, *changes: str) -> None:
    megacode("train", recipe_path, "--run", run, "--processes", 2, *(p for c in changes for p in ("--set", c)))


def one_device_and(recipe_path: Path, folder: Path, *changes: str) -> list[str]:
    """Train on one device, from initial weights that a run of two steps at rate ~0 left; the changes of a run to compare."""
    still = [f"{phase}.{key}" for phase in PHASES for key in ("steps=1", "learning_rate.peak=1e-30")]
    train(recipe_path, folder / "start", *changes, *still, "optimizer.weight_decay=0")
    shared = [*changes, f"initialize_from={folder / 'start'}"]
    train(recipe_path, folder / "one", *shared)
    return shared


@two_devices
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor=2"],
        ["parallel.tensor=2", "parallel.sequence=true"],
        ["parallel.tensor=2", "parallel.sequence=true", "parallel.overlap.tensor=false"],
        ["parallel.pipeline=2"],
        [],
        ["parallel.distributed_optimizer=false"],
    ],
    ids=["tp2", "sequence parallel, userbuffers", "sequence parallel", "pp2", "dp2 distributed optimizer", "dp2"],
)
def test_layouts_on_two_devices_agree_with_one(layout: list[str], recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    shared = one_device_and(recipe, tmp_path, *NARROW, *LOW_RATE)
    train_on_two(recipe, tmp_path / "two", *shared, *layout)
    one, two = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert two.batches == one.batches
    assert len(two.losses) == 20 and two.losses[-1] < 0.99 * two.losses[0], "the model does not learn"
    # fp32, but Transformer Engine may multiply it as TF32, and parts of a matrix round otherwise than the whole.
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-3)
    np.testing.assert_allclose(two.norms, one.norms, rtol=2e-2)


@two_devices
def test_saves_change_nothing_in_a_run_with_fp8_parameters(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    """They gather weights outside a training step; their copies for the backward pass must follow (`step.gathered_weights`)."""
    engine_or_skip()
    in_fp8 = "precision={compute: fp8, fp8_recipe: tensorwise, fp8_params: true}"
    for every in (1, 1000):
        train_on_two(recipe, tmp_path / str(every), *NARROW, *LOW_RATE, in_fp8, f"checkpoints.every={every}")
    often, seldom = steps_of(tmp_path / "1"), steps_of(tmp_path / "1000")
    np.testing.assert_allclose(often.losses, seldom.losses, rtol=1e-4)
    np.testing.assert_allclose(often.norms, seldom.norms, rtol=2e-3)


@two_devices
def test_context_parallel_trains_as_one_device_does(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    """In bf16: Transformer Engine's context parallel attention is flash or fused attention, which know no fp32."""
    engine_or_skip()
    lengths = [f"{phase}.sequence_length=128" for phase in PHASES]
    shared = one_device_and(recipe, tmp_path, *NARROW, *LOW_RATE, *lengths, "precision=bf16")
    train_on_two(recipe, tmp_path / "two", *shared, "parallel.context=2")
    one, two = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert two.batches == one.batches
    assert len(two.losses) == 20 and two.losses[-1] < 0.99 * two.losses[0], "the model does not learn"
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-3)
    np.testing.assert_allclose(two.norms, one.norms, rtol=2e-2)


def losses_by_sample(world, folder: str) -> tuple[list[float], list[float], list[float]]:
    """Loss sums and label counts of four samples, over all context-parallel ranks, from the checkpoint in `folder` (made where
    there is none); and the sums once more with the first half of every sample changed."""
    from megacode.data.batch import make_batch
    from megacode.model.gpt import build_model
    from megacode.recipe.schema import Checkpoints
    from megacode.train.checkpoint import Checkpointer, find_checkpoint, load_checkpoint
    from megacode.train.step import forward_backward

    strong = MODELS["llama"].model_copy(update={"init_std": 0.2})  # so that what a token may look at matters
    settings = small(strong, Precision(compute="bf16"))
    settings = settings.model_copy(update={"parallel": Parallel(context=world.context_size, micro_batch_size=4)})
    chunks = build_model(settings, VOCAB)
    if (Path(folder) / "latest").exists():
        load_checkpoint(find_checkpoint(folder), chunks, None)
    else:
        Checkpointer(Path(folder), Checkpoints(asynchronous=False)).save(0, chunks, None, {}, "")
    windows = torch.randint(3, VOCAB, (4, LENGTH + 1), generator=torch.Generator().manual_seed(3)).numpy()
    changed = windows.copy()
    changed[:, : LENGTH // 2] = windows[::-1, : LENGTH // 2]
    out = []
    for rows in (windows, changed):
        # The loss of the second half only: there, both ranks have a quarter that looks back at the other one's keys.
        batch = make_batch(rows, np.arange(4, dtype=np.int32), np.arange(4))
        batch.loss_mask[:, : LENGTH // 2] = 0
        with torch.no_grad():
            sums = forward_backward(chunks, [batch], 4, settings, world, forward_only=True)
        torch.distributed.all_reduce(sums)
        out.append(sums.tolist())
    return out[0][0], out[0][1], out[1][0]


@two_devices
def test_context_parallel_attention_looks_at_the_whole_sample(tmp_path: Path) -> None:
    engine_or_skip()
    ((one, counts, changed),) = run_on(1, losses_by_sample, str(tmp_path))
    first, second = run_on(2, losses_by_sample, str(tmp_path), parallel=Parallel(context=2))
    assert first == second and first[1] == counts == [LENGTH / 2] * 4
    np.testing.assert_allclose(first[0], one, rtol=1e-2)
    np.testing.assert_allclose(first[2], changed, rtol=1e-2)
    off = np.abs(np.subtract(first[0], one)).max()
    assert off < 0.2 * np.abs(np.subtract(changed, one)).max(), (
        "what stands in the other half must matter more than rounding"
    )
