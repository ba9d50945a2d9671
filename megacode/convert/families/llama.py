"""Llama and what is built like it.

Mistral has the same weights and may have a sliding window, Qwen2 biases on queries, keys and
values, Qwen3 norms on queries and keys, SmolLM3 layers without positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megacode.convert.config_keys import rope_keys
from megacode.convert.family import KEYS, Family, common_keys
from megacode.errors import UserError
from megacode.recipe.schema import Model


def _common(model: Model, length: int) -> dict[str, Any]:
    return {
        **common_keys(model),
        "num_key_value_heads": model.resolved_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        **rope_keys(model, length),
    }


def _llama(model: Model, length: int) -> dict[str, Any]:
    biases = {"attention_bias": model.linear_bias, "mlp_bias": model.linear_bias}
    return _common(model, length) | {"head_dim": model.resolved_head_dim, **biases}


def _mistral(model: Model, length: int) -> dict[str, Any]:
    return _common(model, length) | {
        "head_dim": model.resolved_head_dim,
        "sliding_window": model.sliding_window,
    }


def _qwen2(model: Model, length: int) -> dict[str, Any]:
    return _common(model, length) | {"use_sliding_window": False}


def _qwen3(model: Model, length: int) -> dict[str, Any]:
    more = {"attention_bias": False, "use_sliding_window": False}
    return _common(model, length) | {"head_dim": model.resolved_head_dim, **more}


def _smollm3(model: Model, length: int) -> dict[str, Any]:
    every = model.no_rope_layer_interval
    biases = {"attention_bias": model.linear_bias, "mlp_bias": model.linear_bias}
    rotated = [int(not every or i % every != 0) for i in range(1, model.layers + 1)]
    return _common(model, length) | {
        **biases,
        "no_rope_layers": rotated,
        "no_rope_layer_interval": every or model.layers + 1,
        "use_sliding_window": False,
        # Without them transformers takes those of SmolLM3's own vocabulary.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def _rotated_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """`no_rope_layer_interval` of a SmolLM3, which may list its layers instead."""
    layers, every = config["num_hidden_layers"], config.get("no_rope_layer_interval", 4)
    for interval in (every, *range(2, layers + 2)):
        wanted = [int(i % interval != 0) for i in range(1, layers + 1)]
        if (config.get("no_rope_layers") or wanted) == wanted:
            return {"no_rope_layer_interval": interval if interval <= layers else None}
    raise UserError(
        "config.json: no_rope_layers have no interval, and a recipe has layers without rotary "
        "positions at equal intervals"
    )


def _bias_reasons(model: Model) -> Iterator[str]:
    if model.qkv_bias and not model.linear_bias:
        yield "model.qkv_bias gives biases to queries, keys and values"


def _biases(config: Mapping[str, Any]) -> dict[str, Any]:
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if attention != mlp:
        raise UserError(
            f"config.json: attention_bias is {attention} and mlp_bias {mlp}; "
            "a recipe has biases on all linear layers or none"
        )
    return {"linear_bias": attention}


def _head_dim(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' Qwen2 reads it, though its own configs have none."""
    return {"head_dim": int(config["head_dim"])} if config.get("head_dim") else {}


_SHAPE = {"normalization": "rmsnorm", "rotary_fraction": 1}
_KEYS = {**KEYS, "kv_heads": "num_key_value_heads", "norm_epsilon": "rms_norm_eps"}
_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6}
_QWEN_DEFAULTS = {
    **_DEFAULTS,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
_ONLY = {"pretraining_tp": (1, "matrix products are not cut")}

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    config=_llama,
    fixed={**_SHAPE, "qk_norm": False},
    keys={**_KEYS, "head_dim": "head_dim"},
    defaults={**_DEFAULTS, "max_position_embeddings": 2048},
    only=_ONLY,
    more_reasons=_bias_reasons,
    more_section=_biases,
)
MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    config=_mistral,
    fixed={**_SHAPE, "linear_bias": False, "qkv_bias": False, "qk_norm": False},
    keys={**_KEYS, "head_dim": "head_dim", "sliding_window": "sliding_window"},
    defaults={
        **_DEFAULTS,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    only=_ONLY,
    windowed=True,
)
QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    config=_qwen2,
    fixed={**_SHAPE, "linear_bias": False, "qkv_bias": True, "qk_norm": False},
    keys=_KEYS,
    defaults=_QWEN_DEFAULTS,
    only=_ONLY,
    windowed=True,
    more_section=_head_dim,
)
QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    config=_qwen3,
    fixed={**_SHAPE, "linear_bias": False, "qkv_bias": False, "qk_norm": True},
    keys={**_KEYS, "head_dim": "head_dim"},
    defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    only={
        **_ONLY,
        "attention_bias": (False, "a recipe has biases on all linear layers or none"),
    },
    windowed=True,
)
SMOLLM3 = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    config=_smollm3,
    fixed={**_SHAPE, "qk_norm": False},
    keys={**_KEYS, "no_rope_layer_interval": "no_rope_layer_interval"},
    defaults={
        **_DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
    },
    only={**_ONLY, "use_sliding_window": (False, "its windows are in layers without positions")},
    more_reasons=_bias_reasons,
    more_section=lambda config: _biases(config) | _rotated_layers(config),
)
