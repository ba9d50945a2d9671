"""A real Slurm of two nodes on this machine, in a folder of its own, and a checkout to submit jobs from."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sentencepiece

from megacode.launch import free_port
from tests.e2e.conftest import ROOT, VOCAB, build_corpora, documents

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
# Requeued jobs wait for their old credential to expire: two minutes where nothing else is said.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
ReturnToService=2
KillWait=15
MinJobAge=300
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=0
SlurmdParameters=config_overrides
MessageTimeout=5
SlurmdTimeout=15
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=4 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=UNLIMITED
"""
CGROUP = "CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\nConstrainCores=no\n"


def wait_for(what: Callable[[], object], seconds: float, told: Callable[[], object] = str) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"did not happen within {seconds} s\n{told()}"
        time.sleep(0.1)


@dataclass
class Cluster:
    """The Slurm's daemons: started here, ended by their process ids."""

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, key: str, name: str, *arguments: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as log:
            command = [_program(name), *arguments]
            self.daemons[key] = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True
            )

    def start_node(self, name: str) -> None:
        self.start(name, "slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", name)

    def kill_node(self, name: str) -> None:
        """Let a node fall silent, as one without power does."""
        self.daemons[name].kill()
        self.daemons[name].wait()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """munged, slurmctld and two slurmds; SLURM_CONF names them."""
    missing = [name for name in NEEDED if not _program(name)]
    if missing or os.geteuid():
        why = (
            f"{', '.join(missing)} not installed (Debian: munge slurmctld slurmd slurm-client)"
            if missing
            else "not root"
        )
        pytest.skip(f"a Slurm cannot be started here: {why}")
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    for name in ("state", "spool-n1", "spool-n2", "cgroup"):
        (folder / name).mkdir()
    names = {"folder": folder, "host": socket.gethostname().split(".")[0]}
    ports = {name: free_port() for name in ("port", "port1", "port2")}
    (folder / "slurm.conf").write_text(CONF.format(**names, **ports))
    (folder / "cgroup.conf").write_text(CGROUP.format(**names))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
    cluster = Cluster(folder)
    try:
        cluster.start(
            "munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files
        )
        wait_for((folder / "munge.socket").exists, 10)
        cluster.start("slurmctld", "slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        cluster.start_node("n1")
        cluster.start_node("n2")
        wait_for(
            lambda: sh("sinfo -h -o %T").strip() == "idle",
            40,
            lambda: (folder / "slurmctld.log").read_text()[-3000:],
        )
        yield cluster
        subprocess.run(["scancel", "--user=root"], timeout=20)
        wait_for(lambda: not sh("squeue -h").strip(), 40)
    finally:
        for daemon in reversed(cluster.daemons.values()):
            daemon.send_signal(signal.SIGTERM)
        for daemon in cluster.daemons.values():
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
        del os.environ["SLURM_CONF"]


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


def sh(command: str) -> str:
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60
    ).stdout


RECIPE = """
name: tiny
seed: 7
tokenizer: {{path: {data}/tokenizer.model}}
model: {{layers: 2, hidden_size: 32, heads: 2}}
precision: fp32
sources:
  code: {{path: {data}/code, domain: code, validation: {data}/code_valid}}
  text: {{path: {data}/text, domain: text, validation: {data}/text_valid}}
phases:
  - name: phase1
    steps: 12
    batch_size: 8
    sequence_length: 32
    mixture: {{sources: {{text: 0.9, code: 0.1}}}}
    learning_rate: {{schedule: linear, peak: 0.004, warmup: 2, decay_steps: 40}}
  - name: phase2
    steps: 16
    batch_size: 8
    sequence_length: 32
    mixture: {{sources: {{text: 0.4, code: 0.6}}}}
    learning_rate: {{schedule: linear, peak: 0.003}}
  - name: phase3
    steps: 12
    batch_size: 8
    sequence_length: 32
    mixture: {{sources: {{text: 0.2, code: 0.8}}}}
    learning_rate: {{schedule: cosine, peak: 0.003}}
    optimizer_state: fresh
parallel: {{micro_batch_size: 2}}
checkpoints: {{every: 4}}
evaluation: {{samples: 4}}
logging: {{every: 1, tensorboard: false}}
"""


@dataclass(frozen=True)
class Checkout:
    """Where jobs are submitted: the real scripts, a tiny recipe, and runs."""

    path: Path

    def run(self, name: str) -> Path:
        return self.path / "runs" / name

    def submit(self, command: str) -> int:
        """Run a command here that prints a job's number last."""
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])

    def log(self, job: int) -> str:
        return "".join(path.read_text() for path in self.path.glob(f"*-{job}.log"))


FLAGS = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=0 --time=10"


@pytest.fixture(scope="session")
def checkout(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    sets = {
        "code": documents(1, 300, 10, 140), "code_valid": documents(2, 500, 10, 140),
        "text": documents(3, 300, 140, 300), "text_valid": documents(4, 500, 140, 300),
    }  # fmt: skip
    build_corpora(folder, sets)
    words = (" ".join(f"{name}{number}" for name in ("ab", "cd", "ef")) for number in range(500))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words, model_prefix=str(folder / "tokenizer"), vocab_size=VOCAB, byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    (folder / "tiny.yaml").write_text(RECIPE.format(data=folder))
    # What a user edits.
    cluster = folder / "slurm/cluster.sh"
    text = cluster.read_text()
    for old, new in (
        (
            "source .venv/bin/activate",
            f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT} OMP_NUM_THREADS=1",
        ),
        ("train_flags=()", f"train_flags=({FLAGS})"),
        ("sbatch_flags=()", "sbatch_flags=(--gpus-per-node=0)"),
    ):
        assert text.count(old) == 1, "slurm/cluster.sh has changed: change this test with it"
        text = text.replace(old, new)
    cluster.write_text(text)
    return Checkout(folder)
