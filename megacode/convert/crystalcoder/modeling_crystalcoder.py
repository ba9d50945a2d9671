"""CrystalCoder models for Hugging Face transformers (4.40 and later), PyTorch.

Shipped beside the weights and loaded with `trust_remote_code=True`; it imports nothing but torch
and transformers. Matrices are stored [in, out] (transformers' Conv1D); the columns of `c_attn` are
query | key | value.
"""

import math

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

from .configuration_crystalcoder import CrystalCoderConfig

# From 5 on transformers wants to know which tensor a tied one shares.
_TIED = {"lm_head.weight": "transformer.wte.weight"}
_TIED_KEYS = _TIED if int(transformers.__version__.split(".")[0]) >= 5 else list(_TIED)


def rotary_table(position_ids, config, head_dim):
    """Cosines and sines, float32 [batch, 1, length, rotary_dim / 2] each."""
    size = config.rotary_dim or head_dim
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=position_ids.device) / size
    angles = position_ids[:, None, :, None].float() * (1.0 / config.rotary_base**exponents)
    return angles.cos(), angles.sin()


def rotate(x, table):
    """Rotate the leading dimensions of each head in pairs (0, 1), (2, 3) ...

    x is [batch, heads, length, head_dim].
    """
    cos, sin = table
    size = 2 * cos.shape[-1]
    even, odd = x[..., 0:size:2].float(), x[..., 1:size:2].float()
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated.to(x.dtype), x[..., size:]), dim=-1)


def causal_mask(attention_mask, past, length, device, explicit):
    """Which key each query may see, bool [batch or 1, 1, length, past + length].

    None where plain causality says it all.

    Args:
        attention_mask: [batch, past + length] with 1 for tokens and 0 for padding, or 4-D: bool, or
            added to the scores.
        explicit: give a mask in any case (a cache with more room than tokens).

    A query always sees itself: a row of padding without any key would become NaN.
    """
    total = past + length
    if attention_mask is not None and attention_mask.dim() == 4:
        given = attention_mask.to(device)[..., :total]
        return given if given.dtype == torch.bool else given > torch.finfo(given.dtype).min / 2
    tokens = None
    if attention_mask is not None:
        tokens = attention_mask[:, :total].to(device=device, dtype=torch.bool)
        tokens = F.pad(tokens, (0, total - tokens.shape[1]), value=True)
        tokens = None if bool(tokens.all()) else tokens
    if tokens is None and not explicit and (length == 1 or past == 0):
        return None
    keys = torch.arange(total, device=device)
    queries = torch.arange(past, total, device=device)[:, None]
    seen = (keys <= queries)[None, None]
    return seen if tokens is None else (seen & tokens[:, None, None, :]) | (keys == queries)


class CrystalCoderAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(
                f"CrystalCoder: n_embd {config.n_embd} is not a multiple of n_head {config.n_head}"
            )
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scale = 1.0
        if config.scale_attn_weights:
            self.scale = self.head_dim ** (-1.0 if config.mup_scale_qk_dot_by_d else -0.5)
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.c_proj.before_residual_sum = True
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden, mask=None, rotary=None, cache=None, output_attentions=False):
        batch, length, width = hidden.shape
        query, key, value = (
            part.view(batch, length, -1, self.head_dim).transpose(1, 2)
            for part in self.c_attn(hidden).split(width, -1)
        )
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        keys = key.shape[-2]
        if mask is not None and mask.shape[-1] < keys:  # a cache with more room than tokens
            mask = F.pad(mask, (0, keys - mask.shape[-1]), value=False)
        dropout = self.config.attn_pdrop if self.training else 0.0
        weights = None
        if output_attentions or self.config._attn_implementation == "eager":
            scores = torch.matmul(query, key.transpose(-1, -2)).float() * self.scale
            if mask is None and length > 1:
                mask = torch.ones(length, keys, dtype=torch.bool, device=scores.device).tril()
            if mask is not None:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            weights = F.dropout(scores.softmax(-1).to(value.dtype), dropout, self.training)
            context = torch.matmul(weights, value)
        else:
            causal = mask is None and length > 1
            context = F.scaled_dot_product_attention(
                query, key, value, mask, dropout, causal, scale=self.scale
            )
        context = context.transpose(1, 2).reshape(batch, length, width)
        return self.resid_dropout(self.c_proj(context)), weights


class CrystalCoderMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        gated = config.activation_function == "swiglu"
        self.c_fc = Conv1D(inner, config.n_embd)
        self.c_fc2 = Conv1D(inner, config.n_embd) if gated else None
        self.c_proj = Conv1D(config.n_embd, inner)
        self.c_proj.before_residual_sum = True
        self.act = ACT2FN["silu" if gated else config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden):
        inner = self.c_fc(hidden)
        inner = self.act(inner) if self.c_fc2 is None else inner * self.act(self.c_fc2(hidden))
        return self.dropout(self.c_proj(inner))


class CrystalCoderBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CrystalCoderAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = CrystalCoderMLP(config)

    def forward(self, hidden, mask=None, rotary=None, cache=None, output_attentions=False):
        attended, weights = self.attn(self.ln_1(hidden), mask, rotary, cache, output_attentions)
        hidden = hidden + attended
        return hidden + self.mlp(self.ln_2(hidden)), weights


