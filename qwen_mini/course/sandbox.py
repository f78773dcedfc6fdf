"""Run small programs that a model wrote, so that they can neither harm, nor learn, nor cheat.

`run_sandboxed` sends a program and the inputs of its calls to a worker: this file again, started as `python -s -P -S` with
no environment in an empty folder. The worker has imported what programs may use; for every request it forks before it
reads it, so that nothing of one program stays in the memory of the next. That fork watches another one, which gives up
everything (limits on CPU time, memory and files; no system call but those that pure computation needs) before it runs
a line of the program. What comes back is plain JSON, bounded in size. **Expected answers never enter the
sandbox**: the caller compares, so a program that patches `==`, exits early or forges a result earns nothing that it
did not compute.

What it does not protect from: flaws of the kernel or of the CPU, and side channels through timing. Where the kernel
offers no seccomp (macOS, processors without a table below), Python's audit hooks are all there is, and a program that
looks for them can get round them: the sandbox says so once, and untrusted models belong into a virtual machine there.
Windows cannot fork: use WSL.
"""

import atexit
import contextlib
import json
import os
import platform
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Limits:
    """What one program may use; `cpu_seconds` decides, `wall_seconds` only ends programs that wait."""

    cpu_seconds: float = 0.5
    wall_seconds: float = 2.0
    memory_mib: int = 128
    output_bytes: int = 65_536

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"the sandbox limit {name} must be above 0, got {value}")


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and what its calls returned (one plain value each, if the status is "ok").

    status: "ok"; "error" (it raised, or returned what is no plain data); "timeout"; "killed" (it ended otherwise, as at
    the memory limit or by an exit of its own); "output" (it returned too much).
    """

    status: Literal["ok", "error", "timeout", "killed", "output"]
    values: list[Any] = field(default_factory=list)
    error: str = ""


class SandboxError(RuntimeError):
    """The sandbox itself cannot work here."""


def run_sandboxed(
    program: str, function: str, calls: list[list], limits: Limits | None = None
) -> Outcome:
    """Run `program`, then `function(*arguments)` for every list of arguments in `calls`; nothing it does can raise here.

    Arguments and results are plain data: None, bool, int, finite float, str, lists and dicts of them with str keys
    (tuples come back as lists).
    """
    return run_many([(program, function, calls)], limits)[0]


def run_many(
    jobs: list[tuple[str, str, list[list]]], limits: Limits | None = None
) -> list[Outcome]:
    """`run_sandboxed` of many (program, function, calls), on all cores; outcomes in the order of the jobs."""
    from .hardware import cores  # here, because the worker, this file alone, has no package

    limits = limits or Limits()
    requests = [_request(*job, limits) for job in jobs]
    with _lock:
        count = min(cores(), len(requests))
        _workers.extend(_Worker() for _ in range(count - len(_workers)))
        if count <= 1:
            return [_workers[0].run(request, limits) for request in requests]
        outcomes: list = [None] * len(requests)
        todo = iter(range(len(requests)))  # `next` of a range iterator is atomic

        def serve(worker):
            for i in todo:
                outcomes[i] = worker.run(requests[i], limits)

        with ThreadPoolExecutor(count) as pool:
            list(pool.map(serve, _workers[:count]))
        return outcomes


def _request(program: str, function: str, calls: list[list], limits: Limits) -> bytes:
    job = {"program": program, "function": function, "calls": calls}
    return json.dumps(job | {"limits": asdict(limits)}).encode()


# ---------------------------------------------------------------------------------------------------- the caller's side
_lock, _workers = threading.Lock(), []
_warned: list[int] = []  # once a process


def _forget() -> None:
    """In a fork of the caller: its workers belong to the parent."""
    global _lock, _workers
    for worker in _workers:
        if worker.folder is not None:
            worker.folder._finalizer.detach()  # which would remove the parent's folder
    _lock, _workers = threading.Lock(), []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class _Worker:
    """One worker process, started when needed and again after it died."""

    def __init__(self):
        self.process, self.folder = None, None

    def run(self, request: bytes, limits: Limits) -> Outcome:
        for _ in range(2):  # a worker that was lost is replaced once
            self.start()
            try:
                return self.ask(request, limits)
            except (OSError, EOFError, ValueError, TypeError) as problem:
                lost = problem
                self.stop()
            except BaseException:  # an interrupted call must not leave its answer to the next one
                self.stop()
                raise
        return Outcome("killed", error=f"the sandbox's worker was lost: {lost}")

    def ask(self, request: bytes, limits: Limits) -> Outcome:
        _send(self.process.stdin.fileno(), request)
        answer = _receive(self.process.stdout.fileno(), 2 * limits.wall_seconds + 10)
        try:
            return Outcome(**json.loads(answer))
        except RecursionError:
            return Outcome("killed", error="its result is nested too deeply")

    def start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        self.stop()
        if not hasattr(os, "fork"):
            able = "Linux, macOS, or WSL on Windows"
            raise SandboxError(f"the sandbox needs a system that can fork: {able}")
        options = {"prefix": "qwen_mini_sandbox_", "ignore_cleanup_errors": True}
        self.folder = tempfile.TemporaryDirectory(**options)
        command = [sys.executable, "-s", "-P", "-S", __file__]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        alone = {"cwd": self.folder.name, "bufsize": 0, "start_new_session": True}
        alone["env"] = {"PYTHONHASHSEED": "0"}  # one order of sets for all programs
        self.process = subprocess.Popen(command, **pipes, **alone)
        self.prove()

    def prove(self) -> None:
        """Run one harmless program: a sandbox that cannot would make every right program look wrong."""
        request = _request("def f(x):\n    return x", "f", [[7]], Limits())
        try:
            outcome = self.ask(request, Limits())
            problem = outcome.error if outcome != Outcome("ok", [7]) else ""
        except (OSError, EOFError, ValueError, TypeError) as error:
            self.process.kill()
            problem = f"{error} {self.process.stderr.read().decode(errors='replace')[-300:]}"
        if problem:
            self.stop()
            broken = "the sandbox does not work on this machine, so no program can be judged"
            raise SandboxError(f"{broken}: {problem}")
        if not _warned and _seccomp_filter() is None:
            _warned.append(1)
            remedy = "run untrusted models in a virtual machine"
            print(f"the kernel here cannot lock programs in: {remedy}", file=sys.stderr)

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
                stream.close()
            self.folder.cleanup()
            self.process = None


@atexit.register
def stop_workers() -> None:
    """End all workers; the next program starts new ones."""
    while _workers:
        _workers.pop().stop()


def _send(handle: int, content: bytes) -> None:
    content = struct.pack("<I", len(content)) + content
    while content:
        content = content[os.write(handle, content) :]


def _receive(handle: int, seconds: float | None = None) -> bytes:
    """One message; EOFError at the end of the stream, TimeoutError when nothing comes for so long."""

    def exactly(size: int) -> bytes:
        parts = b""
        while len(parts) < size:
            if seconds is not None and not select.select([handle], [], [], seconds)[0]:
                raise TimeoutError(f"no answer in {seconds:g} s")
            part = os.read(handle, size - len(parts))
            if not part:
                raise EOFError("the stream ended")
            parts += part
        return parts

    return exactly(struct.unpack("<I", exactly(4))[0])


# ---------------------------------------------------------------------------------------------------- the worker's side
PRELOADED = (
    "__future__ bisect cmath collections collections.abc copy dataclasses datetime decimal enum fractions functools heapq "
    "itertools json math operator random re statistics string textwrap time typing"
).split()

# What pure computation asks of the kernel once all files are open and all modules loaded: memory, the clock, locks,
# random bytes, reading and writing handles that are open, and the end. Numbers: the kernel's tables of system calls.
SYSCALLS = {
    "x86_64": {
        "arch": 0xC000003E,
        "read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12,
        "sched_yield": 24, "mremap": 25, "madvise": 28, "getpid": 39, "exit": 60, "gettimeofday": 96,
        "gettid": 186, "futex": 202, "clock_gettime": 228, "clock_getres": 229, "exit_group": 231, "getrandom": 318,
        "rseq": 334,
    },
    "aarch64": {
        "arch": 0xC00000B7,
        "close": 57, "lseek": 62, "read": 63, "write": 64, "fstat": 80, "exit": 93, "exit_group": 94, "futex": 98,
        "clock_gettime": 113, "clock_getres": 114, "sched_yield": 124, "gettimeofday": 169, "getpid": 172,
        "gettid": 178, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278, "rseq": 293,
    },
}  # fmt: skip


def _seccomp_filter() -> bytes | None:
    """The filter as a program for the kernel (classic BPF): these calls pass, all others fail with EPERM."""
    table = dict(SYSCALLS.get(platform.machine(), {}))
    if not sys.platform.startswith("linux") or not table:
        return None
    operation = lambda code, yes, no, value: struct.pack("<HBBI", code, yes, no, value)
    load, equal, answer = 0x20, 0x15, 0x06
    arch, numbers = table.pop("arch"), sorted(table.values())
    lines = [operation(load, 0, 0, 4), operation(equal, 1, 0, arch)]
    lines.append(operation(answer, 0, 0, 0x80000000))  # another architecture: kill
    lines.append(operation(load, 0, 0, 0))
    lines += [operation(equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    lines += [operation(answer, 0, 0, value) for value in (0x00050001, 0x7FFF0000)]
    return b"".join(lines)


ENDED = 3  # exit code of a fork whose caller has gone


def _work() -> None:
    """The worker's loop: a fork for every request, which reads it, has it computed and answers."""
    import ctypes
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    filter_ = _seccomp_filter()
    libc = ctypes.CDLL(None, use_errno=True) if filter_ else None
    lock = _kernel_lock(ctypes, libc, filter_) if filter_ else None
    base = _virtual_bytes()
    ended = False
    while not ended:
        # the request stays unread: what the worker has read, later programs could find
        select.select([0], [], [])
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os._exit(_serve(lock, base))
            os._exit(1)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    folder = os.getcwd()  # the caller has ended, perhaps without a chance to clean up
    os.chdir(os.sep)
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def _serve(lock, base: int) -> int:
    """In the worker's fork: one request; the exit code."""
    try:
        request = json.loads(_receive(0))
    except EOFError:
        return ENDED
    _send(1, json.dumps(_run_in_child(request, lock, base)).encode())
    return 0


