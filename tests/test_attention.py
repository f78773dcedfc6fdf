"""Attention: every path against the written-out reference, the cache, documents, golden values, and transformers."""

import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import HEAD_DIM, heads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qwen_mini.attention import (
    GroupedQueryAttention,
    causal_attention,
    decode_attention,
    masked_attention,
    visible,
)
from qwen_mini.kernels.cache import KVCache
from qwen_mini.layers import RMSNorm, SwiGLU, rope_frequencies

ATTENTION = functools.partial(causal_attention, frequencies=rope_frequencies(HEAD_DIM, 1_000.0))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def one_by_one(q, k, v, mask):
    """Attention as loops over batch, head and query: nothing to get wrong."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = mask[b if len(mask) > 1 else 0, 0, t].nonzero()[:, 0]
                scores = k[b, h // group, seen] @ q[b, h, t] / q.shape[-1] ** 0.5
                out[b, h, t] = scores.softmax(0) @ v[b, h // group, seen]
    return out


def feed(layer, x, sizes, document_ids=None, capacity=64):
    """Outputs of a cached layer that gets x in pieces."""
    cache = KVCache(1, x.shape[0], layer.k_proj.out_features // HEAD_DIM, HEAD_DIM, capacity)
    outputs, start = [], 0
    with torch.no_grad():
        for size in sizes:
            piece = slice(start, start + size)
            cache.remember(None if document_ids is None else document_ids[:, piece], size)
            outputs.append(layer(x[:, piece], ATTENTION, cache=cache.layers[0]))
            cache.length += size
            start += size
    return torch.cat(outputs, 1), cache


# the paths


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_reference_equals_loops(kv_heads):
    q, k, v = heads(2, 4, kv_heads, 9)
    documents = torch.tensor([[0] * 4 + [1] * 5, [3] * 9])
    for mask in (visible(9, 9), visible(9, 9, documents, documents)):
        torch.testing.assert_close(
            masked_attention(q, k, v, mask), one_by_one(q, k, v, mask), **CLOSE
        )


def test_consecutive_query_heads_share_a_kv_head():
    q, k, v = heads(1, 6, 2, 5)
    out = masked_attention(q, k, v)
    moved = masked_attention(
        q, torch.stack([k[:, 0], k[:, 1] + 1], 1), torch.stack([v[:, 0], v[:, 1] + 1], 1)
    )
    assert torch.equal(out[:, :3], moved[:, :3]) and not torch.allclose(out[:, 3:], moved[:, 3:])


def test_decode_attention_equals_the_reference():
    q, k, v = heads(3, 4, 2, 12)
    torch.testing.assert_close(
        decode_attention(q[:, :, -1:], k, v), masked_attention(q[:, :, -1:], k, v), **CLOSE
    )
    documents = torch.tensor([[0] * 12, [-1] * 5 + [0] * 7, [1] * 11 + [0]])
    mask = visible(1, 12, documents[:, -1:], documents)
    out = decode_attention(q[:, :, -1:], k, v, documents[:, -1:], documents)
    torch.testing.assert_close(out, masked_attention(q[:, :, -1:], k, v, mask), **CLOSE)


@pytest.mark.parametrize("length", [1, 40, 600])
def test_causal_attention_is_the_same_with_and_without_gradients(length):
    inputs = heads(1, 4, 2, length)
    with torch.no_grad():
        plain = ATTENTION(*inputs)
    torch.testing.assert_close(ATTENTION(*inputs), plain, **CLOSE)


def test_the_future_is_invisible():
    q, k, v = heads(1, 4, 2, 20)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 13:], v2[:, :, 13:] = 99.0, -99.0
    assert torch.equal(ATTENTION(q, k, v)[:, :, :13], ATTENTION(q, k2, v2)[:, :, :13])


def test_only_distances_matter():
    inputs = heads(1, 4, 2, 20)
    shifted = ATTENTION(*inputs, position_ids=torch.arange(500, 520))
    torch.testing.assert_close(shifted, ATTENTION(*inputs), rtol=1e-4, atol=1e-3)


def test_bfloat16_stays_near_float32():
    inputs = heads(1, 4, 2, 100, 32)
    attention = functools.partial(causal_attention, frequencies=rope_frequencies(32))
    exact = attention(*inputs)
    low = [x.bfloat16() for x in inputs]
    torch.testing.assert_close(attention(*low).float(), exact, rtol=0.05, atol=0.05)
    with torch.no_grad():
        torch.testing.assert_close(attention(*low).float(), exact, rtol=0.05, atol=0.05)


# documents


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=5), st.integers(0, 2**31))
def test_documents_do_not_leak(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    layer = GroupedQueryAttention(16, 4, 2, HEAD_DIM)
    x, other = torch.randn(2, 1, total, 16, generator=generator)
    with torch.no_grad():
        packed = layer(x, ATTENTION, document_ids=documents)
        for number in range(len(lengths)):
            mine = documents == number
            changed = torch.where(mine[..., None], x, other)
            assert (
                layer(changed, ATTENTION, document_ids=documents)[mine] - packed[mine]
            ).abs().max() <= 1e-6
            torch.testing.assert_close(layer(x[mine][None], ATTENTION)[0], packed[mine], **CLOSE)


def test_documents_stop_gradients_too():
    x = torch.randn(1, 10, 16, requires_grad=True)
    documents = torch.tensor([[0] * 4 + [1] * 6])
    out = GroupedQueryAttention(16, 4, 2, HEAD_DIM)(x, ATTENTION, document_ids=documents)
    (grad,) = torch.autograd.grad(out[:, 4:].square().sum(), x)
    assert grad[:, :4].abs().max() == 0 and grad[:, 4:].abs().min() > 0


def test_left_padding_is_another_document_and_never_nan():
    layer, x = GroupedQueryAttention(16, 4, 2, HEAD_DIM), torch.randn(1, 9, 16)
    padded = torch.cat([torch.randn(1, 6, 16), x], 1)
    documents = torch.tensor([[-1] * 6 + [0] * 9])
    out = layer(padded, ATTENTION, document_ids=documents)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, 6:], layer(x, ATTENTION), **CLOSE)


def test_visible_by_hand():
    documents = torch.tensor([[0, 0, 1]])
    expected = torch.tensor([[True, False, False], [True, True, False], [False, False, True]])
    assert torch.equal(visible(3, 3, documents, documents)[0, 0], expected)
    assert visible(2, 5)[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]


# the cache


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.booleans(), st.integers(0, 2**31))
def test_cached_in_pieces_equals_the_full_pass(sizes, padded, seed):
    torch.manual_seed(seed)
    length = sum(sizes)
    layer, x = GroupedQueryAttention(16, 4, 2, HEAD_DIM), torch.randn(2, length, 16)
    documents = torch.zeros(2, length, dtype=torch.long)
    documents[1, : length // 2] = -1
    documents = documents if padded else None
    pieces, cache = feed(layer, x, sizes, documents, capacity=length + 3)
    torch.testing.assert_close(
        pieces, layer(x, ATTENTION, document_ids=documents).detach(), **CLOSE
    )
    assert cache.length == length


def test_a_full_cache_says_so():
    layer = GroupedQueryAttention(16, 4, 2, HEAD_DIM)
    with pytest.raises(ValueError, match="holds 10 tokens, but 11 are needed"):
        feed(layer, torch.randn(1, 11, 16), [8, 3], capacity=10)


def test_select_drops_and_repeats_rows_without_touching_the_original():
    layer, x = GroupedQueryAttention(16, 4, 2, HEAD_DIM), torch.randn(3, 8, 16)
    documents = torch.tensor([[0] * 8, [-1] * 3 + [0] * 5, [-1] * 6 + [0] * 2])
    _, cache = feed(layer, x, [8], documents, capacity=12)
    rows, before = torch.tensor([2, 0, 2]), cache.layers[0].keys.clone()
    chosen = cache.select(rows)
    assert (chosen.batch_size, chosen.length, chosen.capacity) == (3, 8, 12)
    assert torch.equal(chosen.document_ids, cache.document_ids[rows])
    new = torch.randn(3, 1, 16)
    chosen.remember(None, 1)
    with torch.no_grad():
        out = layer(new, ATTENTION, cache=chosen.layers[0])
        ids = torch.cat([documents[rows], torch.zeros(3, 1, dtype=torch.long)], 1)
        full = layer(torch.cat([x[rows], new], 1), ATTENTION, document_ids=ids)[:, -1:]
    torch.testing.assert_close(out, full, **CLOSE)
    assert torch.equal(cache.layers[0].keys, before)


# the layer


def test_heads_must_divide():
    with pytest.raises(ValueError, match=r"num_attention_heads \(6\).*num_key_value_heads \(4\)"):
        GroupedQueryAttention(32, 6, 4, 8)


def test_bias_on_query_key_value_and_none_on_the_output():
    layer = GroupedQueryAttention(32, 4, 2, 8)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "q_proj.weight": (32, 32),
        "q_proj.bias": (32,),
        "k_proj.weight": (16, 32),
        "k_proj.bias": (16,),
        "v_proj.weight": (16, 32),
        "v_proj.bias": (16,),
        "o_proj.weight": (32, 32),
    }


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 4), (4, 2), (7, 1), (6, 2)])
def test_layer_equals_transformers_with_gradients(qwen2, query_heads, kv_heads):
    rope = {"rope_type": "default", "rope_theta": 1_000.0}
    config = qwen2.Qwen2Config(
        hidden_size=24,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    ours = GroupedQueryAttention(24, query_heads, kv_heads, HEAD_DIM)
    theirs = qwen2.Qwen2Attention(config, layer_idx=0)
    theirs.load_state_dict(ours.state_dict())
    x, upstream = torch.randn(2, 70, 24, requires_grad=True), torch.randn(2, 70, 24)
    bias = torch.zeros(70, 70).masked_fill(~visible(70, 70), float("-inf"))
    tables = qwen2.Qwen2RotaryEmbedding(config)(x, torch.arange(70)[None])
    outputs = ours(x, ATTENTION), theirs(x, position_embeddings=tables, attention_mask=bias)[0]
    results = [
        [y, *torch.autograd.grad(y, [x, *module.parameters()], upstream)]
        for y, module in zip(outputs, (ours, theirs), strict=True)
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-5)


class Block(nn.Module):
    """A decoder layer put together from these two chapters alone."""

    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(16), RMSNorm(16)
        self.self_attn, self.mlp = GroupedQueryAttention(16, 4, 2, 4), SwiGLU(16, 24)

    def forward(self, x, attention):
        x = x + self.self_attn(self.input_layernorm(x), attention)
        return x + self.mlp(self.post_attention_layernorm(x))


def test_golden_logits_of_two_layers():
    """Weights from a linear congruential generator, logits from transformers' Qwen2ForCausalLM (tied, 2 layers)."""
    model = nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(12, 16),
            "layers": nn.ModuleList([Block(), Block()]),
            "norm": RMSNorm(16),
        }
    )
    parameters = {f"model.{name}": p for name, p in model.named_parameters()}
    for seed, name in enumerate(sorted(parameters), start=1):
        state, values = seed, []
        for _ in range(parameters[name].numel()):
            state = (1_664_525 * state + 1_013_904_223) % 2**32
            u = state / 2**32 - 0.5
            values.append(1 + 0.5 * u if "norm" in name else 0.8 * u)
        parameters[name].data = torch.tensor(values).view_as(parameters[name])
    ids = torch.tensor([[1, 5, 2, 9, 3, 0, 7, 4]])
    x = model["embed_tokens"](ids)
    for layer in model["layers"]:
        x = layer(x, functools.partial(causal_attention, frequencies=rope_frequencies(4)))
    logits = model["norm"](x) @ model["embed_tokens"].weight.T
    golden = [
        1.245379,
        -0.441101,
        -0.426658,
        1.493341,
        0.387465,
        0.526805,
        -0.266382,
        -0.655909,
        0.688256,
        -1.862029,
        0.159538,
        -0.105091,
    ]
    torch.testing.assert_close(logits[0, -1], torch.tensor(golden), **CLOSE)
    loss = F.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert loss.item() == pytest.approx(2.7750595, abs=1e-5)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(6.997245, abs=1e-4)
