"""A stage is there whole or not at all, whatever happens while it is written."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qwen_mini import course
from qwen_mini.course import artifacts, claims, records, report, stages


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
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device"),
    ],
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
        assert all(
            (found / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    make("next")
    leftovers = [path.name for path in (runs_folder / "quick").iterdir()]
    assert (
        leftovers == ["toy"] or os.name == "nt"
    )  # there nobody knows whether a writer still lives


@pytest.mark.parametrize(("renames", "content"), [(0, "one"), (1, "two"), (2, "two"), (3, "two")])
def test_each_step_of_the_swap_can_be_the_last(runs_folder, monkeypatch, renames, content):
    make("one")
    path = runs_folder / "quick" / "toy"
    rename = type(path).rename

    class Killed(BaseException):
        pass

    def dying_rename(self, target):
        nonlocal renames
        if renames == 0:
            raise Killed
        renames -= 1
        return rename(self, target)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(type(path), "rename", dying_rename)
        make("two")
    assert read() == content and path.is_dir()
    shutil.rmtree(path)
    assert not artifacts.made("quick", "toy")  # no version comes back


def test_a_missing_stage_names_the_command(runs_folder):
    commands = {
        ("quick", "corpus"): "qwen-mini run corpus --scale quick",
        ("quick", "tokenizer"): "qwen-mini run corpus --scale quick",
        ("gpu", "reward_model_careless"): "qwen-mini run reward_model --scale gpu",
        ("quick", "pairs"): "qwen-mini train pairs --scale quick",
        ("my", "sft"): "qwen-mini train sft --scale my.toml",
    }
    for (scale, stage), command in commands.items():
        with pytest.raises(
            course.MissingStage, match=f"'{stage}' of scale '{scale}' is missing: .* `{command}`"
        ):
            artifacts.find(scale, stage)
    with pytest.raises(
        course.MissingStage, match="'toy' .* no stage has that name; those that train are"
    ):
        artifacts.find("laptop", "toy")


@pytest.mark.parametrize("name", ["", "..", ".hidden", "/etc", "a/b", "a b"])
def test_no_name_leads_out_of_the_folder_of_results(runs_folder, name):
    for scale, stage in (("quick", name), (name, "sft")):
        with pytest.raises(course.ArtifactError, match="is not the name of a stage or scale"):
            artifacts.find(scale, stage)


@pytest.fixture
def shipped(runs_folder, tmp_path, monkeypatch):
    """A stage `toy` of the scale laptop that comes with the course."""
    monkeypatch.setenv("QWEN_MINI_HOME", str(tmp_path))
    folder = tmp_path / "data" / "checkpoints" / "toy"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"scale": "laptop", "key": "0a"}')
    return folder


def test_the_shipped_checkpoint_is_the_second_choice_of_its_own_scale(shipped, capsys):
    assert artifacts.find("laptop", "toy") == shipped and artifacts.has("laptop", "toy")
    assert not artifacts.made("laptop", "toy") and not artifacts.has("quick", "toy")
    with pytest.raises(course.MissingStage):
        artifacts.find("quick", "toy")
    with artifacts.write_stage("laptop", "toy"):
        pass
    assert artifacts.find("laptop", "toy") == artifacts.stage_dir("laptop", "toy")
    assert capsys.readouterr().out == ""


def test_a_stage_is_found_by_its_key(shipped, runs_folder):
    assert artifacts.find_by_key("quick", "toy", "0a") == shipped
    with artifacts.write_stage("quick", "toy", key="0b", provenance={"torch": "2"}):
        pass
    own = runs_folder / "quick" / "toy"
    manifest = artifacts.read_manifest(own)
    assert manifest["provenance"] == {"torch": "2"} and manifest["inputs"] == {}
    found = [artifacts.find_by_key("quick", "toy", key) for key in ("0a", "0b", "0c")]
    assert found == [shipped, own, None]
    (own / "manifest.json").write_text('{"key": "0b"')  # cut by hand
    assert (
        artifacts.find_by_key("quick", "toy", "0b") is None and artifacts.read_manifest(own) == {}
    )


def test_a_stage_of_another_scale_file_of_that_name_is_refused(runs_folder):
    with artifacts.write_stage("my", "toy", scale_digest="a"):
        pass
    assert artifacts.find("my", "toy") == artifacts.find("my", "toy", scale_digest="a")
    with pytest.raises(
        course.MissingStage, match="made with another scale of the name 'my': rename"
    ):
        artifacts.find("my", "toy", scale_digest="b")


# ---------------------------------------------------------------- leftovers

LEAVE = """
import os, signal
from qwen_mini.course import artifacts
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
"""
HALF_A_FILE = (
    LEAVE
    + "os.replace = die; artifacts.write_file(artifacts.state_file('quick', 'toy', '0a'), b'x')"
)
HALF_A_STAGE = LEAVE + "with artifacts.write_stage('quick', 'toy'): die()"
BEFORE_THE_SWAP = LEAVE + "with artifacts.write_stage('quick', 'toy'): artifacts._finish = die"


def leave(code: str) -> None:
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL


def names(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


posix = pytest.mark.skipif(os.name == "nt", reason="there is no fcntl")


@posix
@pytest.mark.parametrize("heal", ["write_file", "write_stage", "sweep"])
def test_half_a_training_state_is_swept(runs_folder, heal):
    leave(HALF_A_FILE)
    leave(HALF_A_FILE)  # sweeps the first
    assert len(names(runs_folder)) == 4
    if heal == "write_file":
        artifacts.write_file(artifacts.state_file("quick", "toy", "0a"), b"y")
        assert names(runs_folder / "quick") == [
            "training_state",
            "training_state/toy-0a.safetensors",
        ]
    elif heal == "write_stage":
        make("one")
        assert names(runs_folder / "quick") == [
            "toy", "toy/deep", "toy/deep/file", "toy/manifest.json", "training_state"
        ]  # fmt: skip
    else:
        artifacts.sweep("quick")
        assert names(runs_folder / "quick") == ["training_state"]


@posix
@pytest.mark.parametrize("heal", ["made", "find_by_key", "settle", "sweep"])
def test_what_a_dead_writer_left_around_a_stage_is_cleaned_up(runs_folder, heal):
    leave(BEFORE_THE_SWAP)
    assert ".toy.new" in names(runs_folder / "quick")
    leave(HALF_A_STAGE)  # puts the new version in its place
    assert "toy" in names(runs_folder / "quick") and len(names(runs_folder / "quick")) == 4
    call = getattr(artifacts, heal)
    call(*["quick", "toy", "0a"][: {"find_by_key": 3, "sweep": 1}.get(heal, 2)])
    assert names(runs_folder / "quick") == ["toy", "toy/manifest.json"]


def test_training_states_go_when_the_stage_is_there(runs_folder):
    mine, former, other = (
        artifacts.state_file("quick", stage, key)
        for stage, key in [("toy", "0a"), ("toy", "0b"), ("toy-2", "0a")]
    )
    for file in (mine, former, other):
        artifacts.write_file(file, b"x")
    with artifacts.write_stage("quick", "toy", key="0a"):
        pass
    assert (mine.exists(), former.exists(), other.exists()) == (False, False, True)
    artifacts.write_file(mine, b"x")
    artifacts.write_file(former, b"x")  # an interrupted run with other settings may go on
    artifacts.settle("quick", "toy")
    assert (mine.exists(), former.exists()) == (False, True)


@posix
def test_only_the_dead_are_swept(runs_folder):
    code = (
        LEAVE.replace("SIGKILL", "SIGSTOP") + "with artifacts.write_stage('quick', 'living'): die()"
    )
    leave(HALF_A_STAGE)
    writer = subprocess.Popen([sys.executable, "-c", code])
    os.waitpid(writer.pid, os.WUNTRACED)
    before = names(runs_folder / "quick")
    assert [name.partition("partial")[0] for name in before] == [
        ".living.",
        ".living.writer",
    ]  # it has swept `toy`
    leave(HALF_A_STAGE)
    for heal in (lambda: artifacts.sweep("quick"), lambda: artifacts.made("quick", "living")):
        heal()
        assert names(runs_folder / "quick") == before
    os.kill(writer.pid, signal.SIGCONT)
    assert writer.wait() == 0 and names(runs_folder / "quick") == ["living", "living/manifest.json"]


# ---------------------------------------------------------------- two at once

SECOND = """
import sys
from qwen_mini.course import artifacts
with artifacts.stage_lock("quick", "toy", wait=sys.argv[1] == "wait"):
    print(artifacts.find("quick", "toy").name)
