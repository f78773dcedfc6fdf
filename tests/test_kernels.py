"""Every kernel against the plain form that its chapter teaches: values, gradients, and what transformers computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qwen_mini.kernels.layers import FusedRMSNorm, FusedSwiGLU, Rotate, fused_rms_norm, fused_swiglu, turned
from qwen_mini.layers import RMSNorm, SwiGLU, rms_norm, rope_frequencies, rope_tables, rotate

EPS = 1e-6


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
    assert torch.autograd.gradcheck(lambda x, weight: FusedRMSNorm.apply(x, weight, EPS), (x, weight))


@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 5, 9)])
def test_fused_rms_norm_equals_the_plain_form_with_gradients(shape):
    inputs, upstream = [3 * torch.randn(shape), torch.randn(9)], torch.randn(shape)
    inputs = [x.requires_grad_() for x in inputs]
    results = [
        with_gradients(lambda *x, norm=norm: norm(*x, EPS), inputs, upstream) for norm in (fused_rms_norm, rms_norm)
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


# --- RoPE -----------------------------------------------------------------------------------------------------------


def test_rotate_function_equals_rotate_with_its_gradient():
    x = torch.randn(2, 5, 8, requires_grad=True)
    tables, upstream = rope_tables(torch.arange(5), rope_frequencies(8)), torch.randn(2, 5, 8)
    forms = [with_gradients(lambda x, form=form: form(x, *tables), [x], upstream) for form in (Rotate.apply, rotate)]
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
    inputs, upstream = [3 * torch.randn(2, 4, 6, requires_grad=True) for _ in range(2)], torch.randn(2, 4, 6)
    results = [with_gradients(f, inputs, upstream) for f in (fused_swiglu, lambda gate, up: F.silu(gate) * up)]
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
        monkeypatch.setattr(kernel, "apply", lambda *x, kernel=kernel, usual=usual: used.append(kernel) or usual(*x))
    for device, expected in (("cpu", [FusedRMSNorm, FusedSwiGLU]), ("meta", [])):
        used.clear()
        layers = nn.Sequential(RMSNorm(8), SwiGLU(8, 12)).to(device)
        out = layers(torch.ones(3, 8, device=device))
        assert used == expected and out.shape == (3, 8) and out.requires_grad
        with torch.no_grad():
            layers(torch.ones(3, 8, device=device))
        assert used == expected, "without gradients the plain form runs"