def _kernel_lock(ctypes, libc, filter_: bytes):
    """A function that asks the kernel for the filter; True if it is in force."""
    buffer = ctypes.create_string_buffer(filter_)

    class Program(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    program = Program(len(filter_) // 8, ctypes.addressof(buffer))
    program.keep = buffer  # the address alone does not keep it alive
    version_3, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()

    def lock() -> bool:
        death_signal, no_new_privileges, set_seccomp, mode_filter = 1, 38, 22, 2
        libc.prctl(death_signal, signal.SIGKILL, 0, 0, 0)  # no child outlives its worker
        libc.capset(version_3, none)  # root's powers, where the worker has them
        if libc.prctl(no_new_privileges, 1, 0, 0, 0) != 0:
            return False
        return libc.prctl(set_seccomp, mode_filter, ctypes.byref(program), 0, 0) == 0

    return lock


def _virtual_bytes() -> int:
    with contextlib.suppress(OSError):
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _run_in_child(request: dict, lock, base: int) -> dict:
    """Fork, let the child compute, read at most `output_bytes`, end it; the fields of an `Outcome`."""
    import time

    limits, (reader, writer) = request["limits"], os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            _compute(request, writer, lock, base)
        os._exit(1)
    os.close(writer)
    content, deadline = b"", time.monotonic() + limits["wall_seconds"]
    bound, ended, late = limits["output_bytes"], False, False
    while not ended and not late and len(content) <= bound:
        late = not select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]
        if not late:
            part = os.read(reader, 65_536)
            ended, content = not part, content + part
    os.close(reader)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)  # also one that only closed its handle; none after an exit
    _, status = os.waitpid(child, 0)
    if late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGXCPU)):
        return {"status": "timeout", "error": "it ran out of time"}
    if len(content) > bound:
        return {"status": "output", "error": f"it returned more than {bound:,} bytes"}
    try:
        answer = json.loads(content, parse_constant=_no_number)
        kinds = {"status": str, "values": list, "error": str}
        if {name: type(value) for name, value in answer.items()} != kinds:
            raise ValueError
        count = {"ok": len(request["calls"]), "error": 0}[answer["status"]]
        if len(answer["values"]) != count or _depth(answer["values"]) > DEPTH + 1:
            raise ValueError
        return {**answer, "error": ascii(answer["error"][:200])[1:-1]}
    except (ValueError, AttributeError, KeyError, RecursionError):
        return {"status": "killed", "error": "it ended without a result"}