"""


@posix
def test_the_second_writer_waits_and_finds_the_stage(runs_folder):
    with artifacts.stage_lock("quick", "toy"):
        second = subprocess.Popen(
            [sys.executable, "-u", "-c", SECOND, "wait"], stdout=subprocess.PIPE, text=True
        )
        line = second.stdout.readline()
        assert f"toy is being made by process {os.getpid()} on " in line and " since " in line
        make("one")  # whoever holds the lock may write
        assert second.poll() is None
        refused = subprocess.run(
            [sys.executable, "-c", SECOND, "go"], capture_output=True, text=True
        )
        assert (
            f"ArtifactError: {runs_folder}/quick/toy is being made by process {os.getpid()}"
            in refused.stderr
        )
    assert second.stdout.read() == "toy\n" and second.wait() == 0
    assert names(runs_folder / "quick") == ["toy", "toy/deep", "toy/deep/file", "toy/manifest.json"]


@posix
def test_a_lock_ends_with_its_process_and_a_fork_does_not_hold_it(runs_folder):
    code = (
        "import os, sys, time\n"
        "from qwen_mini.course import artifacts\n"
        "with artifacts.stage_lock('quick', 'toy'):\n"
        "    if os.fork() == 0: time.sleep(60)\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(course.ArtifactError), artifacts.stage_lock("quick", "toy", wait=False):
            pass
        holder.kill()
        holder.wait()
        with artifacts.stage_lock("quick", "toy", wait=False):
            assert names(runs_folder / "quick") == [".toy.writer"]
        assert names(runs_folder / "quick") == []
    finally:
        os.killpg(holder.pid, signal.SIGKILL)  # the fork
        holder.stdin.close()
        holder.stdout.close()


@pytest.mark.parametrize("missing", ["module", "on this disk"])
def test_where_there_are_no_locks_only_writers_clean_up(runs_folder, monkeypatch, missing):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    if missing == "module":
        monkeypatch.setattr(artifacts, "fcntl", None)
    else:
        monkeypatch.setattr(artifacts.fcntl, "lockf", refuse)
    make("one")
    (runs_folder / "quick" / "toy").rename(
        runs_folder / "quick" / ".toy.new"
    )  # as between a swap's two renames
    assert read() == "one" and artifacts.find("quick", "toy").name == ".toy.new"
    with pytest.raises(ZeroDivisionError), artifacts.write_stage("quick", "toy"):
        1 / 0  # noqa: B018
    assert read() == "one" and names(runs_folder / "quick")[0] == "toy"


def test_threads_take_turns(runs_folder):
    seen = []

    def work(number):
        with artifacts.stage_lock("quick", "toy"):
            seen.append(number)
            time.sleep(0.02)
            make(str(number))
            seen.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[::2] == seen[1::2] and read() == str(seen[-1])


@posix
def test_two_writers_never_fail_and_readers_always_find_a_whole_version(runs_folder):
    writer = WRITER.replace("10**9", "150")
    make("one")
    writers = [
        subprocess.Popen([sys.executable, "-c", writer], stderr=subprocess.PIPE) for _ in range(2)
    ]
    reads = 0
    while any(process.poll() is None for process in writers):
        assert artifacts.find("quick", "toy")
        reads += 1
    assert [process.communicate()[1] for process in writers] == [b"", b""] and reads > 100
    assert names(runs_folder / "quick") == [
        "toy",
        *(f"toy/{name}" for name in ["a", "b", "c", "manifest.json"]),
    ]


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full; the previous version, if any, is kept: free some space"),
        (errno.EROFS, "it lies on a read-only file system: set QWEN_MINI_RUNS"),
        (errno.EACCES, "you may not write there: change its permissions"),
        (errno.EPERM, "you may not write there: change its permissions"),
        (errno.EMFILE, "too many files are open: .*ulimit"),
    ],
)
def test_what_cannot_be_written_says_why_before_and_after_the_work(
    runs_folder, monkeypatch, code, message
):
    make("one")
    monkeypatch.chdir(runs_folder.parent)
    monkeypatch.setenv("QWEN_MINI_HOME", str(runs_folder.parent))
    with pytest.raises(
        course.ArtifactError, match=f"^runs/quick/toy was not written because {message}"
    ):
        with artifacts.write_stage("quick", "toy"):
            raise RuntimeError(f"Error while serializing: I/O error: it broke (os error {code})")

    def fail(path, *_, **__):
        raise OSError(code, os.strerror(code), None if isinstance(path, int) else str(path))

    with monkeypatch.context() as patch, pytest.raises(course.ArtifactError) as raised:
        with artifacts.write_stage("quick", "toy") as folder:
            patch.setattr(os, "chmod", fail)
            artifacts.write_file(folder / "model.safetensors", b"x")
    assert str(raised.value).startswith("runs/quick/toy/model.safetensors was not written because ")
    assert read() == "one" and sorted(path.name for path in (runs_folder / "quick").iterdir()) == [
        "toy"
    ]
    artifacts.check_writable("quick")
    with monkeypatch.context() as patch, pytest.raises(course.ArtifactError, match=message):
        patch.setattr(os, "fsync", fail)
        artifacts.check_writable("quick")
    with (
        monkeypatch.context() as patch,
        pytest.raises(course.ArtifactError, match="runs/quick was not written"),
    ):
        patch.setattr(os, "mkdir", fail)
        artifacts.check_writable("quick")
        shutil.rmtree(runs_folder)
        artifacts.check_writable("quick")


def test_a_file_where_the_folder_should_be(runs_folder):
    runs_folder.write_text("x")
    with pytest.raises(course.ArtifactError, match="a file stands where a folder is needed"):
        artifacts.check_writable("quick")


def test_errors_about_other_files_are_left_alone(runs_folder, tmp_path):
    for error in (
        PermissionError(errno.EACCES, "", str(tmp_path / "a" / "source")),
        FileExistsError(errno.EEXIST, ""),
    ):
        with pytest.raises(type(error)), artifacts.write_stage("quick", "toy"):
            raise error


@posix
@pytest.mark.skipif(
    hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere"
)
def test_a_folder_that_may_only_be_read(runs_folder):
    make("one")
    (runs_folder / "quick").chmod(0o555)
    try:
        assert read() == "one"
        for attempt in (lambda: artifacts.check_writable("quick"), lambda: make("two")):
            with pytest.raises(course.ArtifactError, match="you may not write there"):
                attempt()
    finally:
        (runs_folder / "quick").chmod(0o755)


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
    assert (
        capsys.readouterr().out == "no_such_module is not installed: would have compared logits\n"
    )
    assert course.oracle("json").loads("1") == 1


def test_a_stage_that_makes_another_keeps_what_it_has_written(runs_folder):
    with artifacts.write_stage("quick", "outer") as folder:
        (folder / "half.txt").write_text("half")
        with artifacts.write_stage("quick", "inner") as inner:
            (inner / "whole.txt").write_text("whole")
        artifacts.settle("quick", "outer")
        assert (folder / "half.txt").read_text() == "half"
    assert (artifacts.stage_dir("quick", "outer") / "half.txt").read_text() == "half"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_a_lock_is_one_however_its_path_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file"
    with artifacts.alone(path, "it is written", wait=False):
        with artifacts.alone(Path("file"), "it is written", wait=False):
            pass
        held = path.with_name(".file.writer")
        assert held.exists()  # the outer one still holds it
    assert not held.exists()


def test_everything_can_be_made_anew_and_a_chosen_start_still_ships(monkeypatch):
    """`QWEN_MINI_SHIPPED=0`: neither stages nor records of a scale are taken from what ships."""
    key = artifacts.read_manifest(artifacts.shipped_dir("sft"))["key"]
    ready = lambda: (
        artifacts.has("laptop", "sft"),
        artifacts.find_by_key("laptop", "sft", key) is not None,
        any(records._stored("laptop", "16_sft", "base")),
    )
    with_what_ships = ready()
    monkeypatch.setenv("QWEN_MINI_SHIPPED", "0")
    assert with_what_ships == (True, True, True) and ready() == (False, False, False)
    assert not report.open_shelf("laptop").results
    with pytest.raises(artifacts.MissingStage, match="qwen-mini train sft --scale laptop"):
        artifacts.find("laptop", "sft")
    assert stages.shipped("sft") == artifacts.shipped_dir("sft")
