"""RMSNorm, RoPE and SwiGLU for training on a CPU: the gradients of chapter 02's layers, written by hand.

Each function makes one operation of what autograd would split into many small ones, and keeps less for backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable


class FusedRMSNorm(Function):
    """`rms_norm` of chapter 02 with its gradient: one saved activation and half the passes over memory.

    With r = rms(x), n = x / r and δ = weight · ∂L/∂y:  ∂L/∂x = (δ − n · mean(δ n)) / r,  ∂L/∂weight = Σ n · ∂L/∂y.
    In bfloat16 the factor 1 / r is rounded before it multiplies: several times faster than a detour through float32,
    and within two units in the last place of `rms_norm`. Source: arXiv 1910.07467; report §2.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x: (..., hidden_size); weight: (hidden_size,). Returns the shape of x."""
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)  # 1 / rms
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """grad: ∂L/∂y, the shape of x. Returns the gradients of x and weight."""
        normed, scale, weight = ctx.saved_tensors
        product = grad * normed
        grad_weight = product.reshape(-1, weight.numel()).sum(0)
        projection = product @ (weight / -weight.numel())  # −mean(δ n)
        grad_x = (grad * weight).addcmul_(normed, projection.unsqueeze(-1)).mul_(scale)
        return grad_x, grad_weight, None


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm where a gradient is wanted: `FusedRMSNorm` on a CPU, torch's own kernel elsewhere.

    x: (..., hidden_size); weight: (hidden_size,). Returns the shape of x.
    """
    if x.device.type == "cpu":
        return FusedRMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` of chapter 02, which kernels can't import: x turned by tables that broadcast against it.

    x: (..., head_dim); sin is negative in its first half.
    """
    return (x * cos).addcmul_(torch.roll(x, x.shape[-1] // 2, -1), sin)


class Rotate(Function):
    """`rotate` of chapter 02 with its gradient, the rotation back: as few operations as forward, and nothing of x kept.

    A rotation is linear and its transpose turns the other way, R(m)ᵀ = R(−m). Source: RoFormer, arXiv 2104.09864.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (..., head_dim); cos and signed sin broadcast against x. Returns the shape of x."""
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        """grad: ∂L/∂y, the shape of x. Returns the gradient of x; the tables get none."""
        cos, sin = ctx.saved_tensors
        return turned(grad, cos, -sin), None, None


class FusedSwiGLU(Function):
    """`silu(gate) * up` with its gradient: keeps sigmoid(gate), so that backward needs no exponential.

    With σ = sigmoid(gate):  silu′ = σ + silu · (1 − σ). Source: arXiv 2002.05202; report §2.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up: (..., intermediate_size). Returns the same shape."""
        sigmoid = torch.sigmoid(gate)
        ctx.save_for_backward(gate, up, sigmoid)
        return (gate * sigmoid).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """grad: ∂L/∂y, the shape of gate. Returns the gradients of gate and up."""
        gate, up, sigmoid = ctx.saved_tensors
        silu = gate * sigmoid
        grad_up = silu * grad
        slope = silu.addcmul_(silu, sigmoid, value=-1).add_(sigmoid)  # silu′
        return slope.mul_(up).mul_(grad), grad_up


def fused_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` where a gradient is wanted: `FusedSwiGLU` on a CPU, torch's own kernels elsewhere.

    gate, up: (..., intermediate_size). Returns the same shape.
    """
    if gate.device.type == "cpu":
        return FusedSwiGLU.apply(gate, up)
    return F.silu(gate) * up
