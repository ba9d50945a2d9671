"""The verb `doctor`: what is installed here, what each missing piece would give, and how to get it.

Every look is isolated (packages are imported in processes of their own, `megacode.packages`); nothing that is wrong
with the machine makes this verb fail.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megacode.packages import PACKAGES, Package, Probe, clause, probe

EXAMPLE = """examples:
  megacode doctor
  srun --nodes 1 megacode doctor        # a compute node may have what a login node lacks
  megacode doctor --json

A mark says how it stands: ok, ? (works, with a remark), - (missing, optional), ! (needed)."""

State = Literal["ok", "remark", "missing", "needed"]
_MARKS: dict[State, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "remark": ("?", "yellow"),
    "missing": ("-", "dim"),
    "needed": ("!", "bold red"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the answer."""

    group: str
    name: str
    state: State
    found: str
    gives: str = ""
    """What it is for; shown where it is missing or wrong."""
    get: str = ""
    """How to get it, or what to do."""


# --------------------------------------------------------------------------------------------------------- findings


def examine() -> tuple[list[Finding], dict[str, str]]:
    """All findings, and what training would use here. Never raises."""
    with ThreadPoolExecutor(max_workers=max(1, min(4, _cores()))) as pool:
        probes = dict(zip((p.name for p in PACKAGES), pool.map(probe, PACKAGES), strict=True))
    torch_facts = probes["torch"].facts
    findings = []
    for look in (_python, _processors, _memory, _disk):
        findings.append(_isolated("Machine", look))
    findings.append(_isolated("Machine", lambda: _gpu(torch_facts)))
    findings += [_package(package, probes[package.name], torch_facts) for package in PACKAGES]
    findings.append(_isolated("Cluster", lambda: _backend(torch_facts, "nccl")))
    findings.append(_isolated("Cluster", lambda: _backend(torch_facts, "gloo")))
    findings.append(_isolated("Cluster", _slurm))
    return findings, training_would_use(probes)


