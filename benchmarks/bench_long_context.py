"""Time to the first token: dual chunk attention against plain flash attention, sparse prefill against dense.

The shipped long-context checkpoint in the faster precision; every pair is timed in turns in one process, best of
several rounds. The ratio is peer's time / ours.
"""

import time

import numpy as np
import torch
from lines import report

from qwen_mini.course import artifacts, hardware
from qwen_mini.dual_chunk import position_scheme
from qwen_mini.model import Qwen
from qwen_mini.sparse_prefill import SparseAttention, sparse_prefill

LENGTHS = [4_096, 16_384, 32_768]


def seconds(run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main():
    folder = artifacts.shipped_dir("long_context")
    model = Qwen.from_pretrained(folder, hardware.pick_dtype()).eval().requires_grad_(False)
    config = model.config
    stride = config.max_position_embeddings - config.max_position_embeddings // 4
    for length in LENGTHS:
        ids = torch.from_numpy(np.random.default_rng(0).integers(0, 900, (1, length)))
        schemes = {
            "flash": position_scheme(config, "rope", length),
            "dual chunk": position_scheme(config, "dca+temperature", length),
            "sparse": SparseAttention(config, length),
        }
        best = dict.fromkeys(schemes, float("inf"))
        for _ in range(5 if length <= 4_096 else 3):
            for name, attention in schemes.items():
                chunk = -(-length // stride) * stride  # one chunk: the same work for all
                took = seconds(lambda i=ids, a=attention, c=chunk: sparse_prefill(model, i, a, c))
                best[name] = min(best[name], took)
        name = f"time to the first token, {length:,} tokens"
        report(
            f"{name}, dual chunk attention",
            best["dual chunk"],
            best["flash"],
            "plain flash attention",
        )
        report(
            f"{name}, sparse prefill",
            best["sparse"],
            best["dual chunk"],
            "dense dual chunk attention",
        )


if __name__ == "__main__":
    main()
