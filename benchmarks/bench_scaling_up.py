"""Sharded training under torchrun: two ranks with a thread each against one process with two, speed and memory.

The same steps of the same rows. Memory is the growth of the first rank's resident set at its peak, beside what
`memory_per_rank` predicts.
"""

import dataclasses
import json
import resource
import sys
import time

from qwen_mini import course
from qwen_mini.course.launch import join, torchrun
from qwen_mini.course.ranks import world
from qwen_mini.model import ModelConfig, Qwen
from qwen_mini.scaling_up import memory_per_rank, rows_of
from qwen_mini.training import Trainer

SHAPE = ModelConfig(4_096, 448, 1_024, 10, 4, 2, 112, 256, 10_000.0, 1e-6, True)
WARM = dataclasses.replace(SHAPE, hidden_size=64, num_hidden_layers=1, head_dim=16)
ROWS, LENGTH, STEPS = 4, 64, 8


def train(shape: ModelConfig, steps: int) -> float:
    """Seconds of the quickest step."""
    import torch

    settings = course.load_scale("quick").pretraining
    settings = dataclasses.replace(settings, grad_accumulation=1, optimizer="adamw")
    torch.manual_seed(0)
    batch_of = rows_of(torch.randint(shape.vocab_size, (16, LENGTH + 1)), ROWS)
    trainer, taken = Trainer(Qwen(shape), settings, 100), []
    for step in range(steps):
        begun = time.perf_counter()
        trainer.step(batch_of(step, *world()))
        taken.append(time.perf_counter() - begun)
    return min(taken[1:])


def rank_of_torchrun(threads: int) -> None:
    """What each rank does; the first one prints bytes and tokens a second."""
    import psutil
    import torch

    rank, _ = join()
    torch.set_num_threads(threads)
    train(WARM, 2)
    before = psutil.Process().memory_info().rss
    seconds = train(SHAPE, STEPS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if rank == 0:
        print(json.dumps({"bytes": peak - before, "speed": ROWS * LENGTH / seconds}))


def main() -> None:
    found = {n: json.loads(torchrun(__file__, 3 - n, ranks=n)) for n in (1, 2)}
    print(json.dumps({
        "name": "sharded training, 2 ranks x 1 thread, 15M parameters", "ours": round(found[2]["speed"]),
        "peer": round(found[1]["speed"]), "peer_name": "1 process x 2 threads", "unit": "tokens/s",
        "ratio": round(found[2]["speed"] / found[1]["speed"], 2),
    }))  # fmt: skip
    for ranks, one in found.items():
        planned = memory_per_rank(SHAPE, ranks, ROWS * LENGTH // ranks, width=4, layers=1)
        planned = sum(planned.values())
        print(json.dumps({
            "name": f"memory of a rank of {ranks}", "ours": round(one["bytes"] / 2**20),
            "peer": round(planned / 2**20), "peer_name": "predicted", "unit": "MiB",
            "ratio": round(one["bytes"] / planned, 2),
        }))  # fmt: skip


if __name__ == "__main__":
    rank_of_torchrun(int(sys.argv[1])) if len(sys.argv) > 1 else main()
