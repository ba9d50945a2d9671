"""docs/recipes.md says what the schema says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_reference_page_is_current() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "tools" / "recipe-reference"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout == (ROOT / "docs" / "recipes.md").read_text(), (
        "run: tools/recipe-reference > docs/recipes.md"
    )
