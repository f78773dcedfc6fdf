"""Independent runs side by side."""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import psutil
import pytest
import torch

from qwen_mini.course import CourseError, processes, side_by_side

forks = pytest.mark.skipif(
    torch.cuda.is_available() or sys.platform != "linux", reason="no forks here"
)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def trained(seed):
    """Process, threads, and the weights of a few steps of a small network."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(5):
        x = torch.randn(512, 64)
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return os.getpid(), torch.get_num_threads(), model.weight.detach().numpy().copy()


@forks
def test_every_call_has_a_process_and_one_thread():
    beside = side_by_side({seed: partial(trained, seed) for seed in range(3)})
    assert list(beside) == [0, 1, 2]
    assert len({process for process, _, _ in beside.values()} | {os.getpid()}) == 4
    assert [threads for _, threads, _ in beside.values()] == [1] * 3
    assert torch.get_num_threads() == 2


@forks
def test_a_call_more_changes_no_digit_of_the_others():
    torch.manual_seed(7)
    trained(0)  # the parent has used its threads before it forks
    unseeded = lambda: (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    few = side_by_side({"a": partial(trained, 1), "drawn": unseeded})
    more = side_by_side({"b": partial(trained, 2), "a": partial(trained, 1), "drawn": unseeded})
    np.testing.assert_array_equal(few["a"][2], more["a"][2])
    assert few["drawn"] == more["drawn"]


@pytest.mark.parametrize("reason", ["gpu", "torchrun"])
def test_without_forks_they_run_one_after_the_other_with_the_same_numbers(monkeypatch, reason):
    calls = {seed: partial(trained, seed) for seed in range(2)}
    calls["drawn"] = lambda: (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    np.random.seed(1)
    in_forks = side_by_side(calls)
    if reason == "torchrun":
        monkeypatch.setenv("WORLD_SIZE", "2")
    else:
        monkeypatch.setattr(processes.hardware, "device", lambda: "cuda")
    here = side_by_side(calls)
    assert [here[seed][0] for seed in range(2)] == [os.getpid()] * 2
    assert [here[seed][1] for seed in range(2)] == [2 if reason == "gpu" else 1] * 2
    assert torch.get_num_threads() == 2
    assert side_by_side({}) == {}
    if reason == "torchrun":
        for seed in range(2):
            np.testing.assert_array_equal(here[seed][2], in_forks[seed][2])
    assert here["drawn"] == in_forks["drawn"]


@forks
def test_with_one_thread_they_run_one_at_a_time_still_in_forks(tmp_path):
    def alone(name):
        (tmp_path / name).touch()
        seen = len(list(tmp_path.iterdir()))
        time.sleep(0.1)
        (tmp_path / name).unlink()
        return seen, os.getpid()

    torch.set_num_threads(1)
    results = side_by_side({name: partial(alone, name) for name in "abc"})
    assert [seen for seen, _ in results.values()] == [1] * 3
    assert os.getpid() not in {process for _, process in results.values()}


@forks
def test_the_caller_is_told_of_each_end():
    done = []
    side_by_side(
        {name: partial(time.sleep, 0.01) for name in "ab"}, on_done=lambda *call: done.append(call)
    )
    assert sorted(name for name, _ in done) == ["a", "b"] and all(
        seconds >= 0.01 for _, seconds in done
    )


def ended(process: int) -> bool:
    """Whether a process has ended; one that nobody has waited for counts, though its number is still taken."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@forks
