"""What this machine is good at."""

import functools
import time


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
    faster = _matmul_seconds(torch.bfloat16) * 1.3 < _matmul_seconds(torch.float32)
    return torch.bfloat16 if faster else torch.float32


def _matmul_seconds(dtype, size: int = 512, tries: int = 7) -> float:
    """Best time of one square matrix product."""
    import torch

    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(tries):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return best
