"""Many small models at once, each on data of its own: every matrix has a leading axis, one slice a member, for `bmm`.

`ensemble` is for models that read the same batches; here each member reads another mixture, with weights for tokens.

A member is chapter 04's decoder without biases, its norms' gains fixed at 1; `Ensemble.state(i)` is what `Qwen` loads.
Members share no number: each has its own weights, data, learning rate and gradient norm.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .attention import TiledAttention
from .cross_entropy import linear_cross_entropy
from .layers import Rotate, fused_rms_norm, fused_swiglu


@dataclass(frozen=True)
class Shape:
    """Sizes of one member; the vocabulary's table is also the head."""

    vocab_size: int
    hidden_size: int = 64
    intermediate_size: int = 176
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    rope_theta: float = 1_000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class Ensemble:
    """`members` models of one shape; member i begins from the numbers that seeds[i] draws."""

    def __init__(self, shape: Shape, seeds: list[int], dtype: torch.dtype = torch.float32):
        self.shape, self.dtype, d = shape, dtype, shape.hidden_size
        sizes = {"embed": (shape.vocab_size, d)}
        for i in range(shape.num_hidden_layers):
            sizes |= {f"{i}.qkv": (d, 3 * d), f"{i}.o": (d, d)}
            sizes |= {f"{i}.gate_up": (d, 2 * shape.intermediate_size)}
            sizes |= {f"{i}.down": (shape.intermediate_size, d)}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.weights = {
            name: torch.stack([torch.randn(size, generator=g) * 0.02 for g in generators])
            for name, size in sizes.items()
        }
        half = torch.arange(0, shape.head_dim, 2) / shape.head_dim
        self.frequencies = 1.0 / shape.rope_theta**half

    def __len__(self) -> int:
        return len(self.weights["embed"])

    def hidden_states(self, ids: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """ids: (members, batch, length) → (members, batch · length, hidden_size), after the last norm."""
        members, batch, length = ids.shape
        heads, size, dim = (
            self.shape.num_attention_heads,
            self.shape.hidden_size,
            self.shape.head_dim,
        )
        angles = torch.arange(length)[:, None] * self.frequencies
        cos, sin = (torch.cat(p, -1).to(self.dtype) for p in _tables(angles))
        ones = torch.ones(size, dtype=self.dtype)
        offsets = torch.arange(members)[:, None, None] * self.shape.vocab_size
        table = weights["embed"].reshape(-1, size)
        x = torch.nn.functional.embedding((ids + offsets).flatten(1), table)
        for i in range(self.shape.num_hidden_layers):
            normed = fused_rms_norm(x, ones, 1e-6)
            qkv = torch.bmm(normed, weights[f"{i}.qkv"])
            qkv = qkv.view(members * batch, length, 3, heads, dim).permute(2, 0, 3, 1, 4)
            q, k = (Rotate.apply(part, cos, sin) for part in qkv[:2])
            attended = TiledAttention.apply(q, k, qkv[2]).transpose(1, 2)
            x = x + torch.bmm(attended.reshape(members, -1, size), weights[f"{i}.o"])
            gate, up = torch.bmm(fused_rms_norm(x, ones, 1e-6), weights[f"{i}.gate_up"]).chunk(
                2, -1
            )
            x = x + torch.bmm(
                fused_swiglu(gate.contiguous(), up.contiguous()), weights[f"{i}.down"]
            )
        return fused_rms_norm(x, ones, 1e-6)

    def losses(self, windows: Tensor, weights: Tensor | None = None) -> list[Tensor]:
        """Mean of −log p of the tokens 1 … of every window, one scalar a member.

        windows: (members, batch, length + 1); weights: (members, batch, length) ≥ 0 of the targets, default all 1.
        """
        cast = {name: value.to(self.dtype) for name, value in self.weights.items()}
        hidden = self.hidden_states(windows[..., :-1], cast)
        targets = windows[..., 1:].flatten(1)
        weighed = [None] * len(self) if weights is None else weights.flatten(1)
        return [
            linear_cross_entropy(h, table, t, w)
            for h, table, t, w in zip(hidden, cast["embed"], targets, weighed, strict=True)
        ]

    @torch.no_grad()
    def token_scores(self, windows: Tensor, batch: int = 4) -> tuple[Tensor, Tensor]:
        """−log p of every target under every member, and whether it is the likeliest token.

        windows: (rows, length + 1); both results: (members, rows, length).
        """
        cast = {name: value.to(self.dtype) for name, value in self.weights.items()}
        losses, right = [], []
        for rows in windows.split(batch):
            hidden = self.hidden_states(rows[:, :-1].expand(len(self), -1, -1), cast)
            logits = torch.bmm(hidden, cast["embed"].transpose(1, 2)).float()
            targets = rows[:, 1:].reshape(1, -1, 1).expand(len(self), -1, -1)
            nll = logits.logsumexp(-1) - logits.gather(-1, targets)[..., 0]
            losses.append(nll.unflatten(1, rows[:, 1:].shape))
            right.append((logits.argmax(-1) == targets[..., 0]).unflatten(1, rows[:, 1:].shape))
        return torch.cat(losses, 1), torch.cat(right, 1)

    def state(self, member: int) -> dict[str, Tensor]:
        """The member's weights under the names of a tied `Qwen` of the same sizes."""
        w, d = {name: value[member] for name, value in self.weights.items()}, self.shape.hidden_size
        state = {"model.embed_tokens.weight": w["embed"], "model.norm.weight": torch.ones(d)}
        for i in range(self.shape.num_hidden_layers):
            q, k, v = w[f"{i}.qkv"].chunk(3, -1)
            gate, up = w[f"{i}.gate_up"].chunk(2, -1)
            named = {
                f"self_attn.{n}_proj": m
                for n, m in zip("qkvo", (q, k, v, w[f"{i}.o"]), strict=True)
            }
            named |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": w[f"{i}.down"]}
            layer = {f"{n}.weight": m.T.contiguous() for n, m in named.items()}
            layer |= {f"self_attn.{n}_proj.bias": torch.zeros(d) for n in "qkv"}
            layer |= {f"{n}_layernorm.weight": torch.ones(d) for n in ("input", "post_attention")}
            state |= {f"model.layers.{i}.{n}": m for n, m in layer.items()}
        return state


def _tables(angles: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """cos and signed sin of chapter 02, each in two halves."""
    yield angles.cos(), angles.cos()
    yield -angles.sin(), angles.sin()


def train_ensemble(
    ensemble: Ensemble,
    batches: Callable[[int], np.ndarray | tuple[np.ndarray, np.ndarray]],
    steps: int,
    learning_rates: list[float],
    warmup: int = 20,
    weight_decay: float = 0.1,
) -> np.ndarray:
    """AdamW for `steps` steps, every member at its own rate; returns the losses, (steps, members).

    batches(step): token windows (members, batch, length + 1), with loss weights (members, batch, length) or without.
    The rate warms up and falls to a tenth along a cosine; every member's gradient is clipped to norm 1.
    """
    rates = torch.tensor(learning_rates)
    weights = ensemble.weights
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    history = []
    for step in range(steps):
        batch = batches(step)
        windows, mask = batch if isinstance(batch, tuple) else (batch, None)
        for w in weights.values():
            w.requires_grad_(True).grad = None
        mask = None if mask is None else torch.from_numpy(mask)
        losses = torch.stack(ensemble.losses(torch.from_numpy(windows).long(), mask))
        losses.sum().backward()
        history.append(losses.detach())
        rate = rates * min(1, (step + 1) / warmup)
        rate = rate * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        _adamw(weights, first, second, step, rate, weight_decay)
    return torch.stack(history).numpy() if history else np.empty((0, len(ensemble)))


@torch.no_grad()
def _adamw(weights, first, second, step: int, rate: Tensor, decay: float) -> None:
    """One step of AdamW with β = (.9, .95), a rate and a clipped gradient for each member."""
    for w in weights.values():
        w.requires_grad_(False)
    norms = sum(w.grad.square().sum((1, 2)) for w in weights.values()).sqrt()
    clip = (1 / norms.clamp_min(1e-12)).clamp_max(1)[:, None, None]
    rate = rate[:, None, None]
    for name, w in weights.items():
        grad = w.grad.mul_(clip)
        m = first[name].lerp_(grad, 0.1)
        v = second[name].mul_(0.95).addcmul_(grad, grad, value=0.05)
        update = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt_().add_(1e-8))
        w.mul_(1 - rate * decay).sub_(update.mul_(rate))


def rows_of(stream: np.ndarray, length: int) -> np.ndarray:
    """(rows, length + 1): neighbouring windows of a stream that share one token; a shorter stream is repeated."""
    stream = np.resize(stream, max(len(stream), length + 1))
    starts = np.arange((len(stream) - 1) // length)[:, None] * length
    return stream[starts + np.arange(length + 1)]


def windows_of(stream: np.ndarray, count: int, length: int, seed: int) -> np.ndarray:
    """(count, length + 1): `rows_of` a stream in random order, each once before any comes again."""
    rows = rows_of(stream, length)
    rng = np.random.default_rng(seed)
    order = [rng.permutation(len(rows)) for _ in range(count // len(rows) + 1)]
    return rows[np.concatenate(order)[:count]]
