"""What this machine is good at."""

import functools
import os
import time


def threads(config) -> int:
    """Threads to compute with: OMP_NUM_THREADS if it is set to a number, else the scale's, else all cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else config.run.threads or os.cpu_count() or 1


def device() -> str:
    """`"cuda"` if there is a GPU, else `"cpu"`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(preference: str = "auto"):
    """The dtype to compute in: as asked, or the faster of bfloat16 and float32 as measured once on this machine."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(preference) or _measured_dtype()


@functools.cache
def _measured_dtype():
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    best = {torch.bfloat16: float("inf"), torch.float32: float("inf")}
    for _ in range(20):  # in turns, so that a busy moment hits both
        for dtype in best:
            best[dtype] = min(best[dtype], _matmul_seconds(dtype))
    return torch.bfloat16 if best[torch.bfloat16] * 1.2 < best[torch.float32] else torch.float32


def _matmul_seconds(dtype, size: int = 384) -> float:
    import torch

    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    begin = time.perf_counter()
    a @ b
    return time.perf_counter() - begin
