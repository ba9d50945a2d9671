"""A master weight is its bf16 weight and a remainder, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from megacode.megatron.optimizer_state import (
    _masters_to_remainders,
    join,
    remainders_to_masters,
    split,
)


def test_a_master_weight_is_the_nearest_weight_and_a_remainder() -> None:
    masters = torch.cat(
        [
            torch.randn(100_000) * 0.02,
            torch.randint(-(2**31), 2**31 - 1, (100_000,)).to(torch.int32).view(torch.float32),
            torch.tensor(
                [0.0, -0.0, 1.0, -1.0, 2**-140, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8]
            ),  # the last three are ties
        ]
    )
    masters = masters[masters.abs() < 3e38]
    weights, remainders = split(masters)
    assert weights.dtype == torch.bfloat16 and remainders.dtype == torch.int16
    assert torch.equal(join(weights, remainders).view(torch.int32), masters.view(torch.int32))
    assert torch.equal(
        (weights.float() - masters).abs(), (masters.bfloat16().float() - masters).abs()
    )


def test_checkpoints_hold_masters_and_runs_remainders() -> None:
    """As Megatron-Core hands them over: remainders as float32 on the CPU to write, what was read as float32."""
    masters = torch.randn(2, 3)
    weight, remainder = (part.reshape(2, 3) for part in split(masters.flatten()))
    lean = SimpleNamespace(
        optimizer=SimpleNamespace(store_param_remainders=True),
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=True),
        buffers=[SimpleNamespace(param_index_map={weight: None})],
    )
    written = {"param_state": {0: {"param": SimpleNamespace(data=remainder.float())}}}
    remainders_to_masters(lean, written)
    assert torch.equal(written["param_state"][0]["param"].data, masters)

    read, expected = {"param_state": {0: {"param": masters.clone()}}}, weight.clone()
    weight.zero_()
    _masters_to_remainders(lean, read)
    assert torch.equal(read["param_state"][0]["param"], remainder) and torch.equal(weight, expected)

    lean.optimizer.store_param_remainders = False
    remainders_to_masters(lean, written)
    assert torch.equal(written["param_state"][0]["param"].data, masters)
