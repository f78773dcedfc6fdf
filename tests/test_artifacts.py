"""A stage is there whole or not at all, whatever happens while it is written."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import time

import pytest

from qwen_mini import course
from qwen_mini.course import artifacts, claims


def make(content: str, **inputs):
    with artifacts.write_stage("quick", "toy", inputs=inputs) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text(content)


def read() -> str:
    return (artifacts.find("quick", "toy") / "deep" / "file").read_text()


def test_a_stage_carries_its_manifest_and_replaces_the_old_one(runs_folder):
    assert not artifacts.has("quick", "toy")
    make("one", seed=1)
    make("two", seed=2)
    assert read() == "two" and artifacts.has("quick", "toy")
    manifest = json.loads((runs_folder / "quick" / "toy" / "manifest.json").read_text())
    assert manifest["inputs"] == {"seed": 2} and manifest["files"] == {"deep/file": 3}
    assert [path.name for path in (runs_folder / "quick").iterdir()] == ["toy"]


def test_a_manifest_of_ones_own_is_extended(runs_folder):
    with artifacts.write_stage("quick", "toy") as folder:
        (folder / "manifest.json").write_text('{"vocab_size": 7}')
    manifest = json.loads((artifacts.find("quick", "toy") / "manifest.json").read_text())
    assert manifest["vocab_size"] == 7 and manifest["stage"] == "toy"


def test_an_exception_keeps_the_old_stage(runs_folder):
    make("one")
    with pytest.raises(ZeroDivisionError), artifacts.write_stage("quick", "toy") as folder:
        (folder / "half").write_text("x")
        1 / 0  # noqa: B018
    assert read() == "one"
    assert [path.name for path in (runs_folder / "quick").iterdir()] == ["toy"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: No space left on device")]
)
def test_a_full_disk_keeps_the_old_stage_and_says_so(runs_folder, error):
    make("one")
    with pytest.raises(course.ArtifactError, match="toy was not written because the disk is full"):
        with artifacts.write_stage("quick", "toy"):
            raise error
    assert read() == "one"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_is_really_full(runs_folder):
    make("one")
    with pytest.raises(course.ArtifactError), artifacts.write_stage("quick", "toy"):
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)
    assert read() == "one"


WRITER = """
from qwen_mini.course import artifacts
for number in range(10**9):
    with artifacts.write_stage("quick", "toy") as folder:
        for name in "abc":
            (folder / name).write_text(str(number) * 1000)
"""


def test_kill_at_any_moment_leaves_a_whole_stage(runs_folder):
    with artifacts.write_stage("quick", "toy") as folder:
        for name in "abc":
            (folder / name).write_text("0" * 1000)
    for attempt in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER])
        time.sleep(0.25 + 0.013 * attempt)
        writer.kill()
        writer.wait()
        found = artifacts.find("quick", "toy")
        assert len({(found / name).read_text() for name in "abc"}) == 1
        manifest = json.loads((found / "manifest.json").read_text())
        assert all((found / name).stat().st_size == size for name, size in manifest["files"].items())
    make("next")
    leftovers = [path.name for path in (runs_folder / "quick").iterdir()]
    assert leftovers == ["toy"] or os.name == "nt"  # there nobody knows whether a writer still lives


@pytest.mark.parametrize("step", ["before the first rename", "between the renames", "after the second rename"])
def test_each_step_of_the_swap_can_be_the_last(runs_folder, monkeypatch, step):
    make("one")
    path = runs_folder / "quick" / "toy"
    rename = type(path).rename
    left = {"before the first rename": 0, "between the renames": 1, "after the second rename": 2}[step]

    class Killed(BaseException):
        pass

    def dying_rename(self, target):
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return rename(self, target)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(type(path), "rename", dying_rename)
        make("two")
    assert read() == ("two" if step.startswith("after") else "one")


def test_a_missing_stage_names_the_command(runs_folder):
    with pytest.raises(course.MissingStage, match="qwen-mini run toy --scale quick"):
        artifacts.find("quick", "toy")


def test_the_shipped_checkpoint_is_the_second_choice(runs_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QWEN_MINI_HOME", str(tmp_path))
    shipped = tmp_path / "data" / "checkpoints" / "toy"
    shipped.mkdir(parents=True)
    assert artifacts.find("quick", "toy") == shipped
    assert "using the shipped checkpoint data/checkpoints/toy" in capsys.readouterr().out
    make("own")
    assert artifacts.find("quick", "toy") != shipped


def test_one_file_is_replaced_whole(tmp_path, monkeypatch):
    path = artifacts.write_file(tmp_path / "a" / "b.txt", "one")

    def fail(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(course.ArtifactError, match="disk is full"):
        artifacts.write_file(path, b"two")
    assert path.read_text() == "one" and [file.name for file in path.parent.iterdir()] == ["b.txt"]


def test_claims_are_printed_recorded_and_forgotten_on_restart(runs_folder, capsys):
    import torch

    claims.open_notebook("01_a", "quick", 0)
    course.claim("first", holds=torch.tensor(True), value=torch.tensor(1.5), report="§2")
    claims.open_notebook("02_b", "quick", 0)
    course.claim("second", holds=False, value={"x": (1, 2)})
    assert capsys.readouterr().out == "claim holds · first · report §2\nCLAIM FAILS · second\n"
    assert [record["value"] for record in claims.read_claims("quick")] == [1.5, {"x": [1, 2]}]
    claims.open_notebook("01_a", "quick", 0)
    assert [record["claim"] for record in claims.read_claims("quick")] == ["second"]


def test_start_seeds_every_generator(runs_folder, capsys):
    import random

    import numpy as np
    import torch

    drawn = []
    for _ in range(2):
        config = course.start("01_a", scale="quick", seed=5)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1] and config.name == "quick"
    assert capsys.readouterr().out == "scale quick · seed 5\n" * 2


def test_a_missing_oracle_says_what_it_would_have_compared(capsys):
    assert course.oracle("no_such_module", what="logits") is None
    assert capsys.readouterr().out == "no_such_module is not installed: would have compared logits\n"
    assert course.oracle("json").loads("1") == 1
