"""Causal attention for short sequences on a CPU: the fast form of chapter 03's `masked_attention`."""

import functools

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable


@functools.lru_cache(maxsize=256)
def causal_bias(group: int, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """0 where query t in [start, end) may see key j < end, −inf where it may not; every row `group` times.

    Returns ((end − start) · group, end). The tensor is shared between calls: don't write into it.
    """
    allowed = torch.arange(start, end, device="cpu")[:, None] >= torch.arange(end, device="cpu")
    bias = torch.zeros(allowed.shape, dtype=dtype, device="cpu")
    return bias.masked_fill_(~allowed, float("-inf")).repeat_interleave(group, 0)


class TiledAttention(Function):
    """Causal attention for short sequences on a CPU: plain matrix products on tiles that stay in the cache.

    The queries of one group become rows of one matrix, so keys and values are never repeated. 64 query positions at a
    time see only the keys up to their own end, which skips almost half of the square; the probabilities are kept for
    backward. With P = softmax(S) and X̄ for ∂L/∂X:  V̄ = Pᵀ Ō,  P̄ = Ō Vᵀ,  S̄ = P · (P̄ − rowsum(P̄ · P)),
    Q̄ = S̄ K / √head_dim,  K̄ = S̄ᵀ Q / √head_dim. The softmax runs in the dtype of the scores, without mask or
    documents. Sources: arXiv 2205.14135 (tiles), 2305.13245 (groups).
    """

    TILE = 64  # query positions a tile

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (batch, heads, length, head_dim); k, v: (batch, kv_heads, length, head_dim), rotated; returns q's shape.

        Query head i reads kv head i // (heads / kv_heads).
        """
        batch, heads, length, head_dim = q.shape
        kv_heads, group = k.shape[1], heads // k.shape[1]
        scale = head_dim**-0.5
        matrices = batch * kv_heads  # not -1: a prompt may be empty
        rows = q.unflatten(1, (kv_heads, group)).transpose(2, 3)
        rows = rows.reshape(matrices, length * group, head_dim)
        keys = k.transpose(2, 3).reshape(matrices, head_dim, length)
        values = v.reshape(matrices, length, head_dim)
        out, tiles = torch.empty_like(rows), []
        for start in range(0, length, TiledAttention.TILE):
            end = min(start + TiledAttention.TILE, length)
            tile = slice(start * group, end * group)
            bias = causal_bias(group, start, end, q.dtype)
            scores = torch.baddbmm(bias, rows[:, tile], keys[..., :end], alpha=scale)
            tiles.append(torch.softmax(scores, -1))
            out[:, tile] = torch.bmm(tiles[-1], values[:, :end])
        ctx.save_for_backward(rows, keys, values, *tiles)
        ctx.shape = batch, kv_heads, length, group, head_dim
        return out.view(ctx.shape).transpose(2, 3).flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """grad: ∂L/∂output, the shape of q. Returns the gradients of q, k and v."""
        rows, keys, values, *tiles = ctx.saved_tensors
        batch, kv_heads, length, group, head_dim = ctx.shape
        scale = head_dim**-0.5
        grad = grad.unflatten(1, (kv_heads, group)).transpose(2, 3).reshape(rows.shape)
        grad_rows, grad_keys, grad_values = map(torch.empty_like, (rows, values, values))
        keys, values = keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()
        starts = range(0, length, TiledAttention.TILE)
        for start, weights in reversed(list(zip(starts, tiles, strict=True))):
            end = min(start + TiledAttention.TILE, length)
            tile = slice(start * group, end * group)
            grad_weights = torch.bmm(grad[:, tile], values[..., :end])
            softmax_backward = torch.ops.aten._softmax_backward_data
            grad_scores = softmax_backward(grad_weights, weights, -1, weights.dtype)
            grad_rows[:, tile] = torch.bmm(grad_scores, keys[:, :end])
            # the last tile sees every key: it writes the gradients, the others add to them
            if end < length:
                grad_values[:, :end].baddbmm_(weights.transpose(1, 2), grad[:, tile])
                grad_keys[:, :end].baddbmm_(grad_scores.transpose(1, 2), rows[:, tile])
            else:
                torch.bmm(weights.transpose(1, 2), grad[:, tile], out=grad_values)
                torch.bmm(grad_scores.transpose(1, 2), rows[:, tile], out=grad_keys)
        grad_q = grad_rows.mul_(scale).view(ctx.shape).transpose(2, 3).flatten(1, 2)
        shape = (batch, kv_heads, length, head_dim)
        return grad_q, grad_keys.mul_(scale).view(shape), grad_values.view(shape)
