"""Configuration of CrystalCoder models, for Hugging Face transformers (4.40 and later).

Shipped beside the weights and loaded with `trust_remote_code=True`; it imports nothing but transformers.
"""

from transformers import PretrainedConfig


class CrystalCoderConfig(PretrainedConfig):
    """A GPT with SwiGLU, LayerNorm, biases, rotary positions on a part of each head, and muP's factors.

    Args:
        vocab_size, n_positions, n_embd, n_layer, n_head: the usual sizes; head size is n_embd / n_head.
        n_inner: inner size of the feed-forward; None is 4 x n_embd.
        activation_function: "swiglu" (two input matrices, `c_fc2` is the gate), or a name in transformers' ACT2FN.
        position_embedding_type: "rotary", "learned" (a table `wpe`) or "none".
        rotary_dim: how many leading dimensions of each head are rotated, in pairs (0, 1), (2, 3) ...; None is all.
        rotary_base: base of the rotary frequencies.
        mup_embeddings_scale: factor on the embedding's output.
        mup_output_alpha, mup_width_scale: the product is the factor on the logits.
        mup_scale_qk_dot_by_d: attention scores are divided by the head size instead of its root.
        scale_attn_weights: False leaves the scores as they are.
    """

    model_type = "crystalcoder"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(
        self,
        vocab_size=32032,
        n_positions=2048,
        n_embd=4096,
        n_layer=32,
        n_head=32,
        n_inner=None,
        activation_function="swiglu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=1e-5,
        initializer_range=0.02,
        scale_attn_weights=True,
        use_cache=True,
        bos_token_id=1,
        eos_token_id=2,
        position_embedding_type="rotary",
        rotary_dim=None,
        rotary_base=10000.0,
        mup_width_scale=1.0,
        mup_embeddings_scale=1.0,
        mup_output_alpha=1.0,
        mup_scale_qk_dot_by_d=False,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_inner = n_inner
        self.activation_function = activation_function
        self.resid_pdrop = resid_pdrop
        self.embd_pdrop = embd_pdrop
        self.attn_pdrop = attn_pdrop
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.scale_attn_weights = scale_attn_weights
        self.use_cache = use_cache
        self.position_embedding_type = position_embedding_type
        self.rotary_dim = rotary_dim
        self.rotary_base = rotary_base
        self.mup_width_scale = mup_width_scale
        self.mup_embeddings_scale = mup_embeddings_scale
        self.mup_output_alpha = mup_output_alpha
        self.mup_scale_qk_dot_by_d = mup_scale_qk_dot_by_d
        # Set here as well as by the base class, which from transformers 5 on does not keep it for every caller.
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if getattr(self, key, False):
                raise ValueError(
                    f"CrystalCoderConfig: {key} is not supported by this code; set it to false"
                )
        if position_embedding_type not in ("rotary", "learned", "none"):
            raise ValueError(
                f'CrystalCoderConfig: position_embedding_type "{position_embedding_type}" is not supported by this '
                'code; expected "rotary", "learned" or "none"'
            )
