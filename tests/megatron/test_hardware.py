"""What CUDA is told before a process touches its device. On a device: tests/gpu."""

from __future__ import annotations

import pytest

from megacode.megatron.hardware import cuda_environment
from megacode.recipe.schema import Parallel

HOPPER, BLACKWELL = (9, 0), (10, 0)


@pytest.mark.parametrize(
    ("parallel", "capability", "queues"),
    [
        (Parallel(), HOPPER, None),
        (Parallel(pipeline=2), HOPPER, None),
        (Parallel(tensor=2), HOPPER, "1"),
        (Parallel(tensor=2), (8, 0), "1"),
        (Parallel(context=2), HOPPER, "1"),
        (Parallel(tensor=2), BLACKWELL, "32"),
        (Parallel(), BLACKWELL, "32"),
    ],
)
def test_one_queue_where_exchanges_overlap_with_products(
    parallel: Parallel, capability: tuple[int, int], queues: str | None
) -> None:
    assert cuda_environment(parallel, 8, capability).get("CUDA_DEVICE_MAX_CONNECTIONS") == queues


def test_norms_leave_room_where_ranks_exchange() -> None:
    margins = {"NVTE_FWD_LAYERNORM_SM_MARGIN", "NVTE_BWD_LAYERNORM_SM_MARGIN"}
    assert cuda_environment(Parallel(), 1, HOPPER) == {}
    assert cuda_environment(Parallel(), 8, HOPPER).keys() == margins
