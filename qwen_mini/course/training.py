"""`qwen-mini train`: the corpus and the pre-training stage, in one process or under torchrun."""

import datetime
import os

from . import hardware
from .paths import shown
from .scales import ScaleConfig


def train(config: ScaleConfig, seed: int = 0) -> int:
    """Prepare the corpus in the first process, pre-train in all of them."""
    import torch
    import torch.distributed as dist

    from qwen_mini.corpus import prepare_corpus
    from qwen_mini.pretraining import pretrain

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    first = int(os.environ.get("RANK", "0")) == 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, hardware.threads(config) // here))
    if processes > 1:
        gpu = hardware.device() == "cuda"
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # the others wait for as long as the first process needs to prepare the corpus
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"  # losses and weights are summed on the CPU
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    try:
        if first:
            prepare_corpus(config, seed)
        if processes > 1:
            dist.barrier()
        folder = pretrain(config, seed=seed)
    finally:
        if processes > 1:
            dist.destroy_process_group()
    if first:
        print(f"checkpoint in {shown(folder)}")
    return 0
