"""Whatever is killed while it writes results ends, started again, as if nobody had killed it.

Samples of `tests/crash_points.py`, which kills at every file operation on request, and of `tests/random_kills.py`,
which kills the course's own stages.
"""

import functools
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_mini.course import artifacts

if os.name == "nt":
    pytest.skip("there are no forks", allow_module_level=True)

import crash_points  # noqa: E402  (beside this file)
import random_kills  # noqa: E402
from crash_points import SCALE, Case, Failure  # noqa: E402


def test_a_sample_of_the_crash_points():
    script = Path(crash_points.__file__)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [case.name for case in crash_points.CASES]


def test_a_stage_that_was_killed_ends_with_the_numbers_of_one_that_was_not():
    # this seed kills each once, at about seven tenths of its time, when it has left a training state
    command = [sys.executable, random_kills.__file__, "--seed", "331"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == list(random_kills.STAGES)
    assert all(line.endswith("1 of 1 identical") for line in lines)
    assert "1 of them from a training state" in done.stdout  # a slow machine may not have left all


def test_a_run_that_a_kill_changes_is_counted_and_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("QWEN_MINI_RUNS", "unused")  # put back afterwards

    def run():
        _counting()
        time.sleep(0.2)

    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    crash_points.start(_counting, tmp_path / "after")
    work = random_kills.Work("careless", run, tmp_path / "before", tmp_path / "after", 0.2)
    tally = random_kills.survive(work, 2, random.Random(0))
    assert tally.runs == 2 <= tally.kills and tally.same < 2
    assert "other quick/tries" in capsys.readouterr().err


def _straight_into_place(content: str) -> None:
    """A stage written without care: the manifest first, into its own folder."""
    folder = artifacts.stage_dir(SCALE, "toy")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "weights").write_text(content)


def _leaving(name: str) -> None:
    """A file by way of another one, whose name does not tell who writes it."""
    folder = artifacts.stage_dir(SCALE, "training_state")
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{name}-{os.getpid()}"
    aside.write_text("x")
    aside.rename(folder / "state")


def _by_deletion(content: str) -> None:
    """A stage whose old version is gone before the new one is there."""
    if artifacts.made(SCALE, "toy"):
        shutil.rmtree(artifacts.stage_dir(SCALE, "toy"))
    with artifacts.write_stage(SCALE, "toy", {"content": content}):
        pass


def _counting() -> None:
    """A result that depends on how often it was begun."""
    path = artifacts.stage_dir(SCALE, "tries")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("x")
    artifacts.write_file(path, path.read_text()[:10] + "x")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            functools.partial(_straight_into_place, "2"),
            "neither the version before nor the one after",
        ),
        (functools.partial(_leaving, "aside"), "other than a run without a kill"),
        (functools.partial(_by_deletion, "2"), "no version of toy is found any more"),
        (_counting, "other than a run without a kill"),
    ],
)
def test_what_does_not_survive_a_kill_is_found_out(monkeypatch, run, message):
    monkeypatch.setenv("QWEN_MINI_RUNS", "unused")  # put back afterwards
    before = functools.partial(_by_deletion, "1") if "version" in message else lambda: None
    with pytest.raises(Failure, match=message):
        crash_points.examine(Case("careless", run, before, ("toy",)))


def test_a_stage_that_fails_is_no_success():
    with pytest.raises(Failure, match="ended with status 1"):
        crash_points.examine(Case("failing", lambda: 1 / 0))
