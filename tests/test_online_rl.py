"""Online RL: budgets, imitation, a curriculum, rewards of a judge, and what the keys of all these runs hold."""

import dataclasses
import json

import pytest
import torch
from conftest import small_policy_run

from qwen_mini import course, online_rl
from qwen_mini.course import artifacts, stages
from qwen_mini.grpo import fresh_queries, grpo_stage, probe_stage
from qwen_mini.online_rl import (
    curriculum_stage,
    imitation_stages,
    judged,
    mixed,
    more_sft_stage,
    steps_within,
    token_passes,
)
from qwen_mini.reward_model import RewardModel
from qwen_mini.sft import Answer, Row, RowSampler, draw_examples
from qwen_mini.tasks import Verdict

FOLDER = artifacts.shipped_dir("long_context")


@pytest.fixture
def config():
    return small_policy_run()


def test_rewards_from_verifier_and_model_are_mixed_as_in_the_paper(tokenizer):
    model = RewardModel.from_policy(FOLDER).eval()
    [example] = draw_examples(1, 0, tasks=["story"])
    group = [
        Answer(example, "x", True, Verdict(right, True), [40 + i, 50])
        for i, right in enumerate((True, False))
    ]
    [numbers] = judged(model, tokenizer)([group])
    [both] = mixed(model, tokenizer)([group])
    wanted = [
        1 / (1 + torch.tensor(-r / 2).exp().item()) + v - 1
        for r, v in zip(numbers, (1, 0), strict=True)
    ]
    assert both == pytest.approx(wanted) and both[0] > 0 > both[1]


def test_passes_count_reading_sampling_and_three_more_for_what_is_trained(tmp_path, tokenizer):
    settings = course.load_scale("quick").grpo
    settings = dataclasses.replace(settings, steps=2, queries=3, group_size=4)
    weights = {("story", 1, "shown"): 1.0}
    (tmp_path / "probe.json").write_text(
        json.dumps({"weights": [["story", 1, "shown", 1.0]], "tokens": 1000})
    )
    tokenizer.save_pretrained(tmp_path)
    records = [
        {"step": 1, "length": 10.0, "groups": 0.0},
        {"step": 2, "length": 20.0, "groups": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    prompts = [
        sum(
            len(tokenizer.encode_chat(e.messages, add_generation_prompt=True))
            for e in fresh_queries(3, weights, 5, step)
        )
        for step in (0, 1)
    ]
    expected = 1000 + (prompts[0] + 12 * 10) + 4 * (prompts[1] + 12 * 20)
    assert token_passes(tmp_path, tmp_path, settings, seed=5) == expected


def test_steps_fill_the_passes_and_never_more():
    sampler = RowSampler([Row([1] * (5 + i), []) for i in range(10)], 4, 2)
    an_epoch = 3 * sum(5 + i for i in range(10))
    assert sampler.total_steps == 6 and steps_within(2 * an_epoch, sampler) == 6
    assert steps_within(2 * an_epoch - 1, sampler) == 5 and steps_within(5 * an_epoch, sampler) in (
        14,
        15,
    )
    assert steps_within(4 * an_epoch, sampler) == 12 and steps_within(1, sampler) == 1


def test_a_curriculum_visits_its_problems_once_and_passes_over_a_flat_batch(
    config, runs_folder, monkeypatch
):
    asked, original = [], online_rl.roll_out

    def roll_out(model, tokenizer, examples, settings, seed):
        asked.extend(e.key for e in examples)
        answers, groups = original(model, tokenizer, examples, settings, seed)
        first = len(asked) == 2
        return answers, [
            dataclasses.replace(g, rewards=[float(first and i == 0) for i in range(8)])
            for g in groups
        ]

    monkeypatch.setattr(online_rl, "roll_out", roll_out)
    monkeypatch.setattr(online_rl, "dpo_checkpoint", lambda *_: FOLDER)
    folder = curriculum_stage(config, [3, 1, 0, 2], 2, "order").folder()
    pool = [e.key for e in online_rl.pool_of(config.grpo, 4)]
    assert asked == [pool[i] for i in (3, 1, 0, 2)]
    first, second = stages.metrics(folder)
    assert first["groups"] == 1 and first["grad_norm"] > 0 == second["groups"]
    assert first["lr_factor"] == 1 and [first["step"], second["step"]] == [1, 2]


def keys_of(config, seed=0):
    """Keys of the stages of chapters 19 and 20."""
    made = [grpo_stage(config, seed), probe_stage(config, seed), more_sft_stage(config, seed)]
    made.append(curriculum_stage(config, [1, 0, 2, 3], 2, "order", seed))
    return {stage.name: stage.key for stage in made + imitation_stages(config, 2, "expert", seed)}


def changed(config, section, **numbers):
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **numbers)}
    )


def test_every_number_that_a_run_reads_is_in_its_key(config):
    before, settings = keys_of(config), config.grpo
    for name in (field.name for field in dataclasses.fields(settings) if field.name != "start"):
        value = getattr(settings, name)
        other = keys_of(
            changed(config, "grpo", **{name: (*value, 4) if name == "levels" else value + 1})
        )
        assert other["grpo"] != before["grpo"], name
        sampled = name in ("group_size", "levels", "probe", "max_new_tokens")
        assert (other["probe"] != before["probe"]) == sampled, name
        of_run = (
            "steps",
            "queries",
            "probe",
            "warmup_steps",
            "beta",
        )  # a curriculum has its own, or none
        assert (other["order"] != before["order"]) == (name not in of_run), name
        imitated = sampled or name in ("steps", "queries")
        for stage in ("expert_1_answers", "expert_1", "expert_2_answers", "expert_2"):
            assert (other[stage] != before[stage]) == imitated, (name, stage)
    for name in ("beta1", "beta2", "eps", "clip_norm"):
        other = keys_of(
            changed(config, "pretraining", **{name: getattr(config.pretraining, name) / 2})
        )
        assert other["grpo"] != before["grpo"] and other["more_sft"] != before["more_sft"], name
    for name in (
        "demonstrations",
        "replay",
        "replay_weight",
        "batch_rows",
        "learning_rate",
        "matrix_learning_rate",
    ):
        other = keys_of(changed(config, "sft", **{name: getattr(config.sft, name) * 2}))
        for stage in ("more_sft", "expert_1", "expert_2"):
            assert other[stage] != before[stage], (name, stage)


def test_seeds_make_other_stages_and_sizes_of_measurements_do_not(config):
    before = keys_of(config)
    assert all(key != before[name] for name, key in keys_of(config, 1).items())
    assert grpo_stage(config, 1, probe_seed=0).key not in (
        before["grpo"],
        grpo_stage(config, 1, probe_seed=1).key,
    )
    assert (
        keys_of(changed(config, "measure", grpo_heldout=99, side_steps=9, grpo_seeds=7)) == before
    )
