"""The KV cache: memory allocated once, keys transposed; the fast form of chapter 03's growing cache."""

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor


class LayerCache:
    """Keys and values of one layer.

    Keys lie transposed, (batch, kv_heads, head_dim, capacity): a decode step multiplies by the transpose, and reading
    it row by row is up to twice as fast in bfloat16 on a CPU. Values: (batch, kv_heads, capacity, head_dim). Whoever
    uses a layer keeps its `KVCache`: the layer does not.
    """

    def __init__(self, parent: "KVCache", keys: Tensor, values: Tensor):
        # a strong circle would keep the memory until the garbage collector comes
        self.parent = weakref.proxy(parent)
        self.keys, self.values = keys, values

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v, (batch, kv_heads, new, head_dim); return all so far, (…, length + new, head_dim), oldest first.

        ValueError if they don't fit. The parent's `length` stays: the model advances it after the last layer.
        """
        start, end = self.parent.length, self.parent.end_after(k.shape[2])
        self.keys[..., start:end] = k.transpose(-1, -2)
        self.values[:, :, start:end] = v
        return self.keys[..., :end].transpose(-1, -2), self.values[:, :, :end]


class KVCache:
    """Keys and values of all layers, allocated once for `capacity` tokens.

    Size: 2 · layers · kv_heads · head_dim · capacity · bytes per value, times the batch. `length` counts the tokens
    held; the model advances it after the last layer. `document_ids` (batch, capacity) remembers which tokens may see
    each other (None as long as all may). Source: report §2; grouped heads are arXiv 2305.13245.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_key_value_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        keys = (batch_size, num_key_value_heads, head_dim, capacity)
        values = (batch_size, num_key_value_heads, capacity, head_dim)
        self.capacity, self.length = capacity, 0
        self.document_ids: Tensor | None = None
        empty = lambda shape: torch.zeros(shape, dtype=dtype, device=device)
        self.layers = [LayerCache(self, empty(keys), empty(values)) for _ in range(num_layers)]

    @property
    def batch_size(self) -> int:
        """Rows held."""
        return self.layers[0].keys.shape[0]

    def end_after(self, length: int) -> int:
        """`length` after so many more tokens; ValueError if they don't fit."""
        end = self.length + length
        if end > self.capacity:
            short = f"the KV cache holds {self.capacity} tokens, but {end} are needed"
            raise ValueError(f"{short}: make it with a larger capacity or shorten the prompt")
        return end

    def remember(self, document_ids: Tensor | None, length: int) -> None:
        """Store the document ids, (batch, length) or None, of the `length` tokens that are about to be appended."""
        if document_ids is None and self.document_ids is None:
            return
        if self.document_ids is None:
            shape, device = (self.batch_size, self.capacity), self.layers[0].keys.device
            self.document_ids = torch.zeros(shape, dtype=torch.long, device=device)
        new = slice(self.length, self.end_after(length))
        self.document_ids[:, new] = 0 if document_ids is None else document_ids

    def select(self, rows: Tensor) -> "KVCache":
        """A copy with only these rows (repeats allowed): drop finished rows, or repeat a prompt for a group."""
        new = object.__new__(KVCache)
        new.capacity, new.length = self.capacity, self.length
        new.document_ids = None if self.document_ids is None else self.document_ids[rows]
        new.layers = [LayerCache(new, x.keys[rows], x.values[rows]) for x in self.layers]
        return new

    def grow(self, extra: int) -> None:
        """Make room for `extra` more tokens, in place; what is held is copied once."""
        self.capacity += extra
        for layer in self.layers:
            layer.keys = F.pad(layer.keys, (0, extra))
            layer.values = F.pad(layer.values, (0, 0, 0, extra))
        if self.document_ids is not None:
            self.document_ids = F.pad(self.document_ids, (0, extra))
