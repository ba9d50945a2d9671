"""What a family of Hugging Face models is to conversion, and what families have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megacode.convert.layout import EMBEDDING, LAYER, OUTPUT, SAME, Form, Slot
from megacode.errors import UserError
from megacode.recipe.schema import Model


@dataclass(frozen=True)
class Context:
    """What a config.json needs beside the model: sizes and the tokenizer's own ids."""

    vocab_size: int
    length: int
    """Longest sequence the model is for."""
    tokens: Mapping[str, Any]
    """bos_token_id, eos_token_id ... as far as they are known."""
    dtype: str
    """`bfloat16`, `float16` or `float32`."""


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        name: what `--format` takes.
        architecture: the class that transformers loads.
        fits: None where a model can be expressed exactly, else which field is in the way.
        config: config.json of a model that fits.
        model_section: the recipe's `model` keys of a config.json; UserError where they cannot express it.
        slots: every tensor of a model.
        remote_code: files of Python shipped beside the weights.
    """

    name: str
    architecture: str
    model_type: str
    fits: Callable[[Model], str | None]
    config: Callable[[Model, Context], dict[str, Any]]
    model_section: Callable[[Mapping[str, Any]], dict[str, Any]]
    slots: Callable[[Model], Iterator[Slot]]
    remote_code: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------------- fitting

_HARMLESS = (
    "fusion",
    "recompute",
    "cpu_offload",
    "overlap",
    "cuda_graph",
    "deterministic",
    "deallocate",
    "tp_comm",
    "p2p",
    "moe_per_layer",
    "attention_backend",
    "pipeline",  # which stage has which layers
)


def first_reason(checks: Iterable[tuple[bool, str]]) -> str | None:
    """The sentence of the first check that is true."""
    return next((text for wrong, text in checks if wrong), None)


def foreign_fields(model: Model) -> list[tuple[bool, str]]:
    """What stands in the way of every family."""
    other = [name for name in model.megatron if not any(part in name for part in _HARMLESS)]
    return [
        (bool(other), f"model.megatron.{other[0] if other else ''} may change what is computed")
    ]


def common_reasons(model: Model) -> list[tuple[bool, str]]:
    """What stands in the way of every family that has neither muP's factors nor foreign parts."""
    default_scale = abs(model.resolved_softmax_scale * model.resolved_head_dim**0.5 - 1) < 1e-9
    return [
        *foreign_fields(model),
        (
            model.embedding_scale != 1.0,
            f"model.mup.embedding_scale is {model.embedding_scale:g}, not 1",
        ),
        (model.logit_scale != 1.0, f"muP multiplies logits by {model.logit_scale:g}"),
        (
            not default_scale,
            "attention scores are not divided by the root of head_dim (muP, or model.softmax_scale)",
        ),
        (
            model.position_embedding != "rotary",
            f"model.position_embedding is {model.position_embedding}, not rotary",
        ),
    ]


def is_not(field: str, found: Any, *wanted: Any) -> tuple[bool, str]:
    """The check that `model.FIELD` has one of the wanted values."""
    names = ", ".join(str(name) for name in wanted)
    return (
        found not in wanted,
        f"model.{field} is {found}, not {'one of ' if len(wanted) > 1 else ''}{names}",
    )


def scaled_positions(model: Model) -> tuple[bool, str]:
    """The check that rotary frequencies are not stretched, for configs that cannot say so."""
    return model.rotary_scaling is not None, "model.rotary_scaling stretches rotary positions"


def shared_heads(model: Model) -> tuple[bool, str]:
    """The check that every head of queries has its own keys and values."""
    heads = model.resolved_kv_heads
    return heads != model.heads, f"model.kv_heads is {heads}, not heads ({model.heads})"


def own_head_dim(model: Model) -> tuple[bool, str]:
    """The check that the heads together are as wide as the model, for configs that do not say how wide a head is."""
    dim = model.resolved_head_dim
    return (
        dim * model.heads != model.hidden_size,
        f"model.head_dim is {dim}, not hidden_size / heads",
    )


# --------------------------------------------------------------------------------------------- common keys, both ways

ACTIVATIONS = {"gelu": "gelu", "gelu-tanh": "gelu_pytorch_tanh", "relu": "relu"}
"""Plain activations: a recipe's names -> those of transformers."""


def common_keys(model: Model) -> dict[str, Any]:
    """config.json's sizes and what is of use in training, as most families name them."""
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.resolved_ffn_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "initializer_range": model.init_std,
        "attention_dropout": model.attention_dropout,
    }


def common_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's keys of a config.json that names them as `common_keys` does."""
    return {
        "layers": int(value(config, "num_hidden_layers")),
        "hidden_size": int(value(config, "hidden_size")),
        "heads": int(value(config, "num_attention_heads")),
        "ffn_size": int(value(config, "intermediate_size")),
        "init_std": float(config.get("initializer_range") or 0.02),
        "attention_dropout": float(config.get("attention_dropout") or 0.0),
    }


