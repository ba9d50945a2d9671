"""From a launcher's environment to processes, devices and Megatron-Core's process groups."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch

from megacode.errors import UserError
from megacode.launch import free_port
from megacode.megatron import cpu
from megacode.megatron.hardware import cuda_environment
from megacode.recipe.schema import Parallel, Recipe

_START = "start with torchrun, srun or `megacode train --processes N`"

# --------------------------------------------------------------------------------------- launchers


@dataclass(frozen=True)
class Launch:
    """Where this process stands among its peers, as its launcher told it."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    launcher: str


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Read `torchrun`'s variables, else Slurm's (`srun` with one task a process), else a single
    process.

    Raises:
        UserError: a launcher's variables are incomplete, not numbers, or contradict each other.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        launch = Launch(
            rank=_number(env, "RANK"),
            world_size=_number(env, "WORLD_SIZE"),
            local_rank=_number(env, "LOCAL_RANK", 0),
            address=env.get("MASTER_ADDR", "127.0.0.1"),
            port=_number(env, "MASTER_PORT", 29500),
            launcher="torchrun",
        )
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return _checked(launch, names, _number(env, "LOCAL_WORLD_SIZE", 0))
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        return _checked(_slurm_launch(env), names)
    for there, missing in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if there in env:
            raise UserError(
                f"environment: {there} is set and {missing} is not; {_START}, or unset {there} for "
                "a single process"
            )
    return Launch(0, 1, 0, "127.0.0.1", 0, "single process")


def _slurm_launch(env: Mapping[str, str]) -> Launch:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
    # A job script may export WORLD_SIZE for its tasks, but not RANK: it would be one for all.
    if "RANK" in env or _number(env, "WORLD_SIZE", size) != size:
        name = "RANK" if "RANK" in env else "WORLD_SIZE"
        raise UserError(
            f"environment: {name} is {env[name]} inside a Slurm step of {size} tasks, so it is not "
            f"clear who started this process; unset {name} for srun, or start torchrun in the step"
        )
    first = _first_slurm_host(nodes) if nodes else "127.0.0.1"
    return Launch(
        rank=_number(env, "SLURM_PROCID"),
        world_size=size,
        local_rank=_number(env, "SLURM_LOCALID", 0),
        address=env.get("MASTER_ADDR") or first,
        # Jobs that share a node must not share a port; the job id tells them apart.
        port=_number(env, "MASTER_PORT", 20000 + _number(env, "SLURM_JOB_ID", 0) % 20000),
        launcher="slurm",
    )


def _first_slurm_host(nodelist: str) -> str:
    """First host of a Slurm node list such as `gpu[003-007,012],login1`."""
    try:
        command = ["scontrol", "show", "hostnames", nodelist]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return shown.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodelist)
        return (match[1] + (match[2] or "")) if match else socket.gethostname()


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A launcher's variable as a number; empty counts as not set where there is a default."""
    text = env.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise UserError(f"environment: {name} must be a number, not {text!r}; {_START}") from None


def _checked(launch: Launch, names: tuple[str, str, str], local_size: int = 0) -> Launch:
    """`launch`, if its numbers can be true together.

    Args:
        names: of the variables for rank, world size and local rank.
        local_size: processes of this node; 0 if not known.
    """
    rank, size, local = launch.rank, launch.world_size, launch.local_rank
    if not 0 <= rank < size:
        wrong = f"{names[0]} is {rank} of {names[1]} {size}"
    elif not 0 <= local < (local_size or size):
        wrong = f"{names[2]} is {local} of {local_size or size} processes"
    elif not 0 < launch.port < 65536:
        wrong = f"MASTER_PORT is {launch.port}"
    else:
        return launch
    raise UserError(
        f"environment: {wrong}, which cannot be; {_START}, or unset what an earlier launcher left"
    )


def reachable(launch: Launch, env: Mapping[str, str]) -> str:
    """The launch's address, or the one that srun knows where the network knows no node names.

    Raises:
        UserError: neither is on the network; torch would try for minutes, with a worse message.
    """
    try:
        socket.getaddrinfo(launch.address, launch.port or None)
        return launch.address
    except OSError:
        if launch.launcher == "slurm" and env.get("SLURM_LAUNCH_NODE_IPADDR"):
            return env["SLURM_LAUNCH_NODE_IPADDR"]  # of srun in a job script: the first node
    raise UserError(
        f"environment: rank {launch.rank} cannot find the first node, {launch.address!r}, on the "
        "network; set MASTER_ADDR to an address of it that all nodes reach"
    )


