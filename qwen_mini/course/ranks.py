"""Which of the processes of torchrun this is."""

import datetime
from collections.abc import Callable

PREPARATION = datetime.timedelta(days=1)  # the longest that one process may keep the others waiting


def world() -> tuple[int, int]:
    """(rank, world size) of this process; (0, 1) outside torchrun."""
    import torch.distributed as dist  # here, because every start of the command line imports this package

    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_first() -> bool:
    """Whether this process evaluates, prints and writes."""
    return world()[0] == 0


def summed(*values: float) -> list[float]:
    """The values, each summed over all processes."""
    import torch

    totals = torch.tensor(values, dtype=torch.float64)
    if world()[1] > 1:
        torch.distributed.all_reduce(totals)
    return totals.tolist()


def highest(value: int) -> int:
    """The largest of all processes' values."""
    import torch

    found = torch.tensor(value)
    if world()[1] > 1:
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found)


def wait_for_all() -> None:
    """A barrier; outside a group nothing happens."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def patience() -> Callable[[], None]:
    """A barrier that waits for a day: for what one process prepares alone. All call this together, and then the barrier."""
    import torch.distributed as dist

    if world()[1] == 1:
        return lambda: None
    group = dist.new_group(backend="gloo", timeout=PREPARATION)
    return lambda: dist.barrier(group)
