"""Independent runs at the same time."""

import contextlib
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Hashable, Mapping

from . import hardware
from .errors import CourseError


def side_by_side(calls: Mapping[Hashable, Callable[[], object]]) -> dict:
    """What independent calls return, by their names: as many at once as torch has threads, each in a fork with one.

    A small model cannot keep two threads busy: two trainings with a thread each take less time than one after the other
    with both. The first `len(calls) % threads` calls, which would leave a thread idle in the end, run before the others,
    in this process, with all threads; so do fewer calls than threads, and all where a fork cannot compute or would not
    help: with a GPU, under torchrun, outside Linux, with one thread. The last digits of a result may depend on where it
    was computed. Results come through a pipe: return numbers, arrays, answers or paths, neither models nor tensors. What
    a fork prints is dropped: it would stand there in an order by chance.
    """
    import multiprocessing  # here, because every start of the command line imports this module
    from multiprocessing import connection

    import torch

    threads = torch.get_num_threads()
    alone = "WORLD_SIZE" in os.environ or hardware.device() != "cpu" or sys.platform != "linux"
    here, names = len(calls) if alone or threads == 1 else len(calls) % threads, list(calls)
    results = {name: calls[name]() for name in names[:here]}
    waiting, running = names[here:], {}
    fork = multiprocessing.get_context("fork") if waiting else None
    try:
        while waiting or running:
            while waiting and len(running) < threads:
                name = waiting.pop(0)
                receiver, sender = fork.Pipe(duplex=False)
                process = fork.Process(target=_compute, args=(calls[name], sender), daemon=True)
                with warnings.catch_warnings():  # Python 3.12 and later warn of the parent's threads
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                sender.close()
                running[receiver] = name, process
            for receiver in connection.wait(list(running)):
                name, process = running.pop(receiver)
                results[name] = _received(receiver, process)
    finally:
        for _, process in running.values():  # one has failed: the others are of no use
            process.terminate()
            process.join()
    return {name: results[name] for name in names}


def _compute(call: Callable[[], object], sender) -> None:
    """In the fork: one thread, since those of the parent are not there."""
    import torch

    from . import sandbox

    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the sandbox leaves nothing behind
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result = call()
        sender.send((result, None))
    except CourseError as error:
        sender.send((None, CourseError(str(error))))
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
        raise CourseError(
            f"a run beside this one ended with exit code {process.exitcode} before its result was there: if that is -9, "
            "memory was short; set OMP_NUM_THREADS=1 to run one after the other"
        ) from None
    process.join()
    if error:
        raise error
    return result