def local_device(launch: Launch, devices: int, env: Mapping[str, str]) -> int:
    """Number of this process's GPU among the `devices` that it sees.

    Raises:
        UserError: there are fewer than local processes.
    """
    if launch.local_rank < devices:
        return launch.local_rank
    # Slurm's --gpus-per-task=1 (or --gpu-bind=single:1): each task sees the one that is its own.
    if devices == 1 and launch.launcher == "slurm" and env.get("CUDA_VISIBLE_DEVICES"):
        return 0
    raise UserError(
        f"rank {launch.rank}: local process {launch.local_rank} has no GPU of its own, this "
        f"machine shows {devices}; start one process a GPU"
    )


# ------------------------------------------------------------------------------------------ groups


@dataclass(frozen=True)
class World:
    """This process in the initialised parallel layout, in Megatron-Core's order tp-cp-dp-pp."""

    rank: int
    size: int
    device: torch.device
    tensor_rank: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    context_rank: int
    context_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1


def initialize(
    parallel: Parallel, seed: int, launch: Launch | None = None, cuda_graphs: bool = False
) -> World:
    """Start torch.distributed (NCCL on CUDA, else gloo) and Megatron-Core's groups; seed this rank.

    Args:
        cuda_graphs: random generators that recorded graphs can use.

    Raises:
        UserError: the number of processes does not fit the layout, or there are fewer devices than
            local processes.
    """
    launch = launch or read_launch()
    model_parallel = parallel.tensor * parallel.pipeline * parallel.context
    if launch.world_size % model_parallel:
        raise UserError(
            f"parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} x context "
            f"{parallel.context} needs a multiple of {model_parallel} processes, and there are "
            f"{launch.world_size}; start that many or change the layout"
        )
    cpu.quiet()
    cuda = torch.cuda.is_available()
    if cuda:
        device = torch.device("cuda", local_device(launch, torch.cuda.device_count(), os.environ))
        capability = torch.cuda.get_device_capability(device)
        for name, value in cuda_environment(parallel, launch.world_size, capability).items():
            os.environ.setdefault(name, value)
        torch.cuda.set_device(device)
    else:
        cpu.install()
        device = torch.device("cpu")

    port = launch.port or free_port()
    # torch's rendezvous reads the environment, and shares the store of torchrun's agent.
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = reachable(launch, os.environ), str(port)
    torch.distributed.init_process_group(
        backend="nccl" if cuda else "gloo",
        init_method="env://",
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(minutes=parallel.timeout_minutes),
        device_id=device if cuda else None,
    )

    from megatron.core import parallel_state, tensor_parallel

    if launch.rank:
        logging.getLogger("megatron").setLevel(logging.ERROR)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=max(1, round(parallel.timeout_minutes)),
    )
    torch.manual_seed(seed % 2**63)
    # So that Megatron-Core's random tracker knows its generators; with dropout, `seed_step` seeds.
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed % 2**31, te_rng_tracker=cuda_graphs, use_cudagraphable_rng=cuda_graphs
    )
    return current_world()


def current_world() -> World:
    """This process's place in the initialised layout, as Megatron-Core knows it."""
    from megatron.core import parallel_state

    cuda = torch.cuda.is_available()
    return World(
        rank=torch.distributed.get_rank(),
        size=torch.distributed.get_world_size(),
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(with_context_parallel=False),
        data_size=parallel_state.get_data_parallel_world_size(with_context_parallel=False),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
    )


def seed_step(recipe: Recipe, step: int, world: World) -> None:
    """Make dropout a function of (seed, step, place in the layout), as a resumed run needs it.

    Without dropout a step draws nothing, and this does nothing.
    """
    if recipe.model.dropout or recipe.model.attention_dropout:
        from megatron.core import tensor_parallel

        value = dropout_seed(recipe.resolved_model_seed, step, world)
        torch.manual_seed(value)
        tensor_parallel.model_parallel_cuda_manual_seed(value)


def dropout_seed(seed: int, step: int, world: World) -> int:
    """Seed of this rank's generators in a step.

    Every part of the batch and every stage has its own, or all would drop the same units.
    Tensor-parallel ranks share one: Megatron-Core makes the difference where there is to be one.
    """
    share = world.data_rank * world.context_size + world.context_rank
    place = share * world.pipeline_size + world.pipeline_rank
    return (seed * 1_000_003 + step * 7_919 + place * 15_485_863) % 2**31


def shutdown() -> None:
    """Leave the process groups in good order. Safe to call twice."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
