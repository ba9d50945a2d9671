"""The model that the recipe's words build is the one that `transformers` builds from the same words and weights."""

import pytest
import torch

from megacode.recipe.schema import LearningRate, Mixture, Model, Phase, Recipe
from tests.processes import run_on

VOCAB, LENGTH = 1000, 48


def small(model: Model) -> Recipe:
    phase = Phase(
        name="p", steps=1, batch_size=2, sequence_length=LENGTH, mixture=Mixture(sources={"a": 1.0}),
        learning_rate=LearningRate(peak=1e-3),
    )  # fmt: skip
    model = model.model_copy(update={"pad_multiple": 16})  # noise in padding would be another model
    return Recipe(name="t", model=model, sources={}, phases=[phase], precision="fp32")


def megatron_weights_and_logits(world, model: Model):
    from megacode.megatron.model import build_model

    torch.manual_seed(0)
    (chunk,) = build_model(small(model), VOCAB)
    with torch.no_grad():  # biases and norms start at 0 and 1, where a mix-up would not show
        for parameter in chunk.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH).expand(2, -1)
    logits = chunk.eval()(tokens, positions, None)
    return (
        {k: v.detach() for k, v in chunk.state_dict().items() if v is not None},
        tokens,
        logits.detach(),
    )


def llama_like(config_class, model_class, model: Model, weights: dict, **config):
    """The transformers model with Megatron's weights: fused tensors taken apart by the layout Megatron documents."""
    hf = model_class(
        config_class(
            vocab_size=VOCAB,
            hidden_size=model.hidden_size,
            intermediate_size=model.resolved_ffn_size,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.resolved_kv_heads,
            rms_norm_eps=model.norm_epsilon,
            rope_theta=model.rotary_base,
            tie_word_embeddings=model.tie_embeddings,
            max_position_embeddings=LENGTH,
            head_dim=model.resolved_head_dim,
            **config,
        )  # fmt: skip
    ).eval()
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][:VOCAB],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
    }
    key = "embedding.word_embeddings.weight" if model.tie_embeddings else "output_layer.weight"
    state["lm_head.weight"] = weights[key][:VOCAB]
    groups, dim = model.resolved_kv_heads, model.resolved_head_dim
    per_group = model.heads // groups
    for i in range(model.layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        for part in ("weight", "bias"):
            fused = weights.get(ours + f"self_attention.linear_qkv.{part}")
            if fused is not None:
                rows = fused.reshape(groups, per_group + 2, dim, *fused.shape[1:])
                for name, piece in zip("qkv", rows.split([per_group, 1, 1], dim=1), strict=True):
                    state[theirs + f"self_attn.{name}_proj.{part}"] = piece.reshape(
                        -1, *fused.shape[1:]
                    )
        state[theirs + "self_attn.o_proj.weight"] = weights[
            ours + "self_attention.linear_proj.weight"
        ]
        for norm in ("q", "k"):
            if model.qk_norm:
                state[theirs + f"self_attn.{norm}_norm.weight"] = weights[
                    ours + f"self_attention.{norm}_layernorm.weight"
                ]
        gate, up = weights[ours + "mlp.linear_fc1.weight"].chunk(2)
        state[theirs + "mlp.gate_proj.weight"], state[theirs + "mlp.up_proj.weight"] = gate, up
        state[theirs + "mlp.down_proj.weight"] = weights[ours + "mlp.linear_fc2.weight"]
        state[theirs + "input_layernorm.weight"] = weights[ours + "input_layernorm.weight"]
        state[theirs + "post_attention_layernorm.weight"] = weights[
            ours + "pre_mlp_layernorm.weight"
        ]
    missing, unexpected = hf.load_state_dict(state, strict=False)
    assert not unexpected and not [
        m for m in missing if "rotary" not in m and "lm_head" not in m
    ], (
        missing,
        unexpected,
    )
    return hf


CASES = {
    "llama": Model(layers=3, hidden_size=96, heads=6, ffn_size=208),
    "llama-gqa-tied": Model(
        layers=2, hidden_size=96, heads=6, kv_heads=2, tie_embeddings=True, rotary_base=5e5
    ),
    "mistral": Model(layers=2, hidden_size=96, heads=6, kv_heads=2, sliding_window=7),
    "qwen2 windows": Model(
        layers=4, hidden_size=64, heads=4, qkv_bias=True, sliding_window=7, sliding_window_pattern=2
    ),
    "smollm3": Model(layers=4, hidden_size=96, heads=6, no_rope_layer_interval=2),
    "qwen2": Model(layers=2, hidden_size=64, heads=4, kv_heads=2, qkv_bias=True),
    "qwen3": Model(
        layers=2, hidden_size=64, heads=4, kv_heads=2, head_dim=24, qk_norm=True, norm_epsilon=1e-6
    ),
}
FAMILIES = {"mistral": "Mistral", "smollm3": "SmolLM3", "qwen2": "Qwen2", "qwen3": "Qwen3"}
MORE = {
    "mistral": {"sliding_window": 7},
    "qwen2 windows": {
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "smollm3": {"no_rope_layer_interval": 2, "pad_token_id": None},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = CASES[case]
    ((weights, tokens, logits),) = run_on(1, megatron_weights_and_logits, model)
    family = FAMILIES.get(case.partition(" ")[0], "Llama")
    hf = llama_like(
        getattr(transformers, f"{family}Config"),
        getattr(transformers, f"{family}ForCausalLM"),
        model,
        weights,
        **MORE.get(case, {}),
    )
    with torch.no_grad():
        expected = hf(tokens).logits
    ours = logits[..., :VOCAB]
    assert (ours - expected).abs().max() < 1e-4
    assert (ours.argmax(-1) == expected.argmax(-1)).all()


def test_padding_of_the_vocabulary_takes_no_probability() -> None:
    ((_, _, logits),) = run_on(1, megatron_weights_and_logits, CASES["llama"])
    assert logits.shape[-1] == 1008
    assert torch.softmax(logits, -1)[..., VOCAB:].max() == 0
