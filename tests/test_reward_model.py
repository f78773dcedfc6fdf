"""The reward model: loss and scores of TRL and transformers, labels, best of n, exact resume."""

import dataclasses
import itertools
import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import small_config, some_pairs
from test_sft import changed, watched

from qwen_mini import course, reward_model
from qwen_mini.course import CourseError, artifacts, stages
from qwen_mini.model import Qwen
from qwen_mini.reward_model import (
    BIASED,
    CRITERIA,
    FILLER,
    OFF_TOPIC,
    RUDE,
    STYLE_TASKS,
    RewardModel,
    answers_stage,
    best_of_n,
    bradley_terry_loss,
    careless_stage,
    correlation_by_chance,
    criteria,
    gold_reward,
    gold_rewards,
    judge_pairs,
    judge_stages,
    label_pairs,
    pad_right,
    pair_accuracy,
    pair_plan,
    rank_correlation,
    read_answers,
    reward_stage,
    score_rows,
    styled,
    train_reward_model,
)
from qwen_mini.sft import Answer, draw_examples
from qwen_mini.tasks import TASKS, Verdict, split_of

FOLDER = artifacts.shipped_dir("long_context")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return RewardModel(small_config()).eval().requires_grad_(False)


def test_the_loss_is_golden():
    better, worse = torch.tensor([1.2, -0.3, 0.5]), torch.tensor([0.2, 0.1, 0.5])
    assert bradley_terry_loss(better, worse).item() == pytest.approx(0.639808, abs=1e-6)
    both = bradley_terry_loss(better, worse, center=1.0) - bradley_terry_loss(better, worse)
    assert both.item() == pytest.approx(1.0, abs=1e-6)
    margin = bradley_terry_loss(better - 0.5, worse)
    assert bradley_terry_loss(better, worse, margin=0.5).item() == pytest.approx(margin.item())