def known_activation(
    config: Mapping[str, Any], key: str, default: str, known: Mapping[str, str]
) -> str:
    """The recipe's name of config.json's activation; UserError where it is none of `known` (theirs -> ours)."""
    found = config.get(key) or default
    if found not in known:
        raise UserError(
            f"config.json: {key} is {found!r}, and only {', '.join(known)} can be imported exactly"
        )
    return known[found]


# ------------------------------------------------------------------------------------------------- reading config.json


def value(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """A key of config.json; UserError where it is missing and has no default."""
    found = config.get(key, default)
    if found is None and default is None:
        raise UserError(f"config.json: {key} is missing; give a Hugging Face model's whole folder")
    return found


def refuse(config: Mapping[str, Any], key: str, wanted: Any, why: str) -> None:
    """UserError where a key is there with another value than `wanted` (or None)."""
    found = config.get(key)
    if found is not None and found != wanted:
        raise UserError(
            f"config.json: {key} is {found!r}, and only {wanted!r} can be imported exactly: {why}"
        )


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of Llama 3.1 and 3.2, and of Megatron-Core's rotary scaling."""
_DEFAULT_BASE = 10000.0


def rotary_section(config: Mapping[str, Any], key: str = "rope_theta") -> dict[str, Any]:
    """`rotary_base` and `rotary_scaling`, from where transformers before and since version 5 keep them.

    Version 5 has everything in `rope_parameters`, older ones the base at the top and the rest in `rope_scaling`. An older one
    that saves a config of version 5 writes its own default base beside `rope_parameters`, which it does not read.

    UserError: positions are scaled in a way that Megatron-Core does not know, or two keys say different things.
    """
    parameters = _rope_parameters(config)
    section: dict[str, Any] = {
        "rotary_base": _one_of_two(config, key, parameters, "rope_theta", _DEFAULT_BASE)
    }
    kind = parameters.get("rope_type") or "default"
    if kind == "default":
        return section
    if kind not in ("linear", "llama3"):
        raise UserError(
            f"config.json: rope_scaling is of type {kind!r}, and Megatron-Core's rotary positions here know linear and llama3; "
            "a model without it can be imported"
        )
    if kind == "llama3":
        original, longest = (
            config.get(f"{which}max_position_embeddings") for which in ("original_", "")
        )
        found = {"original_max_position_embeddings": longest, **parameters}
        if original not in (
            None,
            found["original_max_position_embeddings"],
        ):  # versions of transformers differ
            used = found["original_max_position_embeddings"]
            raise _two_values(
                "original_max_position_embeddings", original, "that of rotary positions", used
            )
        for name, wanted in LLAMA3.items():
            value(found, name)
            refuse(found, name, wanted, "Megatron-Core's llama3 scaling has Llama 3.1's constants")
    return section | {
        "rotary_scaling": {"kind": kind, "factor": float(value(parameters, "factor"))}
    }


def rotary_fraction(config: Mapping[str, Any], key: str, default: float) -> float:
    """The rotated share of each head, which config.json calls `key`. UserError: two keys say different things."""
    return _one_of_two(config, key, _rope_parameters(config), "partial_rotary_factor", default)


def whole_heads(config: Mapping[str, Any]) -> None:
    """UserError where a family that rotates whole heads is said to rotate a part of them."""
    for section in (config, _rope_parameters(config)):
        refuse(section, "partial_rotary_factor", 1, "this family rotates whole heads")


def _rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_scaling` and `rope_parameters` as one. UserError: both are there and differ, or they differ by kind of layer."""
    old, new = ({**(config.get(key) or {})} for key in ("rope_scaling", "rope_parameters"))
    for parameters in (old, new):
        if nested := [name for name, one in parameters.items() if isinstance(one, Mapping)]:
            raise UserError(
                f"config.json: rope_parameters differ by kind of layer ({', '.join(nested)}); a recipe has one for all"
            )
        if "type" in parameters:
            parameters.setdefault("rope_type", parameters.pop("type"))
    for name in sorted(old.keys() | new.keys()) if old and new else ():
        one, other = old.get(name), new.get(name)
        if one != other and not (name == "rope_theta" and None in (one, other)):
            raise _two_values(f"rope_scaling.{name}", one, f"rope_parameters.{name}", other)
    return {**old, **new}


def _one_of_two(
    config: Mapping[str, Any], key: str, parameters: Mapping[str, Any], name: str, default: float
) -> float:
    """A number that stands in `parameters`, or at the top as `key`. Both may; of two that differ one is the default, which an
    older transformers wrote without having read the other. UserError if neither is."""
    inner, outer = parameters.get(name), config.get(key)
    if inner is None or outer is None:
        found = outer if inner is None else inner
        return default if found is None else float(found)
    if float(inner) != float(outer) and float(outer) != default:
        raise _two_values(key, outer, f"rope_parameters.{name}", inner)
    return float(inner)


def _two_values(first: str, one: Any, second: str, other: Any) -> UserError:
    return UserError(
        f"config.json: {first} is {one!r} and {second} {other!r}; the model was trained with one of them: set both to it"
    )


def within_window(config: Mapping[str, Any], length: int) -> int:
    """The longest sequence at which a sliding window hides nothing."""
    window = config.get("sliding_window")
    return min(length, int(window)) if window and config.get("use_sliding_window", True) else length


def rope_keys(model: Model, context: Context) -> dict[str, Any]:
    """Keys of rotary positions as every version of transformers reads them."""
    base = (
        int(model.rotary_base) if model.rotary_base == int(model.rotary_base) else model.rotary_base
    )
    keys: dict[str, Any] = {"max_position_embeddings": context.length, "rope_theta": base}
    if scaling := model.rotary_scaling:
        constants = LLAMA3 if scaling.kind == "llama3" else {}
        keys["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor, **constants}
    return keys


# --------------------------------------------------------------------------------------------------------------- slots


def layer_slots(model: Model, table: Iterable[tuple[str, Form, tuple[str, ...]]]) -> Iterator[Slot]:
    """A layer's tensors for every layer: (Megatron-Core's name in the layer, form, Hugging Face names with {i})."""
    rows = list(table)
    for i in range(model.layers):
        for key, form, names in rows:
            yield Slot(LAYER + key, i, tuple(name.format(i=i) for name in names), form)


def ends(
    model: Model, embedding: str, norm: str, head: str | None
) -> tuple[list[Slot], list[Slot]]:
    """Slots before and after the layers; `head` None where it is tied and not written."""
    first = [Slot(EMBEDDING, None, (embedding,), SAME)]
    last = [Slot("decoder.final_layernorm.weight", None, (f"{norm}.weight",), SAME)]
    if model.normalization == "layernorm":
        last.append(Slot("decoder.final_layernorm.bias", None, (f"{norm}.bias",), SAME))
    if head and not model.tie_embeddings:
        last.append(Slot(OUTPUT, None, (head,), SAME))
    return first, last


def decoder_slots(
    model: Model, *, embedding: str, norm: str, head: str, layer: str, norms: tuple[str, str], qkv: tuple[Form, tuple[str, ...]],
    output: str, fc1: tuple[Form, tuple[str, ...]], fc2: str, bias: bool, qkv_bias: bool = False,
    more: Iterable[tuple[str, Form, tuple[str, ...]]] = (),
) -> Iterator[Slot]:  # fmt: skip
    """Every tensor of a decoder whose layers are norm, attention, norm, feed-forward.

    Args:
        layer: what the names of a layer begin with, with {i}; `norms`, `qkv`, `output`, `fc1` and `fc2` stand behind it.
        bias: whether linear layers have biases; `qkv_bias`: whether only those of queries, keys and values do.
        more: further rows of `layer_slots`, with whole names.
    """

    def named(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(layer + name for name in names)

    first, last = ends(model, embedding, norm, head)
    yield from first
    yield from layer_slots(
        model,
        [
            *norm_rows(model, "self_attention.linear_qkv", layer + norms[0]),
            *with_biases("self_attention.linear_qkv", qkv[0], named(qkv[1]), bias or qkv_bias),
            *with_biases("self_attention.linear_proj", SAME, named([output]), bias),
            *norm_rows(model, "mlp.linear_fc1", layer + norms[1]),
            *with_biases("mlp.linear_fc1", fc1[0], named(fc1[1]), bias),
            *with_biases("mlp.linear_fc2", SAME, named([fc2]), bias),
            *more,
        ],
    )
    yield from last


def with_biases(
    key: str, form: Form, names: tuple[str, ...], bias: bool
) -> list[tuple[str, Form, tuple[str, ...]]]:
    """Rows of `layer_slots` for a linear layer or a norm: `key` and `names` without `.weight` and `.bias`."""
    rows = [(f"{key}.weight", form, tuple(f"{name}.weight" for name in names))]
    if bias:
        rows.append((f"{key}.bias", form, tuple(f"{name}.bias" for name in names)))
    return rows


def norm_rows(model: Model, key: str, name: str) -> list[tuple[str, Form, tuple[str, ...]]]:
    """Rows for a norm that Megatron-Core's checkpoints name after the linear layer behind it."""
    rows: list[tuple[str, Form, tuple[str, ...]]] = [
        (f"{key}.layer_norm_weight", SAME, (f"{name}.weight",))
    ]
    if model.normalization == "layernorm":
        rows.append((f"{key}.layer_norm_bias", SAME, (f"{name}.bias",)))
    return rows
