"""How sure is a length? Many prompts with one pass key, or with four keys, read sparsely and asked afterwards.

    python benchmarks/needles.py 1048576 --tries 20            # a quarter of an hour on two cores
    python benchmarks/needles.py 16384 --tries 60 --keys 4     # one of four named keys

Not part of `make bench`: it measures the model, not the time.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch

from qwen_mini.course import hardware, load_scale
from qwen_mini.course.statistics import wilson_interval
from qwen_mini.dual_chunk import position_scheme
from qwen_mini.long_context import ask_all, extended_checkpoint, frozen_model, haystack, open_hay
from qwen_mini.sparse_prefill import SparseAttention, choose_budgets, sparse_prefill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("length", type=int, help="tokens of a prompt")
    parser.add_argument("--tries", type=int, default=20, help="prompts")
    parser.add_argument(
        "--keys",
        type=int,
        default=1,
        help="1: the pass key; more: so many named keys beside it, one asked",
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="default: the scale laptop's long-context checkpoint"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = load_scale("laptop")
    torch.set_num_threads(hardware.threads(config))
    start, n = options.checkpoint or extended_checkpoint(config), options.length
    model, (pieces, hay) = frozen_model(start, config), open_hay(start, config)
    hay = np.tile(hay, -(-n // len(hay)))
    sample, _ = haystack(min(n, 16_384), 4, hay, pieces, random.Random(options.seed))
    budgets = choose_budgets(model, torch.tensor([sample]))
    scheme, attention = (
        position_scheme(model.config, "dca+temperature", n),
        SparseAttention(model.config, n, budgets),
    )
    rng, found = random.Random(f"{options.seed}/{n}/{options.keys}"), []
    for attempt in range(options.tries):
        one = options.keys == 1
        style = "prose" if one else rng.choice(("prose", "compact"))
        depths = [attempt % 5 / 4] if one else None
        ids, planted = haystack(n, 1 if one else options.keys + 1, hay, pieces, rng, depths, style)
        begin = time.perf_counter()
        _, cache = sparse_prefill(model, torch.tensor([ids]), attention)
        asked = planted if one else [rng.choice(planted[1:])]
        found += ask_all(model, cache, asked, pieces, scheme, style)
        depth, seconds = asked[0][2], time.perf_counter() - begin
        print(
            f"{attempt + 1:3} depth {depth:.2f} {'found' if found[-1] else 'missed'} {seconds:.1f} s",
            flush=True,
        )
    low, high = wilson_interval(sum(found) / len(found), len(found))
    print(
        json.dumps(
            {
                "length": n,
                "keys": options.keys,
                "found": sum(found),
                "tries": len(found),
                "interval": [low, high],
            }
        )
    )


if __name__ == "__main__":
    main()
