"""The sandbox against a hostile corpus: nothing escapes, hangs, or earns what it did not compute."""

import os
import signal
import struct
import subprocess
import sys
import time

import pytest

from qwen_mini.course import sandbox
from qwen_mini.course.sandbox import Limits, Outcome, SandboxError, run_many, run_sandboxed

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="the sandbox needs a system that can fork"
)
LINUX = sys.platform.startswith("linux")


def run(program: str, *arguments, **limits) -> Outcome:
    return run_sandboxed(program, "f", [list(arguments)], Limits(**limits))


def body(text: str) -> str:
    return "def f(x):\n" + "\n".join("    " + line for line in text.split("\n"))


@pytest.mark.parametrize(
    "value", [None, True, 0, -7, 2**70, 1.5, "é\n", [], [1, [2, "x"]], {"a": {"b": [None]}}]
)  # fmt: skip
def test_plain_values_come_back_as_they_are(value):
    assert run(body("return x"), value) == Outcome("ok", [value])
    [got] = run(body("return x"), value).values
    assert type(got) is type(value)


def test_tuples_come_back_as_lists_and_calls_keep_their_order():
    program = "seen = []\ndef f(x, y=2):\n    seen.append(x)\n    return seen, (x, y)"
    outcome = run_sandboxed(program, "f", [[1], [5, 6]])
    assert outcome.values == [[[1], [1, 2]], [[1, 5], [5, 6]]]


@pytest.mark.parametrize("module", sandbox.PRELOADED)
def test_what_programs_may_use_is_there(module):
    assert (
        run(f"import {module}\n" + body(f"return {module.split('.')[0]}.__name__"), 0).status
        == "ok"
    )


