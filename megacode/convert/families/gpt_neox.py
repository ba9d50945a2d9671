"""GPT-NeoX with its attention and feed-forward one after the other: LayerNorm and biases everywhere, rotary on a part of
each head, queries, keys and values in one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megacode.convert.family import (
    Context,
    Family,
    common_reasons,
    ends,
    first_reason,
    layer_slots,
    norm_rows,
    refuse,
    rotary_base,
    rotary_fraction,
    value,
    with_biases,
)
from megacode.convert.layout import QKV_FUSED, SAME, Slot
from megacode.errors import UserError
from megacode.recipe.schema import Model

_ACTIVATIONS = {"gelu": "gelu", "gelu-tanh": "gelu_pytorch_tanh", "relu": "relu"}


def _fits(model: Model) -> str | None:
    return first_reason(
        [
            *common_reasons(model),
            (model.normalization != "layernorm", f"model.normalization is {model.normalization}, not layernorm"),
            (
                model.activation not in _ACTIVATIONS,
                f"model.activation is {model.activation}, not one of {', '.join(_ACTIVATIONS)}",
            ),
            (not model.linear_bias, "model.linear_bias is false"),
            (
                model.resolved_kv_heads != model.heads,
                f"model.kv_heads is {model.resolved_kv_heads}, not heads {model.heads}",
            ),
            (model.qk_norm, "model.qk_norm normalises queries and keys"),
            (
                model.resolved_head_dim * model.heads != model.hidden_size,
                f"model.head_dim is {model.resolved_head_dim}, not hidden_size / heads",
            ),
        ]
    )


def _config(model: Model, context: Context) -> dict[str, Any]:
    base = int(model.rotary_base) if model.rotary_base == int(model.rotary_base) else model.rotary_base
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.resolved_ffn_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "hidden_act": _ACTIVATIONS[model.activation],
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": False,
        "attention_bias": True,
        "rotary_pct": model.rotary_fraction,
        "rotary_emb_base": base,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": base, "partial_rotary_factor": model.rotary_fraction,
        },
        "max_position_embeddings": context.length,
        "initializer_range": model.init_std,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.dropout,
    }  # fmt: skip


def _model_section(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("use_parallel_residual", True):
        raise UserError(
            "config.json: use_parallel_residual is true (attention and feed-forward side by side, as in Pythia), which "
            "Megatron-Core's GPT layers do not compute; only models without it can be imported"
        )
    refuse(config, "attention_bias", True, "a recipe has biases on all linear layers or none")
    activation = config.get("hidden_act") or "gelu"
    known = {theirs: ours for ours, theirs in _ACTIVATIONS.items()} | {
        "gelu_new": "gelu-tanh",
        "gelu_fast": "gelu-tanh",
    }
    if activation not in known:
        raise UserError(
            f"config.json: hidden_act is {activation!r}, and only {', '.join(known)} can be imported exactly"
        )
    return {
        "layers": int(value(config, "num_hidden_layers")),
        "hidden_size": int(value(config, "hidden_size")),
        "heads": int(value(config, "num_attention_heads")),
        "ffn_size": int(value(config, "intermediate_size")),
        "normalization": "layernorm",
        "norm_epsilon": float(value(config, "layer_norm_eps", 1e-5)),
        "activation": known[activation],
        "linear_bias": True,
        "rotary_base": rotary_base(config, "rotary_emb_base"),
        "rotary_fraction": rotary_fraction(config, "rotary_pct", 0.25),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "context_length": int(value(config, "max_position_embeddings", 2048)),
    }


def _slots(model: Model) -> Iterator[Slot]:
    first, last = ends(model, "gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm", "embed_out.weight")
    layer = "gpt_neox.layers.{i}."
    yield from first
    yield from layer_slots(
        model,
        [
            *norm_rows(model, "self_attention.linear_qkv", layer + "input_layernorm"),
            *with_biases("self_attention.linear_qkv", QKV_FUSED, (layer + "attention.query_key_value",), True),
            *with_biases("self_attention.linear_proj", SAME, (layer + "attention.dense",), True),
            *norm_rows(model, "mlp.linear_fc1", layer + "post_attention_layernorm"),
            *with_biases("mlp.linear_fc1", SAME, (layer + "mlp.dense_h_to_4h",), True),
            *with_biases("mlp.linear_fc2", SAME, (layer + "mlp.dense_4h_to_h",), True),
        ],
    )
    yield from last


GPT_NEOX = Family("gpt_neox", "GPTNeoXForCausalLM", "gpt_neox", _fits, _config, _model_section, _slots)
