"""`qwen-mini train STAGE`, in one process and under torchrun: what a stage starts from is made first, and once."""

import os
import shutil
import subprocess
import sys

import pytest
from test_pretraining import losses_of, tiny_scale, weights_of

from qwen_mini.course import artifacts, cli, load_scale, stages

CHAIN = ["pretraining", "long_context", "sft", "pairs", "dpo"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(scale, runs, runs of two processes): dpo and all before it; the two processes begin at the fine-tuning."""
    folder = tmp_path_factory.mktemp("training")
    scale, one, two = tiny_scale(folder), folder / "one", folder / "two"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("QWEN_MINI_RUNS", str(one))
        assert cli.main(["train", "long_context", "--scale", scale]) == 0
        shutil.copytree(one, two)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["-m", "qwen_mini.course", "train", "dpo", "--scale", scale]
        subprocess.run(command, check=True, timeout=600, env=environment | {"QWEN_MINI_RUNS": str(two)})
        assert cli.main(["train", "sft", "--scale", scale]) == 0
    return scale, one, two


def test_what_a_stage_starts_from_is_made_first(trained):
    _, one, two = trained
    for name in CHAIN:
        assert artifacts.read_manifest(two / "tiny" / name)["key"], name
    assert not (one / "tiny" / "dpo").exists()  # nothing that was not asked for
    for name in ("pretraining", "long_context"):
        assert weights_of(one / "tiny" / name) == weights_of(two / "tiny" / name)
    assert not list((two / "tiny" / "training_state").glob("*"))


def test_two_processes_fine_tune_as_one(trained):
    _, one, two = trained
    mine, theirs = (losses_of(runs / "tiny" / "sft") for runs in (one, two))
    assert len(mine) > 5 and [r[0] for r in mine] == [r[0] for r in theirs]
    assert [r[1] for r in mine] == pytest.approx([r[1] for r in theirs], rel=1e-4)
    keys = [artifacts.read_manifest(runs / "tiny" / "sft")["key"] for runs in (one, two)]
    assert keys[0] == keys[1]


def test_pairs_are_sampled_by_the_first_process_and_both_train_on_them(trained, tmp_path, monkeypatch):
    scale, _, two = trained
    shutil.copytree(two, tmp_path / "alone")
    folder = tmp_path / "alone" / "tiny"
    for name in ("pairs", "dpo"):
        shutil.rmtree(folder / name)
    monkeypatch.setenv("QWEN_MINI_RUNS", str(tmp_path / "alone"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cli.main(["train", "dpo", "--scale", scale]) == 0
    pairs = [(where / "pairs" / "pairs.jsonl").read_bytes() for where in (folder, two / "tiny")]
    assert pairs[0] and pairs[0] == pairs[1]
    alone, both = ([r["loss"] for r in stages.metrics(where / "dpo")] for where in (folder, two / "tiny"))
    assert alone == pytest.approx(both, rel=1e-4)


def test_a_finished_stage_is_trained_again_only_if_asked(trained, monkeypatch, capsys):
    scale, one, _ = trained
    monkeypatch.setenv("QWEN_MINI_RUNS", str(one))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    weights = one / "tiny" / "sft" / "model.safetensors"
    before, content = weights.stat().st_mtime_ns, weights.read_bytes()
    assert cli.main(["train", "sft", "--scale", scale]) == 0
    assert "sft is in " in capsys.readouterr().out and weights.stat().st_mtime_ns == before
    assert cli.main(["train", "sft", "--scale", scale, "--fresh"]) == 0
    assert weights.stat().st_mtime_ns != before and weights.read_bytes() == content
    assert load_scale(scale).name == "tiny" and artifacts.made("tiny", "sft")
