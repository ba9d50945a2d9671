"""The doctor answers on any machine: what is missing, broken, crashing or slow becomes a line, never an error."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megacode.cli import doctor
from megacode.cli.doctor import Finding, look, training_would_use
from megacode.cli.main import main

CUDA = {"cuda": "12.6", "gloo": True, "nccl": "2.21.5", "devices": [["NVIDIA H100 80GB HBM3", 85e9, [9, 0]]] * 8}  # fmt: skip
CPU = {"cuda": None, "gloo": True, "nccl": False, "devices": []}
FINE = {name: Finding(name, "ok", "2.10.0") for name in doctor._IMPORTS}


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, code: str) -> None:
    """A package of this name and version 1.0, whose import the doctor looks at."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    (folder / f"{name}-1.0.dist-info").mkdir()
    (folder / f"{name}-1.0.dist-info/METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    if name not in doctor._IMPORTS:
        monkeypatch.setitem(doctor._IMPORTS, name, f"import {name}")


def test_an_absent_package_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor._IMPORTS, "no_such_package", "import no_such_package")
    finding = look(Requirement("no_such_package"))
    assert (finding.mark, finding.found) == ("!", "not installed")
    assert finding.get == "pip install 'no_such_package'"
    assert look(Requirement("no_such_package; extra == 'tiktoken'")).mark == "-"


def test_a_working_package_is_fine() -> None:
    assert look(Requirement("psutil>=5")).mark == "ok"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise RuntimeError('wrong\\ndriver')", "RuntimeError: wrong"),
        ("import no_such_library_anywhere", "No module named 'no_such_library_anywhere'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "code -11"),
        ("import sys; sys.exit(3)", "code 3"),
        ("print('x' * 10); raise SystemExit", "code 0"),
        ("import time; time.sleep(60)", "did not end within 1 s"),
        ("def (", "SyntaxError"),
    ],
)
def test_a_broken_package_is_a_short_clause(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, said: str
) -> None:
    install(monkeypatch, tmp_path, "broken_thing", code)
    finding = look(Requirement("broken_thing"), seconds=1 if "sleep" in code else 20)
    assert finding.mark == "!" and finding.found.startswith("1.0, broken: ")
    assert len(finding.found) <= 130 and "\n" not in finding.found and said in finding.found


def test_the_package_named_apex_that_is_not_nvidias_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, tmp_path, "apex", "")
    finding = look(Requirement("apex"))
    assert finding.mark == "-" and "No module named 'apex.optimizers'" in finding.found
    assert "is another package" in finding.get


def test_a_package_hidden_from_this_process_is_still_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As `megacode.megatron.cpu` hides Transformer Engine and Apex from Megatron-Core where there is no device.
    install(monkeypatch, tmp_path, "hidden_thing", "")
    monkeypatch.setitem(sys.modules, "hidden_thing", None)
    assert look(Requirement("hidden_thing")).mark == "ok"


def test_training_uses_what_megatron_core_would_take() -> None:
    with_gpu = {**FINE, "torch": replace(FINE["torch"], facts=CUDA)}
    assert training_would_use(with_gpu) == {
        "device": "8 × NVIDIA H100 80GB HBM3", "communication": "NCCL", "layers": "Transformer Engine's",
        "Adam": "FusedAdam of Transformer Engine", "precision": "fp32, bf16, fp8 (delayed), fp8 (tensorwise)",
    }  # fmt: skip
    without = {**with_gpu, "transformer-engine": Finding("transformer-engine", "-", "")}
    assert training_would_use(without)["Adam"] == "FusedAdam of Apex"
    assert training_would_use(without)["precision"] == "fp32, bf16"
    assert "local" in training_would_use(without)["layers"]
    on_cpu = {**FINE, "torch": replace(FINE["torch"], facts=CPU)}
    assert training_would_use(on_cpu)["Adam"] == "torch's AdamW"
    assert training_would_use(on_cpu)["communication"] == "gloo"
    broken = {**FINE, "torch": Finding("torch", "!", "not installed")}
    assert "not possible" in training_would_use(broken)["training"]


@pytest.mark.parametrize(
    ("version", "fits"), [("2.9.1", False), ("2.10.0", True), ("2.12.0", True), ("2.13.0", False)]
)
def test_transformer_engine_versions_that_pair_with_megatron_core(
    monkeypatch: pytest.MonkeyPatch, version: str, fits: bool
) -> None:
    monkeypatch.setattr(doctor, "run_python", lambda *_: ({"version": version}, ""))
    required = map(Requirement, doctor.metadata.requires("megacode") or ())
    engine = next(one for one in required if one.name == "transformer-engine")
    assert look(engine).mark == ("ok" if fits else "?")


def test_nothing_that_imports_is_still_an_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "run_python", lambda *_: ({}, "ImportError: nothing works"))
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert (
        "broken: ImportError: nothing works" in printed and "get it: pip install torch" in printed
    )
    assert "not possible" in printed


def test_slurm_says_what_job_it_is_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text("")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert doctor.slurm().found == "sbatch; not inside a job"
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert doctor.slurm().found == "inside job 17"


def test_a_gpu_is_named_with_its_memory() -> None:
    assert doctor.gpu(replace(FINE["torch"], facts=CUDA)).found == "8 × NVIDIA H100 80GB HBM3, 85 GB, CUDA 12.6"  # fmt: skip


def test_the_verb_answers_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    marks = {finding["name"]: finding["mark"] for finding in answer["findings"]}
    assert marks["Python"] == "ok" and marks["torch"] in ("ok", "?")
    assert set(answer["training"]) == {"device", "communication", "layers", "Adam", "precision"}
    assert all(Finding(**finding).found for finding in answer["findings"])
