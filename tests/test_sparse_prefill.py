"""Patterns against golden values, the skipping loop against dense attention, and every error of a prompt."""

import dataclasses

import pytest
import torch

from qwen_mini import course
from qwen_mini.attention import visible
from qwen_mini.dual_chunk import dual_chunk_attention, position_scheme
from qwen_mini.kernels.cache import KVCache
from qwen_mini.layers import rope_frequencies
from qwen_mini.long_context import ask
from qwen_mini.model import ModelConfig, Qwen, kv_cache_bytes_per_token
from qwen_mini.sparse_prefill import (
    MAX_FACTOR,
    Budget,
    SparseAttention,
    a_shape,
    block_sparse,
    choose_budgets,
    last_weights,
    measure_recalls,
    recall,
    refine_budgets,
    sparse_prefill,
    vertical_slash,
)

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, rope_theta=1_000.0, tie_word_embeddings=True,
)  # fmt: skip
STRIDE = 192


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Qwen(CONFIG).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn_like(p) * 0.3 + (p.ndim == 1) * p)
    return model


def prompt(length, seed=1):
    return torch.randint(61, (1, length), generator=torch.Generator().manual_seed(seed))


def toy(n=32, h=8):
    i, d = torch.arange(float(n))[:, None], torch.arange(float(h))
    return 2 * torch.sin(0.7 * i + 1.3 * d), 2 * torch.cos(0.5 * i - 0.9 * d)


def test_vertical_slash_is_the_golden_one():
    q, k = toy()
    mask, columns, slashes = vertical_slash(q, k, 6, 5, last_q=8, first=2, nearest=3)
    assert columns.tolist() == [0, 1, 12, 13, 24, 25] and slashes.tolist() == [0, 1, 2, 9, 22]
    shares = recall(q, k, mask)
    assert abs(mask.sum() / visible(32, 32).sum() - 0.414773) < 1e-5
    assert abs(shares.mean() - 0.558092) < 1e-5 and abs(shares.min() - 0.012089) < 1e-5


def test_a_shape_is_the_golden_one():
    q, k = toy()
    mask = a_shape(32, 4, 8)
    assert abs(mask.sum() / visible(32, 32).sum() - 0.602273) < 1e-5
    assert abs(recall(q, k, mask).mean() - 0.706696) < 1e-5


def test_block_sparse_keeps_the_own_block_and_the_best_others():
    q, k = toy(64)
    mask = block_sparse(q, k, 2, 8)
    blocks = (
        mask.unflatten(0, (8, 8)).unflatten(2, (8, 8)).any(3).any(1)
    )  # (query block, key block)
    assert blocks.diagonal().all() and (blocks.sum(1) <= 2).all() and not mask.triu(1).any()
    full = visible(64, 64)[0, 0]
    assert torch.equal(block_sparse(q, k, 8, 8), full)
    torch.testing.assert_close(recall(q, k, full), torch.ones(64))
    with pytest.raises(ValueError, match="multiple of block_size"):
        block_sparse(q[:60], k[:60], 2, 8)


def test_last_weights_are_rows_of_the_full_softmax():
    q, k = toy()
    full = torch.softmax(((q @ k.T) * 8**-0.5).masked_fill(~visible(32, 32)[0, 0], -torch.inf), -1)
    torch.testing.assert_close(last_weights(q, k, 5), full[-5:])
    torch.testing.assert_close(last_weights(q, k, 99), full)


