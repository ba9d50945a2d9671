"""CrystalCoder: the form in which Crystal was published (LLM360/CrystalCoder), with remote code beside the weights.

A GPT with biases, LayerNorm, queries, keys and values in one matrix, rotary positions in neighbouring pairs, and muP's
factors. Matrices are stored [in, out]; of the feed-forward's two input matrices `c_fc2` is the gate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megacode.convert.family import (
    ACTIVATIONS,
    Context,
    Family,
    ends,
    first_reason,
    foreign_fields,
    is_not,
    known_activation,
    layer_slots,
    norm_rows,
    own_head_dim,
    refuse,
    scaled_positions,
    shared_heads,
    value,
    with_biases,
)
from megacode.convert.layout import SAME, TRANSPOSED, Form, Slot, join_qkv, split_qkv
from megacode.errors import UserError
from megacode.recipe.schema import Model

_ACTIVATIONS = {"swiglu": "swiglu", **ACTIVATIONS, "squared-relu": "relu2"}
_POSITIONS = ("rotary", "learned", "none")


def _scaling(model: Model) -> dict[str, bool] | None:
    """The keys that say what attention scores are multiplied by: 1/d, 1/sqrt(d) or 1; None for anything else."""
    scale, dim = model.resolved_softmax_scale, model.resolved_head_dim
    known = {
        1 / dim: {"scale_attn_weights": True, "mup_scale_qk_dot_by_d": True},
        dim**-0.5: {"scale_attn_weights": True, "mup_scale_qk_dot_by_d": False},
        1.0: {"scale_attn_weights": False, "mup_scale_qk_dot_by_d": False},
    }
    return next(
        (keys for factor, keys in known.items() if math.isclose(scale, factor, rel_tol=1e-9)), None
    )


def _rotary_dim(model: Model) -> int:
    return int(model.resolved_head_dim * model.rotary_fraction)


def _fits(model: Model) -> str | None:
    rotary = model.position_embedding == "rotary"
    return first_reason(
        [
            *foreign_fields(model),
            is_not("normalization", model.normalization, "layernorm"),
            is_not("activation", model.activation, *_ACTIVATIONS),
            (not model.linear_bias, "model.linear_bias is false"),
            shared_heads(model),
            scaled_positions(model),
            (model.qk_norm, "model.qk_norm normalises queries and keys"),
            own_head_dim(model),
            (
                rotary and (_rotary_dim(model) < 2 or _rotary_dim(model) % 2 != 0),
                f"model.rotary_fraction rotates {_rotary_dim(model)} dimensions of a head, not an even number",
            ),
            (
                _scaling(model) is None,
                f"model.softmax_scale is {model.softmax_scale}, not 1/head_dim, its root, or 1",
            ),
        ]
    )


def _config(model: Model, context: Context) -> dict[str, Any]:
    return {
        "auto_map": {
            "AutoConfig": "configuration_crystalcoder.CrystalCoderConfig",
            "AutoModel": "modeling_crystalcoder.CrystalCoderModel",
            "AutoModelForCausalLM": "modeling_crystalcoder.CrystalCoderLMHeadModel",
        },
        "n_positions": context.length,
        "n_embd": model.hidden_size,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": model.resolved_ffn_size,
        "activation_function": _ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.norm_epsilon,
        "position_embedding_type": model.position_embedding,
        "rotary_dim": _rotary_dim(model) if model.position_embedding == "rotary" else None,
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


def _model_section(config: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        refuse(config, key, False, "Megatron-Core's GPT has nothing like it")
    if config.get("num_key_value_heads") not in (None, config.get("n_head")):
        raise UserError(
            "config.json: num_key_value_heads is not n_head, and CrystalCoder's heads each have their own keys"
        )
    known = {theirs: ours for ours, theirs in _ACTIVATIONS.items()} | {"gelu_new": "gelu-tanh"}
    positions = config.get("position_embedding_type") or "rotary"
    if positions not in _POSITIONS:
        raise UserError(
            f"config.json: position_embedding_type is {positions!r}, and only {', '.join(_POSITIONS)} can be imported exactly"
        )
    hidden, heads = int(value(config, "n_embd")), int(value(config, "n_head"))
    section: dict[str, Any] = {
        "layers": int(value(config, "n_layer")),
        "hidden_size": hidden,
        "heads": heads,
        "ffn_size": int(config.get("n_inner") or 4 * hidden),
        "normalization": "layernorm",
        "norm_epsilon": float(value(config, "layer_norm_epsilon", 1e-5)),
        "activation": known_activation(config, "activation_function", "swiglu", known),
        "linear_bias": True,
        "position_embedding": positions,
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
        "context_length": int(value(config, "n_positions", 2048)),
        "dropout": float(config.get("resid_pdrop") or 0.0),
        "attention_dropout": float(config.get("attn_pdrop") or 0.0),
        "init_std": float(config.get("initializer_range") or 0.02),
    }
    if hidden % heads:
        raise UserError(f"config.json: n_embd {hidden} is not a multiple of n_head {heads}")
    dim = hidden // heads
    if positions == "rotary":
        section["rotary_interleaved"] = True
        section["rotary_base"] = float(config.get("rotary_base") or 10000.0)
        section["rotary_fraction"] = _fraction(int(config.get("rotary_dim") or dim), dim)
    return section | _factors(config, hidden, dim)


def _fraction(rotary_dim: int, dim: int) -> float:
    """A share of `dim` that gives `rotary_dim` again when it is rounded down."""
    share = rotary_dim / dim
    return share if int(dim * share) == rotary_dim else math.nextafter(share, 1.0)


def _factors(config: Mapping[str, Any], hidden: int, dim: int) -> dict[str, Any]:
    """`mup` and `softmax_scale` of the config's factors."""
    width = float(config.get("mup_width_scale", 1.0))
    embedding, alpha = (
        float(config.get("mup_embeddings_scale", 1.0)),
        float(config.get("mup_output_alpha", 1.0)),
    )
    scale: float | None = dim**-0.5
    if not config.get("scale_attn_weights", True):
        scale = 1.0
    elif config.get("mup_scale_qk_dot_by_d"):
        scale = 1 / dim
    if (width, embedding, alpha) == (1.0, 1.0, 1.0) and scale != 1 / dim:
        return {} if scale == dim**-0.5 else {"softmax_scale": scale}
    base = max(round(width * hidden), 1)
    # The recipe's base width is a whole number; where the config's is none, alpha takes the rest, so logits stay the same.
    if not math.isclose(base / hidden, width, rel_tol=1e-9):
        alpha *= width * hidden / base
    factors = {
        "mup": {"base_hidden_size": base, "embedding_scale": embedding, "output_alpha": alpha}
    }
    return factors if scale == 1 / dim else {**factors, "softmax_scale": scale}