def _isolated(group: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except Exception as error:  # whatever is wrong with this machine, the other answers still stand
        return Finding(
            group, look.__name__.strip("_<>"), "remark", clause(f"could not be looked at: {error}")
        )


def _package(package: Package, result: Probe, torch_facts: dict[str, Any]) -> Finding:
    if result.absent:
        state: State = "needed" if package.needed else "missing"
        return Finding(
            package.group, package.name, state, "not installed", package.gives, package.get
        )
    found = result.facts.get("version") or result.version or "installed"
    if package.module == "apex" and result.error:
        found = f"a package named apex is there ({result.version or 'version unknown'}), without FusedAdam: not NVIDIA's"
        return Finding(package.group, package.name, "missing", found, package.gives, package.get)
    if result.error:
        state = "needed" if package.needed else "remark"
        return Finding(
            package.group,
            package.name,
            state,
            f"{found}, broken: {result.error}",
            package.gives,
            package.get,
        )
    remark = (
        _version_remark(package.name, str(found))
        if package.name != "torch"
        else _torch_remark(torch_facts)
    )
    return Finding(package.group, package.name, "remark" if remark else "ok", str(found), remark)


def _version_remark(name: str, version: str) -> str:
    """A remark where the installed version is outside of what is known to work together."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if len(numbers) < 2:
        return ""
    if name == "megatron-core" and numbers < (0, 16):
        return "megacode needs 0.16 or later"
    if name == "Transformer Engine" and not (2, 10) <= numbers <= (2, 12):
        return "2.10 to 2.12 pair with megatron-core 0.16"
    return ""


def _torch_remark(facts: dict[str, Any]) -> str:
    if facts.get("build") is None and _driver():
        return "the build without CUDA, though there is an NVIDIA driver: install the one for its CUDA version (pytorch.org)"
    if facts.get("build") and not facts.get("devices"):
        return f"built for CUDA {facts['build']}, and no device is visible here"
    return ""


def _python() -> Finding:
    version = platform.python_version()
    old = sys.version_info < (3, 10)
    where = "a virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    return Finding(
        "Machine",
        "Python",
        "needed" if old else "ok",
        f"{version}, {where}",
        "3.10 or later" if old else "",
    )


def _cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def _processors() -> Finding:
    usable, total = _cores(), os.cpu_count() or 1
    found = f"{usable}" if usable == total else f"{usable} of {total} usable by this process"
    return Finding("Machine", "cores", "ok", f"{found} ({platform.machine()})")


def _memory() -> Finding:
    facts = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        facts[name] = int(rest.split()[0]) * 1024
    total, free = facts["MemTotal"], facts["MemAvailable"]
    limit = _memory_limit()
    found = f"{free / 1e9:.0f} of {total / 1e9:.0f} GB free"
    if limit and limit < total:
        found += f", limited to {limit / 1e9:.0f} GB here (cgroup)"
    return Finding("Machine", "memory", "ok", found)


def _memory_limit() -> int | None:
    """Bytes that a container or a job may use, if a cgroup says so."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):  # none there, or "max"
            continue
    return None


def _disk() -> Finding:
    usage = shutil.disk_usage(Path.cwd())
    free = usage.free / 1e9
    found = f"{free:,.0f} of {usage.total / 1e9:,.0f} GB free in {Path.cwd()}"
    scale = "a checkpoint takes about 14 bytes a parameter (bf16 and Adam's state in fp32): 100 GB for 7 B parameters"
    return Finding(
        "Machine", "disk", "remark" if free < 10 else "ok", found, scale if free < 10 else ""
    )


def _driver() -> str | None:
    """The NVIDIA driver's version, as nvidia-smi or the kernel tells it."""
    if shutil.which("nvidia-smi"):
        try:
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
            if done.returncode == 0 and done.stdout.strip():
                return done.stdout.split()[0]
        except (OSError, subprocess.SubprocessError):
            pass
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
        return next(word for word in words if word[0].isdigit() and "." in word)
    except (OSError, StopIteration):
        return None


def _gpu(torch_facts: dict[str, Any]) -> Finding:
    from megacode.plan.devices import device_peak

    driver, devices = _driver(), torch_facts.get("devices") or []
    if not devices:
        gives = (
            "training at full speed, bf16 and FP8; without one everything runs on the CPU, slowly"
        )
        found = f"driver {driver}, and torch sees no device" if driver else "none"
        get = (
            "see torch below, and CUDA_VISIBLE_DEVICES"
            if driver
            else "a machine with an NVIDIA GPU"
        )
        return Finding("Machine", "GPU", "remark" if driver else "missing", found, gives, get)
    first = devices[0]
    same = all(device["name"] == first["name"] for device in devices)
    names = first["name"] if same else ", ".join(device["name"] for device in devices)
    peak = device_peak(first["name"])
    found = f"{len(devices)} × {names}, {first['memory'] / 1e9:.0f} GB each" if same else names
    found += f", CUDA {torch_facts.get('build')}, driver {driver or 'unknown'}, compute capability {first['capability']}"
    if peak and peak.bf16:
        found += f", dense peak {peak.bf16:,.0f} TFLOP/s in bf16" + (
            f" and {peak.fp8:,.0f} in FP8" if peak.fp8 else ""
        )
    return Finding("Machine", "GPU", "ok", found)


def _backend(torch_facts: dict[str, Any], name: str) -> Finding:
    label = {"nccl": "NCCL", "gloo": "gloo"}[name]
    if torch_facts.get(name):
        return Finding("Cluster", label, "ok", torch_facts.get(f"{name}_version", "in torch"))
    gives = {
        "nccl": "communication among GPUs",
        "gloo": "communication among processes on CPUs, and stop signals",
    }[name]
    if not torch_facts:
        return Finding("Cluster", label, "missing", "unknown, for torch does not import", gives)
    get = {
        "nccl": "it comes with torch's CUDA builds on Linux",
        "gloo": "install one of torch's official builds",
    }[name]
    return Finding(
        "Cluster",
        label,
        "missing" if name == "nccl" else "needed",
        "not in this build of torch",
        gives,
        get,
    )


def _slurm() -> Finding:
    gives = "runs over many machines, queued and requeued (torchrun needs no Slurm)"
    if not shutil.which("sbatch"):
        return Finding(
            "Cluster",
            "Slurm",
            "missing",
            "no sbatch on the path",
            gives,
            "a cluster's login node has it",
        )
    version = "installed"
    try:
        done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=20)
        version = done.stdout.strip() or version
    except (OSError, subprocess.SubprocessError):
        return Finding(
            "Cluster",
            "Slurm",
            "remark",
            "sbatch is there and does not answer",
            gives,
            "ask the cluster's support",
        )
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return Finding("Cluster", "Slurm", "ok", f"{version}; not inside a job")
    shape = {
        "nodes": "SLURM_JOB_NUM_NODES",
        "tasks": "SLURM_NTASKS",
        "GPUs a node": "SLURM_GPUS_ON_NODE",
    }
    known = ", ".join(
        f"{os.environ[variable]} {what}"
        for what, variable in shape.items()
        if variable in os.environ
    )
    return Finding("Cluster", "Slurm", "ok", f"{version}; job {job}{', ' + known if known else ''}")


