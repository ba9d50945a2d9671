"""One set of weights, as the CPU's local layers see it in fp32 and as CUDA sees it in every precision; FP8's curves
and drift."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megacode.recipe.schema import Model, Precision
from tests.e2e.conftest import corpora, megacode, recipe, steps_of  # noqa: F401  # fixtures
from tests.gpu.common import LENGTH, LOW_RATE, VOCAB, WIDE, fp8_or_skip, settings, train
from tests.processes import run_on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
FP8 = ("delayed", "tensorwise", "blockwise", "mxfp8")
MODELS = {
    "llama": Model(layers=4, hidden_size=256, heads=4, kv_heads=2, ffn_size=682),
    "crystal": Model(layers=4, hidden_size=256, heads=4, ffn_size=682, normalization="layernorm", linear_bias=True,
                     rotary_fraction=0.25, rotary_interleaved=True, tie_embeddings=True,
                     mup={"base_hidden_size": 64, "embedding_scale": 10.0}),
    "qwen3": Model(layers=4, hidden_size=256, heads=4, kv_heads=2, head_dim=64, qk_norm=True),
    "gelu": Model(layers=4, hidden_size=256, heads=4, normalization="layernorm", linear_bias=True, activation="gelu",
                  position_embedding="learned"),
}  # fmt: skip
# Largest difference of the logits from fp32's, in root mean squares of these. fp32 on CUDA may multiply as TF32 (10 bits);
# bf16 has 8 bits, e4m3 has 4.
TOLERANCE = {"fp32": 5e-3, "bf16": 3e-2, "fp8": 0.15}


def logits(
    world, models: dict[str, Model], precision: Precision, folder: str
) -> dict[str, np.ndarray]:
    """`[2, LENGTH, VOCAB]` of every model, from the checkpoints in `folder`, or from its first weights, which go there."""
    from megacode.megatron.checkpoint import Checkpointer, load_checkpoint
    from megacode.megatron.model import build_model
    from megacode.recipe.schema import Checkpoints
    from megacode.run.checkpoints import find_checkpoint

    torch.backends.cuda.matmul.allow_tf32 = False
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1)).to(
        world.device
    )
    positions = torch.arange(LENGTH, device=world.device).expand(2, -1)
    out = {}
    for name, model in models.items():
        (chunk,) = build_model(settings(model, precision), VOCAB)
        place = Path(folder, name)
        if place.exists():
            load_checkpoint(find_checkpoint(str(place)), [chunk], None)
        else:
            Checkpointer(place, Checkpoints(asynchronous=False)).save(0, [chunk], None, {}, "")
        # Once before, as a step would: delayed scaling knows a tensor's range from forwards that could be trained on.
        chunk(tokens, positions, None)
        chunk.set_is_first_microbatch()  # weights are rounded once a step
        with torch.no_grad():
            found = chunk(tokens, positions, None)
        out[name] = found[..., :VOCAB].float().cpu().numpy()
    return out


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, np.ndarray]]:
    """Folder of the weights, and their logits."""
    folder = str(tmp_path_factory.mktemp("weights"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return folder, run_on(1, logits, MODELS, Precision(compute="fp32"), folder)[0]


@pytest.mark.parametrize("compute", ["fp32", "bf16", *FP8])
def test_cuda_computes_what_the_cpu_computes(
    compute: str, on_cpu: tuple[str, dict[str, np.ndarray]]
) -> None:
    precision = (
        Precision(compute=compute)
        if compute in TOLERANCE
        else Precision(compute="fp8", fp8_recipe=compute)
    )
    if compute in FP8:
        fp8_or_skip(compute)
    folder, expectations = on_cpu
    (on_cuda,) = run_on(1, logits, MODELS, precision, folder)
    found = {}
    for name, expected in expectations.items():
        found[name] = float(
            np.sqrt(np.mean((on_cuda[name] - expected) ** 2) / np.mean(expected**2))
        )
    print(compute, {name: f"{value:.2e}" for name, value in found.items()})
    assert max(found.values()) < TOLERANCE[precision.compute], found
    if compute != "fp32":
        assert min(found.values()) > 1e-5, "nothing was rounded: is this precision on at all?"


# --------------------------------------------------------------------------------------------------------- training

HUNDRED = (
    "phases.first.steps=40", "phases.second.steps=60", "phases.first.learning_rate.decay_steps=100",
    "checkpoints.every=1000", *LOW_RATE,
)  # fmt: skip


def smooth(losses: list[float], over: int = 10) -> np.ndarray:
    return np.convolve(losses, np.ones(over) / over, mode="valid")


@pytest.fixture(scope="module")
def hundred_in_bf16(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("hundred") / "bf16"
    train(recipe, run, *WIDE, *HUNDRED, "precision=bf16")
    return run


@pytest.mark.parametrize("kind", FP8)
def test_a_hundred_steps_in_fp8_follow_bf16(
    kind: str, hundred_in_bf16: Path, recipe: Path, tmp_path: Path
) -> None:
    """Means over ten steps within 1 %, and what the run itself reports as drift, too."""
    fp8_or_skip(kind)
    run = tmp_path / kind
    precision = f"precision={{compute: fp8, fp8_recipe: {kind}, compare_every: 20}}"
    train(recipe, run, *WIDE, *HUNDRED, precision)
    bf16, fp8 = steps_of(hundred_in_bf16), steps_of(run)
    assert fp8.batches == bf16.batches
    apart = np.abs(smooth(fp8.losses) / smooth(bf16.losses) - 1)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    drift = {r["step"]: r["drift"] for r in records if r["kind"] == "train" and "drift" in r}
    print(kind, f"largest difference {apart.max():.4f}", drift)
    assert apart.max() < 0.01
    assert list(drift) == [20, 40, 60, 80, 100] and max(map(abs, drift.values())) < 0.01
    assert any(value != 0 for value in drift.values()), (
        "the comparison was not in another precision"
    )
