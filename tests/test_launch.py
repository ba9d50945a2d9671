"""What a process learns from its launcher: torchrun's and Slurm's variables, or none; contradictions are told in a sentence."""

from __future__ import annotations

import pytest

from megacode.errors import UserError
from megacode.megatron import distributed
from megacode.megatron.distributed import Launch, read_launch

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "1234",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NODELIST": "gpu[003-007,012],login1", "SLURM_JOB_NODELIST": "gpu[001-012]",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container on a node: the node list has to be read by hand."""
    monkeypatch.setenv("PATH", "")


def test_torchrun() -> None:
    assert read_launch(TORCHRUN) == Launch(5, 8, 1, "node1", 1234, "torchrun")


def test_torchrun_without_an_address_means_this_machine() -> None:
    assert read_launch({"RANK": "0", "WORLD_SIZE": "2"}) == Launch(
        0, 2, 0, "127.0.0.1", 29500, "torchrun"
    )


def test_slurm() -> None:
    assert read_launch(SLURM) == Launch(9, 16, 1, "gpu003", 20000 + 4711, "slurm")


def test_slurm_takes_an_address_and_a_port_that_are_given() -> None:
    launch = read_launch(
        {**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000", "WORLD_SIZE": "16"}
    )
    assert (launch.address, launch.port) == ("10.0.0.1", 5000)


def test_a_step_smaller_than_its_job_counts_its_own_tasks_and_nodes() -> None:
    launch = read_launch({**SLURM, "SLURM_NTASKS": "32"})
    assert (launch.world_size, launch.address) == (16, "gpu003")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login1", "login1"),
        ("a1,b2", "a1"),
        ("gpu[7,9]", "gpu7"),
        ("gpu[003-007,012],login1", "gpu003"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert read_launch({**SLURM, "SLURM_STEP_NODELIST": nodes}).address == first


def test_scontrol_knows_better(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> object:
        assert command == ["scontrol", "show", "hostnames", SLURM["SLURM_STEP_NODELIST"]]
        return type("Done", (), {"stdout": "rack1-gpu3\nrack1-gpu4\n"})

    monkeypatch.setattr(distributed.subprocess, "run", run)
    assert read_launch(SLURM).address == "rack1-gpu3"


def test_jobs_that_share_a_node_do_not_share_a_port() -> None:
    ports = {read_launch({**SLURM, "SLURM_JOB_ID": str(job)}).port for job in range(100, 120)}
    assert len(ports) == 20 and all(1024 < port < 65536 for port in ports)


def test_torchrun_inside_a_slurm_step_is_torchrun() -> None:
    assert read_launch({**SLURM, **TORCHRUN}).launcher == "torchrun"


@pytest.mark.parametrize(
    "environment", [{}, {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}]
)
def test_without_a_launcher_there_is_one_process(environment: dict[str, str]) -> None:
    """A job script itself (no step) is no task of a launcher."""
    assert read_launch(environment) == Launch(0, 1, 0, "127.0.0.1", 0, "single process")


def test_the_environment_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert read_launch().rank == 5


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RANK": "1"}, "RANK is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is set and RANK is not"),
        ({**TORCHRUN, "RANK": "8"}, "RANK is 8 of WORLD_SIZE 8"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK is -1 of WORLD_SIZE 8"),
        ({**TORCHRUN, "RANK": "zero"}, "RANK must be a number, not 'zero'"),
        ({**TORCHRUN, "RANK": ""}, "RANK must be a number, not ''"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK is 4 of 4 processes"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT must be a number"),
        ({**SLURM, "SLURM_PROCID": "16"}, "SLURM_PROCID is 16 of SLURM_NTASKS 16"),
        ({**SLURM, "SLURM_LOCALID": "x"}, "SLURM_LOCALID must be a number"),
        ({**SLURM, "WORLD_SIZE": "4"}, "WORLD_SIZE is 4 inside a Slurm step of 16 tasks"),
        ({**SLURM, "RANK": "0"}, "RANK is 0 inside a Slurm step of 16 tasks"),
    ],
)
def test_what_cannot_be_is_told_in_one_sentence(environment: dict[str, str], told: str) -> None:
    with pytest.raises(UserError) as error:
        read_launch(environment)
    assert told in str(error.value) and "\n" not in str(error.value) and ";" in str(error.value)


def test_node_names_that_the_network_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise OSError("Name or service not known")

    known = distributed.reachable(read_launch({**SLURM, "MASTER_ADDR": "127.0.0.1"}), SLURM)
    assert known == "127.0.0.1"
    monkeypatch.setattr(distributed.socket, "getaddrinfo", unknown)
    found = distributed.reachable(
        read_launch(SLURM), {**SLURM, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}
    )
    assert found == "10.0.0.7"
    for environment in (SLURM, TORCHRUN):
        with pytest.raises(
            UserError, match=r"cannot find the first node, '(gpu003|node1)'.*set MASTER_ADDR"
        ):
            distributed.reachable(read_launch(environment), environment)


def test_each_process_has_a_gpu_of_its_own() -> None:
    torchrun, task = read_launch(TORCHRUN), read_launch(SLURM)
    assert (
        distributed.local_device(torchrun, 8, {}) == 1
        and distributed.local_device(task, 8, {}) == 1
    )
    # Slurm's --gpus-per-task=1: the second task of a node sees its own GPU, alone.
    assert distributed.local_device(task, 1, {"CUDA_VISIBLE_DEVICES": "1"}) == 0
    for launch, visible in ((torchrun, "0"), (task, "")):
        with pytest.raises(
            UserError, match="local process 1 has no GPU of its own, this machine shows 1"
        ):
            distributed.local_device(launch, 1, {"CUDA_VISIBLE_DEVICES": visible})