ENDS = {  # name -> (program, statuses that are right)
    "endless loop": (body("while True: pass"), {"timeout"}),
    "busy regex": ("import re\n" + body("return bool(re.match('(a+)+$', 'a' * 40 + 'b'))"), {"timeout"}),
    "memory in one piece": (body("return len('x' * 10**11)"), {"error"}),
    "memory bit by bit": (body("a = []\nwhile True: a.append('x' * 10**6)"), {"error", "killed"}),
    "big number": (body("return len(str(9 ** 9 ** 9))"), {"timeout", "error", "killed"}),
    "deep recursion": (body("return f(x)"), {"error"}),
    "endless recursion": ("import sys\nsys.setrecursionlimit(10**9)\n" + body("return f(x)"), {"timeout", "killed"}),
    "huge output": (body("return 'x' * 10**7"), {"output"}),
    "deep output": (body("a = []\nfor _ in range(10**5): a = [a]\nreturn a"), {"error", "killed"}),
    "exit": ("import sys\n" + body("sys.exit(0)"), {"error"}),
    "hard exit": ("import os\n" + body("os._exit(0)"), {"killed", "error"}),
    "exit at the top": ("raise SystemExit", {"error"}),
    "syntax error": ("def f(x:\n", {"error"}),
    "null byte": ("def f(x): return '\0'", {"error"}),
    "no function": ("g = 1", {"error"}),
    "no callable": ("f = 1", {"error"}),
    "too many arguments": ("def f(): return 1", {"error"}),
    "generator": (body("yield 1"), {"error"}),
    "not a number": (body("return float('nan')"), {"error"}),
    "an object": (body("return object()"), {"error"}),
    "equal to everything": ("class E(int):\n    def __eq__(self, o): return True\n" + body("return E(1)"), {"error"}),
    "a list of its own kind": ("class L(list):\n    pass\n" + body("return L([1])"), {"error"}),
    "caught by itself": (body("while True:\n    try: f(x)\n    except BaseException: pass"), {"timeout", "killed"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_programs_that_misbehave_end(name):
    program, right = ENDS[name]
    outcome = run(program, 1)
    assert outcome.status in right and outcome.values == [], outcome


def test_a_sleeper_is_ended_by_the_clock():
    waits = "import _thread\n" + body(
        "lock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()"
    )
    assert run(waits, 1, wall_seconds=0.3).status == "timeout"


@pytest.mark.skipif(not LINUX, reason="the filter is Linux's")
def test_sleeping_is_no_computing():
    assert "PermissionError" in run("import time\n" + body("time.sleep(60)"), 1).error


REACH = {
    "read a file": "return open('/etc/hostname').read()",
    "read itself": "return open('/proc/self/environ').read()",
    "write a file": "return open('x', 'w').write('x')",
    "list a folder": "import os\nreturn os.listdir('/')",
    "remove": "import os\nreturn os.unlink('/tmp/x')",
    "start a process": "import os\nreturn os.system('true')",
    "fork": "import os\nreturn os.fork()",
    "fork bomb": "import os\nwhile True: os.fork()",
    "execute": "import os\nreturn os.execv('/bin/true', ['true'])",
    "kill the parent": "import os\nreturn os.kill(os.getppid(), 0)",
    "kill all": "import os\nreturn os.kill(1, 0)",
    "a thread": "import _thread\nreturn _thread.start_new_thread(print, ())",
    "network": "import socket\nreturn str(socket.socket())",
    "network, below": "import _socket\nreturn str(_socket.socket())",
    "subprocess": "import subprocess\nreturn subprocess.run(['true']).returncode",
    "ctypes": "import ctypes\nreturn ctypes.CDLL(None).getpid()",
    "import from disk": "import sqlite3\nreturn 1",
    "importlib": "import importlib\nreturn importlib.import_module('http.client').__name__",
    "signals": "import signal\nreturn str(signal.signal(signal.SIGPROF, signal.SIG_IGN))",
    "limits": "import resource\nreturn resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "code from a string": "return eval(\"__import__('os').popen('id').read()\")",
    "posix": "import posix\nreturn posix.open('/etc/hostname', 0)",
    "subclasses": "for c in object.__subclasses__():\n"
    "    if c.__name__ == '_wrap_close': return c.__init__.__globals__['system']('id')\nreturn 1 / 0",
    "loader": "for c in object.__subclasses__():\n    if c.__name__ == 'FileLoader':\n"
    "        return c('m', '/etc/hostname').get_data('/etc/hostname').decode()\nreturn 1 / 0",
    "frames": "import sys\nreturn sys._getframe(2).f_globals['os'].listdir('/')",
}


@pytest.mark.parametrize("name", REACH)
def test_nothing_outside_can_be_reached(name, tmp_path):
    outcome = run(body(REACH[name]), 1)
    assert outcome.status in ("error", "killed", "timeout") and outcome.values == [], outcome


@pytest.mark.skipif(not LINUX, reason="the kernel's lock is Linux's")
@pytest.mark.parametrize(
    "attempt",
    ["os.open('/etc/hostname', 0)", "os.fork()", "os.kill(os.getppid(), 0)", "os.listdir('/')"],
)
def test_the_kernel_refuses_what_python_s_hooks_would_miss(attempt, monkeypatch):
    """The worker without its audit hook: the second lock taken off, the first still holds."""
    source = open(sandbox.__file__).read()
    assert source.count("sys.addaudithook(_second_lock())") == 1
    monkeypatch.setattr(sandbox, "_workers", [])
    loose = sandbox._Worker()
    monkeypatch.setattr(sandbox, "__file__", str(_loosened(source)))
    monkeypatch.setattr(sandbox, "_workers", [loose])
    outcome = run("import os\n" + body(f"return str({attempt})"), 1)
    loose.stop()
    assert outcome.status == "error" and outcome.error.startswith("PermissionError: [Errno 1]"), (
        outcome
    )


def _loosened(source: str):
    import pathlib
    import tempfile

    path = pathlib.Path(tempfile.mkdtemp()) / "loose.py"
    path.write_text(source.replace("sys.addaudithook(_second_lock())", "pass"))
    return path


def test_a_program_that_closes_its_handle_and_sleeps_is_ended_with_its_worker():
    program = "import os, _thread\nfor h in range(3, 64):\n    try: os.close(h)\n    except OSError: pass\n"
    program += "lock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()"
    begin = time.perf_counter()
    assert run(program, 1, wall_seconds=0.2).status == "killed"
    assert time.perf_counter() - begin < 5
    assert run(body("return x"), 3).values == [3]


def test_an_interrupted_call_leaves_no_answer_to_the_next():
    run(body("return x"), 1)  # starts the worker
    old = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            run(
                "import time\n"
                + body("end = time.time() + 0.4\nwhile time.time() < end: pass\nreturn 'late'"),
                1,
            )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert run(body("return x"), 2).values == [2] and run(body("return x"), 3).values == [3]


def test_a_sandbox_that_does_not_work_says_so(monkeypatch):
    broken = sandbox._Worker()
    monkeypatch.setattr(
        sandbox,
        "__file__",
        str(
            _loosened(
                open(sandbox.__file__)
                .read()
                .replace("    _work()\n", "    raise SystemExit('no such thing')\n")
            )
        ),
    )
    monkeypatch.setattr(sandbox, "_workers", [broken])
    with pytest.raises(SandboxError, match="does not work on this machine.*no such thing"):
        run(body("return x"), 1)


def test_a_kernel_that_refuses_the_filter_is_no_wrong_answer(monkeypatch):
    source = (
        open(sandbox.__file__)
        .read()
        .replace("    if lock is not None and not lock():", "    if True:")
    )
    broken = sandbox._Worker()
    monkeypatch.setattr(sandbox, "__file__", str(_loosened(source)))
    monkeypatch.setattr(sandbox, "_workers", [broken])
    with pytest.raises(SandboxError, match="the kernel refused the filter"):
        run(body("return x"), 1)


def test_a_fork_of_the_caller_starts_workers_of_its_own():
    run(body("return x"), 1)
    workers, child = [w.process.pid for w in sandbox._workers], os.fork()
    if child == 0:
        right = run(body("return x"), 5).values == [5] and not {
            w.process.pid for w in sandbox._workers
        } & set(workers)
        sandbox.stop_workers()
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (
        run(body("return x"), 2).values == [2]
        and [w.process.pid for w in sandbox._workers] == workers
    )


def test_errors_are_printable_and_deep_results_refused():
    outcome = run(body("raise ValueError('\x1b[31m\ud800é')"), 1)
    assert outcome.status == "error" and outcome.error.isascii() and "\x1b" not in outcome.error
    assert run(body("return 10 ** 5000"), 1).status == "error"
    deep = b'{"status": "ok", "values": [' + b"[" * 900 + b"]" * 900 + b'], "error": ""}'
    forged = f"import os\nfor h in range(3, 64):\n    try: os.write(h, {deep!r})\n    except OSError: pass\nos._exit(0)"
    assert run(forged, 1).status == "killed"
    assert run_sandboxed("1 / 0", "f", []).status == "error" and run_sandboxed(
        "def f(): pass", "f", []
    ) == Outcome("ok")


def test_secrets_of_the_caller_are_not_there(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    sandbox.stop_workers()
    outcome = run("import os\n" + body("return dict(os.environ)"), 1)
    assert "SECRET_TOKEN" not in str(outcome.values) and "HOME" not in str(outcome.values)


def test_a_forged_result_knows_no_expected_value():
    forged = "import os\nfor h in range(3, 64):\n    try: os.write(h, b'{0}')\n    except OSError: pass\nos._exit(0)"
    ok = b'{"status": "ok", "values": [1], "error": ""}'.decode()
    assert run(forged.replace("{0}", ok), 1).values == [
        1
    ]  # what it wrote, which the caller compares
    for bad in (
        "",
        "nonsense",
        "[1]",
        '{"status": "ok"}',
        ok.replace("[1]", "[1, 2]"),
        ok.replace("ok", "gold"),
    ):
        assert run(forged.replace("{0}", bad), 1).status == "killed"


def test_one_program_leaves_nothing_for_the_next():
    spoil = (
        "import builtins, json, math\nbuiltins.len = lambda x: 7\njson.dumps = None\nmath.pi = 3\n"
        + body("return 1")
    )
    run(spoil, 1)
    assert run("import math\n" + body("return [len([]), math.pi > 3.1]"), 1).values == [[0, True]]


def test_same_program_same_result():
    program = "import random\n" + body(
        "return [random.random(), list({'a', 'b', 'c', 'd'}), hash('x')]"
    )
    sandbox.stop_workers()
    first = run(program, 1)
    sandbox.stop_workers()
    assert run(program, 1) == first


def test_many_keep_their_order_and_survive_a_lost_worker():
    jobs = [(body(f"return x + {i}"), "f", [[i], [0]]) for i in range(60)]
    assert [o.values for o in run_many(jobs)] == [[2 * i, i] for i in range(60)]
    for worker in sandbox._workers:
        worker.process.kill()
        worker.process.wait()
    assert [o.values for o in run_many(jobs)] == [[2 * i, i] for i in range(60)]
    assert run_many([]) == []


def test_no_process_is_left_behind():
    run_many([(body("while True: pass"), "f", [[1]])] * 2, Limits(cpu_seconds=0.1))
    processes = [worker.process for worker in sandbox._workers]
    sandbox.stop_workers()
    assert all(process.returncode is not None for process in processes) and sandbox._workers == []


@pytest.mark.parametrize("name", ["cpu_seconds", "wall_seconds", "memory_mib", "output_bytes"])
def test_limits_must_be_above_zero(name):
    with pytest.raises(ValueError, match=f"limit {name} must be above 0"):
        Limits(**{name: 0})


def test_where_nothing_can_fork_it_says_so(monkeypatch):
    monkeypatch.setattr(sandbox, "_workers", [])
    monkeypatch.delattr(os, "fork")
    with pytest.raises(SandboxError, match="Linux, macOS, or WSL"):
        run(body("return 1"), 1)


def test_the_filter_names_every_call_once():
    for machine, table in sandbox.SYSCALLS.items():
        numbers = [number for name, number in table.items() if name != "arch"]
        assert len(set(numbers)) == len(numbers), machine
    program = sandbox._seccomp_filter()
    if program is not None:
        code = [struct.unpack("<HBBI", program[i : i + 8]) for i in range(0, len(program), 8)]
        assert code[-1] == (0x06, 0, 0, 0x7FFF0000) and code[-2] == (0x06, 0, 0, 0x00050001)
        jumps = [i + 1 + yes for i, (op, yes, _, _) in enumerate(code) if op == 0x15 and i > 3]
        assert set(jumps) == {len(code) - 1}  # every allowed call leads to "allow"


def test_a_killed_process_leaves_no_folder(tmp_path):
    code = "from qwen_mini.course.sandbox import run_sandboxed as r, _workers\n"
    code += "r('def f(x):\\n    return x', 'f', [[1]])\n"
    code += "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 20
    while list(tmp_path.glob("qwen_mini_sandbox_*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.glob("qwen_mini_sandbox_*")) == []


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_nothing_of_a_program_stays_in_its_worker():
    """Neither its source nor what it returned: a later program of the same group could find and return it."""
    secrets = [f"secret_{kind}_{os.getpid()}" for kind in ("name", "value")]
    program = body(f"{secrets[0]} = x\nreturn [{secrets[0]}[::-1]] * 3")
    assert run(program, secrets[1][::-1]).values == [[secrets[1]] * 3]
    for worker in sandbox._workers:
        pid = worker.process.pid
        try:
            with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
                areas = [
                    line.split()[0].split("-") for line in maps if line.split()[1].startswith("rw")
                ]
                content = b""
                for low, high in areas:
                    memory.seek(int(low, 16))
                    content += memory.read(int(high, 16) - int(low, 16))
        except PermissionError:
            pytest.skip("this system does not let us look into the worker")
        assert b"PRELOADED" in content, "the search sees what is there"
        assert not [
            secret
            for secret in secrets
            if secret.encode() in content or secret[::-1].encode() in content
        ]


UNLOCK = {
    "a name of the module": "main = sys.modules['__main__']\nfor n in list(vars(main)):\n"
    "    if n.isupper() or n.startswith('_'): setattr(main, n, ())",
    "the hook's frame": "try: open('x')\nexcept PermissionError as e:\n    frame = e.__traceback__\n"
    "    while frame.tb_next: frame = frame.tb_next\n    frame.tb_frame.f_locals.update(event='')\n"
    "    frame.tb_frame.f_globals['PermissionError'] = str",
    "the hook's code": "import gc\nfor o in gc.get_objects():\n"
    "    if getattr(o, '__name__', '') == 'refuse': o.__code__ = (lambda e, a: None).__code__",
}


@pytest.mark.parametrize("name", UNLOCK)
def test_the_second_lock_holds_alone(name, tmp_path, monkeypatch, capfd):
    """Where the kernel has no filter; not against everything (see the module), but against assignments."""
    source = open(sandbox.__file__).read()
    loose = tmp_path / "loose.py"
    loose.write_text(source.replace("    filter_ = _seccomp_filter()\n", "    filter_ = None\n"))
    assert loose.read_text() != source
    alone = sandbox._Worker()
    monkeypatch.setattr(sandbox, "__file__", str(loose))
    monkeypatch.setattr(sandbox, "_workers", [alone])
    (tmp_path / "canary").write_text("hunter2")
    unlock = "\n".join(f"    {line}" for line in UNLOCK[name].split("\n"))
    program = "import sys\ndef f(x):\n    try:\n" + unlock.replace("    ", "        ", 1).replace(
        "\n", "\n    "
    )
    program += f"\n    except Exception: pass\n    return open({str(tmp_path / 'canary')!r}).read()"
    outcome = run(program, 1)
    alone.stop()
    assert outcome.status == "error" and outcome.values == [], outcome


def test_a_machine_without_a_filter_is_told_once(monkeypatch, capsys):
    monkeypatch.setattr(sandbox, "_seccomp_filter", lambda: None)
    monkeypatch.setattr(sandbox, "_warned", [])
    for _ in range(2):
        worker = sandbox._Worker()
        worker.start()
        worker.stop()
    assert capsys.readouterr().err.count("run untrusted models in a virtual machine") == 1
