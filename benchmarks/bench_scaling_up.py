"""Sharded training under torchrun: two ranks with a thread each against one process with two, speed and memory.

The same steps of the same rows, in batches of 256 tokens, where the exchange of weights and gradients weighs most, and
of 4,096, as the course trains. Memory is the growth of the first rank's resident set at its peak in the small batches,
beside what `memory_per_rank` predicts; it is measured apart, with an allocator that gives back what is freed.
"""

import dataclasses
import json
import os
import resource
import sys
import time

from lines import report

from qwen_mini import course
from qwen_mini.course.launch import join, torchrun
from qwen_mini.course.ranks import world
from qwen_mini.model import ModelConfig, Qwen
from qwen_mini.scaling_up import memory_per_rank, rows_of
from qwen_mini.training import Trainer

SHAPE = ModelConfig(4_096, 448, 1_024, 10, 4, 2, 112, 256, 10_000.0, 1e-6, True)
WARM = dataclasses.replace(SHAPE, hidden_size=64, num_hidden_layers=1, head_dim=16)
LENGTH = 64
STEPS = {4: 8, 64: 4}  # rows of a batch: steps
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}  # of glibc


def train(shape: ModelConfig, rows: int, steps: int) -> float:
    """Tokens a second of the quickest step."""
    import torch

    settings = course.load_scale("quick").pretraining
    settings = dataclasses.replace(settings, grad_accumulation=1, optimizer="adamw")
    torch.manual_seed(0)
    batch_of = rows_of(torch.randint(shape.vocab_size, (4 * rows, LENGTH + 1)), rows)
    trainer, taken = Trainer(Qwen(shape), settings, 100), []
    for step in range(steps):
        begun = time.perf_counter()
        trainer.step(batch_of(step, *world()))
        taken.append(time.perf_counter() - begun)
    return rows * LENGTH / min(taken[1:])


def rank_of_torchrun(threads: int, steps: dict[int, int]) -> None:
    """What each rank does; the first one prints bytes, and tokens a second for each batch size."""
    import psutil
    import torch

    rank, _ = join()
    torch.set_num_threads(threads)
    smallest = min(steps)
    train(WARM, smallest, 2)
    before = psutil.Process().memory_info().rss
    speeds = {smallest: train(SHAPE, smallest, steps[smallest])}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    speeds |= {rows: train(SHAPE, rows, n) for rows, n in steps.items() if rows != smallest}
    if rank == 0:
        print(json.dumps({"bytes": peak - before, "speeds": speeds}))


def main() -> None:
    launch = lambda rows: {n: json.loads(torchrun(__file__, 3 - n, *rows, ranks=n)) for n in (1, 2)}
    found = launch(STEPS)
    os.environ |= GIVE_BACK
    lean = launch([min(STEPS)])
    for rows in STEPS:
        ours, peer = (found[ranks]["speeds"][str(rows)] for ranks in (2, 1))
        name = (
            f"sharded training, 2 ranks x 1 thread, 15M parameters, {rows * LENGTH:,} tokens a step"
        )
        report(name, ours, peer, "1 process x 2 threads", "tokens/s")
    for ranks, one in lean.items():
        planned = memory_per_rank(SHAPE, ranks, min(STEPS) * LENGTH // ranks, width=4, layers=1)
        mib = [size / 2**20 for size in (one["bytes"], sum(planned.values()))]
        report(f"memory of a rank of {ranks}", *mib, "predicted", "MiB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        threads, *asked = map(int, sys.argv[1:])
        rank_of_torchrun(threads, {rows: STEPS[rows] for rows in asked})
    else:
        main()