class CrystalCoderPreTrainedModel(PreTrainedModel):
    config_class = CrystalCoderConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CrystalCoderBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_cache_class = True
    # Causal masks that some published files carry.
    _keys_to_ignore_on_load_unexpected = [r"attn\.bias$", r"attn\.masked_bias$"]  # noqa: RUF012

    def _init_weights(self, module):
        """muP: hidden matrices shrink with the root of the width; those before a residual sum also
        with the depth."""
        std = self.config.initializer_range
        hidden = std * math.sqrt(self.config.mup_width_scale)
        if isinstance(module, Conv1D):
            residual = getattr(module, "before_residual_sum", False)
            shrunk = hidden / math.sqrt(2 * self.config.n_layer) if residual else hidden
            nn.init.normal_(module.weight, 0.0, shrunk)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Embedding, nn.Linear)):
            nn.init.normal_(module.weight, 0.0, std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class CrystalCoderModel(CrystalCoderPreTrainedModel):
    """The layers without the output matrix."""

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        learned = config.position_embedding_type == "learned"
        self.wpe = nn.Embedding(config.n_positions, config.n_embd) if learned else None
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(CrystalCoderBlock(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, value):
        self.wte = value

    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("CrystalCoder: give either input_ids or inputs_embeds")
        if output_attentions is None:
            output_attentions = getattr(config, "output_attentions", False)
        if output_hidden_states is None:
            output_hidden_states = getattr(config, "output_hidden_states", False)
        checkpointing = self.gradient_checkpointing and self.training
        use_cache = (config.use_cache if use_cache is None else use_cache) and not checkpointing
        if past_key_values is not None and not isinstance(past_key_values, Cache):
            past_key_values = DynamicCache.from_legacy_cache(past_key_values)
        cache = past_key_values
        if use_cache and cache is None:
            cache = DynamicCache()
        past = int(cache.get_seq_length()) if cache is not None else 0

        hidden = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        length = hidden.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=hidden.device)[None]
        if self.wpe is not None:
            hidden = hidden + self.wpe(position_ids)
        hidden = self.drop(hidden * config.mup_embeddings_scale)
        rotary = None
        if config.position_embedding_type == "rotary":
            rotary = rotary_table(position_ids, config, config.n_embd // config.n_head)
        roomy = cache is not None and not isinstance(cache, DynamicCache)
        mask = causal_mask(attention_mask, past, length, hidden.device, explicit=roomy)

        states, attentions = [], []
        for block in self.h:
            states.append(hidden)
            arguments = (hidden, mask, rotary, cache, output_attentions)
            if checkpointing:
                hidden, weights = self._gradient_checkpointing_func(block.__call__, *arguments)
            else:
                hidden, weights = block(*arguments)
            attentions.append(weights)
        hidden = self.ln_f(hidden)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache if use_cache else None,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output.to_tuple() if return_dict is False else output


class CrystalCoderLMHeadModel(CrystalCoderPreTrainedModel, GenerationMixin):
    """The language model: layers, output matrix (tied to the embedding, if the configuration says
    so), muP's factor."""

    _tied_weights_keys = _TIED_KEYS  # type: ignore[assignment]  # a list before transformers 5

    def __init__(self, config):
        super().__init__(config)
        self.transformer = CrystalCoderModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.output_scale = config.mup_output_alpha * config.mup_width_scale
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def set_input_embeddings(self, value):
        self.transformer.wte = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        **kwargs,
    ):
        """Logits [batch, length, vocab] and, with `labels`, the loss.

        Logits are of the last `logits_to_keep` positions; 0 is all. The loss is the mean over
        labels other than -100, or their sum / `num_items_in_batch` where that is given.
        """
        inputs = (input_ids, past_key_values, attention_mask, position_ids, inputs_embeds)
        wanted = (use_cache, output_attentions, output_hidden_states)
        output = self.transformer(*inputs, *wanted)
        kept = logits_to_keep
        if isinstance(kept, int):
            kept = slice(-kept, None)
        logits = self.lm_head(output.last_hidden_state[:, kept]) * self.output_scale
        loss = None
        if labels is not None:
            shifted = F.pad(labels[:, 1:], (0, 1), value=-100).to(logits.device)
            loss = F.cross_entropy(
                logits.float().flatten(0, 1),
                shifted.flatten(),
                ignore_index=-100,
                reduction="mean" if num_items_in_batch is None else "sum",
            )
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result.to_tuple() if return_dict is False else result

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        position_ids=None,
        use_cache=None,
        **kwargs,
    ):
        """What the next forward pass needs: only tokens that the cache has not seen, with positions
        that skip padding."""
        past = 0
        if past_key_values is not None:
            if isinstance(past_key_values, Cache):
                past = int(past_key_values.get_seq_length())
            else:
                past = past_key_values[0][0].shape[-2]
        inputs = {"past_key_values": past_key_values, "use_cache": use_cache}
        inputs["attention_mask"] = attention_mask
        if "logits_to_keep" in kwargs:
            inputs["logits_to_keep"] = kwargs["logits_to_keep"]
        if inputs_embeds is not None and past == 0:
            inputs["inputs_embeds"] = inputs_embeds
            length = inputs_embeds.shape[1]
        else:
            # With embeddings as the prompt, input_ids hold only what was generated since.
            total = input_ids.shape[1] + (0 if inputs_embeds is None else inputs_embeds.shape[1])
            if attention_mask is not None and attention_mask.dim() == 2:
                total = attention_mask.shape[1]
            inputs["input_ids"] = input_ids[:, -max(total - past, 1) :]
            length = inputs["input_ids"].shape[1]
        if attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        if position_ids is not None:
            inputs["position_ids"] = position_ids[:, -length:]
        return inputs
