"""megacode: a trainer for code-and-language models on Megatron-Core.

The Python API. Names are imported on first use, so a recipe is read and planned without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megacode.version import __version__

if TYPE_CHECKING:
    from megacode.data.mixture import OpenMixture, open_mixture
    from megacode.data.planning import plan_with_data as make_plan
    from megacode.errors import UserError
    from megacode.evaluate.generate import Sampling
    from megacode.plan.plan import Plan
    from megacode.recipe.load import load_recipe
    from megacode.recipe.schema import Recipe
    from megacode.run.metrics import read_metrics
    from megacode.tokenizer.tokenizer import load_tokenizer
    from megacode.train.trainer import Trainer

_PLACES = {
    "OpenMixture": "data.mixture",
    "Plan": "plan.plan",
    "Recipe": "recipe.schema",
    "Sampling": "evaluate.generate",
    "Trainer": "train.trainer",
    "UserError": "errors",
    "load_recipe": "recipe.load",
    "load_tokenizer": "tokenizer.tokenizer",
    "make_plan": "data.planning",
    "open_mixture": "data.mixture",
    "read_metrics": "run.metrics",
}
__all__ = [
    "OpenMixture",
    "Plan",
    "Recipe",
    "Sampling",
    "Trainer",
    "UserError",
    "__version__",
    "load_recipe",
    "load_tokenizer",
    "make_plan",
    "open_mixture",
    "read_metrics",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _PLACES:
        raise AttributeError(f"module 'megacode' has no attribute {name!r}")
    if name in ("Sampling", "Trainer"):  # Megatron-Core is imported behind these
        from megacode.megatron import cpu

        cpu.prepare()
    found = getattr(
        importlib.import_module(f"megacode.{_PLACES[name]}"),
        "plan_with_data" if name == "make_plan" else name,
    )
    globals()[name] = found
    return found
