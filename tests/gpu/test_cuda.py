"""On CUDA: Transformer Engine's layers are the same model as the local ones, checkpoints cross between CPU and CUDA, FP8
trains. Skipped without a CUDA device."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megacode.recipe.schema import LearningRate, Mixture, Model, Parallel, Phase, Precision, Recipe
from tests.e2e.conftest import corpora, megacode, recipe, steps_of  # noqa: F401  # fixtures
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


def logits_of_both_specs(world, model: Model) -> tuple[np.ndarray, np.ndarray]:
    """The same weights under Transformer Engine's spec and under the local one, through sharded names."""
    from megatron.core import parallel_state

    from megacode.model import gpt

    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1)).cuda()
    positions = torch.arange(LENGTH, device="cuda").expand(2, -1)
    meta = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}

    def tensors(chunk):
        return {
            value.key + str(value.global_offset): value.data
            for value in chunk.sharded_state_dict(metadata=meta).values()
            if torch.is_tensor(getattr(value, "data", None)) and hasattr(value, "global_offset")
        }

    (engine,) = gpt.build_model(small(model), VOCAB)
    detected, gpt.transformer_engine_available = gpt.transformer_engine_available, lambda: False
    try:
        (local,) = gpt.build_model(small(model), VOCAB)
    finally:
        gpt.transformer_engine_available = detected
    with torch.no_grad():
        theirs = tensors(local)
        for name, value in tensors(engine).items():
            value.add_(0.02 * torch.randn_like(value))
            theirs[name].copy_(value)
        assert {type(m).__name__ for m in engine.modules()} != {type(m).__name__ for m in local.modules()}
        return engine.eval()(tokens, positions, None).cpu().numpy(), local.eval()(tokens, positions, None).cpu().numpy()


@pytest.mark.parametrize("model", MODELS)
def test_transformer_engine_and_local_layers_are_one_model(model: str) -> None:
    engine_or_skip()
    torch.backends.cuda.matmul.allow_tf32 = False
    ((engine, local),) = run_on(1, logits_of_both_specs, MODELS[model])
    np.testing.assert_allclose(engine[..., :VOCAB], local[..., :VOCAB], atol=2e-3)
    assert (engine[..., :VOCAB].argmax(-1) == local[..., :VOCAB].argmax(-1)).mean() > 0.99


def train(recipe_path: Path, run: Path, *changes: str, cuda: bool = True) -> None:
    environment = {} if cuda else {"CUDA_VISIBLE_DEVICES": ""}
    megacode("train", recipe_path, "--run", run, *(p for c in changes for p in ("--set", c)), **environment)


def test_a_checkpoint_made_on_cpu_continues_on_cuda_and_back(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    """Steps 1 to 8 on the CPU, 9 to 14 on CUDA, 15 to 20 on the CPU, against all of them on the CPU; Adam's state travels."""
    straight, mixed = tmp_path / "cpu", tmp_path / "mixed"
    keep = ("phases.second.optimizer_state=keep",)
    train(recipe, straight, *keep, cuda=False)
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
            part[1]["learning_rate"]["decay_steps"] = 12
        train(recipe, mixed, "phases=" + json.dumps(part), cuda=cuda)
    expected, got = steps_of(straight), steps_of(mixed)
    assert got.batches == expected.batches
    np.testing.assert_allclose(got.losses, expected.losses, rtol=2e-3)


@pytest.mark.parametrize("compute", ["bf16", "delayed", "tensorwise", "blockwise"])
def test_lower_precisions_follow_fp32(compute: str, recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    if compute != "bf16":
        engine_or_skip()
    sizes = ("model.hidden_size=128", "model.vocab_size=304", "model.ffn_size=256")
    precision = ("precision=bf16",) if compute == "bf16" else ("precision=fp8", f"precision.fp8_recipe={compute}")
    train(recipe, tmp_path / "fp32", *sizes)
    train(recipe, tmp_path / "low", *sizes, f"initialize_from={tmp_path / 'fp32'}", *precision)
    train(recipe, tmp_path / "again", *sizes, f"initialize_from={tmp_path / 'fp32'}")
    low, full = steps_of(tmp_path / "low"), steps_of(tmp_path / "again")
    assert low.batches == full.batches
    np.testing.assert_allclose(low.losses, full.losses, rtol=0.03)


def packed_and_masked(world) -> tuple[list[float], list[float], list[float]]:
    """Loss sums by sample: Transformer Engine's packed rows (bf16), the local mask (fp32), and no boundaries at all."""
    from megacode.data.batch import make_batch
    from megacode.model import gpt
    from megacode.train import step as step_module
    from megacode.train.checkpoint import _sharded_state  # the two specs share names there

    windows = torch.randint(3, VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(2)).numpy()
    windows[0, 20] = windows[0, 41] = windows[1, 9] = 2
    stream, positions = np.array([0, 1], np.int32), np.arange(2)
    bounded = make_batch(windows, stream, positions, eod_id=2, reset_at_eod=True)
    plain = make_batch(windows, stream, positions)

    def sums(chunks, batch, recipe) -> list[float]:
        with torch.no_grad():
            return step_module.forward_backward(chunks, [batch], 2, recipe, world, forward_only=True)[0].tolist()

    half, full = small(MODELS["llama"], Precision(compute="bf16")), small(MODELS["llama"])
    torch.manual_seed(0)
    engine = gpt.build_model(half, VOCAB)
    packed = sums(engine, bounded, half)
    detected = gpt.transformer_engine_available
    gpt.transformer_engine_available = step_module.transformer_engine_available = lambda: False
    try:
        local = gpt.build_model(full, VOCAB)
        theirs, ours = _sharded_state(local, None, True)["model"], _sharded_state(engine, None, True)["model"]
        source = {v.key + str(v.global_offset): v.data for v in ours.values() if hasattr(v, "global_offset")}
        for value in theirs.values():
            if hasattr(value, "global_offset") and value.data is not None:
                value.data.detach().copy_(source[value.key + str(value.global_offset)])
        return packed, sums(local, bounded, full), sums(local, plain, full)
    finally:
        gpt.transformer_engine_available = step_module.transformer_engine_available = detected


def test_document_boundaries_as_packed_sequences_equal_the_mask() -> None:
    engine_or_skip()
    ((packed, masked, plain),) = run_on(1, packed_and_masked)
    np.testing.assert_allclose(packed, masked, rtol=5e-3)
    assert np.abs(np.subtract(packed, masked)).max() < np.abs(np.subtract(plain, masked)).max()
