"""Looking at installed packages without importing them here: a broken one can raise, crash the interpreter or hang."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

_SECONDS = 90.0
"""For one package to import: on a cold network file system torch takes half a minute."""


@dataclass(frozen=True)
class Package:
    """An optional or needed package: how to look at it, what it gives, how to get it."""

    group: str
    name: str
    module: str
    distribution: str | None
    """Its name for `importlib.metadata`; None: the probe tells the version."""
    probe: str
    """Python that prints a dictionary as JSON."""
    gives: str
    get: str
    needed: bool = False


_ABSENT = {"absent": True}
# Asked in the process of its own too: in this one, `megacode.megatron.cpu` may have hidden a package that is installed.
_SEEK = """
import importlib.util, sys
if importlib.util.find_spec({name!r}) is None:
    sys.exit(print('{{"absent": true}}'))
"""
_TORCH = """
import json, torch
d = torch.distributed
cuda = torch.cuda.is_available()
out = dict(version=torch.__version__, build=torch.version.cuda, gloo=d.is_available() and d.is_gloo_available(),
           nccl=d.is_available() and d.is_nccl_available(), devices=[])
if out["nccl"] and cuda:
    out["nccl_version"] = ".".join(map(str, torch.cuda.nccl.version()))
for i in range(torch.cuda.device_count() if cuda else 0):
    p = torch.cuda.get_device_properties(i)
    out["devices"].append(dict(name=p.name, memory=p.total_memory, capability=f"{p.major}.{p.minor}"))
print(json.dumps(out))
"""
_IMPORT = "import json, {module}; print(json.dumps({{}}))"
_APEX = "import json; from apex.optimizers import FusedAdam; print(json.dumps({}))"
_ENGINE = (
    "import json, transformer_engine.pytorch as te; from transformer_engine.pytorch.optimizers import FusedAdam;"
    "print(json.dumps({}))"
)
_MEGATRON = "import json; from megatron.core.models.gpt import GPTModel; print(json.dumps({}))"

PACKAGES: tuple[Package, ...] = (
    Package("Training", "torch", "torch", "torch", _TORCH, "everything but plan, preprocess and report",
            "pip install torch (on a GPU machine the build for its CUDA version: pytorch.org, Get Started)", needed=True),
    Package("Training", "megatron-core", "megatron.core", "megatron-core", _MEGATRON, "models, parallelism, checkpoints",
            "pip install 'megatron-core>=0.16' (0.17 and later need Python 3.12)", needed=True),
    Package("Training", "Transformer Engine", "transformer_engine", "transformer-engine", _ENGINE,
            "on CUDA: fused layers, flash attention, FP8, context parallel, FusedAdam",
            "on a machine with CUDA: pip install --no-build-isolation 'transformer-engine[pytorch]>=2.10,<2.13'"),
    Package("Training", "Apex (NVIDIA's)", "apex", "apex", _APEX,
            "on CUDA, where Transformer Engine is missing: FusedAdam; fused gradient accumulation",
            "build it from NVIDIA's sources (github.com/NVIDIA/apex) with --cpp_ext --cuda_ext; `pip install apex` is another"),
    Package("Training", "psutil", "psutil", "psutil", _IMPORT, "Megatron-Core's checkpoints need it",
            "pip install psutil", needed=True),
    Package("Tokenizers", "sentencepiece", "sentencepiece", "sentencepiece", _IMPORT, "SentencePiece .model files",
            "pip install sentencepiece", needed=True),
    Package("Tokenizers", "tokenizers", "tokenizers", "tokenizers", _IMPORT, "Hugging Face tokenizer.json files",
            "pip install tokenizers", needed=True),
    Package("Tokenizers", "tiktoken", "tiktoken", "tiktoken", _IMPORT, "tiktoken vocabularies",
            "pip install 'megacode[tiktoken]'"),
)  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """What came of importing a package in a process of its own."""

    version: str | None
    facts: dict[str, Any]
    error: str | None
    """A short clause; None if the import went well."""
    absent: bool


def probe(package: Package, seconds: float = _SECONDS) -> Probe:
    """Look at a package without importing it here."""
    script = (
        package.probe.format(module=package.module) if package.probe is _IMPORT else package.probe
    )
    facts, error = _run_python(
        _SEEK.format(name=package.module.partition(".")[0]) + script, seconds
    )
    if facts == _ABSENT:
        return Probe(None, {}, None, absent=True)
    try:
        version = metadata.version(package.distribution) if package.distribution else None
    except metadata.PackageNotFoundError:
        version = None
    return Probe(version, facts, error, absent=False)


def _run_python(script: str, seconds: float) -> tuple[dict[str, Any], str | None]:
    """(facts, error) of a script that prints one JSON line last."""
    # Without the working directory on the path: a folder there named like a package is not that package.
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        "import sys; sys.path[:] = [p for p in sys.path if p]\n" + script,
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return {}, f"its import did not end within {seconds:.0f} s"
    except OSError as error:
        return {}, f"could not be looked at ({error.strerror})"
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        try:
            return dict(json.loads(lines[-1])), None
        except ValueError:
            return {}, "its import printed something unexpected"
    if done.returncode < 0:
        return {}, f"its import was ended by signal {-done.returncode}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    # A traceback's last `SomeError: ...`; what an exception says may go on below it.
    errors = [
        line
        for line in lines
        if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b", line)
    ]
    said = (errors or lines or [f"its import ended with code {done.returncode}"])[-1]
    return {}, clause(said)


def clause(text: str, width: int = 110) -> str:
    """One line of at most `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
