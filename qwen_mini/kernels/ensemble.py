"""Many small models trained at once: chapter 11's loop over learning rates as one batched product.

Small matrices leave a processor waiting between operations. Models of one shape that read the same batches share those
operations when every parameter has a member dimension in front; members never meet, so the gradient of the sum of their
losses holds the gradient of each.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import TiledAttention
from .layers import Rotate, fused_rms_norm, fused_swiglu


class Ensemble:
    """Models of one shape whose every parameter has a leading member dimension: one `bmm` serves them all.

    `weights` (members, parameters of one) holds everything, matrices first; `parameters[name]` are views of it, named
    as in Hugging Face's Qwen2. `output_scale` and `attention_scale` are factors of the logits and of the scores, for muP.
    """

    def __init__(self, models: Sequence[nn.Module]):
        states = [dict(model.named_parameters()) for model in models]
        names = sorted(states[0], key=lambda name: states[0][name].ndim < 2)  # vectors last
        shapes = {name: states[0][name].shape for name in names}
        if any({n: p.shape for n, p in state.items()} != shapes for state in states):
            raise ValueError(
                "an ensemble needs models of one shape: train others in a cell of their own"
            )
        self.config, self.members = models[0].config, len(models)
        sizes = [shapes[name].numel() for name in names]
        flat = [torch.cat([s[name].detach().float().flatten() for name in names]) for s in states]
        self.weights = torch.stack(flat)
        self.decayed = sum(shapes[name].numel() for name in names if len(shapes[name]) > 1)
        self.parameters = {
            name: part.view(self.members, *shapes[name]).detach().requires_grad_()
            for name, part in zip(names, self.weights.split(sizes, 1), strict=True)
        }
        self.ones = torch.ones(self.config.hidden_size)
        self.output_scale, self.attention_scale = 1.0, 1.0

    def rope_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin of the first `length` positions, (length, head_dim) each, as in chapter 02."""
        places = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32)
        frequencies = 1.0 / self.config.rope_theta ** (places / self.config.head_dim)
        angles = torch.arange(length)[:, None].float() * frequencies
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm of (members, tokens, width), each member with gains of its own."""
        gains = self.parameters[name + ".weight"]
        return fused_rms_norm(x, self.ones, self.config.rms_norm_eps) * gains[:, None]

    def linear(self, x: Tensor, name: str) -> Tensor:
        """(members, tokens, in) → (members, tokens, out): every member's own matrix, in one product."""
        weight, bias = self.parameters[name + ".weight"], self.parameters.get(name + ".bias")
        if bias is None:
            return torch.bmm(x, weight.transpose(1, 2))
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    def attention(self, x: Tensor, name: str, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Causal attention of (members, rows · length, width); members and rows are one batch here."""
        c, (members, tokens, _) = self.config, x.shape
        length = len(tables[0])
        q, k, v = (
            self.linear(x, f"{name}.{part}_proj").view(
                -1, length, c.num_attention_heads, c.head_dim
            )
            for part in "qkv"
        )
        cos, sin = (table[:, None] for table in tables)
        q, k = Rotate.apply(q * self.attention_scale, cos, sin), Rotate.apply(k, cos, sin)
        mixed = TiledAttention.apply(*(part.transpose(1, 2) for part in (q, k, v)))
        return self.linear(mixed.transpose(1, 2).reshape(members, tokens, -1), f"{name}.o_proj")

    def feed_forward(self, x: Tensor, name: str) -> Tensor:
        """SwiGLU of (members, tokens, width)."""
        gate, up = self.linear(x, f"{name}.gate_proj"), self.linear(x, f"{name}.up_proj")
        return self.linear(fused_swiglu(gate, up), f"{name}.down_proj")

    def logits(self, input_ids: Tensor) -> Tensor:
        """(rows, length) ids, the same for all members → (members, rows · length, vocab_size)."""
        table = self.parameters["model.embed_tokens.weight"]
        x = table[:, input_ids.flatten()]
        tables = self.rope_tables(input_ids.shape[1])
        for layer in (f"model.layers.{i}" for i in range(self.config.num_hidden_layers)):
            normed = self.norm(x, f"{layer}.input_layernorm")
            x = x + self.attention(normed, f"{layer}.self_attn", tables)
            normed = self.norm(x, f"{layer}.post_attention_layernorm")
            x = x + self.feed_forward(normed, f"{layer}.mlp")
        x = self.norm(x, "model.norm") * self.output_scale
        return torch.bmm(x, table.transpose(1, 2))

    def losses(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Mean −log p(target) of every member in nats, (members,)."""
        logits, wanted = self.logits(input_ids), targets.flatten().repeat(self.members)
        losses = F.cross_entropy(logits.flatten(0, 1), wanted, reduction="none")
        return losses.view(self.members, -1).mean(1)

    def gradients(self, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (members,) and gradients (members, parameters of one); members do not see each other."""
        losses = self.losses(input_ids, targets)
        found = torch.autograd.grad(losses.sum(), list(self.parameters.values()))
        return losses.detach(), torch.cat([part.flatten(1) for part in found], 1)


class EnsembleAdamW:
    """AdamW for an `Ensemble`: a learning rate, a gradient norm and a clip for every member.

    The order of operations is PyTorch's; vectors (gains, biases) have no weight decay. Source: arXiv 1711.05101.
    """

    def __init__(self, ensemble: Ensemble, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8, clip=1.0):
        self.ensemble, self.betas, self.eps, self.clip, self.steps = ensemble, betas, eps, clip, 0
        self.mean = torch.zeros_like(ensemble.weights)
        self.square = torch.zeros_like(ensemble.weights)
        self.weight_decay = weight_decay
        self.multipliers = None  # (parameters of one,): factors of the rate, for muP

    @torch.no_grad()
    def step(self, gradients: Tensor, rates: Tensor) -> Tensor:
        """Move every member by its own rate, (members,); returns the norms before clipping, (members,)."""
        self.steps += 1
        (beta1, beta2), weights = self.betas, self.ensemble.weights
        norms = torch.linalg.vector_norm(gradients, dim=1)
        gradients *= (self.clip / (norms + 1e-6)).clamp(max=1.0)[:, None]
        self.mean.lerp_(gradients, 1 - beta1)
        self.square.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        root = (self.square / (1 - beta2**self.steps)).sqrt_().add_(self.eps)
        move = torch.div(self.mean, root, out=root).div_(1 - beta1**self.steps)
        if self.multipliers is not None:
            move *= self.multipliers
        weights[:, : self.ensemble.decayed] *= 1 - rates[:, None] * self.weight_decay
        weights.addcmul_(move, rates[:, None], value=-1)
        return norms
