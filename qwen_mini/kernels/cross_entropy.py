"""Output head and cross-entropy in one pass: chapter 08's loss without a (tokens, vocabulary) matrix in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable


class LinearCrossEntropy(Function):
    """Head and loss in one pass over chunks of tokens, gradients included.

    With d = softmax(h Wᵀ) − 1 at the target: ∂loss/∂h = d W and ∂loss/∂W = dᵀ h, each times the token's weight. d is
    taken in float32 and rounded afterwards: on a token that the model is sure of, d is the small difference of two
    numbers near one. Backward only scales what forward has already computed.
    """

    CHUNK = 512

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None
    ) -> Tensor:
        """The arguments of `linear_cross_entropy`."""
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, device=weight.device)  # float32: a long sum
        scaled = hidden if weights is None else hidden * weights.to(hidden.dtype)[:, None]
        losses = torch.empty(len(targets), device=hidden.device)
        for start in range(0, len(targets), LinearCrossEntropy.CHUNK):
            chunk = slice(start, start + LinearCrossEntropy.CHUNK)
            logits = F.linear(hidden[chunk], weight).float()  # (chunk, vocab_size)
            losses[chunk] = F.cross_entropy(logits, targets[chunk], reduction="none")
            difference = torch.softmax(logits, -1)
            difference[torch.arange(len(logits)), targets[chunk]] -= 1
            difference = difference.to(weight.dtype)
            torch.mm(difference, weight, out=grad_hidden[chunk])
            grad_weight += difference.t() @ scaled[chunk]
        if weights is None:
            total = losses.new_tensor(float(len(targets)))
        else:
            grad_hidden *= weights.to(hidden.dtype)[:, None]
            losses *= weights
            total = total_weight(weights)
        ctx.save_for_backward(grad_hidden, grad_weight, total)
        return losses.sum() / total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, total = ctx.saved_tensors
        scale, dtype = grad / total, grad_hidden.dtype
        return grad_hidden * scale.to(dtype), (grad_weight * scale).to(dtype), None, None


def total_weight(weights: Tensor) -> Tensor:
    """The sum of the weights, 1 where it is 0: a part in which nothing is trained has the loss 0."""
    total = weights.sum()
    return torch.where(total == 0, torch.ones_like(total), total)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Weighted mean of −log p(target) under softmax(hidden · weightᵀ), in float32.

    hidden: (tokens, hidden_size); weight: (vocab_size, hidden_size), the output head; targets: (tokens,); weights:
    (tokens,) ≥ 0, default all 1. Needs memory for one chunk of logits and for the gradients.
    A token is left out by the weight 0, not by the target −100.
    """
    return LinearCrossEntropy.apply(hidden, weight, targets, weights)