def test_scores_and_loss_are_those_of_transformers_and_trl(model, tokenizer, tmp_path):
    transformers, trl = pytest.importorskip("transformers"), pytest.importorskip("trl")
    from datasets import Dataset

    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    )
    assert (
        type(theirs).__name__ == "Qwen2ForSequenceClassification" and theirs.config.num_labels == 1
    )
    pairs = some_pairs()
    data = [
        {"chosen_ids": p.prompt + p.chosen, "rejected_ids": p.prompt + p.rejected} for p in pairs
    ]
    options = dict(
        output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True, bf16=False, max_length=None
    )
    options |= dict(
        per_device_train_batch_size=len(pairs),
        center_rewards_coefficient=0.01,
        disable_dropout=True,
    )
    trainer = trl.RewardTrainer(
        model=theirs,
        args=trl.RewardConfig(**options),
        train_dataset=Dataset.from_list(data),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    batch = trainer.data_collator(data)
    trainer.model.eval()
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    rows = [p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs]
    ids, lengths = pad_right(rows)
    ours = model(ids, lengths)
    torch.testing.assert_close(ours, outputs["logits"][:, 0], rtol=1e-5, atol=1e-6)
    mine = bradley_terry_loss(*ours.chunk(2), center=0.01)
    torch.testing.assert_close(mine, loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(score_rows(model, rows, 5), ours.numpy(), rtol=1e-4, atol=1e-6)


def test_a_reward_model_is_saved_and_loaded_and_starts_from_a_policy(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    policy = Qwen.from_pretrained(FOLDER)
    body = RewardModel.from_policy(FOLDER, seed=3)
    assert torch.equal(
        body.model.layers[4].mlp.up_proj.weight, policy.model.layers[4].mlp.up_proj.weight
    )
    assert torch.equal(body.score.weight, RewardModel.from_policy(FOLDER, seed=3).score.weight)
    assert not torch.equal(body.score.weight, RewardModel.from_policy(FOLDER, seed=4).score.weight)
    half = RewardModel.from_policy(FOLDER, layers=2)
    assert len(half.model.layers) == 2
    assert torch.equal(
        half.model.layers[1].mlp.up_proj.weight, policy.model.layers[1].mlp.up_proj.weight
    )
    assert torch.equal(half.model.norm.weight, policy.model.norm.weight)


def test_transformers_alone_scores_a_padded_batch(model, tokenizer, tmp_path):
    """No help from us: the folder says which token is padding, and the tokenizer pads on the right with it."""
    transformers = pytest.importorskip("transformers")
    pad = tokenizer.control_tokens[tokenizer.pad_token]
    ends = {"eos_token_id": [tokenizer.im_end_id, tokenizer.endoftext_id], "pad_token_id": pad}
    model.save_pretrained(tmp_path, generation_config=ends)
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32
    )
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path, padding_side="right")
    texts = ["Two and two is 4.", "One.<|endoftext|>", "A longer answer, of which the end counts."]
    batch = peer(texts, padding=True, return_tensors="pt")
    assert (batch["input_ids"] == pad).any() and theirs.config.pad_token_id == pad
    with torch.no_grad():
        found = theirs(**batch).logits[:, 0]
    ours = score_rows(model, [tokenizer.encode(text, allow_control=True) for text in texts])
    np.testing.assert_allclose(found.numpy(), ours, rtol=1e-5, atol=1e-6)


def test_rewards_in_16_bits_are_not_rounded_to_16_bits(model, tmp_path):
    model.save_pretrained(tmp_path)
    half = RewardModel.from_pretrained(tmp_path, torch.bfloat16)
    rewards = torch.tensor(score_rows(half, [[i, i + 1, i + 2] for i in range(64)]))
    assert (rewards != rewards.bfloat16().double()).float().mean() > 0.9


def test_a_body_from_a_torn_checkpoint_is_refused(monkeypatch):
    policy = Qwen.from_pretrained(FOLDER)
    whole = policy.state_dict()
    monkeypatch.setattr(
        policy, "state_dict", lambda: {k: v for k, v in whole.items() if k != "model.norm.weight"}
    )
    monkeypatch.setattr(Qwen, "from_pretrained", lambda *_: policy)
    with pytest.raises(CourseError, match="lacks model.norm.weight"):
        RewardModel.from_policy(FOLDER)


def test_an_untied_model_has_no_head_to_train(model):
    untied = RewardModel(dataclasses.replace(model.config, tie_word_embeddings=False))
    ids, lengths = pad_right([[1, 2, 3]])
    untied(ids, lengths).sum().backward()
    assert all(p.grad is not None for p in untied.parameters())


@pytest.mark.parametrize("name", STYLE_TASKS)
def test_every_criterion_sees_its_fault_and_no_other(name):
    for example in draw_examples(20, 0, tasks=[name]):
        gold = example.response
        assert all(criteria(example, gold).values()) and gold_reward(example, gold) == 1
        faults = {
            "concise": FILLER[0],
            "relevant": OFF_TOPIC[0],
            "harmless": RUDE[0],
            "debiased": BIASED[0],
        }
        for fault, line in faults.items():
            found = criteria(example, f"{line}\n{gold}")
            assert [k for k, v in found.items() if not v] == [fault]
        alone = criteria(example, gold.split("\n")[-1])
        assert [k for k, v in alone.items() if not v] == ["helpful"]
        wrong = criteria(example, gold + "x")
        assert [k for k, v in wrong.items() if not v] == ["truthful"]
        rng = random.Random(str(example.key))
        for text in [styled(example, rng) for _ in range(5)]:
            assert TASKS[name].verify(example, text).correct
            assert set(criteria(example, text)) == set(CRITERIA)
        assert len({styled(example, rng) for _ in range(40)}) > 10


def test_no_answer_earns_nothing(tokenizer):
    [group] = answers_of(tokenizer, ["", " \n", "a remark"])
    cut = dataclasses.replace(group[2], finished=False)
    assert gold_rewards([[*group, cut]]).tolist() == [
        [0, 0, gold_reward(group[2].example, "a remark"), 0]
    ]
    assert gold_reward(group[2].example, "a remark") > 0


def test_no_phrase_can_be_part_of_a_solution():
    phrases = [*FILLER, *OFF_TOPIC, *RUDE, *BIASED]
    assert len(set(phrases)) == len(phrases)
    for example in draw_examples(50, 1, tasks=STYLE_TASKS):
        assert not set(example.response.split("\n")) & set(phrases)


def answers_of(tokenizer, texts):
    [example] = draw_examples(1, 0, tasks=["story"])
    made = [
        Answer(example, t, True, Verdict(True, True), [60] * len(t) + [tokenizer.im_end_id])
        for t in texts
    ]
    return [made]


def test_pairs_follow_the_labels_and_flips_are_flips(tokenizer):
    group = answers_of(tokenizer, ["a", "bb", "ccc", "dd"])
    longer = lambda _, text: len(text)
    pairs = label_pairs(tokenizer, group, longer, most=99)
    assert len(pairs) == 5  # bb and dd are equal
    assert all(len(p.chosen) > len(p.rejected) for p in pairs)
    flipped = label_pairs(tokenizer, group, longer, most=99, flip=1.0)
    assert all(len(p.chosen) < len(p.rejected) for p in flipped)
    assert len(label_pairs(tokenizer, group, longer, most=2)) == 2
    assert label_pairs(tokenizer, answers_of(tokenizer, ["a", "b"]), longer) == []
    unfinished = [[dataclasses.replace(a, finished=False) for a in group[0]]]
    assert label_pairs(tokenizer, unfinished, longer) == []


def test_best_of_n_is_the_average_over_all_subsets():
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    for n, (p, g) in zip((1, 2, 4, 6), best_of_n(proxy, gold, (1, 2, 4, 6)), strict=True):
        best = [
            (row[list(s)].max(), other[s[int(np.argmax(row[list(s)]))]])
            for row, other in zip(proxy, gold, strict=True)
            for s in itertools.combinations(range(6), n)
        ]
        assert (p, g) == pytest.approx(np.mean(best, axis=0))
    with pytest.raises(CourseError, match="best of 7 needs 7 samples a problem, but there are 6"):
        best_of_n(proxy, gold, [7])


def test_the_rank_correlation_shares_ranks_as_pandas_does():
    pandas, rng = pytest.importorskip("pandas"), np.random.default_rng(1)
    for _ in range(20):
        a, b = rng.integers(0, 5, 9), rng.normal(size=9)
        ranks = [pandas.Series(x).rank() for x in (a, b)]
        assert rank_correlation(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert rank_correlation([1, 2, 3], [3, 5, 4]) == pytest.approx(0.5)


def test_how_often_chance_orders_as_well():
    """Of the 24 orders of four, one is the same and one the reverse; for five, Spearman's table: 0.8 by 0.133."""
    assert correlation_by_chance([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(2 / 24)
    a, b = [1, 2, 3, 4, 5], [2, 1, 4, 3, 5]
    assert rank_correlation(a, b) == pytest.approx(0.8)
    assert correlation_by_chance(a, b) == pytest.approx(16 / 120)


def test_training_learns_a_visible_difference_and_is_repeatable():
    """Chosen responses end in one token, rejected ones in another: a few steps tell them apart."""
    config = course.load_scale("quick")
    settings = dataclasses.replace(
        config.reward_model, batch_pairs=8, epochs=2, learning_rate=1e-3, warmup_steps=1
    )
    pairs = [
        dataclasses.replace(p, chosen=[*p.chosen, 40], rejected=[*p.rejected, 50])
        for p in some_pairs(64)
    ]
    weights = []
    for _ in range(2):
        trainer, step = train_reward_model(config, FOLDER, pairs[:48], settings)
        records = [step(number) for number in range(trainer.total_steps)]
        weights.append(trainer.model.score.weight.detach().clone())
    assert torch.equal(*weights)
    assert records[-1]["loss"] < records[0]["loss"]
    assert pair_accuracy(trainer.model.eval(), pairs[48:]) > 0.9
    other = [dataclasses.replace(p, chosen=p.rejected, rejected=p.chosen) for p in pairs[48:]]
    assert pair_accuracy(trainer.model, other) < 0.1
    tie = [dataclasses.replace(p, chosen=p.rejected) for p in pairs[48:]]
    assert pair_accuracy(trainer.model, tie) == 0.5
    assert json.dumps(records[0])


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The quick scale in a folder of its own, in float32, on the shipped base model."""
    monkeypatch.setenv("QWEN_MINI_RUNS", str(tmp_path))
    monkeypatch.setattr(reward_model, "start_checkpoint", lambda *_: FOLDER)
    config = course.load_scale("quick")
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dtype="float32"),
        sft=dataclasses.replace(config.sft, batch_rows=8),
        reward_model=dataclasses.replace(config.reward_model, batch_pairs=8, demonstrations=4),
    )


def some_stage(config, recipe="some pairs", **options):
    """A reward model on given pairs."""
    return reward_stage(config, lambda: some_pairs(32), recipe, **options)


@pytest.mark.parametrize("kind", ("reward", "careless"))
def test_an_interrupted_stage_reaches_the_same_weights(small, kind):
    def run(stop_after=None):
        if kind == "careless":
            return careless_stage(small).run(stop_after)
        return some_stage(small).make(stop_after) if stop_after else some_stage(small).folder()

    folder = run()
    whole = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    assert run(stop_after=2).suffix == ".safetensors"
    assert run() == folder and (folder / "model.safetensors").read_bytes() == whole


def test_the_key_holds_every_number_that_the_training_reads(small):
    reads = set()
    made = some_stage(dataclasses.replace(small, reward_model=watched(small.reward_model, reads)))
    reads.clear()  # what was read for the handle does not count
    made.make()
    own = {field.name for field in dataclasses.fields(small.reward_model)} & reads
    assert {"epochs", "batch_pairs", "center", "learning_rate"} <= own
    # what this chapter sets itself, and the rest of what the optimizer reads
    fixed = "optimizer min_lr_ratio weight_decay schedule decay_fraction grad_accumulation".split()
    rest = set(stages.OPTIMIZER) - own - {*fixed, "matrix_learning_rate"}
    others = [changed(small, "reward_model", field) for field in sorted(own)]
    others += [changed(small, "pretraining", field) for field in sorted(rest)]
    assert len({some_stage(config).key for config in (small, *others)}) == 1 + len(own) + len(rest)


def test_the_key_holds_seed_pairs_and_layers_but_no_measurement(small):
    options = ({}, {"seed": 1}, {"layers": 2}, {"recipe": "others"})
    assert len({some_stage(small, **given).key for given in options}) == len(options)
    assert some_stage(changed(small, "measure", "reward_heldout")).key == some_stage(small).key


def test_the_careless_policys_key_holds_what_it_is_shown(small):
    key = careless_stage(small).key
    assert careless_stage(changed(small, "reward_model", "demonstrations")).key != key
    assert (
        careless_stage(changed(small, "sft", "learning_rate")).key
        != key
        != careless_stage(small, 1).key
    )
    assert careless_stage(changed(small, "measure", "reward_heldout")).key == key


def test_answers_are_read_as_they_were_sampled(small, monkeypatch):
    sampled, evaluate = [], reward_model.evaluate_tasks
    monkeypatch.setattr(
        reward_model,
        "evaluate_tasks",
        lambda *given: sampled.append(evaluate(*given)) or sampled[-1],
    )
    made = answers_stage(small, 0, "test", 1, 2)
    assert made.name == "answers_test" and answers_stage(small).name == "answers"
    found = read_answers(made)
    assert found == read_answers(made) and len(sampled) == 1
    without_reason = lambda a: dataclasses.replace(
        a, verdict=dataclasses.replace(a.verdict, reason="")
    )
    assert found == [[without_reason(answer) for answer in group] for group in sampled[0]]
    assert [len(group) for group in sampled[0]] == [2] * len(STYLE_TASKS)
    asked = [group[0].example for group in sampled[0]]
    assert all(split_of(f"{e.task}/{e.key}") == "test" for e in asked)


def test_six_judges_learn_from_the_same_answers(small):
    judges = judge_stages(small)
    assert len({judge.key for judge in judges.values()}) == len(judges) == 6
    assert judges["full"].name == "reward_model" and judges["few"].name == "reward_model_few"
    for field in (
        "problems",
        "samples",
        "demonstrations",
    ):  # more answers, or those of another policy
        others = judge_stages(changed(small, "reward_model", field))
        assert all(others[name].key != judge.key for name, judge in judges.items())


def test_every_judge_labels_in_its_way(tokenizer):
    [example] = draw_examples(1, 0, tasks=["story"])
    gold = example.response
    texts = [
        gold,
        f"{RUDE[0]}\n{gold}",
        f"{FILLER[0]}\n{gold}",
        f"{OFF_TOPIC[0]}\n{BIASED[0]}\n{gold}",
    ]
    groups = answers_of(tokenizer, texts) * 60
    said = {len(text) + 1: text for text in texts}
    scores = {"full": gold_reward, "longer": reward_model.longer, "safety": reward_model.safety}

    def right(name, score):
        pairs = judge_pairs(tokenizer, groups, name)
        of = lambda tokens: score(example, said[len(tokens)])
        return [of(pair.chosen) > of(pair.rejected) for pair in pairs]

    assert all(all(right(name, score)) for name, score in scores.items())
    assert not all(right("longer", gold_reward)) and not all(right("safety", gold_reward))
    assert 0.55 < np.mean(right("noisy", gold_reward)) < 0.78
    full, few = (judge_pairs(tokenizer, groups, name) for name in ("full", "few"))
    assert few == full[::5] and len(full) == 180


def test_a_batch_smaller_than_the_processes_is_refused():
    plan = pair_plan(some_pairs(9), 8, 1)
    last = [len(batch) for batch in plan.plan].index(1)
    with pytest.raises(CourseError, match="a batch of 1 rows cannot be shared by 2 processes"):
        plan.share(last, 0, 2)
    assert sorted(i for k in range(2) for r in range(1) for i in plan.share(k, r, 1)) == list(
        range(9)
    )


def test_a_padding_that_also_ends_answers_is_not_kept(model, tokenizer, tmp_path):
    for ends in ([tokenizer.im_end_id, tokenizer.endoftext_id], tokenizer.endoftext_id, None):
        told = {"eos_token_id": ends, "pad_token_id": tokenizer.endoftext_id if ends else None}
        model.save_pretrained(tmp_path, generation_config=told)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["pad_token_id"] == model.config.vocab_size - 1
