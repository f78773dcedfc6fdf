"""Processes of one group on this machine: forks that run a notebook's own function, and torchrun for a script."""

import datetime
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .errors import CourseError
from .processes import GRACE, die_with_parent, in_forks

# torchrun that ends with the process that started it, whose id is the first argument
LAUNCHER = (
    "import sys; from qwen_mini.course.processes import die_with_parent; "
    "die_with_parent(int(sys.argv.pop(1))); "
    "from torch.distributed.run import main; main()"
)


def on_ranks(work: Callable[[], object], ranks: int, timeout: int = 300) -> list:
    """What `work()` returns in each of `ranks` forks with one thread that form one gloo group, by rank.

    `work` may be a function of a notebook; it finds its place with `torch.distributed.get_rank()`. Nobody computes
    for longer than `timeout` seconds. CourseError where processes cannot fork; a rank's error is raised here.
    """
    import multiprocessing

    import torch._dynamo  # noqa: F401  fully_shard needs it: loaded here once, not in every fork

    if "fork" not in multiprocessing.get_all_start_methods():
        raise CourseError("this system cannot fork: run the ranks as a script under torchrun")
    if ranks < 1:
        raise ValueError(f"a group has at least one rank, got {ranks}")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        store = f"file://{folder}/store"
        calls = {rank: partial(_rank, work, rank, ranks, store, timeout) for rank in range(ranks)}
        found = {r: result for r, result, _ in in_forks(calls, ranks, lost=lambda _, error: error)}
    failed = [error for error in found.values() if isinstance(error, Exception)]
    if failed:  # where one has failed, the others tell of a lost connection
        raise next((e for e in failed if "remote worker" not in str(e)), failed[0])
    return [found[rank] for rank in range(ranks)]


def _rank(work: Callable[[], object], rank: int, ranks: int, store: str, timeout: int) -> object:
    import torch.distributed as dist

    if hasattr(signal, "alarm"):
        signal.alarm(timeout)  # a rank that computes without end meets no limit of the group
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=limit)
    try:
        result = work()
        dist.barrier()  # nobody leaves while another still reads from it
        return result
    finally:
        dist.destroy_process_group()


def join(timeout: int = 600) -> tuple[int, int]:
    """(rank, number of ranks) of a script under torchrun, in a gloo group, with one thread; it ends with torchrun."""
    import torch
    import torch.distributed as dist

    die_with_parent()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout))
    return dist.get_rank(), dist.get_world_size()


def torchrun(script: str | Path, *arguments: object, ranks: int = 2, timeout: int = 600) -> str:
    """Run a Python file in `ranks` processes of this machine; what they printed, without warnings.

    CourseError with the last lines if it fails, or if it is not done after `timeout` seconds. All processes end with
    the one that called.
    """
    options = ["--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, "-c", LAUNCHER, str(os.getpid()), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    started = subprocess.Popen(
        [*command, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=environment,
    )  # fmt: skip
    try:
        out, errors = started.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise CourseError(f"{script} was not done after {timeout} s under torchrun") from None
    finally:
        _end(started)
    if started.returncode:
        lines = errors.strip().splitlines()
        told = [
            line for line in lines if re.match(r"\[rank\d+\]:\s\w[\w.]*(Error|Exception)\b", line)
        ]
        raise CourseError(f"{script} failed under torchrun: " + "\n".join(told[:1] or lines[-15:]))
    return out


def _end(started: subprocess.Popen) -> None:
    """Ask torchrun to end its ranks and itself; kill it if it does not listen."""
    if started.poll() is None:
        started.terminate()
        try:
            started.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:
            started.kill()
            started.communicate()
