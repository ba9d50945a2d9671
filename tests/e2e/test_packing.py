"""Training on packed documents: any layout, resumed and refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import megacode, steps_of

CONSTANT = ("--set", "phases.second.mixture.domains={code: 0.5, text: 0.5}")
PACKED = ("--set", "data.packing=best_fit", "--set", "data.reset_at_eod=false", *CONSTANT)


@pytest.mark.slow
def test_packed_training_is_the_same_in_any_layout_and_goes_on(
    recipe: Path, tmp_path: Path
) -> None:
    first = megacode(
        "train", recipe, "--run", tmp_path / "one", *PACKED, "--set", "parallel.tensor=2", ranks=2
    )
    assert "packing: best_fit (concatenate cuts" in first.stdout
    run = tmp_path / "two"
    megacode("train", recipe, "--run", run, *PACKED, ranks=2)
    one, two = steps_of(tmp_path / "one"), steps_of(run)
    assert one.batches == two.batches and len(one.batches) == 20
    np.testing.assert_allclose(one.losses, two.losses, rtol=1e-4)
    assert one.losses[-1] < one.losses[0]

    # A longer run keeps its batches (its rates decay more slowly, which is asked for); the other packing is refused, and named.
    longer = ("--set", "phases.second.steps=14", "--accept-change", "phases.second.learning_rate")
    megacode("train", recipe, "--run", run, *PACKED, *longer, ranks=2)
    assert steps_of(run).batches[:20] == two.batches and len(steps_of(run).batches) == 22
    refused = megacode("train", recipe, "--run", tmp_path / "one", *CONSTANT, check=False, ranks=2)
    assert (
        refused.returncode == 2
        and "packing" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = [record["loss_by_source"] for record in records if record["kind"] == "validation"]
    assert len(validated) >= 2 and all(
        math.isfinite(loss) for losses in validated for loss in losses.values()
    )
