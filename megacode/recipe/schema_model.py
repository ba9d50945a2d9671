"""The recipe's `model` and `tokenizer`: what is trained, as typed data. No torch."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from megacode.recipe.section import Count, Section


def padded(size: int, pad_multiple: int, tensor_parallel: int) -> int:
    """A size that is a multiple of both."""
    multiple = math.lcm(pad_multiple, tensor_parallel)
    return -(-size // multiple) * multiple


class Mup(Section):
    """Maximal update parametrisation (arXiv 2203.03466, table 8, as Crystal runs it): rates and
    `init_std` found at a small width hold at every width.

    With r = base_hidden_size / hidden_size: hidden matrices start at init_std x sqrt(r) and learn
    at r times the rate; logits are multiplied by output_alpha x r, the embedding's output by
    embedding_scale; attention scores are divided by head_dim instead of its root. Embeddings, norms
    and biases keep their rate and their start.
    """

    base_hidden_size: int = Field(gt=0)
    """Width at which `init_std`, `output_init_std` and the learning rates are stated."""
    embedding_scale: float = Field(default=1.0, gt=0)
    output_alpha: float = Field(default=1.0, gt=0)


class RotaryScaling(Section):
    """Rotary frequencies stretched for sequences longer than a model was first trained on:
    `rope_scaling` of published models."""

    kind: Literal["linear", "llama3", "yarn"]
    """`linear` divides every frequency; `llama3` divides low ones and leaves high ones, with the
    constants of Llama 3.1 and 3.2 (1 and 4 turns); so does `yarn` (arXiv 2309.00071; 1 and 32
    turns), which also multiplies rotated queries and keys by 0.1 ln(factor) + 1."""
    factor: float = Field(ge=1.0)
    original_context_length: Count | None = None
    """Longest sequence before the stretch, within which the turns are counted. `yarn` needs it;
    `llama3` has Llama's 8192 without it."""

    @model_validator(mode="after")
    def _counts_turns(self) -> RotaryScaling:
        given = self.original_context_length is not None
        if (self.kind == "linear" and given) or (self.kind == "yarn" and not given):
            word, remedy = ("takes no", "take it out") if given else ("needs", "add it")
            raise ValueError(f"{self.kind} {word} `original_context_length`; {remedy}")
        return self

    @property
    def original_length(self) -> int:
        return self.original_context_length or 8192


