"""Independent runs side by side."""

import os
import signal
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

from qwen_mini.course import CourseError, side_by_side

forks = pytest.mark.skipif(torch.cuda.is_available() or sys.platform != "linux", reason="no forks here")


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
def test_every_run_has_a_process_and_one_thread_and_the_same_numbers_as_alone():
    alone = [trained(seed)[2] for seed in range(4)]  # the parent has used its threads before it forks
    beside = side_by_side({seed: partial(trained, seed) for seed in range(4)})
    assert list(beside) == [0, 1, 2, 3]
    assert len({process for process, _, _ in beside.values()} | {os.getpid()}) == 5
    assert [threads for _, threads, _ in beside.values()] == [1] * 4
    for here, (_, _, there) in zip(alone, beside.values(), strict=True):
        np.testing.assert_allclose(there, here, atol=1e-6)
    assert torch.get_num_threads() == 2


@forks
def test_what_would_leave_a_thread_idle_runs_here_with_all_threads():
    runs = side_by_side({seed: partial(trained, seed) for seed in range(3)}).values()
    assert [process == os.getpid() for process, _, _ in runs] == [True, False, False]
    assert [threads for _, threads, _ in runs] == [2, 1, 1]


@pytest.mark.parametrize("reason", ["threads", "torchrun"])
def test_without_forks_they_run_one_after_the_other(monkeypatch, reason):
    if reason == "threads":
        torch.set_num_threads(1)
    else:
        monkeypatch.setenv("WORLD_SIZE", "2")
    runs = side_by_side({seed: partial(trained, seed) for seed in range(2)})
    assert [process for process, _, _ in runs.values()] == [os.getpid()] * 2
    assert side_by_side({}) == {}


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
    begun = time.monotonic()
    with pytest.raises(CourseError, match="one sentence"):
        side_by_side({"wrong": wrong, "slow": lambda: time.sleep(60)})
    assert time.monotonic() - begun < 30  # the other one was ended
    with pytest.raises(RuntimeError, match="pickle"):
        side_by_side({"function": lambda: lambda: 0, "right": partial(trained, 0)})


@forks
def test_what_a_fork_prints_is_dropped(capfd):
    assert side_by_side({"a": lambda: print("there") or 1, "b": lambda: 2}) == {"a": 1, "b": 2}
    assert "there" not in capfd.readouterr().out
