"""CrystalCoder, as Crystal was published (LLM360/CrystalCoder), with remote code beside the
weights.

A GPT with biases, LayerNorm, queries, keys and values in one matrix, rotary positions in
neighbouring pairs, and muP's factors. Matrices are stored [in, out]; of the feed-forward's two
input matrices `c_fc2` is the gate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megacode.convert.family import ACTIVATIONS, Family, Weights
from megacode.convert.layout import QKV_STACKED
from megacode.errors import UserError
from megacode.recipe.schema import Model

_ACTIVATIONS = {"swiglu": "swiglu", **ACTIVATIONS, "squared-relu": "relu2"}
_POSITIONS = ("rotary", "learned", "none")


def _scaling(model: Model) -> dict[str, bool] | None:
    """The keys for a factor on attention scores of 1/d, 1/sqrt(d) or 1; None for any other."""
    dim = model.resolved_head_dim
    for factor, scaled, by_dim in (
        (1 / dim, True, True),
        (dim**-0.5, True, False),
        (1.0, False, False),
    ):
        if math.isclose(model.resolved_softmax_scale, factor, rel_tol=1e-9):
            return {"scale_attn_weights": scaled, "mup_scale_qk_dot_by_d": by_dim}
    return None


def _reasons(model: Model) -> Iterator[str]:
    rotated = model.rotated_dimensions
    if model.position_embedding == "rotary" and (rotated < 2 or rotated % 2):
        yield f"model.rotary_fraction rotates {rotated} dimensions of a head, not an even number"
    if _scaling(model) is None:
        yield f"model.softmax_scale is {model.softmax_scale}, not 1/head_dim, its root, or 1"


def _config(model: Model, length: int) -> dict[str, Any]:
    return {
        "auto_map": {
            "AutoConfig": "configuration_crystalcoder.CrystalCoderConfig",
            "AutoModel": "modeling_crystalcoder.CrystalCoderModel",
            "AutoModelForCausalLM": "modeling_crystalcoder.CrystalCoderLMHeadModel",
        },
        "n_positions": length,
        "n_embd": model.hidden_size,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": model.resolved_ffn_size,
        "activation_function": _ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.norm_epsilon,
        "position_embedding_type": model.position_embedding,
        "rotary_dim": model.rotated_dimensions if model.position_embedding == "rotary" else None,
        **({} if model.rotary_base == 10000 else {"rotary_base": model.rotary_base}),
        "mup_embeddings_scale": model.embedding_scale,
        "mup_output_alpha": model.mup.output_alpha if model.mup else 1.0,
        "mup_width_scale": model.width_ratio,
        **(_scaling(model) or {}),
        "attn_pdrop": model.attention_dropout,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "initializer_range": model.init_std,
    }


def _more_section(config: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = int(config["n_embd"]), int(config["n_head"])
    if config.get("num_key_value_heads") not in (None, heads):
        raise UserError(
            "config.json: num_key_value_heads is not n_head, and CrystalCoder's heads each have "
            "their own keys"
        )
    if hidden % heads:
        raise UserError(f"config.json: n_embd {hidden} is not a multiple of n_head {heads}")
    positions, dim = config.get("position_embedding_type") or "rotary", hidden // heads
    if positions not in _POSITIONS:
        raise UserError(
            f"config.json: position_embedding_type is {positions!r}, and only "
            f"{', '.join(_POSITIONS)} can be imported"
        )
    section: dict[str, Any] = {
        "position_embedding": positions,
        "ffn_size": int(config.get("n_inner") or 4 * hidden),
    }
    if positions == "rotary":
        section["rotary_interleaved"] = True
        section["rotary_base"] = float(config.get("rotary_base") or 10000.0)
        section["rotary_fraction"] = _fraction(int(config.get("rotary_dim") or dim), dim)
    return section | _factors(config, hidden, dim)


def _fraction(rotated: int, dim: int) -> float:
    """A share of `dim` that gives `rotated` again when it is rounded down."""
    share = rotated / dim
    return share if int(dim * share) == rotated else math.nextafter(share, 1.0)


def _factors(config: Mapping[str, Any], hidden: int, dim: int) -> dict[str, Any]:
    """`mup` and `softmax_scale` of the config's factors."""
    width = float(config.get("mup_width_scale", 1.0))
    embedding = float(config.get("mup_embeddings_scale", 1.0))
    alpha = float(config.get("mup_output_alpha", 1.0))
    scale = 1 / dim if config.get("mup_scale_qk_dot_by_d") else dim**-0.5
    if not config.get("scale_attn_weights", True):
        scale = 1.0
    if (width, embedding, alpha) == (1.0, 1.0, 1.0) and scale != 1 / dim:
        return {} if scale == dim**-0.5 else {"softmax_scale": scale}
    base = max(round(width * hidden), 1)
    # The recipe's base width is a whole number; where the config's is none, alpha takes the rest,
    # so logits stay the same.
    if not math.isclose(base / hidden, width, rel_tol=1e-9):
        alpha *= width * hidden / base
    mup = {"base_hidden_size": base, "embedding_scale": embedding, "output_alpha": alpha}
    return {"mup": mup} if scale == 1 / dim else {"mup": mup, "softmax_scale": scale}


CRYSTALCODER = Family(
    name="crystalcoder",
    architecture="CrystalCoderLMHeadModel",
    config=_config,
    fixed={
        "normalization": "layernorm",
        "linear_bias": True,
        "rotary_scaling": None,
        "qk_norm": False,
    },
    keys={
        "layers": "n_layer",
        "hidden_size": "n_embd",
        "heads": "n_head",
        "context_length": "n_positions",
        "activation": "activation_function",
        "norm_epsilon": "layer_norm_epsilon",
        "init_std": "initializer_range",
        "dropout": "resid_pdrop",
        "attention_dropout": "attn_pdrop",
    },
    activations=_ACTIVATIONS,
    defaults={
        "activation_function": "swiglu",
        "layer_norm_epsilon": 1e-5,
        "n_positions": 2048,
        "tie_word_embeddings": True,
    },
    only=dict.fromkeys(
        ("scale_attn_by_inverse_layer_idx", "add_cross_attention"),
        (False, "Megatron-Core's GPT has nothing like it"),
    ),
    scaled=True,
    more_reasons=_reasons,
    more_section=_more_section,
    weights=Weights(
        embedding="transformer.wte",
        positions="transformer.wpe",
        layer="transformer.h.{i}.",
        attention_norm="ln_1",
        qkv=("attn.c_attn",),
        qkv_form=QKV_STACKED,
        attention_output="attn.c_proj",
        ffn_norm="ln_2",
        gate="mlp.c_fc2",
        ffn_in="mlp.c_fc",
        ffn_out="mlp.c_proj",
        final_norm="transformer.ln_f",
        transposed=True,
    ),
    remote_code=("configuration_crystalcoder.py", "modeling_crystalcoder.py"),
)
