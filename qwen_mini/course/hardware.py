"""What this machine is good at, as far as it changes no result."""

import os

from .errors import CourseError
from .scales import ScaleConfig


def cores() -> int:
    """Cores that this process may use: with taskset, SLURM or a container fewer than there are."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13 and later
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(config: ScaleConfig) -> int:
    """Threads to compute with: OMP_NUM_THREADS if it is a number, else the scale's, at most one a core."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return min(config.run.threads or cores(), cores())


def device() -> str:
    """`"cuda"` if there is a GPU, else `"cpu"`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(preference: str = "auto"):
    """The dtype to compute in: QWEN_MINI_DTYPE if it is set, else `preference`, the scale's.

    "auto" is bfloat16 on a GPU that has it, else float32. Nothing is measured: a stopwatch would
    choose differently from day to day, and with it the numbers.
    """
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    wanted = os.environ.get("QWEN_MINI_DTYPE")
    if wanted and wanted not in known:
        raise CourseError(f"QWEN_MINI_DTYPE must be float32 or bfloat16, not {wanted!r}")
    if not wanted and preference == "auto":
        able = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        wanted = "bfloat16" if able else "float32"
    return known[wanted or preference]
