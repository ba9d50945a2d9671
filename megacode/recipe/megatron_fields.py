"""Fields of Megatron-Core's own configurations that a recipe passes through, checked without importing Megatron-Core.

Its dataclasses are read as text (importing them costs seconds, and torch): names and plain types come from the
installed version, so whatever that version can do is within reach of a recipe, and a misspelt name is found before
anything starts.
"""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacode.recipe.compose import did_you_mean
from megacode.recipe.schema import Recipe
from megacode.recipe.yaml_tree import describe

# What a recipe key (or megacode itself) sets: the key to use instead, or why the field is not free.
_MODEL_GOVERNED = {
    "num_layers": "model.layers",
    "hidden_size": "model.hidden_size",
    "num_attention_heads": "model.heads",
    "num_query_groups": "model.kv_heads",
    "kv_channels": "model.head_dim",
    "ffn_hidden_size": "model.ffn_size",
    "normalization": "model.normalization",
    "layernorm_epsilon": "model.norm_epsilon",
    "qk_layernorm": "model.qk_norm",
    "gated_linear_unit": "model.activation",
    "activation_func": "model.activation",
    "add_bias_linear": "model.linear_bias",
    "add_qkv_bias": "model.qkv_bias",
    "rotary_interleaved": "model.rotary_interleaved",
    "hidden_dropout": "model.dropout",
    "attention_dropout": "model.attention_dropout",
    "softmax_scale": "model.softmax_scale",
    "init_method_std": "model.init_std",
    "init_method": "model.init_std",
    "output_layer_init_method": "model.output_init_std",
    "embedding_init_method": "model.embedding_init_std",
    "embedding_init_method_std": "model.embedding_init_std",
    "use_mup": "model.mup",
    "mup_width_mult": "model.mup.base_hidden_size",
    "mup_base_hidden_size": "model.mup.base_hidden_size",
    "mup_embedding_mult": "model.mup.embedding_scale",
    "mup_output_mult": "model.mup.output_alpha",
    "mup_base_head_dim": "model.softmax_scale",
    "mup_attn_scale_power": "model.softmax_scale",
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "context_parallel_size": "parallel.context",
    "sequence_parallel": "parallel.sequence",
    "recompute_granularity": "parallel.recompute.granularity",
    "recompute_method": "parallel.recompute.method",
    "recompute_num_layers": "parallel.recompute.layers",
    "fp16": "precision.compute",
    "bf16": "precision.compute",
    "params_dtype": "precision.compute",
    "pipeline_dtype": "precision.compute",
    "autocast_dtype": "precision.compute",
    "fp8": "precision.fp8_format",
    "fp8_recipe": "precision.fp8_recipe",
    "fp8_amax_history_len": "precision.fp8_amax_history",
    "fp8_param": "precision.fp8_params",
    "first_last_layers_bf16": "precision.bf16_first_layers",
    "num_layers_at_start_in_bf16": "precision.bf16_first_layers",
    "num_layers_at_end_in_bf16": "precision.bf16_last_layers",
    "calculate_per_token_loss": "optimizer.loss_denominator",
    "tp_comm_overlap": "parallel.overlap.tensor",
    "overlap_p2p_comm": "parallel.overlap.pipeline",
    "batch_p2p_comm": "parallel.overlap.pipeline",
    "apply_rope_fusion": "fusion.rope",
    "cross_entropy_loss_fusion": "fusion.cross_entropy",
    "cross_entropy_fusion_impl": "fusion.cross_entropy",
    "bias_activation_fusion": "fusion.activation",
    "bias_dropout_fusion": "fusion.bias_dropout",
    "gradient_accumulation_fusion": "fusion.gradient_accumulation",
    "cuda_graph_impl": "fusion.cuda_graphs",
    "enable_cuda_graph": "fusion.cuda_graphs",
    "external_cuda_graph": "fusion.cuda_graphs",
    "use_te_rng_tracker": "fusion.cuda_graphs",
}
_OPTIMIZER_GOVERNED = {
    "lr": "phases.NAME.learning_rate.peak",
    "min_lr": "phases.NAME.learning_rate.final",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.epsilon",
    "clip_grad": "optimizer.clip_grad",
    "fp16": "precision.compute",
    "bf16": "precision.compute",
    "params_dtype": "precision.compute",
    "fp8_recipe": "precision.fp8_recipe",
    "reuse_grad_buf_for_mxfp8_param_ag": "precision.fp8_params",
    "use_distributed_optimizer": "parallel.distributed_optimizer",
    "overlap_param_gather": "parallel.overlap.param_gather",
}
DTYPES = ("fp32", "bf16", "fp16", "fp8")
"""What a recipe calls a field's torch.dtype, as Megatron-LM's own options do."""
_DDP_GOVERNED = {
    "use_distributed_optimizer": "parallel.distributed_optimizer",
    "fp8_param_gather": "precision.fp8_params",
    "reuse_grad_buf_for_mxfp8_param_ag": "precision.fp8_params",
    "overlap_grad_reduce": "parallel.overlap.grad_reduce",
    "overlap_param_gather": "parallel.overlap.param_gather",
}

