"""Parameter counts against published models; the other estimates against their formulas."""

from pathlib import Path

import pytest

from megacode.plan.estimate import days, flops_per_token, parameter_count, parameter_parts
from megacode.plan.memory import checkpoint_bytes, memory_per_rank, stage_memory
from megacode.recipe.load import load_recipe
from megacode.recipe.schema import Model

ROOT = Path(__file__).parents[2]
LLAMA2 = Model(layers=32, hidden_size=4096, heads=32, ffn_size=11008)


@pytest.mark.parametrize(
    ("model", "vocab_size", "parameters"),
    [
        (LLAMA2, 32000, 6_738_415_616),
        (
            Model(layers=32, hidden_size=4096, heads=32, kv_heads=8, ffn_size=14336),  # Llama 3 8B
            128_256,
            8_030_261_248,
        ),
        (
            Model(
                layers=24, hidden_size=896, heads=14, kv_heads=2, ffn_size=4864, qkv_bias=True, tie_embeddings=True
            ),  # Qwen2.5 0.5B
            151_936,
            494_032_768,
        ),
        (
            Model(
                layers=12, hidden_size=768, heads=12, normalization="layernorm", activation="gelu", linear_bias=True,
                tie_embeddings=True, position_embedding="learned", context_length=1024,
            ),  # GPT-2
            50_257,
            124_439_808,
        ),
        (
            Model(
                layers=32, hidden_size=4096, heads=32, ffn_size=10922, normalization="layernorm", linear_bias=True,
                tie_embeddings=True,
            ),  # Crystal
            32_032,
            6_575_278_720,
        ),
    ],
)  # fmt: skip
def test_parameters_are_those_of_published_models(model, vocab_size, parameters):
    assert parameter_count(model, vocab_size) == parameters


def test_parts_sum_up_and_qk_norm_counts():
    parts = parameter_parts(LLAMA2.model_copy(update={"qk_norm": True}), 32000)
    assert parts["norms"] == 32 * (2 * 4096 + 2 * 128) + 4096


def test_a_window_counts_itself():
    windowed = LLAMA2.model_copy(update={"sliding_window": 1024, "sliding_window_pattern": 4})
    saved = 12 * 24 * 4096 * (4096 - 1024)
    full, less = (flops_per_token(model, 32000, 4096) for model in (LLAMA2, windowed))
    assert full - less == saved
    assert flops_per_token(windowed, 32000, 512) == flops_per_token(LLAMA2, 32000, 512)


def test_flops_are_six_per_weight_and_attention_in_full():
    weights = (
        parameter_count(LLAMA2, 32000) - 32000 * 4096 - parameter_parts(LLAMA2, 32000)["norms"]
    )
    assert flops_per_token(LLAMA2, 32000, 4096) == 6 * weights + 12 * 32 * 4096 * 4096


EXACT = "model.pad_multiple=1"


def test_memory_splits_over_ranks(write):
    path = write()
    alone = memory_per_rank(load_recipe(path, [EXACT]), 1000, 1)
    assert alone.weights == 2 * alone.parameters and alone.optimizer == 12 * alone.parameters
    assert alone.parameters == parameter_count(load_recipe(path).model, 1000)
    four = memory_per_rank(load_recipe(path, [EXACT]), 1000, 4)
    assert four.optimizer == alone.optimizer / 4 and four.weights == alone.weights
    split = memory_per_rank(load_recipe(path, [EXACT, "parallel.tensor=2"]), 1000, 2)
    assert 0.5 < split.parameters / alone.parameters < 0.51
    aware = "optimizer.megatron={use_precision_aware_optimizer: true, exp_avg_dtype: bf16, exp_avg_sq_dtype: fp8}"
    lean = memory_per_rank(load_recipe(path, [EXACT, aware]), 1000, 1)
    assert lean.optimizer == alone.optimizer * (2 + 1 + 2) / 12, (
        "the master copy keeps 16 bits beside the weight's"
    )
    ema = memory_per_rank(load_recipe(path, [EXACT, "optimizer.ema=0.99"]), 1000, 4)
    assert ema.optimizer == four.optimizer * 16 / 12
    fp32 = memory_per_rank(load_recipe(path, [EXACT, "precision=fp32"]), 1000, 1)
    assert fp32.weights == 4 * fp32.parameters and fp32.optimizer == 8 * fp32.parameters


def test_activations_follow_the_published_formula(write):
    # Korthikanti et al., equation 1 without attention scores: 34 s b h bytes a layer, for 4h-wide GELU layers in
    # 16 bit with dropout.
    path = write()
    keys = [
        EXACT,
        "model.activation=gelu",
        "model.dropout=0.1",
        "model.layers=1",
        "model.ffn_size=256",
    ]

    def layer(*more):
        logits = 128 * 1000 * 6
        return memory_per_rank(load_recipe(path, [*keys, *more]), 1000, 1).activations - logits

    assert layer() == layer("parallel.recompute=selective") == 128 * 64 * 34


@pytest.mark.parametrize(
    ("layers", "precision", "gib"), [(24, "bf16", 96.1), (24, "fp8", 103.8), (32, "bf16", 127.2)]
)
def test_memory_is_what_an_h200_measured(layers, precision, gib):
    """Highest allocation of docs/results/gpu-nvidia-h200.md: Crystal's shape with a feed-forward of 10,944, two sequences of
    2048 a micro-batch, one device."""
    recipe = load_recipe(
        ROOT / "recipes/crystal-7b.yaml",
        [f"model.layers={layers}", "model.ffn_size=10944", "model.pad_multiple=64", f"precision={precision}", "parallel=null",
         "parallel.micro_batch_size=2"],
    )  # fmt: skip
    assert stage_memory(recipe, 32032, 1, 0).total / 2**30 == pytest.approx(gib, rel=0.015)


def test_both_ends_of_a_pipeline_hold_the_tied_embedding():
    recipe = load_recipe(ROOT / "recipes/crystal-7b.yaml")
    first, middle, last = (stage_memory(recipe, 32032, 4, stage).parameters for stage in (0, 1, 3))
    assert first == last == middle + 32128 * 4096


def test_a_checkpoint_is_as_large_as_one_that_was_written():
    """crystal-tiny's, 8,032 tokens, fp32: 53,749,274 bytes on disk with everything. In 16 bit two bytes of sixteen less."""
    recipe = load_recipe(ROOT / "recipes/crystal-tiny.yaml")
    assert checkpoint_bytes(recipe, 8032) == pytest.approx(53_749_274, rel=0.01)
    half = load_recipe(ROOT / "recipes/crystal-tiny.yaml", ["precision=bf16"])
    assert checkpoint_bytes(half, 8032) / checkpoint_bytes(recipe, 8032) == 14 / 16
    ema = load_recipe(ROOT / "recipes/crystal-tiny.yaml", ["optimizer.ema=0.99"])
    assert checkpoint_bytes(ema, 8032) / checkpoint_bytes(recipe, 8032) == 20 / 16


def test_days():
    assert days(989e12 * 86_400, 2, 989e12, 0.5) == 1
