"""The pass-through to Megatron-Core's own fields, checked without importing it."""

import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest

from megacode.errors import UserError
from megacode.recipe import megatron_fields
from megacode.recipe.load import load_recipe

MISTAKES = {
    "model.megatron.fp8_magin=1": [
        "TransformerConfig has no such field",
        "did you mean `fp8_margin`?",
    ],
    "model.megatron.num_layers=2": ["is what `model.layers` sets", "use that key"],
    "model.megatron.tensor_model_parallel_size=2": ["`parallel.tensor`"],
    "model.megatron.bf16=true": ["`precision.compute`"],
    "model.megatron.fp8_margin=a": ["expected int", "not 'a'"],
    "model.megatron.fp8_margin=true": ["expected int", "not true"],
    "model.megatron.softmax_type=soft": ["'vanilla' or 'off-by-one'"],
    "model.megatron.num_moe_experts=4": ["layers of another kind", "take it out"],
    "model.megatron.moe_router_topk=1": ["layers of another kind"],
    "model.megatron.multi_latent_attention=true": ["layers of another kind"],
    "model.megatron.mtp_num_layers=1": ["layers of another kind"],
    "model.megatron.qk_l2_norm=true": ["layers of another kind"],
    "model.megatron.recompute_modules=core_attn": ["expected list"],
    "model.megatron.attention_backend=cudnn": ["'flash' or 'fused' or 'unfused'", "not 'cudnn'"],
    "optimizer.megatron.lr=1": ["`phases.NAME.learning_rate.peak`"],
    "optimizer.megatron.hysteresis=1.5": ["expected int"],
    "optimizer.megatron.exp_avg_dtype=bfloat16": ["'bf16'", "torch.dtype", "not 'bfloat16'"],
    "optimizer.megatron.optimizer=sgd": ["AdamW", "take it out"],
    "parallel.ddp.num_distributed_optimizer_instances=2": ["groups of ranks", "take it out"],
    "parallel.ddp.use_megatron_fsdp=true": ["another wrapper"],
    "parallel.ddp.bucket_sise=1": ["DistributedDataParallelConfig", "`bucket_size`"],
    "parallel.ddp.overlap_grad_reduce=true": ["`parallel.overlap.grad_reduce`"],
    "model.megatron.apply_rope_fusion=false": ["`fusion.rope`"],
    "parallel.ddp.use_distributed_optimizer=true": ["`parallel.distributed_optimizer`"],
}
GOOD = [
    "model.megatron={fp8_margin: 1, glu_linear_offset: 1e-2, recompute_modules: [mlp], fp8_wgrad: true}",
    "model.megatron={window_size: [128, 0], attention_backend: flash, moe_router_dtype: null, qk_l2_norm: false}",
    "optimizer.megatron={loss_scale: 1, decoupled_weight_decay: false}",
    "optimizer.megatron={use_precision_aware_optimizer: true, exp_avg_dtype: bf16, exp_avg_sq_dtype: fp8}",
    "parallel.ddp={bucket_size: 1000, average_in_collective: true}",
]


@pytest.mark.parametrize("override", MISTAKES)
def test_a_field_that_is_wrong_is_refused_with_its_key(write, override):
    with pytest.raises(UserError) as caught:
        load_recipe(write(), [override])
    message = str(caught.value)
    key = override.partition("=")[0]
    assert message.startswith(f"--set {override}: {key}: "), message
    assert all(word in message for word in MISTAKES[override]), message


@pytest.mark.parametrize("override", GOOD)
def test_fields_of_the_installed_version_pass(write, override):
    load_recipe(write(), [override])


def test_another_version_s_names_are_left_to_it(write, monkeypatch):
    monkeypatch.setattr(megatron_fields.metadata, "version", lambda name: "0.99.0")
    load_recipe(write(), ["model.megatron.anything=1"])
    for change in (
        "model.megatron.num_layers=1",
        "model.megatron.num_moe_experts=4",
        "model.megatron.fp8_margin=a",
    ):
        with pytest.raises(UserError):
            load_recipe(write(), [change])


def test_the_table_is_that_of_the_pinned_version():
    pytest.importorskip("torch")
    root = Path(__file__).parents[2]
    pinned = f"megatron-core=={megatron_fields._table()['version']}"
    assert pinned in (root / "tools/constraints.txt").read_text()
    if megatron_fields._is_the_tables_version():
        made = subprocess.run(
            [sys.executable, root / "tools/megatron-fields"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert made.stdout == (root / "megacode/recipe/megatron_fields.json").read_text(), (
            "run: tools/megatron-fields > megacode/recipe/megatron_fields.json"
        )


def test_names_of_dtypes_reach_megatron_core_as_dtypes():
    torch = pytest.importorskip("torch")
    from megatron.core.optimizer import OptimizerConfig

    from megacode.megatron.config import with_types

    given = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "fp8", "loss_scale": 1.0}
    assert with_types(OptimizerConfig, given) == {
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.uint8,
        "loss_scale": 1.0,
    }


def test_every_governed_field_exists():
    newer = {name for name in megatron_fields.GOVERNED if "mup" in name}  # from 0.17 on
    assert set(megatron_fields.GOVERNED) - newer <= all_fields()


def test_every_refused_pattern_is_of_a_field():
    for pattern in megatron_fields.REFUSED:
        assert fnmatch.filter(all_fields(), pattern), pattern


def all_fields() -> set[str]:
    kinds = ("TransformerConfig", "OptimizerConfig", "DistributedDataParallelConfig")
    return {name for kind in kinds for name in megatron_fields.fields_of(kind)}
