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
        "is no field of Megatron-Core's TransformerConfig that megacode knows",
        "did you mean `fp8_margin`?",
    ],
    "model.megatron.num_layers=2": ["is what `model.layers` sets", "use that key"],
    "model.megatron.tensor_model_parallel_size=2": ["`parallel.tensor`"],
    "model.megatron.bf16=true": ["`precision.compute`"],
    "model.megatron.wgrad_deferral_limit=a": ["expected int", "not 'a'"],
    "model.megatron.wgrad_deferral_limit=true": ["expected int", "not true"],
    "model.megatron.fp8_margin=1": ["no effect without `precision: fp8`"],
    "model.megatron.qk_clip=true": ["no effect", "take it out"],
    "model.megatron.apply_residual_connection_post_layernorm=true": ["no effect"],
    "model.megatron.attention_output_gate=true": ["other layers than"],
    "model.megatron.attention_softmax_in_fp32=false": ["is megacode's to set"],
    "model.megatron.masked_softmax_fusion=true": ["document boundaries"],
    "model.megatron.fp4=e2m1": ["precision that megacode does not have"],
    "model.megatron.flash_decode=true": ["inference engine"],
    "model.megatron.fp32_residual_connection=true": ["fails with megacode's layers"],
    "model.megatron.softmax_type=soft": ["'vanilla' or 'off-by-one'"],
    "model.megatron.num_moe_experts=4": ["other layers than", "take it out"],
    "model.megatron.moe_router_topk=1": ["other layers than"],
    "model.megatron.multi_latent_attention=true": ["other layers than"],
    "model.megatron.mtp_num_layers=1": ["other layers than"],
    "model.megatron.qk_l2_norm=true": ["other layers than"],
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
    "model.megatron={wgrad_deferral_limit: 1, recompute_modules: [mlp], deterministic_mode: true}",
    "model.megatron={softmax_type: learnable, attention_backend: flash, moe_router_dtype: null}",
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


def test_fields_of_fp8_pass_with_fp8(write):
    sizes = "model={hidden_size: 256, heads: 4}"
    load_recipe(
        write(), [sizes, "precision=fp8", "model.megatron={fp8_margin: 1, fp8_wgrad: true}"]
    )


def test_another_version_s_names_are_left_to_it(write, monkeypatch):
    monkeypatch.setattr(megatron_fields.metadata, "version", lambda name: "0.99.0")
    load_recipe(write(), ["optimizer.megatron.anything=1", "parallel.ddp.anything=1"])
    for change in (
        "model.megatron.anything=1",  # what it changes is not known
        "model.megatron.num_layers=1",
        "model.megatron.num_moe_experts=4",
        "model.megatron.wgrad_deferral_limit=a",
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


def test_every_field_of_the_model_has_one_class():
    """Another key sets it, a recipe may set it, or it is refused."""
    fields = set(megatron_fields.fields_of("TransformerConfig"))
    if megatron_fields._is_the_tables_version():
        config = pytest.importorskip("megatron.core.transformer").TransformerConfig
        fields |= {name for name in config.__dataclass_fields__ if not name.startswith("_")}
    for field in sorted(fields):
        refused = any(fnmatch.fnmatchcase(field, one) for one in megatron_fields.REFUSED)
        classes = [field in megatron_fields.GOVERNED, field in megatron_fields.EFFECT, refused]
        assert sum(classes) == 1, f"{field}: {classes}; give it one class in megatron_fields.py"
    assert set(megatron_fields.EFFECT) <= fields


def test_every_refused_pattern_is_of_a_field():
    for pattern in megatron_fields.REFUSED:
        assert fnmatch.filter(all_fields(), pattern), pattern


def all_fields() -> set[str]:
    kinds = ("TransformerConfig", "OptimizerConfig", "DistributedDataParallelConfig")
    return {name for kind in kinds for name in megatron_fields.fields_of(kind)}
