"""Llama and what is built like it: Mistral (the same weights), Qwen2 (biases on queries, keys and values), Qwen3 (norms on
queries and keys)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megacode.convert.family import (
    Context,
    Family,
    common_keys,
    common_reasons,
    common_section,
    decoder_slots,
    first_reason,
    is_not,
    own_head_dim,
    refuse,
    rope_keys,
    rotary_section,
    value,
    whole_heads,
    within_window,
)
from megacode.convert.layout import GATE_UP, HEAD_NORM, QKV, Slot
from megacode.errors import UserError
from megacode.recipe.schema import Model


def _fits(model: Model, name: str) -> str | None:
    qwen2, qwen3 = name == "qwen2", name == "qwen3"
    return first_reason(
        [
            *common_reasons(model),
            is_not("normalization", model.normalization, "rmsnorm"),
            is_not("activation", model.activation, "swiglu"),
            is_not("rotary_fraction", model.rotary_fraction, 1),
            (
                model.linear_bias and name != "llama",
                "model.linear_bias gives biases to every linear layer",
            ),
            (
                model.qkv_bias and not model.linear_bias and not qwen2,
                "model.qkv_bias gives biases to queries, keys and values",
            ),
            (qwen2 and not model.qkv_bias, "model.qkv_bias is false"),
            (model.qk_norm and not qwen3, "model.qk_norm normalises queries and keys"),
            (qwen3 and not model.qk_norm, "model.qk_norm is false"),
            *([own_head_dim(model)] if qwen2 else []),
        ]
    )


def _config(model: Model, context: Context, name: str) -> dict[str, Any]:
    out = {
        **common_keys(model),
        "num_key_value_heads": model.resolved_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        **rope_keys(model, context),
    }
    if name in ("llama", "qwen3", "mistral"):
        out["head_dim"] = model.resolved_head_dim
    if name == "llama":
        out |= {"attention_bias": model.linear_bias, "mlp_bias": model.linear_bias}
    if name == "qwen3":
        out["attention_bias"] = False
    if name == "mistral":
        out["sliding_window"] = None
    if name in ("qwen2", "qwen3"):
        out["use_sliding_window"] = False
    return out


_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "head_dim": 128,
    },
}
"""What transformers takes where a config.json is silent."""


def _model_section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    config = {**_DEFAULTS[name], **config}
    whole_heads(config)
    refuse(config, "hidden_act", "silu", "the feed-forward is SwiGLU")
    refuse(config, "pretraining_tp", 1, "matrix products are not cut")
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if (
        name in ("llama", "qwen3")
        and attention_bias != mlp_bias
        and (name == "llama" or attention_bias)
    ):
        raise UserError(
            f"config.json: attention_bias is {attention_bias} and mlp_bias {mlp_bias}; a recipe has biases on all linear layers "
            "or none"
        )
    length = int(value(config, "max_position_embeddings"))
    windowed = name == "mistral" or (name != "llama" and bool(config.get("use_sliding_window")))
    common = common_section(config)
    section: dict[str, Any] = {
        **common,
        "kv_heads": int(config.get("num_key_value_heads") or common["heads"]),
        "normalization": "rmsnorm",
        "norm_epsilon": float(value(config, "rms_norm_eps", 1e-6)),
        "activation": "swiglu",
        **rotary_section(config),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "context_length": within_window(config, length) if windowed else length,
        "linear_bias": attention_bias and mlp_bias,
    }
    if name == "qwen2":
        section["qkv_bias"] = True
    if name == "qwen3":
        section["qk_norm"] = True
    if config.get("head_dim"):
        section["head_dim"] = int(config["head_dim"])
    return section


def _slots(model: Model) -> Iterator[Slot]:
    more = [
        (
            f"self_attention.{p}_layernorm.weight",
            HEAD_NORM,
            (f"model.layers.{{i}}.self_attn.{p}_norm.weight",),
        )
        for p in "qk"
    ]
    return decoder_slots(
        model, embedding="model.embed_tokens.weight", norm="model.norm", head="lm_head.weight", layer="model.layers.{i}.",
        norms=("input_layernorm", "post_attention_layernorm"), qkv=(QKV, tuple(f"self_attn.{part}_proj" for part in "qkv")),
        output="self_attn.o_proj",
        fc1=(GATE_UP, ("mlp.gate_proj", "mlp.up_proj")), fc2="mlp.down_proj",
        bias=model.linear_bias, qkv_bias=model.qkv_bias, more=more if model.qk_norm else (),
    )  # fmt: skip


def _family(name: str, architecture: str) -> Family:
    return Family(
        name=name,
        architecture=architecture,
        model_type=name,
        fits=lambda model: _fits(model, name),
        config=lambda model, context: _config(model, context, name),
        model_section=lambda config: _model_section(config, name),
        slots=_slots,
    )


LLAMA = _family("llama", "LlamaForCausalLM")
MISTRAL = _family("mistral", "MistralForCausalLM")
QWEN2 = _family("qwen2", "Qwen2ForCausalLM")
QWEN3 = _family("qwen3", "Qwen3ForCausalLM")
