"""The verb `doctor`: what is installed here, what each missing piece would give, and how to get it.

Packages that often break are imported in processes of their own: one can raise, crash or hang.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version
from rich.table import Table
from rich.text import Text

from megacode.corpus.workers import available_cores
from megacode.errors import UserError
from megacode.plan.hardware import Hardware, fp8_refusal
from megacode.terminal import print_table, table_console

EXAMPLE = """examples:
  megacode doctor
  srun --nodes 1 megacode doctor        # a compute node may have what a login node lacks
  megacode doctor --json

Marks: ok; ? works, with a remark; - an optional piece is missing or broken; ! a needed one is."""

_MARKS = {"ok": "green", "?": "yellow", "-": "dim", "!": "bold red"}
_TORCH = """
import torch
d = torch.distributed
facts.update(cuda=torch.version.cuda, nccl=d.is_nccl_available(), gloo=d.is_gloo_available())
if facts["nccl"] and torch.cuda.is_available():
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
facts["devices"] = [(d.name, d.total_memory, (d.major, d.minor)) for d in devices]
"""
_ENGINE = """
import transformer_engine.pytorch
from transformer_engine.pytorch.optimizers import FusedAdam
facts["version"] = getattr(transformer_engine, "__version__", "0")
"""
_IMPORTS = {
    "torch": _TORCH,
    "megatron-core": "from megatron.core.models.gpt import GPTModel",
    "transformer-engine": _ENGINE,
    "apex": "from apex.optimizers import FusedAdam",
}
"""Python that imports what is used of a package, and may put JSON-able values into `facts`."""
_GIVES = {
    "": "a part of megacode",
    "huggingface": "running what was exported",
    "tiktoken": "tiktoken vocabularies",
    "harness": "megacode evaluate --harness",
    "studies": "tools/study-data",
    "pairs": "megacode pairs",
    "synthesis": "megacode synthesize",
    "trees": "megacode mix fit with more than five domains",
    "wandb": "logging.wandb",
    "mlflow": "logging.mlflow",
    "cuda": "on CUDA: fused layers, flash attention, FP8, context parallel, FusedAdam",
    "apex": "on CUDA: FusedAdam without Transformer Engine, fused gradient accumulation",
}
"""By the extra of megacode's that a distribution belongs to."""
_GET = {
    "torch": "pip install torch; with a GPU the build for its CUDA (pytorch.org, Get Started)",
    "transformer-engine": "on CUDA: pip install --no-build-isolation 'transformer-engine[pytorch]'",
    "apex": "build NVIDIA's (docs/install.md); `pip install apex` is another package",
}


@dataclass(frozen=True)
class Finding:
    """One line of the answer.

    Attributes:
        mark: a key of _MARKS.
        gives, get: what the piece is for and how to get it, shown where it is not fine.
        facts: what the process that imported it has to say.
    """

    name: str
    mark: str
    found: str
    gives: str = ""
    get: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        return self.mark in ("ok", "?")


def examine() -> dict[str, Finding]:
    """What is here, by name."""
    try:
        required = [Requirement(text) for text in metadata.requires("megacode") or ()]
    except metadata.PackageNotFoundError:
        raise UserError("megacode is not installed: `pip install -e .` in its folder") from None
    required = [one for one in required if extra_of(one) != "test"]
    with ThreadPoolExecutor(max_workers=4) as pool:
        packages = {one.name: one for one in pool.map(look, [*required, Requirement("apex")])}
    torch = packages["torch"]
    others = [
        Finding("Python", "ok", f"{platform.python_version()} in {sys.prefix}"),
        Finding("cores", "ok", f"{available_cores()} usable ({platform.machine()})"),
        gpu(torch),
        communication(torch),
        slurm(),
    ]
    return {one.name: one for one in others} | packages


def extra_of(requirement: Requirement) -> str:
    """The extra of megacode's that a requirement belongs to; Apex, which is in none, is its own."""
    match = re.search(r"extra == .(\w+)", str(requirement.marker or ""))
    return match[1] if match else requirement.name if requirement.name == "apex" else ""


def look(requirement: Requirement, seconds: float = 120.0) -> Finding:
    """Which version of a distribution is here, and whether it imports within `seconds`.

    On a cold network file system torch takes half a minute.
    """
    name, extra = requirement.name, extra_of(requirement)
    facts, error = run_python(_IMPORTS[name], seconds) if name in _IMPORTS else ({}, "")
    version: str | None
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:  # built in place, as in some containers, or missing
        version = facts.get("version")
    mark, found = ("-" if extra else "!"), version or "not installed"
    if version and error:
        found += f", broken: {error}"
    elif version and not requirement.specifier.contains(version, prereleases=True):
        mark, found = "?", f"{version}, and {requirement.specifier} is known to work"
    elif version:
        mark = "ok"
    get = _GET.get(name, f"pip install '{f'megacode[{extra}]' if extra else requirement}'")
    return Finding(name, mark, found, _GIVES[extra], get, facts)


