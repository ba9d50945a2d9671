"""GPTBigCode (StarCoder, StarCoderBase, SantaCoder): LayerNorm and biases everywhere, learned
positions, and one key and value for all heads (multi-query) or one for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megacode.convert.family import ACTIVATIONS, Family, Weights
from megacode.convert.layout import SAME
from megacode.recipe.schema import Model


def _config(model: Model, length: int) -> dict[str, Any]:
    return {
        "n_embd": model.hidden_size,
        "n_inner": model.resolved_ffn_size,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_positions": length,
        "multi_query": model.resolved_kv_heads == 1,
        "num_key_value_heads": model.resolved_kv_heads,
        "activation_function": ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": model.init_std,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.attention_dropout,
        "scale_attn_weights": True,
    }


def _reasons(model: Model) -> Iterable[str]:
    if model.resolved_kv_heads not in (1, model.heads):
        yield f"model.kv_heads is {model.resolved_kv_heads}, not 1 or heads ({model.heads})"


def _section(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kv_heads": 1 if config["multi_query"] else int(config["n_head"]),
        "ffn_size": int(config.get("n_inner") or 4 * config["n_embd"]),
    }


GPT_BIGCODE = Family(
    name="gpt_bigcode",
    architecture="GPTBigCodeForCausalLM",
    config=_config,
    fixed={
        "normalization": "layernorm",
        "linear_bias": True,
        "position_embedding": "learned",
        "qk_norm": False,
    },
    keys={
        "layers": "n_layer",
        "hidden_size": "n_embd",
        "heads": "n_head",
        "kv_heads": "num_key_value_heads",
        "context_length": "n_positions",
        "activation": "activation_function",
        "norm_epsilon": "layer_norm_epsilon",
        "init_std": "initializer_range",
        "dropout": "resid_pdrop",
        "attention_dropout": "attn_pdrop",
    },
    activations=ACTIVATIONS,
    defaults={
        "activation_function": "gelu_pytorch_tanh",
        "layer_norm_epsilon": 1e-5,
        "multi_query": True,
        "n_positions": 1024,
        "tie_word_embeddings": True,
    },
    only={"scale_attn_weights": (True, "attention scores are divided by the root of head_dim")},
    more_reasons=_reasons,
    more_section=_section,
    weights=Weights(
        embedding="transformer.wte",
        positions="transformer.wpe",
        layer="transformer.h.{i}.",
        attention_norm="ln_1",
        qkv=("attn.c_attn",),
        # Megatron-Core's order: each head's query, key and value, or queries and the one key and
        # value.
        qkv_form=SAME,
        attention_output="attn.c_proj",
        ffn_norm="ln_2",
        ffn_in="mlp.c_fc",
        ffn_out="mlp.c_proj",
        final_norm="transformer.ln_f",
    ),
)
