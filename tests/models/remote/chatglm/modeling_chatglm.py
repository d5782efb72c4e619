"""A stand-in for the model that comes with ChatGLM3: its module tree, tensor names, shapes and layouts.

What is unusual: hidden states are [tokens, batch, channels]; query, key and value are one matrix with a bias, gate
and up another; half of each head turns with the position, in pairs of neighbours; the frequencies of that are a tensor
of the checkpoint; the output layer is part of the transformer, and the class doesn't call it the output embedding.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_chatglm import ChatGLMConfig


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        return (self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps))).to(x.dtype)


class RotaryEmbedding(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, size, 2).float() / size))

    def forward(self, length):
        angles = torch.outer(torch.arange(length, device=self.inv_freq.device).float(), self.inv_freq.float())
        return angles.cos(), angles.sin()


def rotated(x, angles):
    """x: [tokens, batch, heads, width]; the first half of its channels turns, in pairs (0, 1), (2, 3), ..."""
    cos, sin = (part[:, None, None].to(x.dtype) for part in angles)
    turning, rest = x.chunk(2, -1)
    even, odd = turning[..., 0::2], turning[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(3)
    return torch.cat((turned, rest), -1)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.groups, self.width = (
            config.num_attention_heads,
            config.multi_query_group_num,
            config.kv_channels,
        )
        total = (self.heads + 2 * self.groups) * self.width
        self.query_key_value = nn.Linear(config.hidden_size, total, bias=config.add_qkv_bias)
        self.dense = nn.Linear(self.heads * self.width, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, x, angles, mask):
        tokens, batch, _ = x.shape
        sizes = [self.heads * self.width, self.groups * self.width, self.groups * self.width]
        query, key, value = (
            part.reshape(tokens, batch, -1, self.width) for part in self.query_key_value(x).split(sizes, -1)
        )
        query, key = rotated(query, angles), rotated(key, angles)
        key, value = (part.repeat_interleave(self.heads // self.groups, 2) for part in (key, value))
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        context = F.scaled_dot_product_attention(query, key, value, mask)
        return self.dense(context.permute(2, 0, 1, 3).reshape(tokens, batch, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.add_bias_linear)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, x):
        gate, up = self.dense_h_to_4h(x).chunk(2, -1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class GLMBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, angles, mask):
        x = x + self.self_attention(self.input_layernorm(x), angles, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class GLMTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([GLMBlock(config) for _ in range(config.num_layers)])
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)

    def forward(self, x, angles, mask):
        for layer in self.layers:
            x = layer(x, angles, mask)
        return self.final_layernorm(x)


class Embedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, ids):
        return self.word_embeddings(ids).transpose(0, 1).contiguous()


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["GLMBlock"]

    def _init_weights(self, module):
        return


class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = Embedding(config)
        self.rotary_pos_emb = RotaryEmbedding(config.kv_channels // 2)
        self.encoder = GLMTransformer(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value):
        self.embedding.word_embeddings = value

    def forward(self, input_ids, attention_mask=None, use_cache=None, **kwargs):
        x = self.embedding(input_ids)
        length = len(x)
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None, :] | torch.eye(length, dtype=torch.bool, device=x.device)
        return BaseModelOutputWithPast(last_hidden_state=self.encoder(x, self.rotary_pos_emb(length), mask))


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
        x = self.transformer(input_ids, attention_mask).last_hidden_state
        return CausalLMOutputWithPast(logits=self.transformer.output_layer(x).transpose(0, 1).contiguous())