def _no_number(text: str):
    raise ValueError(f"{text} is not a number")


def _compute(request: dict, writer: int, lock, base: int) -> None:
    """In the child: give up everything, then run the program and write what its calls return."""
    try:
        _give_up(request["limits"], writer, lock, base)
        # after the fork, which seeds it by chance: same program, same result
        sys.modules["random"].seed(0)
        # dataclasses and typing look their module up
        module = sys.modules["program"] = type(sys)("program")
        space = vars(module)
        space["__builtins__"] = __builtins__
        exec(compile(request["program"], "program", "exec"), space)
        if not callable(space.get(request["function"])):
            raise NameError(f"the program defines no function {request['function']!r}")
        values = [_plain(space[request["function"]](*arguments)) for arguments in request["calls"]]
        answer = {"status": "ok", "values": values, "error": ""}
        content = json.dumps(answer, allow_nan=False).encode()
    except MemoryError:
        content = b'{"status": "error", "values": [], "error": "MemoryError"}'
    except BaseException as problem:
        error = ascii(f"{type(problem).__name__}: {problem}"[:200])[1:-1]
        content = json.dumps({"status": "error", "values": [], "error": error}).encode()
    while content:  # not by a function of this module: the program may have put another one there
        content = content[os.write(writer, content) :]
    os._exit(0)


