"""What CUDA and Transformer Engine are told through the environment, before a process touches its device."""

from __future__ import annotations

from megacode.recipe.schema import Parallel

_NORM_MARGIN = "16"


def cuda_environment(
    parallel: Parallel, world_size: int, capability: tuple[int, int]
) -> dict[str, str]:
    """Variables for this layout on devices of a compute capability, as NVIDIA's published configurations have them
    (Megatron-Bridge, `scripts/performance/perf_plugins.py`).

    Kernels of a process reach its device through a number of queues (8, if nothing is said). Up to Hopper, tensor- and context-
    parallel exchanges overlap with products only where they begin in the order in which the host sent them: one queue. Later
    devices keep that order by themselves, and streams that share a queue would wait for each other. Where ranks exchange
    anything, norms leave some multiprocessors to the exchange.
    """
    variables = {}
    if capability >= (10, 0):
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    elif parallel.tensor > 1 or parallel.context > 1:
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if world_size > 1:
        variables["NVTE_FWD_LAYERNORM_SM_MARGIN"] = variables["NVTE_BWD_LAYERNORM_SM_MARGIN"] = (
            _NORM_MARGIN
        )
    return variables
