"""`export` gives a whole folder or nothing, of every kind of model."""

import errno
import json
import shutil

import pytest
import torch
from conftest import tiny_model

from qwen_mini.course import artifacts, load_scale
from qwen_mini.course.errors import CourseError
from qwen_mini.course.export import export
from qwen_mini.model import Qwen
from qwen_mini.reward_model import RewardModel, score_rows

ROWS = [[5, 6, 7, 8], [9, 3]]


@pytest.fixture
def stages(runs_folder):
    """A language model, a reward model made of it, and a stage that is no model."""
    with artifacts.write_stage("quick", "pretraining") as folder:
        tiny_model().save_pretrained(folder, generation_config={"eos_token_id": 3})
        (folder / "metrics.jsonl").write_text("{}\n")
    with artifacts.write_stage("quick", "reward_model") as folder:
        model = RewardModel.from_policy(artifacts.find("quick", "pretraining"))
        model.save_pretrained(folder, generation_config={"pad_token_id": 0})
    with artifacts.write_stage("quick", "tasks") as folder:
        (folder / "tasks.json").write_text("[]")
    return load_scale("quick")


def test_a_language_model_in_16_bits(stages, tmp_path):
    whole = export(stages, "pretraining", tmp_path / "new" / "whole", False)
    half = export(stages, "pretraining", tmp_path / "half", True)
    source = artifacts.find("quick", "pretraining")
    assert (whole / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert sorted(file.name for file in half.iterdir()) == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
    ]
    files = json.loads((half / "manifest.json").read_text())["files"]
    assert files == {
        file.name: file.stat().st_size for file in half.iterdir() if file.name != "manifest.json"
    }
    rounded = Qwen.from_pretrained(source).to(torch.bfloat16).float()
    for name, value in Qwen.from_pretrained(half).state_dict().items():
        assert torch.equal(value, rounded.state_dict()[name]), name
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_reward_model_in_16_bits(stages, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = export(stages, "reward_model", tmp_path / "out", True)
    ours = score(RewardModel.from_pretrained(folder))
    whole = RewardModel.from_pretrained(artifacts.find("quick", "reward_model"))
    assert torch.equal(ours, score(whole.to(torch.bfloat16).float()))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32
    )
    with torch.no_grad():
        logits = theirs.eval()(input_ids=torch.tensor(ROWS[:1])).logits[:, 0]
    torch.testing.assert_close(logits, ours[:1], rtol=1e-4, atol=1e-4)


def score(model) -> torch.Tensor:
    return torch.as_tensor(score_rows(model.eval(), ROWS), dtype=torch.float32)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("module", "name"),
    [(shutil, "copystat"), (artifacts, "count_files"), (artifacts, "write_file")],
)
@pytest.mark.parametrize(
    ("failure", "raised"), [(full_disk, CourseError), (interrupted, KeyboardInterrupt)]
)
def test_a_failed_export_leaves_nothing(
    stages, tmp_path, monkeypatch, module, name, failure, raised
):
    target = tmp_path / "a" / "b" / "out"
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch, pytest.raises(raised):
        patch.setattr(module, name, failure)
        export(stages, "reward_model", target, True)
    assert sorted(tmp_path.rglob("*")) == before
    assert RewardModel.from_pretrained(export(stages, "reward_model", target, True))


def test_torn_weights_are_named_and_leave_nothing(stages, tmp_path):
    (artifacts.find("quick", "pretraining") / "model.safetensors").write_bytes(b"torn")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CourseError, match="weights cannot be read"):
        export(stages, "pretraining", tmp_path / "out", True)
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_requests_are_refused_before_anything_is_made(stages, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CourseError, match="'tasks' holds no Hugging Face checkpoint"):
        export(stages, "tasks", tmp_path / "out", False)
    with pytest.raises(artifacts.MissingStage):
        export(stages, "grpo", tmp_path / "out", False)
    with pytest.raises(CourseError, match="could not be written"):
        (tmp_path / "file").touch()
        export(stages, "pretraining", tmp_path / "file" / "out", False)
    (tmp_path / "file").unlink()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(CourseError, match="exists already: name a new folder"):
        export(stages, "pretraining", tmp_path / "link", False)
    (tmp_path / "link").unlink()
    assert sorted(tmp_path.rglob("*")) == before