# What Megatron-Core would take and ignore, or fail at later, since megacode does not build what it is for; shell patterns.
_OTHER_LAYERS = (
    "belongs to layers of another kind than megacode's, which are dense with standard attention; take it out"
)
_MODEL_REFUSED = dict.fromkeys(
    (
        "num_moe_experts", "moe_*", "*moe_expert_parallel*", "expert_*_parallel_size", "ep_overlap_*",
        "multi_latent_attention", "qk_l2_norm", "experimental_attention_variant", "dsa_*", "linear_attention_*", "linear_*_dim",
        "linear_num_*", "mtp_*", "heterogeneous_*", "hetereogenous_*", "is_hybrid_model", "mamba_*", "use_mamba_*", "mrope_*",
        "use_kitchen*", "kitchen_*", "use_te_activation_func", "use_fused_weighted_squared_relu", "transformer_impl",
    ),
    _OTHER_LAYERS,
)  # fmt: skip
_OPTIMIZER_REFUSED = {
    "optimizer": "rates, groups and checkpoints here are AdamW's, the only optimizer; take it out",
}
_DDP_REFUSED = {
    "num_distributed_optimizer_instances": "needs groups of ranks that megacode does not make; take it out",
    "use_*_fsdp": "needs another wrapper than DistributedDataParallel, which is megacode's; take it out",
}


@dataclass(frozen=True)
class Field:
    """A field of a Megatron-Core dataclass: its annotation as written, and whether a recipe can hold a value for it."""

    annotation: str
    types: tuple[type, ...]
    choices: tuple[Any, ...] = ()
    checked: bool = True
    nullable: bool = False


