"""Independent runs at the same time."""

import contextlib
import io
import os
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping

from . import hardware
from .errors import CourseError

GRACE = 10  # seconds between asking a fork to end and ending it


def side_by_side(
    calls: Mapping[Hashable, Callable[[], object]],
    on_done: Callable[[Hashable, float], None] | None = None,
) -> dict:
    """What independent calls return, by their names: each in a fork with one thread.

    There are as many forks at once as torch has threads: a small model cannot keep two threads busy,
    and two trainings with a thread each take less time than one after the other with both. A call's
    numbers do not depend on the calls beside it: all begin with the same state of the random
    generators and have one thread, also where a fork cannot compute (with a GPU, under torchrun,
    outside Linux) and they run here, one after the other. `on_done` is told the name and seconds of
    each call that ends. Results come through a pipe: return numbers, arrays, answers or paths,
    neither models nor tensors. What a fork prints is dropped: its place would be chance.
    """
    import multiprocessing

    nested = multiprocessing.parent_process() is not None  # a fork cannot have forks
    alone = nested or "WORLD_SIZE" in os.environ
    if alone or hardware.device() != "cpu" or sys.platform != "linux":
        return _one_after_the_other(calls, on_done)
    import torch

    results = {}
    for name, result, seconds in in_forks(calls, torch.get_num_threads()):
        results[name] = result
        if on_done:
            on_done(name, seconds)
    return {name: results[name] for name in calls}


def die_with_parent(parent: int | None = None) -> None:
    """Send this process a SIGTERM when its parent ends: nobody waits for its result then.

    `parent` is the parent's id, if known: it may have ended before this call. The kernel's own signal, PR_SET_PDEATHSIG,
    would come when the *thread* ends that made this process.
    """
    parent = parent or os.getppid()

    def watch(seconds: float = 0.5) -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=watch, daemon=True).start()


def _one_after_the_other(calls, on_done) -> dict:
    import torch

    threads, results = torch.get_num_threads(), {}
    if hardware.device() == "cpu":
        torch.set_num_threads(1)
    try:
        for name, call in calls.items():
            begun = time.monotonic()
            with generators_kept():
                results[name] = call()
            if on_done:
                on_done(name, time.monotonic() - begun)
    finally:
        torch.set_num_threads(threads)
    return results


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Random generators go on as if the block had drawn nothing, as they do when it is a fork."""
    import numpy as np
    import torch

    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def in_forks(
    calls: Mapping[Hashable, Callable[[], object]],
    at_once: int,
    lost: Callable[[Hashable, Exception], object] | None = None,
) -> Iterator[tuple[Hashable, object, float]]:
    """Name, result and seconds of each call as it ends, `at_once` running beside each other; the rest ends with this.

    A call that fails raises here, or gives what `lost` makes of its name and error.
    """
    import multiprocessing  # here, because every start of the command line imports this module
    from multiprocessing import connection

    fork = multiprocessing.get_context("fork")
    waiting, running = list(calls), {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                receiver, sender = fork.Pipe(duplex=False)
                work = (calls[name], sender, os.getpid(), random.getstate())
                process = fork.Process(target=_compute, args=work, daemon=True)
                with (
                    warnings.catch_warnings()
                ):  # Python 3.12 and later warn of the parent's threads
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                sender.close()
                running[receiver] = name, process, time.monotonic()
            for receiver in connection.wait(list(running)):
                name, process, begun = running[receiver]
                del running[receiver]
                try:
                    result = _received(receiver, process)
                except Exception as error:
                    if lost is None:
                        raise
                    result = lost(name, error)
                yield name, result, time.monotonic() - begun
    finally:  # one has failed: the others are of no use
        _end([process for _, process, _ in running.values()])


def _compute(call: Callable[[], object], sender, parent: int, generator: tuple) -> None:
    """In the fork: one thread, since those of the parent are not there."""
    from . import sandbox

    # Ctrl-C reaches the parent, too, which ends its forks; at their end the sandbox leaves nothing behind
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    die_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it would wait for threads that are not there
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    random.setstate(generator)  # Python seeds its own generator anew in every fork, from nowhere
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result = call()
        sender.send((result, None))
    except CourseError as error:  # of its own class: all of them are made of one sentence
        sender.send((None, error))
    except Exception:
        sender.send((None, RuntimeError(f"in a run beside this one:\n{traceback.format_exc()}")))
    finally:
        sandbox.stop_workers()


def _received(receiver, process) -> object:
    try:
        with receiver:
            result, error = receiver.recv()
    except (EOFError, OSError):
        process.join()
        short = "memory was short: set OMP_NUM_THREADS=1 to run one after the other"
        why = short if process.exitcode == -signal.SIGKILL else "somebody ended it"
        ended = f"a run beside this one ended with exit code {process.exitcode}"
        raise CourseError(f"{ended} before its result was there: {why}") from None
    process.join()
    if error:
        raise error
    return result


def _end(processes: list) -> None:
    """End forks; one that does not listen, because it stands in a library's code, is killed."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(GRACE)
        if process.is_alive():
            process.kill()
            process.join()
