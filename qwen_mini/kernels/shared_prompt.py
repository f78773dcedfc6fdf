"""Attention over rows that hold one prompt and several responses behind it: the prompt is computed once.

Each response sees the prompt and itself, causally. The numbers are those of rows with one response each; chapter 19
shows the plain form, one mask over the whole row, and compares.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import TiledAttention


def shared_prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, prompt_length: int, responses: int
) -> Tensor:
    """softmax(q kᵀ / √head_dim + bias) v, where a response sees the prompt and itself. Returns the shape of q.

    q: (batch, heads, prompt_length + responses · width, head_dim); k, v: (batch, kv_heads, …); q and k are rotated.
    bias: from `shared_prompt_bias`, made once for all layers.
    """
    q, k, v = (x.tensor_split([prompt_length], 2) for x in (q, k, v))
    prompt = _prompt_attention(q[0], k[0], v[0])
    keys, values = (_behind_the_prompt(*x, responses) for x in (k, v))
    return torch.cat([prompt, _response_attention(q[1], keys, values, bias, responses)], 2)


def shared_prompt_bias(
    real: Tensor, width: int, responses: int, heads: int, kv_heads: int, dtype: torch.dtype
) -> Tensor:
    """What `shared_prompt_attention` adds to the scores of responses: 0 where they may look, −inf where not.

    real: (batch, prompt_length), False where a prompt is padding; width: tokens of a response. The result, on the
    device of `real`, is (batch · kv_heads · responses, group · width, prompt_length + width): the `group` query heads
    that read one kv head are rows of one matrix.
    """
    batch, length = real.shape
    allowed = torch.ones(width, length + width, dtype=torch.bool, device=real.device).tril(length)
    allowed = allowed.repeat(batch, 1, 1)
    allowed[:, :, :length] &= real[:, None]
    bias = torch.zeros(allowed.shape, dtype=dtype, device=real.device)
    bias.masked_fill_(~allowed, -math.inf)
    return bias.repeat(1, heads // kv_heads, 1).repeat_interleave(kv_heads * responses, 0)


def _prompt_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within the prompt."""
    if q.device.type == "cpu":
        return TiledAttention.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _behind_the_prompt(prompt: Tensor, own: Tensor, responses: int) -> Tensor:
    """Keys or values that each response reads: (batch · kv_heads · responses, prompt_length + width, head_dim).

    The prompt is copied for every response: one product with all keys takes less time than two products with parts,
    whose scores would have to be put together.
    """
    copies = prompt[:, :, None].expand(-1, -1, responses, -1, -1)
    return torch.cat([copies, own.unflatten(2, (responses, -1))], 3).flatten(0, 2)


def _response_attention(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, responses: int
) -> Tensor:
    """Attention of all responses, each with its own keys behind the prompt's; q: (batch, heads, …, head_dim)."""
    batch, heads, head_dim = q.shape[0], q.shape[1], q.shape[-1]
    kv_heads = len(keys) // (batch * responses)
    rows = q.reshape(batch, kv_heads, heads // kv_heads, responses, -1, head_dim)
    rows = rows.transpose(2, 3).reshape(len(keys), -1, head_dim)
    scores = torch.baddbmm(bias, rows, keys.transpose(1, 2), alpha=head_dim**-0.5)
    out = torch.softmax(scores, -1) @ values
    out = out.view(batch, kv_heads, responses, heads // kv_heads, -1, head_dim).transpose(2, 3)
    return out.reshape(q.shape)
