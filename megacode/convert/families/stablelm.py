"""StableLM: LayerNorm, SwiGLU, rotary on a part of each head, biases on qkv or none."""

from __future__ import annotations

from typing import Any

from megacode.convert.config_keys import rope_keys
from megacode.convert.family import KEYS, Family, common_keys
from megacode.recipe.schema import Model


def _config(model: Model, length: int) -> dict[str, Any]:
    return {
        **common_keys(model),
        "num_key_value_heads": model.resolved_kv_heads,
        "hidden_act": "silu",
        "layer_norm_eps": model.norm_epsilon,
        "use_qkv_bias": model.qkv_bias,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "partial_rotary_factor": model.rotary_fraction,
        "hidden_dropout": model.dropout,
        **rope_keys(model, length),
    }


STABLELM = Family(
    name="stablelm",
    architecture="StableLmForCausalLM",
    config=_config,
    fixed={"normalization": "layernorm", "linear_bias": False, "qk_norm": False},
    keys={
        **KEYS,
        "kv_heads": "num_key_value_heads",
        "norm_epsilon": "layer_norm_eps",
        "dropout": "hidden_dropout",
        "rotary_fraction": "partial_rotary_factor",
    },
    defaults={
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "partial_rotary_factor": 0.25,
    },
    only={
        "qk_layernorm": (False, "its norms have weights for each head"),
        "use_parallel_residual": (False, "attention and feed-forward run one after the other"),
    },
    more_section=lambda config: {"qkv_bias": bool(config.get("use_qkv_bias"))},
)