@pytest.mark.parametrize(
    "length", [1, 63, 64, 65, 192, 193, 255, 257, 300, 384, 448, 500, 1_000, 1_153]
)
def test_with_every_column_it_is_dense_dual_chunk_attention(length):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, n, length, 16, generator=generator) for n in (4, 2, 2))
    want = dual_chunk_attention(
        q,
        k,
        v,
        frequencies=rope_frequencies(16, 1_000.0),
        chunk_size=256,
        local_size=64,
        original_length=256,
    )
    for window in (64, 128):
        cache = KVCache(1, 1, 2, 16, length)
        attention = SparseAttention(CONFIG, length, Budget(length, window))
        torch.testing.assert_close(
            attention(q, k, v, cache=cache.layers[0]), want, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("chunk", [STRIDE, 2 * STRIDE, 5 * STRIDE])
def test_chunked_prefill_equals_one_dense_pass(model, chunk):
    ids = prompt(900)
    own, model.attention = model.attention, position_scheme(CONFIG, "dca+temperature", 900)
    try:
        with torch.no_grad():
            want = model(ids)[:, -1]
    finally:
        model.attention = own
    got, cache = sparse_prefill(model, ids, SparseAttention(CONFIG, 900, Budget(900, 128)), chunk)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert cache.length == 900 and model.attention is own


def kept_by(columns, window, length):
    """Which keys each query sees, from the definition: first chunk, last 64 queries, columns, band of its block."""
    kept = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        if i < STRIDE or i >= length - 64:
            kept[i, : i + 1] = True
            continue
        chunk = i // STRIDE * STRIDE
        begin = i - (i - chunk) % 128 - window
        kept[i, columns[columns <= i]] = True
        kept[i, max(0, begin) : i + 1] = True
    return kept


@pytest.mark.parametrize("estimate", [True, False])
@pytest.mark.parametrize("length", [500, 832, 1_000])
def test_sparse_attention_is_dense_attention_with_its_mask(length, estimate):
    """The loop that skips against a full score matrix with the same keys masked out."""
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, n, length, 16, generator=generator) * 1.5 for n in (4, 2, 2))
    attention = SparseAttention(CONFIG, length, Budget(24, 64, estimate), temperature=False)
    cache = KVCache(1, 1, 2, 16, length)
    got = attention(q, k, v, cache=cache.layers[0])[0].unflatten(0, (2, 2))
    for head in range(2):
        rows = q[0, 2 * head : 2 * head + 2].transpose(0, 1) * 16**-0.5
        keys, values = cache.layers[0].keys[0, head], v[0, head]
        columns = attention.columns(rows[-64:], keys, Budget(24, 64, estimate))
        kept = kept_by(columns, 64, length)
        want = torch.empty(length, 2, 16)
        for a in range(0, length, STRIDE):
            b = min(a + STRIDE, length)
            scores = attention.scores(rows[a:b], keys, a).masked_fill(
                ~kept[a:b, None, :b], -torch.inf
            )
            want[a:b] = torch.softmax(scores, -1) @ values[:b]
        torch.testing.assert_close(got[head].transpose(0, 1), want, rtol=1e-4, atol=1e-5)