class Model(Section):
    """The GPT family, in the field's words: dense layers with standard attention. `megatron`
    reaches every other field of Megatron-Core's TransformerConfig that such layers have; those of
    experts, latent attention and the like are refused.

    The vocabulary is the tokenizer's; `vocab_size` states it where no tokenizer is at hand
    (planning) and must then agree.
    """

    layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int | None = Field(default=None, gt=0)
    """Key/value heads (grouped-query attention); default: as many as `heads`."""
    head_dim: int | None = Field(default=None, gt=0)
    """Default: hidden_size / heads."""
    ffn_size: int | None = Field(default=None, gt=0)
    """Inner size of the feed-forward layer; default: 4 x hidden_size, or 8/3 of it rounded up to 64
    for gated ones."""
    vocab_size: Count | None = None
    context_length: Count | None = None
    """Longest sequence the model is for (export); default: the longest phase's sequence length.
    Where phases have rotary positions of their own, exports have the longest so far instead, and
    with `yarn` factor x original_context_length."""
    normalization: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_epsilon: float = Field(default=1e-5, gt=0)
    qk_norm: bool = False
    activation: Literal["swiglu", "geglu", "gelu", "gelu-tanh", "relu", "squared-relu"] = "swiglu"
    """`gelu-tanh` is GELU's usual approximation by a hyperbolic tangent."""
    linear_bias: bool = False
    """Biases on every linear layer (query/key/value, attention output, feed-forward)."""
    qkv_bias: bool = False
    """Biases on query/key/value only (Qwen2)."""
    position_embedding: Literal["rotary", "learned", "none"] = "rotary"
    rotary_base: float = Field(default=10000.0, gt=0)
    rotary_fraction: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of each head's dimensions that is rotated."""
    rotary_interleaved: bool = False
    """Pairs (x0, x1), (x2, x3) ... (GPT-J, Crystal) instead of halves (Llama)."""
    rotary_scaling: RotaryScaling | None = None
    no_rope_layer_interval: int | None = Field(default=None, gt=1)
    """Every so many layers, the last of them has no rotary positions (SmolLM3: 4); default: all
    have them."""
    sliding_window: int | None = Field(default=None, gt=0)
    """Tokens that a token attends to, itself and those just before it; default: all before it."""
    sliding_window_pattern: int | None = Field(default=None, gt=1)
    """Every so many layers, the last of them attends to all tokens before; default: none does."""
    tie_embeddings: bool = False
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    attention_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """What is dropped is a function of model_seed, step and layout: a resumed run drops the same,
    another layout drops other units."""
    init_std: float = Field(default=0.02, gt=0)
    """Of every matrix without a key of its own. Biases start at 0, norms at 1."""
    init_distribution: Literal["normal", "truncated_normal"] = "normal"
    """`truncated_normal` draws again what lies beyond two standard deviations."""
    embedding_init_std: float | None = Field(default=None, gt=0)
    """Default: init_std. With `mup`, also used for an untied output layer."""
    output_init_std: float | None = Field(default=None, gt=0)
    """Of attention-out and FFN-down; default: init_std / sqrt(2 x layers)."""
    softmax_scale: float | None = Field(default=None, gt=0)
    """Factor on attention scores; default: 1 / sqrt(head_dim), with `mup` 1 / head_dim."""
    mup: Mup | None = None
    pad_multiple: int = Field(default=128, gt=0)
    """Vocabulary and feed-forward are stored with zeros up to a multiple of this and of the
    tensor-parallel size, so that every layout and FP8 can split them. The zeros stay zero, change
    nothing, are counted nowhere and never exported. A run that is to change to a tensor-parallel
    size that does not divide it (3, 5, 6) needs a multiple of that size from its start."""
    megatron: dict[str, Any] = Field(default_factory=dict)
    """Further TransformerConfig fields by their own names; names and plain types are checked
    against the installed one."""

    @property
    def resolved_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.heads

    @property
    def width_ratio(self) -> float:
        """base width / width; 1 without muP."""
        return self.mup.base_hidden_size / self.hidden_size if self.mup else 1.0

    @property
    def hidden_init_std(self) -> float:
        """Of query/key/value and FFN-in."""
        return self.init_std * math.sqrt(self.width_ratio)

    @property
    def residual_init_std(self) -> float:
        """Of attention-out and FFN-down."""
        return (self.output_init_std or self.init_std / math.sqrt(2 * self.layers)) * math.sqrt(
            self.width_ratio
        )

    @property
    def resolved_embedding_init_std(self) -> float:
        return self.embedding_init_std or self.init_std

    @property
    def head_init_std(self) -> float:
        """Of an untied output layer."""
        return self.resolved_embedding_init_std if self.mup else self.init_std

    @property
    def embedding_scale(self) -> float:
        """Factor on the embedding's output."""
        return self.mup.embedding_scale if self.mup else 1.0

    @property
    def logit_scale(self) -> float:
        return self.mup.output_alpha * self.width_ratio if self.mup else 1.0

    @property
    def resolved_softmax_scale(self) -> float:
        """Factor on attention scores."""
        return self.softmax_scale or (
            1 / self.resolved_head_dim if self.mup else self.resolved_head_dim**-0.5
        )

    @property
    def rotated_dimensions(self) -> int:
        """Of each head; an even number."""
        return int(self.resolved_head_dim * self.rotary_fraction)

    @property
    def windowed_layers(self) -> int:
        """Layers whose attention has the sliding window."""
        full = self.layers // self.sliding_window_pattern if self.sliding_window_pattern else 0
        return self.layers - full if self.sliding_window else 0

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "geglu")

    @property
    def resolved_ffn_size(self) -> int:
        if self.ffn_size:
            return self.ffn_size
        return -(-self.hidden_size * 8 // 3 // 64) * 64 if self.gated else 4 * self.hidden_size

    def stored(self, size: int, tensor_parallel: int) -> int:
        """A vocabulary or feed-forward size with its padding."""
        return padded(size, self.pad_multiple, tensor_parallel)

    def stored_ffn_size(self, tensor_parallel: int) -> int:
        return self.stored(self.resolved_ffn_size, tensor_parallel)


class TokenizerSection(Section):
    """Which tokenizer made the corpora. `path` is a SentencePiece .model, a tokenizer.json or a
    tiktoken vocabulary."""

    path: str
    kind: Literal["sentencepiece", "huggingface", "tiktoken"] | None = None
    """Default: by the file's ending."""
    added_tokens: Literal["none", "crystal"] | list[str] = "none"
    """Control tokens after the base vocabulary; `crystal` is the published list (fim, starcoder,
    chat, reserved)."""
    bos: bool = False
    """Put the begin-of-sequence token before each document."""
    eod: bool = True
    """Put the end-of-document token after each document."""
