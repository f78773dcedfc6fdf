"""How a result was made: what is said of it, and decides nothing."""

import datetime
import functools
import platform
from pathlib import Path

from .. import __version__
from . import hardware


def provenance(dtype=None) -> dict:
    """Precision, processor and versions of this process."""
    import torch

    dtype = dtype or torch.float32
    return {
        "precision": str(dtype).removeprefix("torch."),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
        "version": __version__,
        "date": datetime.date.today().isoformat(),
    }


@functools.cache
def processor() -> str:
    """The processor's name and its widest vectors, or the GPU's name."""
    import torch

    if hardware.device() == "cuda":
        return torch.cuda.get_device_name()
    facts, told = {}, Path("/proc/cpuinfo")
    if told.exists():
        for line in told.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    flags = set(facts.get("flags", "").split())
    widest = next((f for f in ("avx512_bf16", "avx512f", "avx2") if f in flags), "")
    return f"{name}, {widest}" if widest else name
