"""RMSNorm, RoPE and SwiGLU against formulas, golden values, autograd and transformers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qwen_mini.layers import (
    RMSNorm,
    SwiGLU,
    apply_rope,
    rms_norm,
    rope_frequencies,
    rope_tables,
    rotate,
)

EPS = 1e-6
POSITION = st.integers(0, 2_000)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_same_module(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, tolerance=1e-5):
    """Equal outputs and gradients, and equal outputs when no gradient is wanted."""
    theirs.load_state_dict(ours.state_dict())
    results = []
    for module in (ours, theirs):
        y = module(x)
        weight = torch.linspace(-1, 1, y.numel()).view_as(y)
        results.append([y, *torch.autograd.grad(y, [x, *module.parameters()], weight)])
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)


# RMSNorm


def test_rms_norm_by_hand():
    y = rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(y, torch.tensor([3.0, 8.0]) / math.sqrt(12.5))


def test_rms_norm_of_zero_is_zero_with_a_finite_gradient():
    layer, x = RMSNorm(8), torch.zeros(1, 8, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(layer(x), torch.zeros(1, 8))
    assert x.grad.isfinite().all()


def test_rms_norm_equals_transformers(qwen2):
    layer = RMSNorm(48, eps=EPS)
    nn.init.normal_(layer.weight, mean=1.0, std=0.3)
    assert_same_module(
        layer, qwen2.Qwen2RMSNorm(48, eps=EPS), torch.randn(2, 5, 48, requires_grad=True)
    )


def test_rms_norm_in_bfloat16_equals_transformers_bit_for_bit(qwen2):
    ours, theirs = RMSNorm(64, eps=EPS).bfloat16(), qwen2.Qwen2RMSNorm(64, eps=EPS).bfloat16()
    ours.weight.data = theirs.weight.data = (1 + 0.3 * torch.randn(64)).bfloat16()
    x = (3 * torch.randn(200, 64)).bfloat16()
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 1_000.0), st.integers(0, 2**31))
def test_rms_norm_ignores_the_length_of_a_vector(size, factor, seed):
    x = torch.randn(4, size, generator=torch.Generator().manual_seed(seed)) + 0.5
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    one = torch.ones(size)
    torch.testing.assert_close(
        rms_norm(factor * x, one, 1e-12), rms_norm(x, one, 1e-12), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        rms_norm(x, one, 0.0).square().mean(-1), torch.ones(4), rtol=1e-4, atol=1e-5
    )


# RoPE


def test_rope_golden_value():
    golden = [-1.695593, 0.137552, 2.788682, 3.975982, -4.808842, 6.323059, 7.086837, 8.011964]
    y = apply_rope(torch.arange(1.0, 9.0).view(1, 1, 1, 8), torch.tensor([3]), rope_frequencies(8))
    torch.testing.assert_close(y.flatten(), torch.tensor(golden), rtol=1e-6, atol=1e-6)


def test_rope_frequencies_run_from_one_to_almost_one_over_the_base():
    frequencies = rope_frequencies(128, 1e6)
    assert frequencies.shape == (64,) and frequencies.dtype == torch.float32
    assert frequencies[0] == 1 and frequencies[-1].item() == pytest.approx(
        1e6 ** (-126 / 128), rel=1e-5
    )


def test_an_odd_head_dim_is_refused():
    with pytest.raises(ValueError, match="even.*7"):
        rope_frequencies(7)


@pytest.mark.parametrize("theta", [1e3, 1e4, 1e6])
def test_rope_equals_transformers_far_out(qwen2, theta):
    rope = {"rope_type": "default", "rope_theta": theta}
    config = qwen2.Qwen2Config(hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    embedding = qwen2.Qwen2RotaryEmbedding(config)
    assert torch.equal(embedding.inv_freq, rope_frequencies(16, theta))
    x, position_ids = torch.randn(2, 4, 9, 16), torch.randint(0, 131_072, (2, 9))
    theirs, _ = qwen2.apply_rotary_pos_emb(x, x, *embedding(x, position_ids))
    torch.testing.assert_close(
        apply_rope(x, position_ids, rope_frequencies(16, theta)), theirs, rtol=1e-6, atol=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(
    POSITION,
    POSITION,
    st.integers(-2_000, 2_000),
    st.sampled_from([2, 6, 16]),
    st.integers(0, 2**31),
)
def test_a_score_depends_on_the_distance_only(m, n, shift, head_dim, seed):
    q, k = torch.randn(
        2, 1, 1, 1, head_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    frequencies = rope_frequencies(head_dim, 1_000.0)

    def score(a, b):
        return (
            apply_rope(q, torch.tensor([a]), frequencies)
            * apply_rope(k, torch.tensor([b]), frequencies)
        ).sum()

    torch.testing.assert_close(score(m + shift, n + shift), score(m, n), rtol=0, atol=0.01)
    torch.testing.assert_close(score(m, m), (q * k).sum(), rtol=0, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-10_000, 1_000_000), min_size=1, max_size=8), st.integers(0, 2**31))
def test_rope_keeps_every_norm(positions, seed):
    x = torch.randn(2, 3, len(positions), 8, generator=torch.Generator().manual_seed(seed))
    y = apply_rope(x, torch.tensor(positions), rope_frequencies(8))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)


def test_rotate_by_roll_equals_rotate_by_halves():
    x, position_ids = torch.randn(2, 5, 8), torch.arange(5)
    cos, sin = rope_tables(position_ids, rope_frequencies(8))
    first, second = x.chunk(2, -1)
    c, s = cos[..., :4], sin[..., 4:]
    torch.testing.assert_close(
        rotate(x, cos, sin), torch.cat([first * c - second * s, second * c + first * s], -1)
    )


def test_rope_takes_one_row_of_positions_or_one_per_sequence():
    x, frequencies = torch.randn(3, 2, 6, 8), rope_frequencies(8)
    one = apply_rope(x, torch.arange(6), frequencies)
    assert torch.equal(one, apply_rope(x, torch.arange(6).expand(3, 6), frequencies))
    assert one.shape == x.shape


def test_rope_gradient():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: apply_rope(x, torch.arange(4) * 7, rope_frequencies(6)), (x,)
    )


def test_tables_in_bfloat16_are_rounded_at_the_end_only():
    frequencies, positions = rope_frequencies(8), torch.tensor([256, 257, 4_096, 4_112, 31_999])
    low, high = (
        rope_tables(positions, frequencies, torch.bfloat16),
        rope_tables(positions, frequencies),
    )
    for a, b in zip(low, high, strict=True):
        assert torch.equal(a, b.bfloat16())
    assert positions.bfloat16()[0] == positions.bfloat16()[1]  # what casting the positions would do
    assert not torch.equal(low[0][0], low[0][1])


# SwiGLU


def test_swiglu_by_hand():
    layer = SwiGLU(1, 1)
    for projection, value in (
        (layer.gate_proj, 1.5),
        (layer.up_proj, -2.0),
        (layer.down_proj, 3.0),
    ):
        nn.init.constant_(projection.weight, value)
    expected = 3.0 * (1.5 / (1 + math.exp(-1.5))) * -2.0
    assert layer(torch.ones(1, 1)).item() == pytest.approx(expected, rel=1e-6)
    assert all(projection.bias is None for projection in layer.children())


def test_swiglu_equals_transformers(qwen2):
    theirs = qwen2.Qwen2MLP(qwen2.Qwen2Config(hidden_size=32, intermediate_size=80))
    assert_same_module(SwiGLU(32, 80), theirs, torch.randn(2, 5, 32, requires_grad=True))
