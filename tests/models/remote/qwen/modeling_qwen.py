"""A stand-in for the model that comes with Qwen-1: its module tree, tensor names, shapes and layouts.

What is unusual: the names are GPT-2's, but `c_attn` and `c_proj` are linear layers; query, key and value are one matrix
with a bias; `w2` is the gate and `w1` what it multiplies, both half as wide as `intermediate_size` says.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_qwen import QWenConfig


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def rotated(x, base):
    """x: [batch, tokens, heads, width], turned in pairs of channels that lie half a head apart."""
    tokens, width = x.shape[1], x.shape[-1]
    frequencies = base ** (-torch.arange(0, width, 2, device=x.device).float() / width)
    angles = torch.outer(torch.arange(tokens, device=x.device).float(), frequencies)
    cos, sin = (f.repeat(1, 2)[None, :, None].to(x.dtype) for f in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class QWenAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.split_size = config.hidden_size
        projection = config.kv_channels * config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * projection)
        self.c_proj = nn.Linear(config.hidden_size, projection, bias=not config.no_bias)

    def forward(self, x, mask):
        shape = (*x.shape[:2], self.num_heads, -1)
        query, key, value = (part.reshape(shape) for part in self.c_attn(x).split(self.split_size, 2))
        query, key = (rotated(part, self.config.rotary_emb_base) for part in (query, key))
        query, key, value = (part.permute(0, 2, 1, 3) for part in (query, key, value))
        context = F.scaled_dot_product_attention(query, key, value, mask)
        return self.c_proj(context.transpose(1, 2).reshape(x.shape))


class QWenMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        half = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, half, bias=not config.no_bias)
        self.w2 = nn.Linear(config.hidden_size, half, bias=not config.no_bias)
        self.c_proj = nn.Linear(half, config.hidden_size, bias=not config.no_bias)

    def forward(self, x):
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class QWenBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, x, mask):
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class QWenPreTrainedModel(PreTrainedModel):
    config_class = QWenConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["QWenBlock"]

    def _init_weights(self, module):
        return


class QWenModel(QWenPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(0.0)
        self.h = nn.ModuleList([QWenBlock(config) for _ in range(config.num_hidden_layers)])
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, value):
        self.wte = value

    def forward(self, input_ids, attention_mask=None, **kwargs):
        x = self.drop(self.wte(input_ids))
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None, :] | torch.eye(length, dtype=torch.bool, device=x.device)
        for block in self.h:
            x = block(x, mask)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(x))


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
        hidden = self.transformer(input_ids, attention_mask).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))
