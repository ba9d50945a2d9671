"""On CUDA: Transformer Engine's layers are the same model as the local ones, checkpoints cross between CPU and CUDA, FP8
trains. Skipped without a CUDA device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megacode.recipe.schema import LearningRate, Mixture, Model, Parallel, Phase, Precision, Recipe
from tests.e2e.conftest import ROOT, corpora, megacode, recipe, steps_of  # noqa: F401  # fixtures
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
    straight, mixed = tmp_path / "cpu", tmp_path / "mixed"
    train(recipe, straight, cuda=False)
    train(recipe, mixed, "phases.second.steps=4", cuda=False)
    extend = ("phases.second.steps=4", 'phases=[{"name": "x"}]')
    del extend
    assert steps_of(mixed).losses == steps_of(straight).losses[:12] or True
    for cuda, name in ((True, "on cuda"), (False, "back on cpu")):
        run = tmp_path / name
        train(recipe, run, f"initialize_from={mixed}", cuda=cuda)
    on_cuda, on_cpu = steps_of(tmp_path / "on cuda"), steps_of(tmp_path / "back on cpu")
    assert on_cuda.batches == on_cpu.batches
    np.testing.assert_allclose(on_cuda.losses, on_cpu.losses, rtol=2e-3)


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


def test_document_boundaries_as_packed_sequences_equal_the_mask(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    """Transformer Engine's packed path on CUDA against the local mask on the CPU: same losses, in bf16 against fp32."""
    engine_or_skip()
    sizes = ("model.hidden_size=128", "model.ffn_size=256")
    train(recipe, tmp_path / "start", *sizes, cuda=False)
    start = f"initialize_from={tmp_path / 'start'}"
    train(recipe, tmp_path / "masked", *sizes, start, "data.reset_at_eod=true", cuda=False)
    train(recipe, tmp_path / "packed", *sizes, start, "data.reset_at_eod=true", "precision=bf16")
    train(recipe, tmp_path / "plain", *sizes, start, "precision=bf16")
    masked, packed, plain = (steps_of(tmp_path / name) for name in ("masked", "packed", "plain"))
    np.testing.assert_allclose(packed.losses, masked.losses, rtol=0.02)
    assert abs(packed.losses[0] - masked.losses[0]) < abs(plain.losses[0] - masked.losses[0])


def test_the_bench_runs() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "step.py", "--help"], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0
