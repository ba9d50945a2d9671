"""Configuration of CrystalCoder models, for Hugging Face transformers (4.40 and later).

Shipped beside the weights and loaded with `trust_remote_code=True`; it imports nothing but
transformers.
"""

from transformers import PretrainedConfig

# Every key and what it is where config.json is silent.
DEFAULTS = {
    "vocab_size": 32032,
    "n_positions": 2048,
    "n_embd": 4096,
    "n_layer": 32,
    "n_head": 32,  # head size is n_embd / n_head
    "n_inner": None,  # inner size of the feed-forward; None is 4 x n_embd
    # "swiglu" (two input matrices, `c_fc2` is the gate), or a name in transformers' ACT2FN
    "activation_function": "swiglu",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "scale_attn_weights": True,  # False leaves attention scores as they are
    "use_cache": True,
    # "rotary", "learned" (a table `wpe`) or "none"
    "position_embedding_type": "rotary",
    # how many leading dimensions of each head are rotated, in pairs (0, 1), (2, 3) ...; None is all
    "rotary_dim": None,
    "rotary_base": 10000.0,
    "mup_embeddings_scale": 1.0,  # factor on the embedding's output
    "mup_width_scale": 1.0,
    "mup_output_alpha": 1.0,  # times mup_width_scale: the factor on the logits
    "mup_scale_qk_dot_by_d": False,  # attention scores are divided by the head size, not its root
    # Also set by the base class, which from transformers 5 on does not keep it for every caller.
    "tie_word_embeddings": True,
}


class CrystalCoderConfig(PretrainedConfig):
    """A GPT with SwiGLU, LayerNorm, biases, rotary positions on a part of each head, and muP's
    factors; its keys stand in DEFAULTS."""

    model_type = "crystalcoder"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(self, bos_token_id=1, eos_token_id=2, **kwargs):
        for key, default in DEFAULTS.items():
            setattr(self, key, kwargs.pop(key, default))
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=self.tie_word_embeddings,
            **kwargs,
        )
        for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if getattr(self, key, False):
                raise ValueError(
                    f"CrystalCoderConfig: {key} is not supported by this code; set it to false"
                )
        found = self.position_embedding_type
        if found not in ("rotary", "learned", "none"):
            raise ValueError(
                f'CrystalCoderConfig: position_embedding_type "{found}" is not supported by this '
                'code; expected "rotary", "learned" or "none"'
            )
