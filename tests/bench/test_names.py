"""What no test runs here (benches, tests that need a device) names only what the library has."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "bench").rglob("*.py")), *sorted((ROOT / "tests/gpu").glob("*.py"))]


def names_of(module: str) -> set[str]:
    """Top-level names of one of the library's modules, and its submodules."""
    path = ROOT / Path(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = {one.stem for one in path.glob("*")} if path.is_dir() else set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_imported_is_there(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
            "megacode",
            "tests",
        ):
            missing = {alias.name for alias in node.names} - names_of(str(node.module))
            assert not missing, f"{script}:{node.lineno}: {node.module} has no {', '.join(missing)}"
