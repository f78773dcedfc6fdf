"""One decode step of a small model with half as many operations: the fast form of `Qwen.hidden_states` for one token."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import KVCache
from .layers import turned

if TYPE_CHECKING:
    from qwen_mini.model import Qwen


class FusedDecoder:
    """One decode step of a plain, small `Qwen`: what `hidden_states` computes for one token a row.

    Starting an operation costs as much as a small one computes. Here query, key and value are one product, gate and up
    another; all layers share the rope tables, and the query's carry the 1/√head_dim of the scores. The step attends
    over the whole capacity of the cache, −inf where nothing is stored yet: products copy operands that do not lie in
    one piece. Holds joined copies of the weights as they were at the start, so it serves one rollout and is thrown away.
    """

    def __init__(self, model: "Qwen", tables: tuple[Tensor, Tensor]):
        """tables: cos and signed sin of every position, float32, each (length, head_dim); no text gets longer."""
        self.config = model.config
        self.norm = model.model.norm.forward  # forward: without the hooks of a module
        self.embedding = model.model.embed_tokens.weight
        self.layers = [_joined(layer) for layer in model.model.layers]
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        scale = torch.ones(heads + kv_heads, 1, device=self.embedding.device)
        scale[:heads] = self.config.head_dim**-0.5
        # each (length, heads + kv_heads, head_dim)
        self.cos, self.sin = ((table[:, None] * scale).to(self.embedding.dtype) for table in tables)

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """(rows, 1) ids → (rows, hidden_size) after the final norm; appends to the cache. Needs room in it, and no gradients."""
        config, rows, position = self.config, len(tokens), cache.length
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        cos, sin = self.cos[position], self.sin[position]
        cache.remember(None, 1)
        bias = _padding_bias(cache, cos.dtype, tokens.device)
        x = F.embedding(tokens[:, 0], self.embedding)  # (rows, hidden_size)
        for layer, stored in zip(self.layers, cache.layers, strict=True):
            norm, after, qkv, qkv_bias, out, gate_up, down = layer
            qkv = F.linear(norm(x), qkv, qkv_bias).view(rows, -1, config.head_dim)  # all heads
            both, v = turned(qkv[:, :-kv_heads], cos, sin), qkv[:, -kv_heads:]
            stored.keys[..., position] = both[:, heads:]
            stored.values[:, :, position] = v
            q = both[:, :heads].reshape(rows * kv_heads, -1, config.head_dim)
            scores = torch.bmm(q, stored.keys.flatten(0, 1))  # (rows · kv_heads, group, capacity)
            scores[..., position + 1 :] = -math.inf
            if bias is not None:
                scores.view(rows, heads, -1).add_(bias)
            mixed = torch.bmm(torch.softmax(scores, -1), stored.values.flatten(0, 1))
            x = x + F.linear(mixed.view(rows, -1), out)
            gate, up = F.linear(after(x), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate).mul_(up), down)
        cache.length = position + 1
        return self.norm(x)


def _joined(layer: torch.nn.Module) -> tuple:
    """What a step needs of a decoder layer: both norms, and its matrices, joined where they share their input."""
    a, mlp = layer.self_attn, layer.mlp
    projections = (a.q_proj, a.k_proj, a.v_proj)
    qkv = torch.cat([projection.weight for projection in projections])
    bias = torch.cat([projection.bias for projection in projections])
    gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    norms = layer.input_layernorm.forward, layer.post_attention_layernorm.forward
    return *norms, qkv, bias, a.o_proj.weight, gate_up, mlp.down_proj.weight


def _padding_bias(cache: KVCache, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """(rows, 1, capacity): −inf where a token is padding (of another document than 0), 0 elsewhere; None without any."""
    if cache.document_ids is None:
        return None
    padding = cache.document_ids[:, None].to(device) != 0
    return torch.zeros_like(padding, dtype=dtype).masked_fill_(padding, -math.inf)
