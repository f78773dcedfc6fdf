"""`qwen-mini train STAGE`: any stage of the course, in one process or under torchrun."""

import datetime
import importlib
import os

from . import hardware
from .errors import CourseError
from .paths import shown
from .processes import die_with_parent
from .ranks import patience
from .scales import ScaleConfig
from .stages import Stage

# stage -> the function that gives its handle; what a stage starts from is made first
STAGES = {
    "pretraining": "pretraining.pretraining_stage",
    "long_context": "long_context.extension_stage",
    "sft": "sft.sft_stage",
    "careless": "reward_model.careless_stage",
    "pairs": "dpo.pairs_stage",
    "dpo": "dpo.dpo_stage",
    "grpo": "grpo.grpo_stage",
}
# what these train on is sampled, from what the section of the scale names as their start
SAMPLED = {"careless": "reward_model", "pairs": "dpo", "dpo": "dpo", "grpo": "grpo"}
COLLECTIVE = datetime.timedelta(
    minutes=30
)  # the longest that a step of one process may let the others wait


def handle(name: str, config: ScaleConfig, seed: int = 0) -> Stage:
    """The handle of a stage of the course; nothing is computed."""
    if name not in STAGES:
        raise CourseError(f"there is no stage {name!r} to train: use one of {', '.join(STAGES)}")
    module, _, function = STAGES[name].partition(".")
    return getattr(importlib.import_module(f"qwen_mini.{module}"), function)(config, seed)


def train(config: ScaleConfig, name: str = "pretraining", seed: int = 0, anew: bool = False) -> int:
    """Train a stage, after what it starts from; `anew` trains it although it is there."""
    import torch
    import torch.distributed as dist

    handle(name, config, seed)  # a wrong name is told before anything starts
    processes, first = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0")) == 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, hardware.threads(config) // here))
    if processes > 1:
        die_with_parent()
        _join()
    try:
        if _needs_text(name, config, seed):
            _prepare(config, seed, first)
        stage = handle(name, config, seed)
        folder = stage.make() if anew else stage.folder()
    finally:
        if processes > 1:
            dist.destroy_process_group()
    if first:
        print(f"{name} is in {shown(folder)}")
    return 0


def _needs_text(name: str, config: ScaleConfig, seed: int) -> bool:
    """Whether the corpus is read: by a stage itself, or by the fine-tuning that it starts from and that is not there."""
    if name not in SAMPLED:
        return True
    own = getattr(config, SAMPLED[name]).start == "own"
    return own and handle("sft", config, seed).find() is None


def _join() -> None:
    import torch
    import torch.distributed as dist

    gpu = hardware.device() == "cuda"
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # losses and weights are summed on the CPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=COLLECTIVE)


def _prepare(config: ScaleConfig, seed: int, first: bool) -> None:
    """The first process prepares the corpus; the others wait as long as that takes, and no longer than a day."""
    from qwen_mini.corpus import prepare_corpus

    wait = patience()
    if first:
        prepare_corpus(config, seed)
    wait()
