"""The kernel for rows of one prompt and several responses: numbers and gradients of one mask over the whole row."""

import pytest
import torch

from qwen_mini.attention import masked_attention
from qwen_mini.kernels.shared_prompt import shared_prompt_attention, shared_prompt_bias

PROMPT, RESPONSES, WIDTH = 5, 3, 4


def plain_mask(real):
    """(batch, 1, tokens, tokens): a token sees the prompt's real tokens and its own response, before it."""
    owner = torch.tensor([0] * PROMPT + [1 + i for i in range(RESPONSES) for _ in range(WIDTH)])
    place = torch.arange(len(owner))
    mask = ((owner[:, None] == owner) | (owner == 0)) & (place[:, None] >= place)
    mask = mask.repeat(len(real), 1, 1)
    mask[:, PROMPT:, :PROMPT] &= real[
        :, None
    ]  # padding follows the prompt's own tokens, none of which sees it
    return mask[:, None]


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_it_gives_the_numbers_and_gradients_of_the_plain_mask(heads, kv_heads):
    torch.manual_seed(0)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    length, numbers = PROMPT + RESPONSES * WIDTH, {"dtype": torch.float64, "requires_grad": True}
    q, k, v = (torch.randn(2, n, length, 8, **numbers) for n in (heads, kv_heads, kv_heads))
    bias = shared_prompt_bias(real, WIDTH, RESPONSES, heads, kv_heads, torch.float64)
    assert bias.shape == (2 * kv_heads * RESPONSES, heads // kv_heads * WIDTH, PROMPT + WIDTH)
    fast = shared_prompt_attention(q, k, v, bias, PROMPT, RESPONSES)
    plain = masked_attention(q, k, v, plain_mask(real))
    torch.testing.assert_close(fast, plain)
    upstream = torch.randn_like(plain)
    found, wanted = (torch.autograd.grad(out, (q, k, v), upstream) for out in (fast, plain))
    torch.testing.assert_close(found, wanted)


def test_a_response_sees_no_other_response():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, PROMPT + RESPONSES * WIDTH, 8) for _ in range(3))
    bias = shared_prompt_bias(
        torch.ones(1, PROMPT, dtype=torch.bool), WIDTH, RESPONSES, 2, 2, torch.float32
    )
    before = shared_prompt_attention(q, k, v, bias, PROMPT, RESPONSES)
    own = slice(PROMPT + WIDTH, PROMPT + 2 * WIDTH)
    k[:, :, own], v[:, :, own] = 9.0, 9.0
    moved = (shared_prompt_attention(q, k, v, bias, PROMPT, RESPONSES) != before).any(-1)[0, 0]
    assert moved[own].all() and moved.sum() == WIDTH
