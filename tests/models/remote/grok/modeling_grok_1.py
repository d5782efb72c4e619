"""A stand-in for the model that comes with Grok-1 for Hugging Face: its module tree, tensor names and shapes.

What is unusual: embeddings and logits are multiplied; a norm, whose parameter is called `scale`, stands before and
after each half of a block; attention scores are bent by a tanh; each expert is three linear layers called `linear`,
`linear_v` and `linear_1`.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_grok_1 import Grok1Config


class RMSNorm(nn.Module):
    def __init__(self, size, eps=1e-5):
        super().__init__()
        self.variance_epsilon = eps
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x):
        wide = x.float()
        return self.scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)


def rotated(x):
    """x: [batch, heads, tokens, width]"""
    tokens, width = x.shape[-2:]
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, device=x.device).float() / width)
    angles = torch.outer(torch.arange(tokens, device=x.device).float(), frequencies).repeat(1, 2)
    first, second = x.chunk(2, -1)
    return x * angles.cos().to(x.dtype) + torch.cat((-second, first), -1) * angles.sin().to(x.dtype)


class MultiHeadAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.width = config.hidden_size // config.num_attention_heads
        keys = config.num_key_value_heads * self.width
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, mask):
        config = self.config
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotated(query), rotated(key)
        repeat = config.num_attention_heads // config.num_key_value_heads
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        scores = query @ key.transpose(-1, -2) * config.attn_output_multiplier
        scores = config.max_attn_value * torch.tanh(scores / config.max_attn_value)
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).float().softmax(-1).to(x.dtype)
        return self.o_proj((weights @ value).transpose(1, 2).flatten(2))


class MoeMLP(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.linear_v = nn.Linear(hidden, inner, bias=False)
        self.linear_1 = nn.Linear(inner, hidden, bias=False)
        self.linear = nn.Linear(hidden, inner, bias=False)

    def forward(self, x):
        return self.linear_1(F.gelu(self.linear(x)) * self.linear_v(x))


class MoeBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            [MoeMLP(config.hidden_size, config.intermediate_size) for _ in range(config.num_experts)]
        )

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        shares, chosen = F.softmax(self.gate(tokens).float(), -1).topk(self.top_k, -1)
        total = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            if len(rows):
                total.index_add_(0, rows, expert(tokens[rows]) * shares[rows, places, None].to(x.dtype))
        return total.reshape(x.shape)


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn = MultiHeadAttention(config)
        self.moe_block = MoeBlock(config)
        self.pre_attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_moe_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_moe_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, mask):
        x = x + self.post_attn_norm(self.attn(self.pre_attn_norm(x), mask))
        return x + self.post_moe_norm(self.moe_block(self.pre_moe_norm(x)))


class Grok1PretrainedModel(PreTrainedModel):
    config_class = Grok1Config
    base_model_prefix = "model"
    _no_split_modules = ["DecoderLayer"]

    def _init_weights(self, module):
        return


class Grok1Model(Grok1PretrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding_multiplier_scale = config.embedding_multiplier_scale
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(self, input_ids, attention_mask=None, **kwargs):
        x = self.embed_tokens(input_ids) * self.embedding_multiplier_scale
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None, :] | torch.eye(length, dtype=torch.bool, device=x.device)
        for layer in self.layers:
            x = layer(x, mask)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


class Grok1ModelForCausalLM(Grok1PretrainedModel):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = Grok1Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
        hidden = self.model(input_ids, attention_mask).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden) * self.config.output_multiplier_scale)
