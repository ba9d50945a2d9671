"""A family of Hugging Face models: which models fit, the config both ways, the weights' names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megacode.convert.config_keys import refuse, rotary_section, value
from megacode.convert.layout import (
    EMBEDDING,
    GATE_UP,
    HEAD_NORM,
    LAYER,
    OUTPUT,
    POSITIONS,
    QKV,
    SAME,
    Form,
    Slot,
    transposed,
)
from megacode.errors import UserError
from megacode.recipe.megatron_fields import EFFECT
from megacode.recipe.schema import Model

KEYS = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
    "context_length": "max_position_embeddings",
    "activation": "hidden_act",
    "rotary_base": "rope_theta",
    "init_std": "initializer_range",
    "attention_dropout": "attention_dropout",
}
"""The recipe's `model` fields -> config.json's keys, as most families name them."""
_NUMBERS: Mapping[str, type[int] | type[float]] = {
    **dict.fromkeys(("layers", "hidden_size", "heads", "ffn_size", "kv_heads", "head_dim"), int),
    "context_length": int,
    **dict.fromkeys(("norm_epsilon", "init_std", "dropout", "attention_dropout"), float),
}
_MAY_BE_MISSING = ("kv_heads", "head_dim", "init_std", "dropout", "attention_dropout")
"""The recipe's default means the same."""

ACTIVATIONS = {"gelu": "gelu", "gelu-tanh": "gelu_pytorch_tanh", "relu": "relu"}
"""Plain activations: a recipe's names -> those of transformers."""
_SAME_ACTIVATION = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class Weights:
    """How a family names and cuts its weights; the defaults are Llama's.

    Names stand without `.weight` and `.bias`, those of a layer without `layer`, which has its
    number as {i}.
    """

    embedding: str = "model.embed_tokens"
    positions: str = ""
    """Learned positions, for families that have them."""
    layer: str = "model.layers.{i}."
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    head_norms: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    attention_output: str = "self_attn.o_proj"
    ffn_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    ffn_in: str = "mlp.up_proj"
    ffn_out: str = "mlp.down_proj"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    qkv_form: Form = QKV
    transposed: bool = False
    """Matrices of layers are stored as [in, out]."""


