"""Mixtures of experts in an `Ensemble`: eight SwiGLU layers side by side are one wide SwiGLU layer with gates.

A gate is 0 for every expert but the chosen ones. That computes what chapter 06's mixture computes, at the price of all
experts; for models as small as chapter 11's it is faster than sorting tokens.
"""

import torch
from torch import Tensor, nn

from .ensemble import Ensemble
from .layers import fused_swiglu


class Experts(nn.Module):
    """Parameters of `experts` SwiGLU layers of `intermediate` channels side by side, and of their router."""

    def __init__(self, width: int, intermediate: int, experts: int):
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.gate_proj = nn.Linear(width, experts * intermediate, bias=False)
        self.up_proj = nn.Linear(width, experts * intermediate, bias=False)
        self.down_proj = nn.Linear(experts * intermediate, width, bias=False)


class ExpertEnsemble(Ensemble):
    """An `Ensemble` whose feed-forward layers are `Experts`: the top 2 of a token, gates that sum to 1.

    `gradients` adds 0.01 times the balance loss of each layer, experts · Σ share · mean probability, which is 1 when
    balanced (arXiv 2101.03961); `losses` is the cross-entropy alone.
    """

    top_k, balance = 2, 0.01

    def feed_forward(self, x: Tensor, name: str) -> Tensor:
        """(members, tokens, width) through the experts that each token's router chose."""
        probabilities = self.linear(x, f"{name}.router").softmax(-1)  # (members, tokens, experts)
        gates, chosen = probabilities.topk(self.top_k, -1)
        gates = gates / gates.sum(-1, keepdim=True)
        kept = torch.zeros_like(probabilities).scatter(-1, chosen, gates)
        hidden = fused_swiglu(
            self.linear(x, f"{name}.gate_proj"), self.linear(x, f"{name}.up_proj")
        )
        hidden = hidden.unflatten(-1, (kept.shape[-1], -1)) * kept[..., None]
        share = (kept > 0).float().mean(1) / self.top_k
        self.penalties.append(kept.shape[-1] * (share * probabilities.mean(1)).sum(-1))
        return self.linear(hidden.flatten(-2), f"{name}.down_proj")

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """As of an `Ensemble`; `penalties` then holds the balance loss of each layer of this pass, (members,) each."""
        self.penalties = []
        return super().hidden_states(input_ids)

    def objective(self, losses: Tensor) -> Tensor:
        """The losses, and the balance losses of the pass that computed them."""
        return losses + self.balance * sum(self.penalties)