# --------------------------------------------------------------------------------------------------------------- forms


def _pairs(model: Model, tensor: Tensor, back: bool) -> Tensor:
    """Rows of heads rotated in halves (x0, x1 ... | y0, y1 ...) to neighbouring pairs (x0, y0), (x1, y1) ..., or back."""
    if model.rotary_interleaved or model.position_embedding != "rotary":
        return tensor
    dim, rotated = model.resolved_head_dim, _rotary_dim(model)
    order = torch.arange(dim)
    order[:rotated] = torch.arange(rotated).reshape(2, -1).T.reshape(-1)
    order = torch.argsort(order) if back else order
    return (
        tensor.reshape(-1, dim, *tensor.shape[1:])
        .index_select(1, order.to(tensor.device))
        .reshape(tensor.shape)
    )


def _split_columns(model: Model, tensor: Tensor) -> list[Tensor]:
    """linear_qkv (weight or bias) -> c_attn: queries | keys | values along the last dimension."""
    q, k, v = split_qkv(model, tensor)
    return [torch.cat((_pairs(model, q, False), _pairs(model, k, False), v)).t()]


def _join_columns(model: Model, tensors: Sequence[Tensor]) -> Tensor:
    q, k, v = tensors[0].t().chunk(3)
    return join_qkv(model, [_pairs(model, q, True), _pairs(model, k, True), v])


def _split_gate(model: Model, tensor: Tensor) -> list[Tensor]:
    return [part.t() for part in tensor.chunk(2)]


_QKV = Form(_split_columns, _join_columns)
_GATE = Form(_split_gate, lambda model, tensors: torch.cat([tensor.t() for tensor in tensors]))


def _slots(model: Model) -> Iterator[Slot]:
    first, last = ends(model, "transformer.wte.weight", "transformer.ln_f", "lm_head.weight")
    layer = "transformer.h.{i}."
    inner: tuple[Form, tuple[str, ...]] = (TRANSPOSED, (layer + "mlp.c_fc",))
    if model.gated:
        inner = (_GATE, (layer + "mlp.c_fc2", layer + "mlp.c_fc"))
    yield from first
    if model.position_embedding == "learned":
        yield Slot("embedding.position_embeddings.weight", None, ("transformer.wpe.weight",), SAME)
    # Transposing a bias leaves it as it is, so weights and biases share their forms.
    yield from layer_slots(
        model,
        [
            *norm_rows(model, "self_attention.linear_qkv", layer + "ln_1"),
            *with_biases("self_attention.linear_qkv", _QKV, (layer + "attn.c_attn",), True),
            *with_biases("self_attention.linear_proj", TRANSPOSED, (layer + "attn.c_proj",), True),
            *norm_rows(model, "mlp.linear_fc1", layer + "ln_2"),
            *with_biases("mlp.linear_fc1", *inner, True),
            *with_biases("mlp.linear_fc2", TRANSPOSED, (layer + "mlp.c_proj",), True),
        ],
    )
    yield from last


CRYSTALCODER = Family(
    "crystalcoder",
    "CrystalCoderLMHeadModel",
    "crystalcoder",
    _fits,
    _config,
    _model_section,
    _slots,
    remote_code=("configuration_crystalcoder.py", "modeling_crystalcoder.py"),
)
