"""Which family a model is exported as, by its own shape, and which field is in the way."""

from __future__ import annotations

import pytest

from megacode.convert.families import choose
from megacode.errors import UserError
from megacode.recipe.schema import Model, Mup, RotaryScaling

LLAMA = dict(layers=2, hidden_size=64, heads=4)
GPT = LLAMA | dict(normalization="layernorm", linear_bias=True)
SCALED = dict(rotary_scaling=RotaryScaling(kind="linear", factor=4.0))


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        (LLAMA, "llama"),
        (LLAMA | SCALED | dict(kv_heads=2, head_dim=24), "llama"),
        (
            LLAMA
            | dict(
                megatron={"attention_backend": "flash", "num_layers_in_first_pipeline_stage": 1}
            ),
            "llama",
        ),
        (LLAMA | dict(qkv_bias=True), "qwen2"),
        (LLAMA | dict(qk_norm=True, head_dim=32), "qwen3"),
        (LLAMA | dict(normalization="layernorm", rotary_fraction=0.25), "stablelm"),
        (GPT | dict(activation="gelu-tanh", kv_heads=2), "starcoder2"),
        (GPT | dict(activation="gelu", rotary_fraction=0.25), "gpt_neox"),
        (GPT | dict(mup=Mup(base_hidden_size=16)), "crystalcoder"),
    ],
)
def test_the_first_family_that_fits(keys: dict, family: str) -> None:
    assert choose(Model(**keys)).name == family


@pytest.mark.parametrize(
    ("keys", "family", "words"),
    [
        (GPT, "llama", "model.normalization is layernorm, not rmsnorm"),
        (LLAMA | dict(rotary_fraction=0.5), "llama", "model.rotary_fraction is 0.5, not 1"),
        (LLAMA | dict(activation="geglu"), "mistral", "model.activation is geglu, not swiglu"),
        (
            LLAMA | dict(qkv_bias=True, head_dim=24),
            "qwen2",
            "model.head_dim is 24, not hidden_size / heads",
        ),
        (GPT, "starcoder2", "model.activation is swiglu, not one of gelu, gelu-tanh, relu"),
        (
            GPT | dict(kv_heads=2, activation="gelu"),
            "gpt_neox",
            "model.kv_heads is 2, not heads (4)",
        ),
        (
            GPT | SCALED | dict(activation="gelu"),
            "gpt_neox",
            "model.rotary_scaling is set",
        ),
        (GPT | SCALED, "crystalcoder", "model.rotary_scaling is set"),
        (
            LLAMA | dict(megatron={"softmax_type": "off-by-one"}),
            "llama",
            "model.megatron.softmax_type changes",
        ),
        (LLAMA, "bert", "no such family; known are llama, mistral"),
    ],
)
def test_what_is_in_the_way_is_named(keys: dict, family: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        choose(Model(**keys), family)
    assert words in str(caught.value)


def test_a_shape_of_no_family_names_the_field_for_each() -> None:
    with pytest.raises(UserError) as caught:
        choose(Model(**LLAMA, linear_bias=True, softmax_scale=0.3, normalization="layernorm"))
    assert "llama: attention scores" in str(
        caught.value
    ) and "crystalcoder: model.softmax_scale" in str(caught.value)
