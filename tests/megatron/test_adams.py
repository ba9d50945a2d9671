"""A run goes from one Adam to another: torch's counts steps in every weight's state, the fused ones in their groups."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megacode.recipe.schema import Checkpoints, Parallel, Precision
from tests.megatron.test_step import VOCAB, small, windows
from tests.processes import run_on


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the groups and states of Transformer Engine's and Apex's: the count and `bias_correction` in the group."""

    def __init__(self, params, lr, betas, eps, weight_decay, **others):
        defaults = {
            "lr": lr,
            "bias_correction": True,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["bias_correction"]
            group["step"] = group.get("step", 0) + 1
            assert type(group["step"]) is int, "the kernel takes no other"
            first, second = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                assert set(state) == {"exp_avg", "exp_avg_sq"}
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                root = (
                    (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt_().add_(group["eps"])
                )
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(
                    state["exp_avg"], root, value=-group["lr"] / (1 - first ** group["step"])
                )


def losses(world, folder: str, distributed: bool, compute: str) -> dict[str, list[float]]:
    """Of six steps, two by each of three Adams, each continuing the checkpoint of the one before."""
    import megatron.core.optimizer as mcore
    from megatron.core.optimizer import distrib_optimizer

    from megacode.data.batch import make_batch
    from megacode.megatron.checkpoint import Checkpointer, load_checkpoint
    from megacode.megatron.config import megatron_config
    from megacode.megatron.model import build_model
    from megacode.megatron.optimizer import adam_of, build_optimizer, set_lr, wrap_data_parallel
    from megacode.megatron.step import prepare_model_for_training, train_step
    from megacode.run.checkpoints import find_checkpoint

    recipe = small().model_copy(
        update={
            "parallel": Parallel(distributed_optimizer=distributed),
            "precision": Precision(compute=compute),
        }
    )
    batch = [make_batch(windows(), np.zeros(2, np.int32), np.arange(2))]

    def two_steps(name: str, place: Path | None, target: Path) -> list[float]:
        fused = name == "fused"
        with pytest.MonkeyPatch.context() as patch:
            if fused:
                patch.setattr(mcore, "Adam", FusedAdam)
                patch.setattr(distrib_optimizer, "Adam", FusedAdam)
            patch.setattr(mcore, "USING_PYTORCH_OPTIMIZER", not fused)
            patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", fused)
            patch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", fused)
            config = megatron_config(recipe, data_size=world.data_size)
            chunks = wrap_data_parallel(config, build_model(recipe, VOCAB, config))
            optimizer = build_optimizer(recipe, chunks)
            assert adam_of(optimizer) == "torch's AdamW" and fused == (
                "FusedAdam" in repr(optimizer.chained_optimizers[0].optimizer)
            )
            prepare_model_for_training(chunks, optimizer)
            if place:
                load_checkpoint(find_checkpoint(place), chunks, optimizer)
            seen = []
            for _ in range(2):
                set_lr(optimizer, 1e-2, 0.1)
                sums, norm = train_step(chunks, optimizer, batch, 1, recipe, world)
                seen += [float(sums[0, 0]), float(norm)]
            Checkpointer(target, Checkpoints(asynchronous=False)).save(0, chunks, optimizer, {}, "")
            return seen

    out = {}
    for order in (
        ("torch", "torch", "torch"),
        ("torch", "fused", "torch"),
        ("fused", "torch", "fused"),
    ):
        found, place = [], None
        for i, name in enumerate(order):
            target = Path(folder, "-".join(order), str(i))
            target.mkdir(parents=True)
            found += two_steps(name, place, target)
            place = target
        out["-".join(order)] = found
    return out


@pytest.mark.parametrize(
    ("distributed", "compute"), [(True, "bf16"), (False, "bf16"), (False, "fp32")]
)
def test_a_run_goes_on_with_another_adam(distributed: bool, compute: str, tmp_path: Path) -> None:
    (found,) = run_on(1, losses, str(tmp_path), distributed, compute)
    expected = found.pop("torch-torch-torch")
    assert expected[-2] < 0.9 * expected[0]
    for order, losses_and_norms in found.items():
        np.testing.assert_allclose(
            losses_and_norms, expected, rtol=1e-4 if compute == "fp32" else 1e-2, err_msg=order
        )


def test_a_checkpoint_of_other_groups_is_refused_with_the_keys() -> None:
    from megacode.megatron.optimizer_state import other_multipliers

    def groups(*pairs: tuple[float, float]) -> list[dict[str, float]]:
        return [{"lr_mult": rate, "wd_mult": decay} for rate, decay in pairs]

    run = SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups((1.0, 1.0), (1.0, 0.0))))
    kept = groups((1.0, 0.0), (1.0, 1.0), (0.5, 1.0))
    assert other_multipliers(run, {"optimizer": {"param_groups": kept}}) is None
    assert other_multipliers(run, {"param_groups": kept}) is None
    said = other_multipliers(run, {"optimizer": {"param_groups": kept[1:]}})
    assert said and all(
        part in said for part in ("optimizer.groups", "model.mup", "0.5 and 1", "initialize_from")
    )
