"""Many small models trained at once: chapter 10's mixtures and chapter 11's learning rates as one batched product.

Small matrices leave a processor waiting between operations. Models of one shape share those operations when every
parameter has a member dimension in front, whether they read the same batches or each its own; members never meet, so
the gradient of the sum of their losses holds the gradient of each.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import TiledAttention
from .cross_entropy import linear_cross_entropy
from .layers import Rotate, fused_rms_norm, fused_swiglu


class Ensemble:
    """Models of one shape whose every parameter has a leading member dimension: one `bmm` serves them all.

    `weights` (members, parameters of one) holds everything, matrices first; `parameters[name]` are views of it, named
    as in Hugging Face's Qwen2. `dtype` is what matrix products compute in; weights and losses are float32.
    `output_scale` and `attention_scale` are factors of the logits and of the scores, for muP. The head is the token
    table: ValueError for models with a head of their own, and for models of several shapes.

    Token ids are (rows, length), the same for all members, or (members, rows, length), each member's own.
    """

    def __init__(self, models: Sequence[nn.Module], dtype: torch.dtype = torch.float32):
        states = [dict(model.named_parameters()) for model in models]
        names = sorted(states[0], key=lambda name: states[0][name].ndim < 2)  # vectors last
        shapes = {name: states[0][name].shape for name in names}
        if any({n: p.shape for n, p in state.items()} != shapes for state in states):
            raise ValueError(
                "an ensemble needs models of one shape: train others in a cell of their own"
            )
        if not models[0].config.tie_word_embeddings:
            raise ValueError(
                "an ensemble takes the token table as the head: build its models with tie_word_embeddings=True"
            )
        self.config, self.members, self.dtype = models[0].config, len(models), dtype
        sizes = [shapes[name].numel() for name in names]
        flat = [torch.cat([s[name].detach().float().flatten() for name in names]) for s in states]
        self.weights = torch.stack(flat)
        self.decayed = sum(shapes[name].numel() for name in names if len(shapes[name]) > 1)
        self.parameters = {
            name: part.view(self.members, *shapes[name]).detach().requires_grad_()
            for name, part in zip(names, self.weights.split(sizes, 1), strict=True)
        }
        self.ones = torch.ones(self.config.hidden_size, dtype=dtype)
        self.output_scale, self.attention_scale = 1.0, 1.0
        self.first_rows = torch.arange(self.members)[:, None] * self.config.vocab_size

    def rope_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin of the first `length` positions, (length, head_dim) each, as in chapter 02."""
        places = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32)
        frequencies = 1.0 / self.config.rope_theta ** (places / self.config.head_dim)
        angles = torch.arange(length)[:, None].float() * frequencies
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def weight(self, name: str) -> Tensor:
        """(members, ...): a parameter of every member, in the dtype of the products."""
        return self.parameters[name].to(self.dtype)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm of (members, tokens, width), each member with gains of its own."""
        gains = self.weight(name + ".weight")
        return fused_rms_norm(x, self.ones, self.config.rms_norm_eps) * gains[:, None]

    def linear(self, x: Tensor, name: str) -> Tensor:
        """(members, tokens, in) → (members, tokens, out): every member's own matrix, in one product."""
        weight = self.weight(name + ".weight").transpose(1, 2)
        if name + ".bias" not in self.parameters:
            return torch.bmm(x, weight)
        return torch.baddbmm(self.weight(name + ".bias")[:, None], x, weight)

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

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Token ids → (members, rows · length, hidden_size), after the last norm."""
        table, ids = self.weight("model.embed_tokens.weight"), self.of_each(input_ids).flatten(1)
        x = F.embedding(ids + self.first_rows, table.flatten(0, 1))
        tables = self.rope_tables(input_ids.shape[-1])
        for layer in (f"model.layers.{i}" for i in range(self.config.num_hidden_layers)):
            normed = self.norm(x, f"{layer}.input_layernorm")
            x = x + self.attention(normed, f"{layer}.self_attn", tables)
            normed = self.norm(x, f"{layer}.post_attention_layernorm")
            x = x + self.feed_forward(normed, f"{layer}.mlp")
        return self.norm(x, "model.norm") * self.output_scale

    def logits(self, input_ids: Tensor) -> Tensor:
        """Token ids → (members, rows · length, vocab_size)."""
        table = self.weight("model.embed_tokens.weight")
        return torch.bmm(self.hidden_states(input_ids), table.transpose(1, 2))

    def of_each(self, ids: Tensor) -> Tensor:
        """(members, rows, length), of ids that all members share or that each has."""
        return ids.expand(self.members, -1, -1)

    def losses(self, input_ids: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean −log p(target) of every member in nats, (members,).

        weights: ≥ 0, one a target, default all 1; with them, or with ids of its own, a member's head and loss are taken
        in one pass, so that its logits stay in the cache.
        """
        if input_ids.ndim == 2 and weights is None:
            logits, wanted = self.logits(input_ids), targets.flatten().repeat(self.members)
            losses = F.cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="none")
            return losses.view(self.members, -1).mean(1)
        hidden, table = self.hidden_states(input_ids), self.weight("model.embed_tokens.weight")
        of_each = [None] * self.members if weights is None else self.of_each(weights).flatten(1)
        parts = zip(hidden, table, self.of_each(targets).flatten(1), of_each, strict=True)
        return torch.stack([linear_cross_entropy(*part) for part in parts])

    def gradients(
        self, input_ids: Tensor, targets: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses (members,) and gradients (members, parameters of one); members do not see each other."""
        losses = self.losses(input_ids, targets, weights)
        goal = self.objective(losses).sum()
        found = torch.autograd.grad(goal, list(self.parameters.values()))
        return losses.detach(), torch.cat([part.flatten(1) for part in found], 1)

    def objective(self, losses: Tensor) -> Tensor:
        """What training lowers, (members,): here the losses that were just computed."""
        return losses

    @torch.no_grad()
    def token_scores(self, windows: Tensor, rows: int = 4) -> tuple[Tensor, Tensor]:
        """−log p of every target, and whether it is the likeliest token, (members, rows, length) each.

        windows: (rows, length + 1) ids, the same for all members; `rows` of them are looked at together.
        """
        losses, right = [], []
        for part in windows.split(rows):
            logits, targets = self.logits(part[:, :-1]).float(), self.of_each(part[:, 1:])
            nll = F.cross_entropy(logits.mT, targets.flatten(1), reduction="none")
            losses.append(nll.view(targets.shape))
            right.append(logits.argmax(-1).view(targets.shape) == targets)
        return torch.cat(losses, 1), torch.cat(right, 1)


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

    @contextlib.contextmanager
    def branch(self) -> Iterator[None]:
        """Inside, training goes on as of a copy: afterwards weights, moments and steps are what they were before."""
        tensors = self.ensemble.weights, self.mean, self.square
        steps, kept = self.steps, [tensor.clone() for tensor in tensors]
        yield
        self.steps = steps
        for tensor, old in zip(tensors, kept, strict=True):
            tensor.copy_(old)


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