def check_pass_through(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, sentence) for every pass-through field that Megatron-Core has not, that another key governs, that would have no
    effect, or of a wrong type.

    Where Megatron-Core is not installed, only names are checked that are governed or without effect.
    """
    sections: tuple[
        tuple[str, Mapping[str, Any], Mapping[str, str], Mapping[str, str], tuple[tuple[str, str], ...]], ...
    ] = (
        (
            "model.megatron",
            recipe.model.megatron,
            _MODEL_GOVERNED,
            _MODEL_REFUSED,
            (
                ("model_parallel_config.py", "ModelParallelConfig"),
                ("transformer/transformer_config.py", "TransformerConfig"),
            ),
        ),
        (
            "optimizer.megatron",
            recipe.optimizer.megatron,
            _OPTIMIZER_GOVERNED,
            _OPTIMIZER_REFUSED,
            (("optimizer/optimizer_config.py", "OptimizerConfig"),),
        ),
        (
            "parallel.ddp",
            recipe.parallel.ddp,
            _DDP_GOVERNED,
            _DDP_REFUSED,
            (("distributed/distributed_data_parallel_config.py", "DistributedDataParallelConfig"),),
        ),
    )
    for section, given, governed, refused, classes in sections:
        if not given:
            continue
        known = fields_of(classes)
        for name, value in given.items():
            key = f"{section}.{name}"
            if name in governed:
                yield key, f"is what `{governed[name]}` sets; use that key"
            elif value not in (None, False) and (why := _refusal(name, refused)):
                yield key, why
            elif known is not None and name not in known:
                free = [field for field in known if field not in governed]
                hint = did_you_mean(name, free)
                shown = hint if hint.startswith("; did") else "; its field names are in the class's source"
                yield key, f"Megatron-Core's {classes[-1][1]} has no such field{shown}"
            elif known is not None:
                problem = _type_problem(known[name], value)
                if problem:
                    yield key, problem


def _refusal(name: str, refused: Mapping[str, str]) -> str | None:
    return next((why for pattern, why in refused.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _type_problem(field: Field, value: Any) -> str | None:
    if not field.checked or (value is None and field.nullable):
        return None
    if field.choices and value in field.choices:
        return None
    fits = any(
        (isinstance(value, kind) and (kind is bool or not isinstance(value, bool)))
        or (kind is float and isinstance(value, int) and not isinstance(value, bool))
        for kind in field.types
    )
    if fits:
        return None
    wanted = " or ".join([*(repr(choice) for choice in field.choices), *(kind.__name__ for kind in field.types)])
    return f"expected {wanted} (Megatron-Core declares {field.annotation}), not {describe(value)}; change the value"


def core_folder() -> Path | None:
    """Where megatron/core is installed, or None. Does not import it."""
    spec = importlib.util.find_spec("megatron")  # a namespace without code of its own
    for folder in (spec.submodule_search_locations if spec else None) or ():
        core = Path(folder) / "core"
        if (core / "model_parallel_config.py").is_file():
            return core
    return None


def fields_of(classes: tuple[tuple[str, str], ...]) -> dict[str, Field] | None:
    """Fields of dataclasses (file in megatron/core, class), later ones over earlier ones; None where one cannot be
    read."""
    core = core_folder()
    if core is None:
        return None
    fields: dict[str, Field] = {}
    enumerations = _enumerations(core / "transformer/enums.py")
    for file, name in classes:
        try:
            tree = ast.parse((core / file).read_text(encoding="utf-8"))
        except (OSError, SyntaxError):
            return None
        found = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
        if found is None:
            return None
        for statement in found.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                field = statement.target.id
                if not field.startswith("_"):
                    fields[field] = _field(statement.annotation, enumerations)
    return fields


def _enumerations(file: Path) -> dict[str, list[str]]:
    """Names of the members of every enumeration in a source file: what a recipe may say in their place."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return {}
    return {
        node.name: [
            statement.targets[0].id
            for statement in node.body
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
        ]
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases)
    }


def _field(annotation: ast.expr, enumerations: Mapping[str, list[str]]) -> Field:
    types: set[type] = set()
    choices: list[Any] = []
    state = {"checked": True, "nullable": False}
    plain: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str, "list": list, "dict": dict}

    def visit(node: ast.expr) -> None:
        if isinstance(node, ast.Constant) and node.value is None:
            state["nullable"] = True
        elif isinstance(node, ast.Name) and node.id in plain:
            types.add(plain[node.id])
        elif isinstance(node, ast.Name) and node.id in enumerations:
            choices.extend(enumerations[node.id])
        elif isinstance(node, ast.Attribute) and node.attr == "dtype":
            choices.extend(DTYPES)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            visit(node.left)
            visit(node.right)
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            if node.value.id == "Optional":
                state["nullable"] = True
                visit(inner[0])
            elif node.value.id == "Union":
                for part in inner:
                    visit(part)
            elif node.value.id == "Literal":
                choices.extend(part.value for part in inner if isinstance(part, ast.Constant))
            elif node.value.id in ("List", "list", "Tuple", "tuple"):
                types.add(list)
            elif node.value.id in ("Dict", "dict"):
                types.add(dict)
            else:
                state["checked"] = False
        else:
            state["checked"] = False  # a function: Megatron-Core itself says what it takes

    visit(annotation)
    ordered = tuple(sorted(types, key=lambda kind: kind.__name__))
    return Field(ast.unparse(annotation), ordered, tuple(choices), state["checked"], state["nullable"])
