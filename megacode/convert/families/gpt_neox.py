"""GPT-NeoX with attention and feed-forward one after the other.

LayerNorm and biases everywhere, rotary on a part of each head, queries, keys and values in one
tensor.
"""

from __future__ import annotations

from typing import Any

from megacode.convert.config_keys import rotary_base
from megacode.convert.family import ACTIVATIONS, KEYS, Family, Weights, common_keys
from megacode.convert.layout import QKV_BY_HEAD
from megacode.recipe.schema import Model


def _config(model: Model, length: int) -> dict[str, Any]:
    base, fraction = rotary_base(model), model.rotary_fraction
    rope = {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": fraction}
    return {
        **common_keys(model),
        "hidden_act": ACTIVATIONS[model.activation],
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": False,
        "attention_bias": True,
        "rotary_pct": fraction,
        "rotary_emb_base": base,
        "rope_parameters": rope,
        "max_position_embeddings": length,
        "hidden_dropout": model.dropout,
    }


GPT_NEOX = Family(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    config=_config,
    fixed={
        "normalization": "layernorm",
        "linear_bias": True,
        "qk_norm": False,
        # transformers before 5 reads no scaling from where this family keeps rotary positions.
        "rotary_scaling": None,
    },
    keys={
        **KEYS,
        "norm_epsilon": "layer_norm_eps",
        "dropout": "hidden_dropout",
        "rotary_base": "rotary_emb_base",
        "rotary_fraction": "rotary_pct",
    },
    activations=ACTIVATIONS,
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
    },
    only={
        "use_parallel_residual": (
            False,
            "Megatron-Core's layers do not run attention and feed-forward side by side (Pythia)",
        ),
        "attention_bias": (True, "a recipe has biases on all linear layers or none"),
    },
    weights=Weights(
        embedding="gpt_neox.embed_in",
        layer="gpt_neox.layers.{i}.",
        qkv=("attention.query_key_value",),
        qkv_form=QKV_BY_HEAD,
        attention_output="attention.dense",
        ffn_in="mlp.dense_h_to_4h",
        ffn_out="mlp.dense_4h_to_h",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
    ),
)
