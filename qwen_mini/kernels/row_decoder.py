"""One decode step of one text in numpy: the fast form of `Qwen.hidden_states` for one token of one row on a CPU."""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .cache import KVCache

if TYPE_CHECKING:
    from qwen_mini.model import Qwen


class RowDecoder:
    """`FusedDecoder` for a single row in float32, several times as fast.

    At one row a small model's operations take less time than torch needs to start them. numpy starts one in a third of
    that, and its product of a matrix and a vector is quicker, too. Gains of the norms are multiplied into the matrices
    behind them. The cache's tensors are read and written in place. Holds joined copies of the weights as they were at
    the start, so it serves one text and is thrown away.
    """

    def __init__(self, model: "Qwen", tables: tuple[Tensor, Tensor]):
        """tables: cos and signed sin of every position, float32, each (length, head_dim); no text gets longer."""
        config = self.config = model.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        scale = np.ones((heads + kv_heads, 1), np.float32)
        scale[:heads] = config.head_dim**-0.5
        # each (length, heads + kv_heads, head_dim)
        self.cos, self.sin = (table.numpy()[:, None] * scale for table in tables)
        self.swapped = np.roll(np.arange(config.head_dim), config.head_dim // 2)
        self.embedding, self.gain = map(_array, (model.model.embed_tokens, model.model.norm))
        self.layers = [_joined(layer) for layer in model.model.layers]
        self.stored: tuple = (
            None,
            [],
        )  # the first layer's keys, and all layers' keys and values as arrays

    @np.errstate(
        over="ignore", invalid="ignore"
    )  # the sampler tells of numbers that are not finite
    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """(1, 1) ids → (1, hidden_size) after the final norm; appends to the cache. Needs room in it, and no gradients."""
        position, eps = cache.length, self.config.rms_norm_eps
        cache.remember(None, 1)
        if self.stored[0] is not cache.layers[0].keys:  # the cache has grown
            arrays = [(x.keys.numpy()[0], x.values.numpy()[0]) for x in cache.layers]
            self.stored = cache.layers[0].keys, arrays
        x = self.embedding[tokens.item()].copy()  # (hidden_size,)
        for layer, stored in zip(self.layers, self.stored[1], strict=True):
            qkv, bias, out, gate_up, down = layer
            projected = np.dot(qkv, _normed(x, eps))
            projected += bias
            x += np.dot(out, self._attend(projected, *stored, position))
            x += np.dot(down, _swiglu(np.dot(gate_up, _normed(x, eps))))
        cache.length = position + 1
        return torch.from_numpy(_normed(x, eps) * self.gain)[None]

    def _attend(
        self, projected: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int
    ) -> np.ndarray:
        """Query, key and value of all heads, one after the other → what the heads have mixed, (heads · head_dim,)."""
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        projected = projected.reshape(-1, self.config.head_dim)
        both, v = projected[:-kv_heads], projected[-kv_heads:]
        turned = both.take(self.swapped, 1)
        turned *= self.sin[position]
        turned += both * self.cos[position]
        keys[:, :, position], values[:, position] = turned[heads:], v
        grouped = turned[:heads].reshape(kv_heads, -1, self.config.head_dim)
        scores = np.matmul(grouped, keys[:, :, : position + 1])  # (kv_heads, group, position + 1)
        scores -= np.maximum.reduce(scores, -1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= np.add.reduce(scores, -1, keepdims=True)
        return np.matmul(scores, values[:, : position + 1]).reshape(-1)


def _normed(x: np.ndarray, eps: float) -> np.ndarray:
    """x over its root mean square; the gain is elsewhere."""
    return x * np.float32(1 / math.sqrt(float(np.dot(x, x)) / x.size + eps))


def _swiglu(gate_up: np.ndarray) -> np.ndarray:
    """silu(gate) · up of both, one after the other, with silu(z) = z/2 · (1 + tanh(z/2)), which never overflows."""
    gate_up = gate_up.reshape(2, -1)
    half = gate_up[0] * np.float32(0.5)
    product = np.tanh(half)
    product += 1
    product *= half
    product *= gate_up[1]
    return product


def _array(module: torch.nn.Module) -> np.ndarray:
    return module.weight.detach().numpy()


def _joined(layer: torch.nn.Module) -> tuple[np.ndarray, ...]:
    """What a step needs of a decoder layer: its matrices, joined where they share their input, times its norms' gains."""
    a, mlp = layer.self_attn, layer.mlp
    projections = (a.q_proj, a.k_proj, a.v_proj)
    bias = torch.cat([projection.bias for projection in projections]).detach().numpy()
    qkv = np.concatenate([*map(_array, projections)]) * _array(layer.input_layernorm)
    gate_up = np.concatenate([_array(mlp.gate_proj), _array(mlp.up_proj)])
    gate_up *= _array(layer.post_attention_layernorm)
    return qkv, bias, _array(a.o_proj), gate_up, _array(mlp.down_proj)