def test_the_column_that_the_last_queries_read_is_found():
    """One key that every query likes: the estimate must keep it, the first columns must not."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, n, 1_000, 16, generator=generator) * 0.1 for n in (4, 2))
    q[..., 15] = 8.0  # the slowest channel pair hardly turns
    k[:, :, 417, 15] = 8.0
    attention = SparseAttention(CONFIG, 1_000, Budget(20, 64))
    cache = KVCache(1, 1, 2, 16, 1_000)
    attention(q, k, torch.randn(1, 2, 1_000, 16, generator=generator), cache=cache.layers[0])
    rows = q[0, :2].transpose(0, 1)[-64:]
    assert 417 in attention.columns(rows, cache.layers[0].keys[0, 0], Budget(20, 64)).tolist()
    assert attention.columns(
        rows, cache.layers[0].keys[0, 0], Budget(20, 64, False)
    ).tolist() == list(range(20))


def test_recall_is_one_with_every_column_and_less_with_few(model):
    ids, found = prompt(1_000), []
    for vertical in (16, 64, 1_000):
        attention = SparseAttention(CONFIG, 1_000, Budget(vertical, 64))
        attention.recalls = {}
        sparse_prefill(model, ids, attention, 6 * STRIDE)
        assert len(attention.recalls) == 4
        found.append(min(attention.recalls.values()))
    assert found[0] < found[1] < found[2] and abs(found[2] - 1) < 1e-4


def test_refinement_reaches_the_threshold_or_the_upper_end(model):
    start = [[Budget(16, 64)] * 2] * 2
    budgets, rounds = refine_budgets(model, prompt(1_000), start, threshold=0.9, max_vertical=512)
    for layer, heads in enumerate(budgets):
        for head, budget in enumerate(heads):
            assert rounds[-1][layer, head] >= 0.9 or budget.vertical >= 512
    assert len(rounds) > 1


def test_questions_leave_the_cache_as_it_was(model):
    ids = prompt(600)
    _, cache = sparse_prefill(model, ids, chunk_tokens=4 * STRIDE)
    decode = position_scheme(CONFIG, "dca+temperature", 600)
    first = ask(model, cache, [3, 5, 7], 6, decode)
    other = ask(model, cache, [9, 9], 6, decode)
    assert ask(model, cache, [3, 5, 7], 6, decode) == first and cache.length == 600
    assert len(other) == 6


def test_sparse_attention_can_decode(model):
    ids = prompt(500)
    attention = SparseAttention(CONFIG, 500, Budget(500, 128))
    logits, cache = sparse_prefill(model, ids, attention, 3 * STRIDE)
    got = ask(model, cache, [int(logits.argmax())], 5, attention)
    assert got == ask(
        model, cache, [int(logits.argmax())], 5, position_scheme(CONFIG, "dca+temperature", 500)
    )


@pytest.mark.parametrize("length, options, message", [
    (500, {"chunk_tokens": 100}, "multiple of the stride 192, got 100: try 192"),
    (500, {"max_cache_bytes": 1_000}, "above max_cache_bytes"),
    (256 * 1_024 + 1, {}, "above the supported 262,144"),
    (0, {}, "one prompt of shape"),
])  # fmt: skip
def test_prompts_that_do_not_fit_are_an_error(model, length, options, message):
    with pytest.raises(ValueError, match=message):
        sparse_prefill(
            model,
            torch.zeros(1, length, dtype=torch.long),
            **{"chunk_tokens": 3 * STRIDE, **options},
        )


def test_an_attention_made_for_another_length_is_an_error(model):
    with pytest.raises(ValueError, match="made for 600 tokens, but the prompt has 500"):
        sparse_prefill(
            model, torch.zeros(1, 500, dtype=torch.long), SparseAttention(CONFIG, 600), 3 * STRIDE
        )


def test_batches_padding_and_positions_are_an_error(model):
    with pytest.raises(ValueError, match="one prompt of shape"):
        sparse_prefill(model, torch.zeros(2, 10, dtype=torch.long))
    q, k = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match="reads one prompt into a KV cache"):
        SparseAttention(CONFIG)(q, k, k)


def test_an_error_inside_puts_the_attention_back(model):
    own = model.attention
    with pytest.raises(ValueError):
        sparse_prefill(
            model, prompt(300), lambda *a: (_ for _ in ()).throw(ValueError("inside")), 2 * STRIDE
        )
    assert model.attention is own


def test_the_choice_is_the_best_candidate_of_every_head(model):
    ids, candidates = prompt(1_000), (Budget(16, 64), Budget(16, 64, False), Budget(8, 128))
    recalls = [measure_recalls(model, ids, candidate) for candidate in candidates]
    chosen = choose_budgets(model, ids, candidates)
    for (layer, head), best in {
        place: max(r[place] for r in recalls) for place in recalls[0]
    }.items():
        assert recalls[candidates.index(chosen[layer][head])][layer, head] == best


CONTINUOUS = {  # golden rows of the positions that select: stride 5, chunk size 8
    9: [9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
    10: [8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0],
    11: [9, 8, 7, 6, 5, 6, 5, 4, 3, 2, 1, 0],
    14: [12, 11, 10, 9, 8, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
}


@pytest.mark.parametrize("row", CONTINUOUS)
def test_the_positions_that_select_run_on_as_in_the_golden_rows(row, monkeypatch):
    attention = SparseAttention(
        dataclasses.replace(CONFIG, max_position_embeddings=8), budgets=Budget(4, 0)
    )
    monkeypatch.setattr(attention, "stride", 5)
    monkeypatch.setattr(attention, "turn", lambda x, positions: positions)
    intra, succ, inter = (
        int(p) for p in attention.roles(torch.zeros(1, 1, 16), row, continuous=True)
    )
    want = [(intra, succ, inter)[min(2, row // 5 - j // 5)] - j % 5 for j in range(row + 1)]
    assert want == CONTINUOUS[row]
    clamped = [int(p) for p in attention.roles(torch.zeros(1, 1, 16), row)]
    assert max(clamped) <= 8


def test_budgets_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="at least one column"):
        Budget(0, 64)
    with pytest.raises(ValueError, match="a band of 256 keys is longer than the stride 192"):
        SparseAttention(CONFIG, 500, Budget(16, 256))
    with pytest.raises(ValueError, match="a band of 200 keys"):
        SparseAttention(CONFIG, 500, [[Budget(16, 64), Budget(16, 200)]])


def test_the_upper_end_is_kept_exactly(model):
    budgets, _ = refine_budgets(
        model, prompt(700), [[Budget(16, 64)] * 2] * 2, threshold=2.0, max_vertical=40
    )
    assert {budget.vertical for row in budgets for budget in row} == {40}


@pytest.mark.parametrize("name", ["quick", "laptop", "gpu", "cluster"])
def test_every_scale_measures_what_fits(name):
    """Chunks of whole strides, caches within half of the memory, lengths within what is supported."""
    scale = course.load_scale(name)
    trained, settings = scale.long_context.trained_length, scale.sparse_prefill
    assert settings.chunk_tokens % (trained - trained // 4) == 0
    assert max(settings.lengths) <= MAX_FACTOR * trained and settings.lengths[1] > trained
    model = ModelConfig.from_scale(scale)
    width = {"float32": 4, "bfloat16": 2}[scale.run.dtype]
    assert (max(settings.lengths) + 64) * kv_cache_bytes_per_token(
        model, width
    ) <= scale.run.memory_gib * 2**29
