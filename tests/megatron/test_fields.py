"""What fields of TransformerConfig change, beside what `megatron_fields.EFFECT` says of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megacode.errors import UserError
from megacode.recipe.megatron_fields import EFFECT
from megacode.recipe.schema import Model, Parallel, Recipe
from tests.megatron.test_step import EOD, VOCAB, small, windows
from tests.processes import run_on

VALUES: dict[str, Any] = {
    "attention_backend": "unfused",
    "cp_comm_type": "a2a",
    "cpu_offloading_num_layers": 1,
    "cuda_graph_warmup_steps": 1,
    "min_offloaded_tensor_size": 10,
    "recompute_modules": ["core_attn", "mlp"],
    "softmax_type": "learnable",
    "wgrad_deferral_limit": 1,
}
"""Others than the default, where that is no switch."""
ELSEWHERE = {
    "config_logger_dir": "writes files",
    "cpu_offloading": "Transformer Engine",
    "defer_embedding_wgrad_compute": "gradient accumulation in CUDA kernels",
    "fine_grained_activation_offloading": "Transformer Engine",
    "layernorm_zero_centered_gamma": "the same loss from other weights: norms stored less 1",
    "offload_modules": "Transformer Engine",
    "microbatch_group_size_per_vp_stage": "pipelines, below",
    "num_layers_in_first_pipeline_stage": "pipelines, below",
    "num_layers_in_last_pipeline_stage": "pipelines, below",
    "overlap_p2p_comm_warmup_flush": "an overlap that gloo does not have",
    "pipeline_model_parallel_layout": "pipelines, below",
}
"""Fields that one process without CUDA cannot try."""
PIPELINES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"pipeline": 2}, {"num_layers_in_first_pipeline_stage": 1}),
    ({"pipeline": 2}, {"num_layers_in_last_pipeline_stage": 1}),
    ({"pipeline": 2}, {"pipeline_model_parallel_layout": "Et|tttL"}),
    (
        {"pipeline": 2},
        {
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
    ),
    ({"pipeline": 2, "virtual_pipeline": 2}, {"microbatch_group_size_per_vp_stage": 2}),
)


def bent(given: dict[str, Any], layers: int = 2, **parallel: Any) -> Recipe:
    model = Model(layers=layers, hidden_size=32, heads=2, init_std=0.3, megatron=given)
    return small().model_copy(update={"model": model, "parallel": Parallel(**parallel)})


def losses(world: Any, recipes: dict[str, Recipe]) -> dict[str, list[float]]:
    """Of three training steps on documents with boundaries."""
    import os

    from megacode.data.batch import make_batch
    from megacode.megatron.config import megatron_config
    from megacode.megatron.model import build_model
    from megacode.megatron.optimizer import build_optimizer, set_lr, wrap_data_parallel
    from megacode.megatron.step import prepare_model_for_training, train_step

    def of(recipe: Recipe) -> list[float]:
        config = megatron_config(recipe)
        chunks = wrap_data_parallel(config, build_model(recipe, VOCAB, config))
        optimizer = build_optimizer(recipe, chunks)
        prepare_model_for_training(chunks, optimizer)
        rows, out = windows(), []
        parts = [
            make_batch(
                rows[i : i + 1], np.zeros(1, np.int32), np.array([i]), eod_id=EOD, reset_at_eod=True
            )
            for i in range(2)
        ]
        for _ in range(3):
            set_lr(optimizer, 1e-2, 0.1)
            sums, _ = train_step(chunks, optimizer, parts, 1, recipe, world)
            out.append(float(sums[0].sum()))
        return out

    found = {}
    for name, recipe in recipes.items():
        for variable in [name for name in os.environ if name.startswith("NVTE_")]:
            del os.environ[variable]  # Megatron-Core's, of the model before
        found[name] = of(recipe)
    return found


def value(field: str) -> Any:
    from megatron.core.transformer import TransformerConfig

    return VALUES.get(field, not TransformerConfig.__dataclass_fields__[field].default)


def losses_of_every_field(world: Any) -> dict[str, list[float]]:
    fields = [f for f, effect in EFFECT.items() if effect != "training" and f not in ELSEWHERE]
    given = {field: {field: value(field)} for field in fields}
    recipes = {field: bent(one) for field, one in given.items()}
    recipes["recompute_modules"] = bent(given["recompute_modules"], recompute="selective")
    return losses(world, {"": bent({}), **recipes})


def test_fields_of_layout_change_no_loss_and_those_of_the_function_do() -> None:
    (found,) = run_on(1, losses_of_every_field)
    for field, got in found.items():
        same = got == found[""]
        assert same == (EFFECT.get(field) != "function"), f"{field}: {got}, without it {found['']}"


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "given"), PIPELINES)
def test_fields_of_pipelines_change_no_loss(parallel: dict, given: dict) -> None:
    recipe = bent(given, 4, **parallel)
    (whole,) = run_on(1, losses, {"": bent({}, 4)})
    found = run_on(2, losses, {"": recipe}, parallel=recipe.parallel)
    assert found[-1][""] == pytest.approx(whole[""], rel=1e-6)


def refused(world: Any, given: dict[str, Any]) -> str:
    from megacode.megatron.config import megatron_config

    with pytest.raises(UserError) as caught:
        megatron_config(bent(given))
    return str(caught.value)


@pytest.mark.parametrize(
    "given", [{"cpu_offloading": True}, {"recompute_modules": ["layernorm"]}], ids=str
)
def test_what_needs_transformer_engine_says_so(given: dict[str, Any]) -> None:
    (message,) = run_on(1, refused, given)
    assert f"model.megatron.{next(iter(given))}" in message and "Transformer Engine" in message