def test_forks_end_with_a_parent_that_is_killed(tmp_path):
    code = (
        "import os, pathlib, sys\n"
        "from qwen_mini.course.processes import in_forks\n"
        "def call(name):\n"
        "    (pathlib.Path(sys.argv[1]) / name).write_text(str(os.getpid()))\n"
        "    while True: pass\n"
        "list(in_forks({name: lambda name=name: call(name) for name in 'ab'}, 2))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    forks = [int(eventually(lambda name=name: (tmp_path / name).read_text())) for name in "ab"]
    assert not any(map(ended, forks))
    parent.kill()
    parent.wait()
    assert eventually(lambda: all(map(ended, forks)))


@forks
def test_a_fork_outlives_the_thread_that_made_it():
    def call(queue):
        processes.die_with_parent(os.getppid())
        time.sleep(1)
        queue.put("done")

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    fork = context.Process(target=call, args=(queue,))
    thread = threading.Thread(target=fork.start)
    thread.start()
    thread.join()
    fork.join()
    assert fork.exitcode == 0 and queue.get() == "done"


def eventually(look, seconds=60):
    """What `look` returns as soon as it is true; a file that is not there yet counts as false."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError):
            if found := look():
                return found
        time.sleep(0.05)
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_process_whose_parent_has_ended_before_it_asked_ends_at_once():
    code = "from qwen_mini.course.processes import die_with_parent\ndie_with_parent({})\nprint('lives')"
    for parent, lives in ((os.getpid(), True), (os.getpid() + 1, False)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(parent)], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (
            (0, "lives\n") if lives else (-signal.SIGTERM, "")
        )


@forks
def test_tokenizing_in_a_fork_does_not_wait_for_threads_that_are_not_there(monkeypatch, tokenizer):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    texts = [f"text number {number}" for number in range(2_000)]
    count = len(tokenizer.encode_batch(texts))  # its threads are there now
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the forks hang"))
    signal.alarm(60)
    try:
        results = side_by_side({name: lambda: len(tokenizer.encode_batch(texts)) for name in "ab"})
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert results == {"a": count, "b": count}


@forks
def test_errors_reach_the_caller():
    def wrong():
        raise CourseError("one sentence")

    def broken():
        return 1 / 0

    def killed():
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(CourseError, match="^one sentence$"):
        side_by_side({"wrong": wrong, "right": partial(trained, 0)})
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        side_by_side({"right": partial(trained, 0), "broken": broken})
    with pytest.raises(CourseError, match="exit code -9"):
        side_by_side({"killed": killed, "right": partial(trained, 0)})
    with pytest.raises(RuntimeError, match="pickle"):
        side_by_side({"function": lambda: lambda: 0, "right": partial(trained, 0)})


@forks
@pytest.mark.parametrize("deaf", [False, True], ids=["listens", "deaf"])
def test_after_a_failure_the_others_are_ended(tmp_path, monkeypatch, deaf):
    monkeypatch.setattr(processes, "GRACE", 0.5)

    def slow():
        if deaf:  # as inside a library that does not return
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (tmp_path / "aside").write_text(str(os.getpid()))
        (tmp_path / "aside").rename(tmp_path / "slow")
        time.sleep(600)

    def wrong():
        assert eventually((tmp_path / "slow").exists)
        raise CourseError("one sentence")

    with pytest.raises(CourseError, match="one sentence"):
        side_by_side({"slow": slow, "wrong": wrong})
    assert ended(int((tmp_path / "slow").read_text()))


@forks
def test_what_a_fork_prints_is_dropped(capfd):
    assert side_by_side({"a": lambda: print("there") or 1, "b": lambda: 2}) == {"a": 1, "b": 2}
    assert "there" not in capfd.readouterr().out


def test_a_fork_computes_its_own_calls_one_after_the_other():
    inner = lambda: side_by_side({"a": lambda: 1, "b": lambda: 2})
    assert side_by_side({"outer": inner}) == {"outer": {"a": 1, "b": 2}}


def test_errors_keep_their_class():
    from qwen_mini.course.artifacts import MissingStage

    def missing():
        raise MissingStage("nobody has made it")

    with pytest.raises(MissingStage, match="^nobody has made it$"):
        side_by_side({"a": missing, "b": lambda: 1})


class Named(CourseError):
    """An error with a sentence of its own and a fact beside it."""

    def __init__(self, sentence="nothing varies"):
        super().__init__(sentence)
        self.reason = "flat"


def test_an_error_comes_out_of_a_fork_as_it_was_raised():
    def fail():
        raise Named()

    with pytest.raises(Named, match="nothing varies") as caught:
        processes.side_by_side({"a": fail})
    assert caught.value.reason == "flat"
