"""`qwen-mini train STAGE`, in one process and under torchrun: what a stage starts from is made first, and once."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TINY, losses_of, tiny_scale, weights_of

from qwen_mini.course import artifacts, cli, stages


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def train(runs: Path, *words: str) -> None:
    """`qwen-mini train` in this process, with results there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_MINI_RUNS", str(runs))
        assert cli.main(["train", *words]) == 0


def train_in_two(runs: Path, *words: str) -> None:
    """The same in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"QWEN_MINI_RUNS": str(runs)}
    subprocess.run(
        [*command, "-m", "qwen_mini.course", "train", *words],
        check=True,
        timeout=600,
        env=environment,
    )


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(scale, runs of one process, runs of two): `sft`, and all before it by one process."""
    folder = tmp_path_factory.mktemp("tuned")
    scale, one, two = tiny_scale(folder), folder / "one", folder / "two"
    train(one, "long_context", "--scale", scale)
    shutil.copytree(one, two)
    train_in_two(two, "sft", "--scale", scale)
    train(one, "sft", "--scale", scale)
    return scale, one / "tiny", two / "tiny"


def test_what_a_stage_starts_from_is_made_first_and_once(tuned):
    _, one, two = tuned
    for name in ("pretraining", "long_context", "sft"):
        assert (
            artifacts.read_manifest(one / name)["key"] == artifacts.read_manifest(two / name)["key"]
        )
    for name in ("pretraining", "long_context"):
        assert (one / name / "model.safetensors").stat().st_mtime_ns < (
            one / "sft"
        ).stat().st_mtime_ns
        assert weights_of(one / name) == weights_of(two / name)
    assert not any(
        (one / name).exists() for name in ("careless", "pairs", "dpo", "grpo")
    )  # nobody asked for them
    assert not list(two.glob("training_state/*"))


def test_two_processes_fine_tune_as_one(tuned):
    mine, theirs = (losses_of(runs / "sft") for runs in tuned[1:])
    assert len(mine) > 5 and [r[0] for r in mine] == [r[0] for r in theirs]
    assert [r[1] for r in mine] == pytest.approx([r[1] for r in theirs], rel=1e-4)


def test_a_finished_stage_is_trained_again_only_if_asked(tuned, capsys):
    scale, one, _ = tuned
    weights = one / "sft" / "model.safetensors"
    before, content = weights.stat().st_mtime_ns, weights.read_bytes()
    train(one.parent, "sft", "--scale", scale)
    assert "sft is in " in capsys.readouterr().out and weights.stat().st_mtime_ns == before
    train(one.parent, "sft", "--scale", scale, "--fresh")
    assert weights.stat().st_mtime_ns != before and weights.read_bytes() == content


def resized(text: str, section: str, **sizes: int) -> str:
    """A scale's text with other numbers in a section."""
    before, head, after = text.partition(f"\n[{section}]\n")
    inside, following, rest = after.partition("\n[")
    for name, value in sizes.items():
        inside, found = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value}", inside)
        assert found == 1, name
    return before + head + inside + following + rest


@pytest.fixture(scope="module")
def preferring(tmp_path_factory):
    """(runs of one process, runs of two): `dpo` from the shipped checkpoint, and the pairs that it trains on."""
    folder = tmp_path_factory.mktemp("preferring")
    # all pairs in every batch: however many there are, two can share them
    pairs = {"problems": 2, "samples": 8, "max_new_tokens": 48, "pairs_per_problem": 2}
    text = resized(TINY, "dpo", **pairs, epochs=2, batch_pairs=128)
    text = resized(text, "grpo", steps=2, queries=6, group_size=8, max_new_tokens=48, probe=2)
    scale = folder / "ready.toml"
    scale.write_text(text.replace('start = "own"', 'start = "shipped"').format(dtype="float32"))
    one, two = folder / "one", folder / "two"
    train_in_two(two, "dpo", "--scale", str(scale))
    train(one, "dpo", "--scale", str(scale))
    return one / "ready", two / "ready"


def test_pairs_are_sampled_by_the_first_process_alone(preferring):
    pairs = [(runs / "pairs" / "pairs.jsonl").read_text().splitlines() for runs in preferring]
    assert len(pairs[0]) > 2 and pairs[0] == pairs[1]


def test_two_processes_train_on_the_same_pairs_as_one(preferring):
    mine, theirs = (losses_of(runs / "dpo") for runs in preferring)
    assert [r[0] for r in mine] == [r[0] for r in theirs] == [1, 2]
    assert [r[1] for r in mine] == pytest.approx([r[1] for r in theirs], rel=1e-3)
    one, two = (stages.metrics(runs / "dpo") for runs in preferring)
    for key, near in (("accuracy", 1e-6), ("chosen", 1e-3), ("rejected", 1e-3)):  # of all pairs
        assert [r[key] for r in one] == pytest.approx([r[key] for r in two], rel=near, abs=1e-5)
    manifests = [artifacts.read_manifest(runs / "dpo") for runs in preferring]
    assert manifests[0]["key"] == manifests[1]["key"]
    assert (
        manifests[0]["inputs"]["pairs"] == artifacts.read_manifest(preferring[1] / "pairs")["key"]
    )


def test_reinforcement_learning_runs_in_two_processes(preferring):
    """Each samples answers of its own, so the numbers are not one process's; tests/test_grpo.py compares updates."""
    _, two = preferring
    train_in_two(two.parent, "grpo", "--scale", str(two.parent.parent / "ready.toml"))
    records = losses_of(two / "grpo")
    assert [r[0] for r in records] == list(range(1, len(records) + 1)) and len(records) > 1
    assert all(r[2] > 0 for r in records)  # the gradient
    assert weights_of(two / "grpo") != weights_of(artifacts.shipped_dir("dpo"))