def run_python(script: str, seconds: float) -> tuple[dict[str, Any], str]:
    """What a script puts into `facts`, and one line that says why it failed, if it did."""
    # Without the working directory on the path: a folder there may have a package's name.
    begin = "import json, sys\nsys.path = [p for p in sys.path if p]\nfacts = {}\n"
    command = [sys.executable, "-W", "ignore", "-c", f"{begin}{script}\nprint(json.dumps(facts))"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        return dict(json.loads(done.stdout.splitlines()[-1])), ""
    except subprocess.TimeoutExpired:
        return {}, f"its import did not end within {seconds:.0f} s"
    except (IndexError, ValueError):
        # The last `SomeError: ...` of the traceback; its message may have more lines.
        lines = done.stderr.splitlines() or [f"its import ended with code {done.returncode}"]
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
        return {}, textwrap.shorten((errors or lines)[-1], 110, placeholder=" …")


def gpu(torch: Finding) -> Finding:
    gives = "training at full speed, bf16 and FP8; without one all runs on the CPU, slowly"
    if devices := torch.facts.get("devices"):
        name, memory, _ = devices[0]
        found = f"{len(devices)} × {name}, {memory / 1e9:.0f} GB, CUDA {torch.facts['cuda']}"
        return Finding("GPU", "ok", found, gives)
    if not shutil.which("nvidia-smi"):
        return Finding("GPU", "-", "none", gives, "a machine with an NVIDIA GPU")
    get = "torch's build for CUDA (pytorch.org); CUDA_VISIBLE_DEVICES may hide devices"
    return Finding("GPU", "?", "nvidia-smi is here, and torch sees no device", gives, get)


def communication(torch: Finding) -> Finding:
    nccl, gloo = torch.facts.get("nccl"), torch.facts.get("gloo")
    found = " and ".join([*([f"NCCL {nccl}"] if nccl else []), *(["gloo"] if gloo else [])])
    gives = "NCCL: among GPUs; gloo: among processes on CPUs, and stop signals"
    get = "torch's official builds have gloo, its CUDA builds on Linux also NCCL"
    mark = "!" if not gloo else "ok" if nccl else "-"
    return Finding("communication", mark, found or "none", gives, get)


def slurm() -> Finding:
    gives = "runs over many machines, queued and requeued (torchrun needs no Slurm)"
    if not shutil.which("sbatch"):
        return Finding("Slurm", "-", "no sbatch on the path", gives, "a cluster's login node")
    job = os.environ.get("SLURM_JOB_ID")
    return Finding("Slurm", "ok", f"inside job {job}" if job else "sbatch; not inside a job", gives)


def training_would_use(found: dict[str, Finding]) -> dict[str, str]:
    """What a run on this machine computes with, by the rules of `megacode.megatron`."""
    if not (found["torch"].works and found["megatron-core"].works):
        return {"training": "not possible before torch and megatron-core import"}
    facts = found["torch"].facts
    if not facts["devices"]:
        return {
            "device": f"CPU, {available_cores()} cores",
            "communication": "gloo",
            "layers": "Megatron-Core's local ones",
            "Adam": "torch's AdamW",
            "precision": "fp32, bf16",
        }
    device, _, capability = facts["devices"][0]
    engine = found["transformer-engine"]
    adams = {"Transformer Engine": engine, "Apex": found["apex"]}
    adam = next((f"FusedAdam of {name}" for name, one in adams.items() if one.works), None)
    version = release(engine.found) if engine.works else None
    hardware = Hardware(device, tuple(capability), release(facts["cuda"]), version)
    kinds = ("delayed", "tensorwise", "blockwise", "mxfp8")
    fp8 = [f"fp8 ({kind})" for kind in kinds if fp8_refusal(kind, hardware) is None]
    return {
        "device": f"{len(facts['devices'])} × {device}",
        "communication": "NCCL",
        "layers": "Transformer Engine's" if engine.works else "Megatron-Core's local ones",
        "Adam": adam or "torch's AdamW",
        "precision": ", ".join(["fp32", "bf16", *fp8]),
    }


def release(version: str | None) -> tuple[int, ...] | None:
    """`12.9` -> (12, 9)."""
    return Version(version.split(",")[0]).release if version else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def run(args: argparse.Namespace) -> int:
    found = examine()
    use = training_would_use(found)
    if args.json:
        findings = [asdict(finding) for finding in found.values()]
        print(json.dumps({"findings": findings, "training": use}, indent=1))
        return 0
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for no_wrap in (True, True, False):
        table.add_column(no_wrap=no_wrap)
    for finding in found.values():
        mark = Text(finding.mark, _MARKS[finding.mark])
        table.add_row(mark, finding.name, Text(finding.found))
        if finding.mark != "ok":
            table.add_row("", "", Text(f"gives: {finding.gives}\nget it: {finding.get}", "dim"))
    table.add_row("", Text("\nTraining here would use", "bold"), "")
    for name, value in use.items():
        table.add_row("", name, value)
    print_table(table_console(), table)
    return 0