def common_keys(model: Model) -> dict[str, Any]:
    """config.json's sizes and what is of use in training, as `KEYS` names them."""
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.resolved_ffn_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "initializer_range": model.init_std,
        "attention_dropout": model.attention_dropout,
    }


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        name: what `--format` takes, and config.json's `model_type`.
        architecture: the class that transformers loads.
        config: (model, its longest sequence) -> config.json of a model that fits.
        fixed: fields of the recipe's `model` that have one value in this family.
        keys: the recipe's fields -> config.json's keys. Without `kv_heads`, `head_dim`,
            `rotary_fraction` or `rotary_base` a family has no grouped queries, no heads of another
            width, rotates whole heads, or brings its own positions; likewise `sliding_window`.
        defaults: what transformers takes where a config.json is silent.
        only: keys of config.json that have to be this, or missing -> (value, why).
        windowed: whether `sliding_window` limits attention, in all layers or (without it in `keys`)
            in some.
        scaled: whether config.json says what embeddings, attention scores and logits are multiplied
            by, as muP does.
        more_reasons: what else stands in a model's way.
        more_section: further `model` fields of a config.json.
        remote_code: files of Python shipped beside the weights.
    """

    name: str
    architecture: str
    config: Callable[[Model, int], dict[str, Any]]
    fixed: Mapping[str, Any]
    keys: Mapping[str, str]
    activations: Mapping[str, str] = field(default_factory=lambda: {"swiglu": "silu"})
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    windowed: bool = False
    scaled: bool = False
    more_reasons: Callable[[Model], Iterable[str]] = lambda model: ()
    more_section: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    weights: Weights = field(default_factory=Weights)
    remote_code: tuple[str, ...] = ()

    def fits(self, model: Model) -> str | None:
        """None where a config.json can say this model exactly, else which field is in the way."""
        return next(iter(self._reasons(model)), None)

    def _reasons(self, model: Model) -> Iterator[str]:
        for name, given in model.megatron.items():
            if given is not None and EFFECT.get(name, "function") == "function":
                yield f"model.megatron.{name} changes what is computed"
        dim, heads, kv_heads = model.resolved_head_dim, model.heads, model.resolved_kv_heads
        if not self.scaled:
            if model.embedding_scale != 1.0:
                yield f"model.mup.embedding_scale is {model.embedding_scale:g}, not 1"
            if model.logit_scale != 1.0:
                yield f"muP multiplies logits by {model.logit_scale:g}"
            if not math.isclose(model.resolved_softmax_scale, dim**-0.5):
                yield (
                    "attention scores are not divided by the root of head_dim "
                    "(muP, or model.softmax_scale)"
                )
        for name in ("sliding_window", "sliding_window_pattern", "no_rope_layer_interval"):
            if getattr(model, name) and name not in self.keys:
                yield f"model.{name} is set"
        if "rotary_base" in self.keys and model.position_embedding != "rotary":
            yield f"model.position_embedding is {model.position_embedding}, not rotary"
        for name, wanted in self.fixed.items():
            found = getattr(model, name)
            if found != wanted and wanted is None:
                yield f"model.{name} is set"
            elif found != wanted:
                yield f"model.{name} is {_yaml(found)}, not {_yaml(wanted)}"
        if model.activation not in self.activations:
            names = ("one of " if len(self.activations) > 1 else "") + ", ".join(self.activations)
            yield f"model.activation is {model.activation}, not {names}"
        if "kv_heads" not in self.keys and kv_heads != heads:
            yield f"model.kv_heads is {kv_heads}, not heads ({heads})"
        if "head_dim" not in self.keys and dim * heads != model.hidden_size:
            yield f"model.head_dim is {dim}, not hidden_size / heads"
        yield from self.more_reasons(model)

    def model_section(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe's `model` fields of a config.json; UserError where they cannot express it."""
        config = {**self.defaults, **config}
        for key, (wanted, why) in self.only.items():
            refuse(config, key, wanted, why)
        section: dict[str, Any] = {
            **self.fixed,
            "tie_embeddings": bool(config.get("tie_word_embeddings")),
            "activation": self._activation(config),
        }
        for name, key in self.keys.items():
            number = _NUMBERS.get(name)
            if number and (config.get(key) is not None or name not in _MAY_BE_MISSING):
                section[name] = number(value(config, key))
        if "kv_heads" in self.keys:
            section.setdefault("kv_heads", section["heads"])
        if "rotary_base" in self.keys:
            section |= rotary_section(config, self.keys, self.defaults)
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        if "sliding_window" in self.keys and window:
            section["sliding_window"] = int(window)
        elif self.windowed and window:  # of some layers; shorter texts are attended to in full
            section["context_length"] = min(section["context_length"], int(window))
        return section | self.more_section(config)

    def _activation(self, config: Mapping[str, Any]) -> str:
        key = self.keys["activation"]
        found = config.get(key) or self.defaults.get(key)
        ours = {theirs: ours for ours, theirs in self.activations.items()}
        known = _SAME_ACTIVATION.get(str(found), found)
        if known not in ours:
            raise UserError(
                f"config.json: {key} is {found!r}, and only {', '.join(ours)} can be imported"
            )
        return ours[known]

    def slots(self, model: Model) -> Iterator[Slot]:
        """Every tensor of a model, in the order of its layers."""
        names, layer = self.weights, self._layer_tensors(model)
        norm = ("weight", "bias") if model.normalization == "layernorm" else ("weight",)
        yield Slot(EMBEDDING, None, (f"{names.embedding}.weight",), SAME)
        if model.position_embedding == "learned":
            yield Slot(POSITIONS, None, (f"{names.positions}.weight",), SAME)
        for i in range(model.layers):
            for key, theirs, form, has_bias in layer:
                for part in ("weight", "bias") if has_bias else ("weight",):
                    full = tuple(f"{names.layer.format(i=i)}{name}.{part}" for name in theirs)
                    yield Slot(f"{LAYER}{key}{part}", i, full, form)
        for part in norm:
            yield Slot(
                f"decoder.final_layernorm.{part}", None, (f"{names.final_norm}.{part}",), SAME
            )
        if not model.tie_embeddings:
            yield Slot(OUTPUT, None, (f"{names.head}.weight",), SAME)

    def _layer_tensors(self, model: Model) -> list[tuple[str, tuple[str, ...], Form, bool]]:
        """Of one layer: (Megatron-Core's name without `weight` and `bias`, names, form, has a
        bias).

        Megatron-Core's checkpoints name a norm after the linear layer behind it.
        """
        names, bias, norm_bias = self.weights, model.linear_bias, model.normalization == "layernorm"

        def stored(form: Form) -> Form:
            return transposed(form) if names.transposed else form

        fc1 = (names.gate, names.ffn_in) if model.gated else (names.ffn_in,)
        fc1_form = stored(GATE_UP if model.gated else SAME)
        tensors = [
            ("self_attention.linear_qkv.layer_norm_", (names.attention_norm,), SAME, norm_bias),
            (
                "self_attention.linear_qkv.",
                names.qkv,
                stored(names.qkv_form),
                bias or model.qkv_bias,
            ),
            ("self_attention.linear_proj.", (names.attention_output,), stored(SAME), bias),
            ("mlp.linear_fc1.layer_norm_", (names.ffn_norm,), SAME, norm_bias),
            ("mlp.linear_fc1.", fc1, fc1_form, bias),
            ("mlp.linear_fc2.", (names.ffn_out,), stored(SAME), bias),
        ]
        if model.qk_norm:
            for part, name in zip("qk", names.head_norms, strict=True):
                tensors.append((f"self_attention.{part}_layernorm.", (name,), HEAD_NORM, False))
        return tensors


def _yaml(found: Any) -> str:
    """A value as a recipe spells it."""
    return str(found).lower() if isinstance(found, bool) else str(found)
