"""Every kernel against the plain form that its chapter teaches: values, gradients, and what transformers computes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import HEAD_DIM, heads
from torch import nn

from qwen_mini.attention import causal_attention, masked_attention, visible
from qwen_mini.generation import left_pad
from qwen_mini.kernels.attention import TiledAttention, causal_bias
from qwen_mini.kernels.cache import KVCache
from qwen_mini.kernels.decoder import FusedDecoder
from qwen_mini.kernels.layers import (
    FusedRMSNorm,
    FusedSwiGLU,
    Rotate,
    fused_rms_norm,
    fused_swiglu,
    turned,
)
from qwen_mini.kernels.row_decoder import RowDecoder
from qwen_mini.layers import RMSNorm, SwiGLU, rms_norm, rope_frequencies, rope_tables, rotate
from qwen_mini.model import ModelConfig, Qwen

EPS = 1e-6
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def with_gradients(function, inputs, upstream):
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


# --- RMSNorm --------------------------------------------------------------------------------------------------------


def test_fused_rms_norm_in_bfloat16_stays_within_two_units_in_the_last_place():
    x, weight = torch.randn(500, 64).bfloat16(), (0.5 + torch.rand(64)).bfloat16()
    fused, plain = FusedRMSNorm.apply(x, weight, EPS).float(), rms_norm(x, weight, EPS).float()
    unit = 2.0 ** (torch.floor(torch.log2(plain.abs().clamp_min(1e-30))) - 7)
    assert ((fused - plain).abs() <= 2 * unit).all()


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_fused_rms_norm_gradient(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: FusedRMSNorm.apply(x, weight, EPS), (x, weight)
    )


@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 5, 9)])
def test_fused_rms_norm_equals_the_plain_form_with_gradients(shape):
    inputs, upstream = [3 * torch.randn(shape), torch.randn(9)], torch.randn(shape)
    inputs = [x.requires_grad_() for x in inputs]
    results = [
        with_gradients(lambda *x, norm=norm: norm(*x, EPS), inputs, upstream)
        for norm in (fused_rms_norm, rms_norm)
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


# --- RoPE -----------------------------------------------------------------------------------------------------------


def test_rotate_function_equals_rotate_with_its_gradient():
    x = torch.randn(2, 5, 8, requires_grad=True)
    tables, upstream = rope_tables(torch.arange(5), rope_frequencies(8)), torch.randn(2, 5, 8)
    forms = [
        with_gradients(lambda x, form=form: form(x, *tables), [x], upstream)
        for form in (Rotate.apply, rotate)
    ]
    torch.testing.assert_close(*forms)
    assert torch.equal(turned(x, *tables), rotate(x, *tables))


def test_rotate_function_gradient():
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    tables = rope_tables(torch.arange(5), rope_frequencies(8), torch.float64)
    assert torch.autograd.gradcheck(lambda x: Rotate.apply(x, *tables), (x,))


# --- SwiGLU ---------------------------------------------------------------------------------------------------------


def test_fused_swiglu_gradient():
    gate, up = (3 * torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(FusedSwiGLU.apply, (gate, up))


def test_fused_swiglu_equals_the_plain_form_with_gradients():
    inputs, upstream = (
        [3 * torch.randn(2, 4, 6, requires_grad=True) for _ in range(2)],
        torch.randn(2, 4, 6),
    )
    results = [
        with_gradients(f, inputs, upstream)
        for f in (fused_swiglu, lambda gate, up: F.silu(gate) * up)
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_fused_swiglu_survives_extreme_gates():
    gate = torch.tensor([-200.0, -20.0, 0.0, 20.0, 200.0], requires_grad=True)
    up = torch.ones(5, requires_grad=True)
    ours = torch.autograd.grad(FusedSwiGLU.apply(gate, up).sum(), (gate, up))
    plain = torch.autograd.grad((F.silu(gate) * up).sum(), (gate, up))
    torch.testing.assert_close(ours, plain)


def test_layers_train_with_kernels_on_a_cpu_and_with_those_of_torch_elsewhere(monkeypatch):
    used = []
    for kernel in (FusedRMSNorm, FusedSwiGLU):
        usual = kernel.apply
        monkeypatch.setattr(
            kernel, "apply", lambda *x, kernel=kernel, usual=usual: used.append(kernel) or usual(*x)
        )
    for device, expected in (("cpu", [FusedRMSNorm, FusedSwiGLU]), ("meta", [])):
        used.clear()
        layers = nn.Sequential(RMSNorm(8), SwiGLU(8, 12)).to(device)
        out = layers(torch.ones(3, 8, device=device))
        assert used == expected and out.shape == (3, 8) and out.requires_grad
        with torch.no_grad():
            layers(torch.ones(3, 8, device=device))
        assert used == expected, "without gradients the plain form runs"


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("shape", [(2, 4, 2), (1, 3, 1), (1, 2, 2)])
def test_tiled_attention_equals_the_reference_with_gradients(length, shape):
    inputs = heads(*shape, length, requires_grad=True)
    upstream = torch.randn_like(inputs[0])
    results = []
    for path in (
        TiledAttention.apply,
        lambda q, k, v: masked_attention(q, k, v, visible(length, length)),
    ):
        out = path(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    torch.testing.assert_close(*results, **CLOSE)


def test_tiled_attention_gradcheck(monkeypatch):
    monkeypatch.setattr(TiledAttention, "TILE", 3)
    inputs = heads(1, 4, 2, 8, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(TiledAttention.apply, inputs)


def test_tiled_attention_takes_views_and_gradients_that_are_not_contiguous():
    inputs = [
        x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in heads(2, 4, 2, 70)
    ]
    upstream = torch.randn(2, 70, 4, HEAD_DIM).transpose(1, 2)
    ours = torch.autograd.grad(TiledAttention.apply(*inputs), inputs, upstream)
    plain = torch.autograd.grad(masked_attention(*inputs, visible(70, 70)), inputs, upstream)
    torch.testing.assert_close(ours, plain, **CLOSE)


def test_the_fast_path_runs_on_a_cpu_only(monkeypatch):
    used, usual = [], TiledAttention.apply
    monkeypatch.setattr(TiledAttention, "apply", lambda *x: used.append(len(x)) or usual(*x))
    frequencies = rope_frequencies(HEAD_DIM)
    for device, calls in (("cpu", 1), ("meta", 1)):
        out = causal_attention(
            *(x.to(device) for x in heads(1, 4, 2, 9)), frequencies=frequencies.to(device)
        )
        assert len(used) == calls and out.shape == (1, 4, 9, HEAD_DIM)


# --- the cache ------------------------------------------------------------------------------------------------------


def test_cache_keeps_keys_transposed_and_oldest_first():
    cache = KVCache(2, 1, 2, HEAD_DIM, capacity=5)
    _, k, v = heads(1, 4, 2, 3)
    keys, values = cache.layers[1].update(k, v)
    assert cache.layers[1].keys.shape == (1, 2, HEAD_DIM, 5) and cache.layers[1].values.shape == (
        1,
        2,
        5,
        HEAD_DIM,
    )
    assert torch.equal(keys, k) and torch.equal(values, v)
    assert cache.layers[0].keys.abs().max() == 0 and cache.length == 0


def test_document_ids_that_come_late_leave_the_earlier_tokens_in_document_zero():
    cache = KVCache(1, 2, 1, 4, capacity=6)
    cache.remember(None, 3)
    assert cache.document_ids is None
    cache.length = 3
    cache.remember(torch.tensor([[0, 1], [2, 2]]), 2)
    assert cache.document_ids.tolist() == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 2, 2, 0]]


@pytest.mark.parametrize("sizes", [[12], [7, 1, 4], [1] * 12])
def test_the_cache_holds_what_concatenation_gives(sizes):
    cache, (_, k, v) = KVCache(1, 3, 2, HEAD_DIM, capacity=20), heads(3, 4, 2, 12)
    for start, end in itertools.pairwise([0, *itertools.accumulate(sizes)]):
        held = cache.layers[0].update(k[:, :, start:end], v[:, :, start:end])
        cache.length = end
        assert all(map(torch.equal, held, (k[:, :, :end], v[:, :, :end])))


@pytest.mark.parametrize(
    "documents", [None, torch.tensor([[1, 0, 0], [0, 0, 0]])], ids=["even", "padded"]
)
def test_growing_keeps_what_is_held(documents):
    cache, (_, k, v) = KVCache(2, 2, 2, HEAD_DIM, capacity=3), heads(2, 4, 2, 5)
    cache.remember(documents, 3)
    for layer in cache.layers:
        layer.update(k[:, :, :3], v[:, :, :3])
    cache.length = 3
    with pytest.raises(ValueError, match="holds 3 tokens, but 5 are needed"):
        cache.layers[0].update(k[:, :, 3:], v[:, :, 3:])
    cache.grow(4)
    cache.remember(None, 2)
    for layer in cache.layers:
        assert all(map(torch.equal, layer.update(k[:, :, 3:], v[:, :, 3:]), (k, v)))
    assert cache.capacity == 7 and (documents is None) == (cache.document_ids is None)
    if documents is not None:
        assert cache.document_ids.tolist() == [[1, 0, 0, 0, 0, 0, 0], [0] * 7]


# --- the decoder ----------------------------------------------------------------------------------------------------

CONFIGS = [
    ModelConfig(300, 32, 48, 2, 4, 2, 8, 128, 1_000.0, 1e-6, True, 0.3),
    ModelConfig(211, 24, 40, 3, 3, 1, 16, 96, 10_000.0, 1e-5, False, 0.3),
    ModelConfig(128, 40, 64, 1, 5, 5, 8, 64, 500.0, 1e-6, True, 0.3),
]
PROMPTS = [[5, 9, 17], [3], [8, 8, 1, 20, 41, 7], [100, 2]]


def random_model(config):
    """A model whose weights and biases are large enough that every part of it matters."""
    model = Qwen(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif parameter.ndim == 1:
                parameter.normal_(mean=1.0, std=0.3)
    return model


@pytest.mark.parametrize("number", range(len(CONFIGS)))
@pytest.mark.parametrize(
    ("prompts", "kind"),
    [(PROMPTS, FusedDecoder), ([[1, 2, 3], [4, 5, 6]], FusedDecoder), ([[1, 2, 3]], RowDecoder)],
    ids=["padded", "even", "one"],
)
def test_the_fused_step_equals_the_plain_model(number, prompts, kind):
    model = random_model(CONFIGS[number])
    ids, document_ids = left_pad(prompts)
    with torch.inference_mode():
        caches = [model.make_cache(len(ids), ids.shape[1] + 5) for _ in range(2)]
        for cache in caches:
            model.hidden_states(ids, document_ids=document_ids, cache=cache)
        tables = rope_tables(
            torch.arange(caches[0].capacity), model.attention.keywords["frequencies"]
        )
        step = kind(model, tables)
        for n in range(5):
            token = torch.full((len(ids), 1), n)
            expected = model.hidden_states(token, cache=caches[1])[:, 0]
            torch.testing.assert_close(step(token, caches[0]), expected, rtol=1e-4, atol=1e-4)
            assert caches[0].length == caches[1].length
        for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["norm", "swiglu", "attention"])
def test_a_second_derivative_is_refused(kernel):
    """Gradients are written by hand, and hold for the first derivative alone."""
    x, weight = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(8)
    out = {
        "norm": lambda: FusedRMSNorm.apply(x, weight, 1e-6),
        "swiglu": lambda: FusedSwiGLU.apply(x, 2 * x),
        "attention": lambda: TiledAttention.apply(x, 2 * x, 3 * x),
    }[kernel]()
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_mask_of_tiles_does_not_depend_on_the_default_device():
    causal_bias.cache_clear()
    with torch.device("meta"):
        causal_bias(2, 0, 4, torch.float32)
    assert causal_bias(2, 0, 4, torch.float32).device.type == "cpu"


def test_a_padded_prompt_that_does_not_fit_says_so():
    cache = KVCache(1, 2, 2, 8, capacity=5)
    with pytest.raises(ValueError, match="holds 5 tokens, but 9 are needed"):
        cache.remember(torch.zeros(2, 9, dtype=torch.long), 9)


@pytest.mark.parametrize("kernel", ["tiles", "swiglu"])
def test_kernels_in_bfloat16_are_as_exact_as_the_plain_form(kernel):
    if kernel == "tiles":
        inputs = heads(2, 4, 2, 100)
        plain, fast = masked_attention, TiledAttention.apply
        extra = (visible(100, 100),)
    else:
        inputs, extra = (torch.randn(50, 64), torch.randn(50, 64)), ()
        plain, fast = (lambda gate, up: F.silu(gate) * up), FusedSwiGLU.apply
    exact = plain(*inputs, *extra)
    narrow = [x.bfloat16() for x in inputs]
    error = (fast(*narrow).float() - exact).abs().max()
    assert error <= 1.5 * (plain(*narrow, *extra).float() - exact).abs().max()


def test_an_empty_prompt_has_an_empty_answer():
    q, k, v = heads(2, 4, 2, 0)
    assert TiledAttention.apply(q, k, v).shape == q.shape
