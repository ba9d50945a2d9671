"""The doctor answers on any machine: what is missing, broken, crashing or slow becomes a line, never an error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megacode.cli import doctor
from megacode.cli.doctor import Finding, examine, show, training_would_use
from megacode.cli.main import main
from megacode.packages import PACKAGES, Package, Probe, probe

HERE = {package.name: package for package in PACKAGES}
FINE = {name: Probe("1.0", {}, None, absent=False) for name in HERE}
CUDA = {"version": "2.6.0", "build": "12.6", "gloo": True, "nccl": True, "nccl_version": "2.21.5",
        "devices": [{"name": "NVIDIA H100 80GB HBM3", "memory": 85e9, "capability": "9.0"}] * 8}  # fmt: skip
CPU = {"version": "2.6.0+cpu", "build": None, "gloo": True, "nccl": False, "devices": []}
GONE = Probe(None, {}, None, absent=True)


def package(module: str, script: str = "import json, {module}; print(json.dumps({{}}))") -> Package:
    return Package(
        "Training",
        module,
        module,
        None,
        script.format(module=module),
        "something",
        "from somewhere",
    )


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))


def test_an_absent_package_is_absent() -> None:
    assert probe(package("no_such_package_here")) == GONE


def test_a_working_package_is_fine() -> None:
    assert probe(HERE["psutil"]).error is None


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise RuntimeError('wrong\\ndriver')", "RuntimeError: wrong"),
        ("import no_such_library_anywhere", "No module named 'no_such_library_anywhere'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
        ("import sys; sys.exit(3)", "code 3"),
        ("print('x' * 10); raise SystemExit", "unexpected|code 0"),
        ("import time; time.sleep(60)", "did not end within 1 s"),
        ("def (", "SyntaxError"),
    ],
)
def test_a_broken_package_is_a_short_clause(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, said: str
) -> None:
    install(monkeypatch, tmp_path, "broken_thing", code)
    result = probe(package("broken_thing"), seconds=1 if "sleep" in code else 20)
    assert result.error and len(result.error) <= 110 and "\n" not in result.error
    assert any(part in result.error for part in said.split("|"))


def test_the_package_named_apex_that_is_not_nvidias_is_recognised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, tmp_path, "apex", "")
    result = probe(HERE["Apex (NVIDIA's)"])
    finding = doctor._package(HERE["Apex (NVIDIA's)"], result, {})
    assert finding.state == "missing" and "not NVIDIA's" in finding.found


def test_a_package_hidden_from_this_process_is_still_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As `megacode.megatron.cpu` hides Transformer Engine and Apex from Megatron-Core where there is no device.
    install(monkeypatch, tmp_path, "hidden_thing", "")
    monkeypatch.setitem(sys.modules, "hidden_thing", None)
    assert probe(package("hidden_thing")) == Probe(None, {}, None, absent=False)


def test_training_uses_what_megatron_core_would_take() -> None:
    with_gpu = {**FINE, "torch": Probe("2.6.0", CUDA, None, absent=False)}
    assert training_would_use(with_gpu)["precision"] == "fp32, bf16, fp8 (delayed)"
    assert training_would_use(with_gpu) | {"precision": ""} == {
        "device": "8 × NVIDIA H100 80GB HBM3", "communication": "NCCL", "layers": "Transformer Engine's",
        "Adam": "FusedAdam of Transformer Engine", "precision": "",
    }  # fmt: skip
    without = {**with_gpu, "Transformer Engine": GONE}
    assert training_would_use(without)["Adam"] == "FusedAdam of Apex (NVIDIA's)"
    assert "local" in training_would_use(without)["layers"]
    on_cpu = {
        **FINE,
        "torch": Probe("2.6.0", CPU, None, absent=False),
        "Transformer Engine": GONE,
        "Apex (NVIDIA's)": GONE,
    }
    assert training_would_use(on_cpu)["Adam"] == "torch's AdamW"
    assert training_would_use(on_cpu)["communication"] == "gloo"
    assert "not possible" in training_would_use({**FINE, "torch": GONE})["training"]


@pytest.mark.parametrize(
    ("version", "fits"), [("2.9.1", False), ("2.10.0", True), ("2.12.0", True), ("2.13.0", False)]
)
def test_transformer_engine_versions_that_pair_with_megatron_core(version: str, fits: bool) -> None:
    finding = doctor._package(
        HERE["Transformer Engine"], Probe(version, {}, None, absent=False), {}
    )
    assert (finding.state == "ok") is fits


def test_nothing_installed_at_all_is_still_an_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "probe", lambda package: GONE)
    findings, use = examine()
    show(findings, use)
    printed = capsys.readouterr().out
    assert {f.state for f in findings if f.name in ("torch", "megatron-core")} == {"needed"}
    assert "get it: pip install torch" in printed and "not possible" in printed


def test_every_look_at_the_machine_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **more: Any) -> Any:
        raise OSError("nothing works")

    monkeypatch.setattr(doctor, "probe", lambda package: GONE)
    for name in ("disk_usage", "which"):
        monkeypatch.setattr(doctor.shutil, name, fail)
    monkeypatch.setattr(doctor.Path, "read_text", fail)
    findings, _ = examine()
    assert sum("could not be looked at" in finding.found for finding in findings) >= 3


def test_slurm_says_what_job_it_is_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = tmp_path / "sbatch"
    command.write_text("#!/bin/sh\necho slurm 24.05.1\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    assert doctor._slurm().found == "slurm 24.05.1; not inside a job"
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    assert doctor._slurm().found == "slurm 24.05.1; job 17, 4 nodes"


def test_the_gpu_line_names_the_dense_peak() -> None:
    found = doctor._gpu(CUDA).found
    assert (
        "8 × NVIDIA H100 80GB HBM3" in found
        and "989 TFLOP/s in bf16" in found
        and "1,979 in FP8" in found
    )


def test_the_verb_answers_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    states = {finding["name"]: finding["state"] for finding in answer["findings"]}
    assert states["Python"] == "ok" and states["torch"] in ("ok", "remark")
    assert set(answer["training"]) == {"device", "communication", "layers", "Adam", "precision"}
    assert all(Finding(**finding).found for finding in answer["findings"])