def training_would_use(probes: dict[str, Probe]) -> dict[str, str]:
    """Device, layers, Adam and communication that a run on this machine gets, by the rules of the training code."""
    torch_probe = probes["torch"]
    if (
        torch_probe.absent
        or torch_probe.error
        or probes["megatron-core"].absent
        or probes["megatron-core"].error
    ):
        return {"training": "not possible before torch and megatron-core import"}
    usable = {name: not p.absent and not p.error for name, p in probes.items()}
    devices = torch_probe.facts.get("devices") or []
    engine = bool(devices) and usable["Transformer Engine"]
    # Megatron-Core takes the first Adam that imports, also on a machine without CUDA.
    adam = next(
        (
            f"FusedAdam of {name}"
            for name in ("Transformer Engine", "Apex (NVIDIA's)")
            if usable[name]
        ),
        "torch's AdamW",
    )
    precisions = ["fp32", "bf16", *(_fp8_recipes(probes) if engine else [])]
    return {
        "device": f"{len(devices)} × {devices[0]['name']}" if devices else f"CPU, {_cores()} cores",
        "communication": "NCCL" if devices else "gloo",
        "layers": "Transformer Engine's" if engine else "Megatron-Core's local ones",
        "Adam": adam,
        "precision": ", ".join(precisions),
    }


def _fp8_recipes(probes: dict[str, Probe]) -> list[str]:
    """FP8 recipes that the first device can train by."""
    from megacode.plan.hardware import Hardware, fp8_refusal

    facts = probes["torch"].facts
    first = facts["devices"][0]
    hardware = Hardware(
        first["name"], _numbers(first["capability"]), _numbers(facts.get("build")),
        _numbers(probes["Transformer Engine"].version) or (2, 10),
    )  # fmt: skip
    kinds = ("delayed", "tensorwise", "blockwise", "mxfp8")
    return [f"fp8 ({kind})" for kind in kinds if fp8_refusal(kind, hardware) is None]


def _numbers(version: str | None) -> Any:
    """`12.9` -> (12, 9)."""
    match = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(map(int, match[0].split("."))) if match else None


# ----------------------------------------------------------------------------------------------------------- verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def run(args: argparse.Namespace) -> int:
    findings, use = examine()
    if args.json:
        print(
            json.dumps(
                {"findings": [asdict(finding) for finding in findings], "training": use}, indent=1
            )
        )
    else:
        show(findings, use)
    return 0


def show(findings: list[Finding], use: dict[str, str]) -> None:
    """Print the findings by group, and what training would use."""
    from rich.table import Table
    from rich.text import Text

    from megacode.terminal import print_table, table_console

    console = table_console()
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True, width=2)
    table.add_column(no_wrap=True)
    table.add_column()
    group = ""
    for finding in findings:
        if finding.group != group:
            table.add_row(*(["", "", ""] if group else []))
            table.add_row("", Text(finding.group, style="bold"), "")
            group = finding.group
        mark, style = _MARKS[finding.state]
        table.add_row(Text(mark, style=style), finding.name, Text(finding.found))
        if finding.gives:
            table.add_row("", "", Text(finding.gives, style="dim"))
        if finding.get:
            table.add_row("", "", Text(f"get it: {finding.get}", style="dim"))
    table.add_row("", "", "")
    table.add_row("", Text("Training here would use", style="bold"), "")
    for name, value in use.items():
        table.add_row("", name, value)
    print_table(console, table)
