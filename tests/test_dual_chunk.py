"""YaRN and dual chunk attention against published formulas, golden values and `transformers`."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_mini.attention import causal_attention
from qwen_mini.dual_chunk import (
    attention_and_lse,
    attention_by_rows,
    dual_chunk_attention,
    dual_chunk_positions,
    merge,
    naive_dual_chunk_attention,
    ntk_frequencies,
    position_scheme,
    query_positions,
    temperature_of,
    yarn_attention,
    yarn_frequencies,
    yarn_range,
    yarn_temperature,
)
from qwen_mini.generation import generate
from qwen_mini.kernels.cache import KVCache
from qwen_mini.layers import rope_frequencies
from qwen_mini.model import ModelConfig, Qwen

ROWS = {  # golden rows of the relative-position matrix, stride 5, local 3, chunk size 8, form of the code
    7: [7, 6, 5, 4, 3, 2, 1, 0],
    8: [8, 7, 6, 5, 4, 3, 2, 1, 0],
    9: [8, 7, 6, 5, 4, 4, 3, 2, 1, 0],
    10: [8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0],
    12: [8, 7, 6, 5, 4, 7, 6, 5, 4, 3, 2, 1, 0],
    13: [8, 7, 6, 5, 4, 8, 7, 6, 5, 4, 3, 2, 1, 0],
    14: [8, 7, 6, 5, 4, 8, 7, 6, 5, 4, 4, 3, 2, 1, 0],
}
TINY = ModelConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=32, rope_theta=1_000.0, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = Qwen(TINY).eval().requires_grad_(False)
    for (
        p
    ) in model.parameters():  # larger than at initialisation: attention must have something to say
        p.copy_(torch.randn_like(p) * 0.3 + (p.ndim == 1) * p)
    return model


def random_qkv(length, batch=1, heads=4, kv_heads=2, head_dim=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, length, head_dim, dtype=dtype, generator=generator)
            for n in (heads, kv_heads, kv_heads)]  # fmt: skip


def test_yarn_range_and_frequencies_are_the_golden_ones():
    assert yarn_range(128, 1e6, 32_768) == (23, 40)
    assert yarn_range(64, 1e6, 32_768) == (11, 20)
    assert yarn_range(16, 1e4, 64) == (0, 3)
    want = [1, 0.23717082, 0.05, 0.00790569, 0.0025, 0.00079057, 0.00025, 7.906e-5]
    torch.testing.assert_close(
        yarn_frequencies(16, 1e4, 4, 64), torch.tensor(want), rtol=1e-4, atol=0
    )
    ratio = yarn_frequencies(32, 1e4, 4, 256) / rope_frequencies(32, 1e4)
    want = [1, 0.892857, 0.785714, 0.678571, 0.571429, 0.464286, 0.357143] + [0.25] * 9
    torch.testing.assert_close(ratio, torch.tensor(want), rtol=1e-5, atol=0)


SQUARED = [(2, 1.14343), (4, 1.296477), (8, 1.459129), (16, 1.631390), (32, 1.813260)]


@pytest.mark.parametrize("factor, squared", SQUARED)
def test_the_temperature_is_the_golden_one(factor, squared):
    assert math.isclose(yarn_temperature(factor) ** 2, squared, rel_tol=1e-5)
    assert math.isclose(temperature_of(factor * 512, 512), squared, rel_tol=1e-5)


def test_nothing_changes_up_to_the_trained_length():
    assert (
        yarn_temperature(1)
        == yarn_temperature(0.5)
        == temperature_of(100, 512)
        == temperature_of(9_999, None)
        == 1
    )
    torch.testing.assert_close(yarn_frequencies(64, 1e4, 1, 512), rope_frequencies(64, 1e4))


def test_ntk_slows_the_slowest_pair_by_the_factor():
    ratio = ntk_frequencies(64, 1e4, 4) / rope_frequencies(64, 1e4)
    assert ratio[0] == 1 and math.isclose(ratio[-1].item(), 0.25, rel_tol=1e-5)


def test_a_factor_below_one_is_an_error():
    with pytest.raises(ValueError, match="factor must be at least 1"):
        yarn_frequencies(64, 1e4, 0.5, 512)


@pytest.mark.parametrize("factor", [2.0, 4.0, 16.0])
def test_yarn_logits_equal_transformers(tiny, factor):
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "yarn", "rope_theta": TINY.rope_theta, "factor": factor,
            "original_max_position_embeddings": 32}  # fmt: skip
    values = {
        k: v
        for k, v in TINY.to_dict().items()
        if k not in ("architectures", "rope_theta", "rope_parameters")
    }
    theirs = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**values, rope_parameters=rope)
    ).eval()
    theirs.load_state_dict(tiny.state_dict(), strict=True)
    ids = torch.randint(97, (2, 64), generator=torch.Generator().manual_seed(1))
    frequencies = yarn_frequencies(16, TINY.rope_theta, factor, 32)
    attention = functools.partial(
        yarn_attention, frequencies=frequencies, temperature=yarn_temperature(factor)
    )
    own, tiny.attention = tiny.attention, attention
    try:
        with torch.no_grad():
            torch.testing.assert_close(tiny(ids), theirs(ids).logits, rtol=1e-4, atol=2e-5)
    finally:
        tiny.attention = own


@pytest.mark.parametrize("row", ROWS)
def test_relative_positions_are_the_golden_ones(row):
    assert dual_chunk_positions(15, 5, 8)[row, : row + 1].tolist() == ROWS[row]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(1, 20), st.integers(0, 20))
def test_invariants_of_the_position_matrix(length, stride, local):
    local = min(local, stride - 1)
    chunk_size = stride + local
    matrix = dual_chunk_positions(length, stride, chunk_size)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    causal = distance >= 0
    assert (
        (matrix[~causal] == -1).all() and (matrix[causal] >= 0).all() and matrix.max() <= chunk_size
    )
    near = causal & (distance <= local)
    assert torch.equal(matrix[near], distance[near])
    short = min(length, chunk_size + 1)
    assert torch.equal(
        matrix[:short, :short][causal[:short, :short]],
        distance[:short, :short][causal[:short, :short]],
    )


def golden_inputs():
    i, d = torch.arange(15, dtype=torch.float64)[:, None], torch.arange(4, dtype=torch.float64)
    q, k, v = (
        torch.sin(0.7 * i + 1.3 * d),
        torch.cos(0.5 * i - 0.9 * d),
        torch.sin(0.3 * i + 0.2 * d**2),
    )
    return [x[None, None] for x in (q, k, v)]


GOLDEN = {
    0: [0, 0.198669, 0.717356, 0.973848],
    7: [0.785203, 0.803654, 0.670195, -0.011233],
    8: [0.677698, 0.734137, 0.724725, 0.188899],
    12: [0.322543, 0.278112, 0.087502, -0.259559],
    14: [0.566565, 0.496475, 0.182428, -0.416935],
}


def test_attention_is_the_golden_one():
    out = dual_chunk_attention(
        *golden_inputs(),
        frequencies=rope_frequencies(4, 1e4),
        chunk_size=8,
        local_size=3,
        original_length=8,
    )[0, 0]
    for row, want in GOLDEN.items():
        torch.testing.assert_close(
            out[row], torch.tensor(want, dtype=torch.float64), rtol=0, atol=2e-6
        )
    plain = causal_attention(*golden_inputs(), frequencies=rope_frequencies(4, 1e4))[0, 0, 14]
    want = torch.tensor([0.527374, 0.457309, 0.152394, -0.411736], dtype=torch.float64)
    torch.testing.assert_close(plain, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("length", [1, 11, 12, 13, 24, 25, 36, 100])
def test_fast_equals_naive(length):
    q, k, v = random_qkv(length, batch=2)
    f = rope_frequencies(16, 1_000.0)
    want = naive_dual_chunk_attention(q, k, v, frequencies=f, stride=12, chunk_size=16)
    got = dual_chunk_attention(q, k, v, frequencies=f, chunk_size=16, local_size=4)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_plain_rope_up_to_the_chunk_size_and_not_beyond():
    f = rope_frequencies(16, 1_000.0)
    q, k, v = random_qkv(18)
    rope = causal_attention(q, k, v, frequencies=f)
    dca = dual_chunk_attention(q, k, v, frequencies=f, chunk_size=16, local_size=4)
    torch.testing.assert_close(dca[:, :, :17], rope[:, :, :17], rtol=1e-5, atol=1e-6)
    assert (dca[:, :, 17] - rope[:, :, 17]).abs().max() > 1e-3


@pytest.mark.parametrize("piece", [1, 5, 12, 13, 31])
@pytest.mark.parametrize("temperature", [False, True])
def test_pieces_into_one_cache_equal_one_pass(piece, temperature):
    q, k, v = random_qkv(61, batch=2)
    options = dict(frequencies=rope_frequencies(16, 1_000.0), chunk_size=16, local_size=4)
    options |= dict(original_length=16, length=61) if temperature else {}
    want, parts = dual_chunk_attention(q, k, v, **options), []
    cache = KVCache(1, 2, 2, 16, 61, torch.float64)
    for start in range(0, 61, piece):
        new = [x[:, :, start : start + piece] for x in (q, k, v)]
        parts.append(dual_chunk_attention(*new, cache=cache.layers[0], **options))
        cache.length += new[0].shape[2]
    torch.testing.assert_close(torch.cat(parts, 2), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["rope", "yarn", "dca", "dca+temperature", "dca+yarn"])
def test_greedy_generation_equals_repeated_full_passes(tiny, mode):
    prompts = torch.randint(97, (3, 70), generator=torch.Generator().manual_seed(2))
    own, tiny.attention = tiny.attention, position_scheme(TINY, mode, 90)
    try:
        got = [one.tokens for one in generate(tiny, prompts, 12, context=90)]
        ids = prompts
        with torch.no_grad():
            for _ in range(12):
                ids = torch.cat([ids, tiny(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    finally:
        tiny.attention = own
    assert got == ids[:, 70:].tolist()


def test_short_inputs_do_not_change_with_dca_and_temperature(tiny):
    ids = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = tiny(ids)
        own, tiny.attention = tiny.attention, position_scheme(TINY, "dca+temperature", 32)
        try:
            torch.testing.assert_close(tiny(ids), plain, rtol=1e-5, atol=1e-5)
        finally:
            tiny.attention = own


def test_merge_is_the_softmax_over_the_union_and_does_not_overflow():
    q, k, v = random_qkv(30, kv_heads=4)
    whole, lse = attention_and_lse(q, k, v)
    parts = [
        attention_and_lse(q, k[:, :, s], v[:, :, s])
        for s in (slice(0, 7), slice(7, 8), slice(8, 30))
    ]
    torch.testing.assert_close(merge(parts), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        merge([(o, s + 5_000) for o, s in parts]), whole, rtol=1e-8, atol=1e-8
    )
    scores = (q @ k.mT) * 16**-0.5
    torch.testing.assert_close(lse.to(torch.float64), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_gradients_flow_through_the_naive_form():
    q, k, v = (x.requires_grad_() for x in random_qkv(20))
    naive_dual_chunk_attention(
        q, k, v, frequencies=rope_frequencies(16, 1e3), stride=6, chunk_size=8
    ).sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("options, message", [
    (dict(chunk_size=16, local_size=16), "local_size must be at least 0 and below chunk_size"),
    (dict(chunk_size=16, local_size=12), "longer than the stride"),
])  # fmt: skip
def test_chunks_that_do_not_fit_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        dual_chunk_attention(*random_qkv(4), frequencies=rope_frequencies(16, 1e3), **options)


def test_padding_and_own_positions_are_an_error():
    options = dict(frequencies=rope_frequencies(16, 1e3), chunk_size=16, local_size=4)
    q, k, v = random_qkv(4)
    with pytest.raises(ValueError, match="counts positions itself"):
        dual_chunk_attention(q, k, v, document_ids=torch.zeros(1, 4, dtype=torch.long), **options)
    with pytest.raises(ValueError, match="counts positions itself"):
        dual_chunk_attention(q, k, v, position_ids=torch.arange(1, 5), **options)
    want = dual_chunk_attention(q, k, v, **options)
    torch.testing.assert_close(
        dual_chunk_attention(q, k, v, position_ids=torch.arange(4), **options), want
    )
    torch.testing.assert_close(
        dual_chunk_attention(q, k, v, position_ids=torch.arange(4)[None], **options), want
    )


def test_an_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="there is no mode 'alibi'"):
        position_scheme(TINY, "alibi", 64)


def test_query_positions_never_exceed_the_chunk_size():
    roles = query_positions(torch.arange(1_000), 48, 64)
    assert max(int(role.max()) for role in roles) == 64


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [7, 1_024])
def test_attention_by_rows_is_the_fused_kernel(causal, rows):
    """What runs off the CPU, where no flash kernel returns its log-sum-exp through one interface."""
    q, k, v = (torch.randn(2, 3, n, 16) for n in ((40,) * 3 if causal else (23, 40, 40)))
    want, got = attention_and_lse(q, k, v, causal), attention_by_rows(q, k, v, causal, rows)
    for w, g in zip(want, got, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