def _give_up(limits: dict, writer: int, lock, base: int) -> None:
    """Keep the one handle for the result; limit CPU time, memory and files; lock the kernel's door."""
    import resource

    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    for handle in range(3, max(64, writer + 1, null + 1)):
        if handle != writer:
            with contextlib.suppress(OSError):
                os.close(handle)
    seconds = limits["cpu_seconds"]
    signal.setitimer(signal.ITIMER_PROF, seconds)
    hard = {resource.RLIMIT_CPU: int(seconds) + 2, resource.RLIMIT_FSIZE: 0}
    hard |= {resource.RLIMIT_CORE: 0, resource.RLIMIT_AS: base + limits["memory_mib"] * 2**20}
    for kind, value in hard.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (value, value))
    for name in "ctypes _ctypes resource signal select subprocess tempfile threading".split():
        sys.modules.pop(name, None)
    if lock is not None and not lock():
        raise OSError("the kernel refused the filter")
    sys.addaudithook(_second_lock())


def _second_lock():
    """An audit hook: the second lock, and the only one where there is no seccomp.

    The hook has no name in this module, and what it refuses is a constant of its code: nothing to assign to.
    """

    def refuse(event: str, arguments) -> None:
        if event.startswith((
            "open", "os.", "socket.", "subprocess.", "ctypes.", "shutil.", "fcntl.", "mmap.", "pty.",
            "signal.", "gc.",
        )):  # fmt: skip
            raise PermissionError(f"not allowed in the sandbox: {event}")

    return refuse


DEPTH = 50  # levels of lists and dicts in a result


def _plain(value, depth: int = 0):
    """Exact copies of plain data; TypeError for anything else."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        if value - value != 0:
            raise TypeError("a number that is not finite")
        return value
    if depth == DEPTH:
        raise TypeError(f"data nested more than {DEPTH} deep")
    if type(value) in (list, tuple):
        return [_plain(item, depth + 1) for item in value]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    raise TypeError(f"no plain data: {type(value).__name__}")


def _depth(value) -> int:
    """Levels of lists and dicts."""
    inside = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    )
    return 0 if inside is None else 1 + max(map(_depth, inside), default=0)


if __name__ == "__main__":
    _work()
