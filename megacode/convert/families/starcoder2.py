"""StarCoder2: LayerNorm and biases everywhere, GELU, grouped queries, whole heads rotated."""

from __future__ import annotations

from typing import Any

from megacode.convert.config_keys import rope_keys
from megacode.convert.family import ACTIVATIONS, KEYS, Family, Weights, common_keys
from megacode.recipe.schema import Model


def _config(model: Model, length: int) -> dict[str, Any]:
    return {
        **common_keys(model),
        "num_key_value_heads": model.resolved_kv_heads,
        "hidden_act": ACTIVATIONS[model.activation],
        "norm_epsilon": model.norm_epsilon,
        "use_bias": True,
        "sliding_window": model.sliding_window,
        "residual_dropout": model.dropout,
        "embedding_dropout": model.dropout,
        **rope_keys(model, length),
    }


STARCODER2 = Family(
    name="starcoder2",
    architecture="Starcoder2ForCausalLM",
    config=_config,
    fixed={
        "normalization": "layernorm",
        "linear_bias": True,
        "rotary_fraction": 1,
        "qk_norm": False,
    },
    keys={
        **KEYS,
        "kv_heads": "num_key_value_heads",
        "norm_epsilon": "norm_epsilon",
        "dropout": "residual_dropout",
        "sliding_window": "sliding_window",
    },
    activations=ACTIVATIONS,
    defaults={
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    only={"use_bias": (True, "its linear layers have biases")},
    windowed=True,
    weights=Weights(ffn_in="mlp.c_fc", ffn_out="mlp.c_proj"),
)
