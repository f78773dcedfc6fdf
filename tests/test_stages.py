"""Stages: shipped checkpoints form a chain that can be recomputed; keys hold what trains, and nothing else."""

import dataclasses
import json

import pytest
import torch

from qwen_mini.course import CourseError, artifacts, load_scale, stages, training
from qwen_mini.course.training import STAGES, train

LAPTOP = load_scale("laptop")


def handle(name, config=LAPTOP, seed=0):
    return training.handle(name, config, seed)


SHIPPED = [name for name in STAGES if artifacts.shipped_dir(name).is_dir()]
STARTS = {
    **{"long_context": "pretraining", "sft": "long_context", "grpo": "dpo"},
    **dict.fromkeys(("careless", "pairs", "dpo"), "sft"),
}


def test_every_model_of_the_course_is_shipped():
    assert {"pretraining", "long_context", "sft", "dpo", "grpo"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_checkpoint_is_found_by_its_key(name, runs_folder):
    stage = handle(name)
    assert stage.find() == artifacts.shipped_dir(name), (
        f"{name} was made from something else: train it, or undo"
    )
    assert artifacts.read_manifest(stage.find())["scale"] == "laptop"
    assert not runs_folder.exists() or not any(runs_folder.rglob("*.safetensors"))


@pytest.mark.parametrize("name", [name for name in SHIPPED if name in STARTS])
def test_what_a_shipped_checkpoint_started_from_is_shipped(name):
    inputs = artifacts.read_manifest(artifacts.shipped_dir(name))["inputs"]
    assert inputs["start"] == stages.weights_hash(artifacts.shipped_dir(STARTS[name]))


@pytest.mark.parametrize("name", SHIPPED)
def test_no_checkpoint_of_another_scale_is_handed_out(name, runs_folder):
    with pytest.raises(artifacts.MissingStage, match=f"train {name} --scale gpu"):
        artifacts.find("gpu", name)
    assert handle(name, load_scale("gpu")).find() is None


def changed(config, section, **values):
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **values)}
    )


def numbers(section):
    """Every number and text of a section, another value for each."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if isinstance(value, bool):
            yield field.name, not value
        elif isinstance(value, int | float):
            yield field.name, value * 2 if value else 1


NOT_READ = {
    "pretraining": {"matrix_learning_rate"} if LAPTOP.pretraining.optimizer == "adamw" else set()
}


@pytest.mark.parametrize("field", [name for name, _ in numbers(LAPTOP.measure)])
def test_sizes_of_measurements_are_in_no_key(field):
    value = dict(numbers(LAPTOP.measure))[field]
    other = changed(LAPTOP, "measure", **{field: value})
    assert all(handle(name, other).key == handle(name).key for name in STAGES)


def test_precision_and_threads_are_in_no_key():
    other = changed(LAPTOP, "run", dtype="bfloat16", threads=7)
    assert all(handle(name, other).key == handle(name).key for name in STAGES)


# what an extension reads of the pre-training's section: its optimiser, at other rates (once left out of the key)
EXTENSION = {
    "weight_decay": 0.2,
    "clip_norm": 0.05,
    "beta1": 0.8,
    "beta2": 0.9,
    "eps": 1e-6,
    "optimizer": "adamw",
}


@pytest.mark.parametrize("field", EXTENSION)
def test_the_extension_depends_on_every_number_of_its_optimiser(field):
    other = changed(LAPTOP, "pretraining", **{field: EXTENSION[field]})
    for name in ("long_context", "sft"):
        mine = {key: value for key, value in handle(name).inputs.items() if key != "start"}
        theirs = {key: value for key, value in handle(name, other).inputs.items() if key != "start"}
        assert mine != theirs


OWN = {name: name for name in ("pretraining", "long_context", "sft", "dpo", "grpo")} | {
    "pairs": "dpo"
}


@pytest.mark.parametrize(
    ("stage", "field"),
    [
        (stage, name)
        for stage, section in OWN.items()
        for name, _ in numbers(getattr(LAPTOP, section))
    ],
)
def test_a_key_holds_every_number_that_its_training_reads(stage, field):
    section = getattr(LAPTOP, OWN[stage])
    try:
        other = changed(LAPTOP, OWN[stage], **{field: dict(numbers(section))[field]})
    except ValueError:
        other = changed(LAPTOP, OWN[stage], **{field: dict(numbers(section))[field] / 4})
    reads = "problems samples pairs_per_problem max_new_tokens".split()
    if stage == "pairs" and field not in reads:
        assert handle(stage, other).key == handle(stage).key
    else:
        assert handle(stage, other).key != handle(stage).key


@pytest.mark.parametrize("name", STAGES)
def test_versions_of_the_chapters_used_are_in_the_key(name, monkeypatch):
    from qwen_mini.course import versions as module

    before = handle(name)
    raised = dict(module.versions()) | {"grpo": 99}
    monkeypatch.setattr(module, "versions", lambda: raised)
    assert (handle(name).key != before.key) == ("grpo" in before.versions)


def test_weights_are_hashed_as_they_are_shipped(tmp_path):
    from qwen_mini.model import Qwen

    source = artifacts.shipped_dir("sft")
    Qwen.from_pretrained(source).save_pretrained(tmp_path / "float32", torch.float32)
    assert stages.weights_hash(tmp_path / "float32") == stages.weights_hash(source)


def test_metrics_are_thinned_but_keep_what_is_looked_at():
    records = [
        {"step": i, "loss": 1.0} | ({"heldout": {"a": 1}} if i == 77 else {}) for i in range(5000)
    ]
    kept = stages.thinned(records)
    assert len(kept) <= stages.MOST_METRICS + 2
    assert {0, 77, 4999} <= {record["step"] for record in kept}


def test_an_unknown_stage_is_named():
    with pytest.raises(CourseError, match="no stage 'nothing' to train: use one of pretraining"):
        train(LAPTOP, "nothing")


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(CourseError, match="holds no weights"):
        stages.weights_hash(tmp_path)


def test_the_manifest_is_plain():
    for name in SHIPPED:
        text = (artifacts.shipped_dir(name) / "manifest.json").read_text(encoding="utf-8")
        assert {"key", "seed", "versions", "inputs", "provenance", "files"} <= set(json.loads(text))
