"""GRPO: advantages and losses of TRL, shared prompts, fresh queries, exact resume, clear errors."""

import dataclasses
import json
import random

import pytest
import torch
from conftest import run_two_processes, small_policy_run, tiny_model

from qwen_mini.course import CourseError, artifacts, stages
from qwen_mini.dpo import response_row, token_logprobs
from qwen_mini.grpo import (
    LOSSES,
    Group,
    NoVariance,
    fresh_queries,
    group_advantages,
    group_logprobs,
    grpo_loss,
    new_trainer,
    optimize,
    optimize_policy,
    order_by_reward_variance,
    policy_update,
    probe,
    probe_stage,
    query_weights,
    read_probe,
    verified,
)
from qwen_mini.model import Qwen
from qwen_mini.sft import Answer, to_batch
from qwen_mini.tasks import TASKS, Verdict, split_of

FOLDER = artifacts.shipped_dir("long_context")
LENGTHS = [4, 2, 5, 3]


def padded(*rows):
    out = torch.zeros(4, 5)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out


LOGPROBS = padded([-1, -0.5, -2, -0.2], [-0.3, -1.2], [-0.7] * 5, [-2, -0.1, -0.4])
OLD = padded(
    [-1.3, -0.5, -1.5, -0.2], [-0.3, -1], [-0.9, -0.5, -0.7, -1.2, -0.7], [-1.5, -0.1, -0.9]
)
REFERENCE = padded(
    [-1.1, -0.6, -1.9, -0.3], [-0.2, -1.1], [-0.8, -0.6, -0.9, -0.7, -0.5], [-1.8, -0.2, -0.5]
)
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
REWARDS = [[1, 0, 0.5, 1]]


def test_advantages_are_golden_and_centred():
    found = group_advantages(REWARDS)
    torch.testing.assert_close(
        found, torch.tensor([[0.783186, -1.305310, -0.261062, 0.783186]]), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        group_advantages(REWARDS, scale=False), torch.tensor([[0.375, -0.625, -0.125, 0.375]])
    )
    rewards = torch.rand(5, 8)
    torch.testing.assert_close(group_advantages(rewards).sum(1), torch.zeros(5), rtol=0, atol=1e-5)
    assert not group_advantages([[0.1] * 8, [0.7] * 8]).any()  # whose means are rounded
    torch.testing.assert_close(
        group_advantages(rewards), group_advantages(3 + 2 * rewards), rtol=1e-3, atol=1e-3
    )


def test_rewards_that_cannot_be_compared_are_refused():
    with pytest.raises(CourseError, match="two answers or more"):
        group_advantages([[1.0], [0.0]])
    with pytest.raises(
        CourseError, match="the reward of answer 1 of group 0 is nan: mend the reward function"
    ):
        group_advantages([[0.0, float("nan")], [0.0, 1.0]])


@pytest.mark.parametrize(
    "options, loss, gradient",
    [
        (dict(kind="grpo"), 0.0015121, 0.239040),
        (dict(kind="grpo", beta=0.04), 0.0018169, 0.238360),
        (dict(kind="grpo", beta=0.04, bias_corrected_kl=True), 0.0017940, 0.238374),
        (dict(kind="bnpo"), -0.0942933, 0.169126),
        (dict(kind="dapo"), -0.0942933, 0.169126),
        (dict(kind="dapo", beta=0.04), -0.0939754, None),
        (dict(kind="dapo", beta=0.04, bias_corrected_kl=True), -0.0939938, None),
        (dict(kind="dapo", epsilon_high=0.28), -0.1032439, None),
        (dict(kind="dr_grpo", max_length=8), -0.0412533, None),
        (dict(kind="dr_grpo", max_length=8, beta=0.04), -0.0411143, None),
        (dict(kind="dr_grpo", max_length=8, beta=0.04, bias_corrected_kl=True), -0.0411223, None),
    ],
)
def test_the_losses_are_golden(options, loss, gradient):
    logprobs, reference = (
        LOGPROBS.clone().requires_grad_(),
        REFERENCE if "beta" in options else None,
    )
    found, seen = grpo_loss(logprobs, OLD, group_advantages(REWARDS)[0], MASK, reference, **options)
    found.backward()
    assert found.item() == pytest.approx(loss, abs=2e-7)
    if gradient:
        assert logprobs.grad.norm().item() == pytest.approx(gradient, abs=2e-6)
    assert not logprobs.grad[~MASK].any()
    assert ("kl" in seen) == (reference is not None)


def test_parts_of_a_batch_sum_to_the_whole():
    advantages = group_advantages(REWARDS)[0]
    for kind in LOSSES:
        whole, _ = grpo_loss(LOGPROBS, OLD, advantages, MASK, kind=kind, max_length=8)
        total = 4 if kind in ("grpo", "dr_grpo") else sum(LENGTHS)
        parts = [
            grpo_loss(
                LOGPROBS[s], OLD[s], advantages[s], MASK[s], kind=kind, max_length=8, total=total
            )[0]
            for s in (slice(0, 1), slice(1, 4))
        ]
        torch.testing.assert_close(sum(parts), whole)


def test_on_policy_nothing_is_clipped_and_the_gradient_is_the_policy_gradient():
    logprobs, advantages = LOGPROBS.clone().requires_grad_(), group_advantages(REWARDS)[0]
    loss, seen = grpo_loss(logprobs, LOGPROBS, advantages, MASK)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -advantages[:, None] * MASK / MASK.sum())
    assert seen["clipped"] == 0
    assert seen["sampled_nll"] == pytest.approx(-(LOGPROBS * MASK).sum().item() / sum(LENGTHS))
    _, seen = grpo_loss(LOGPROBS, OLD, advantages, MASK)
    ratio, down = (LOGPROBS - OLD).exp(), advantages[:, None] < 0
    outside = MASK & ((ratio < 0.8) & down | (ratio > 1.2) & ~down)
    assert seen["clipped"] == pytest.approx(outside.sum().item() / sum(LENGTHS)) != 0


def test_unknown_losses_are_refused():
    advantages = group_advantages(REWARDS)[0]
    with pytest.raises(ValueError, match="there is no loss 'ppo': use one of grpo"):
        grpo_loss(LOGPROBS, OLD, advantages, MASK, kind="ppo")
    with pytest.raises(ValueError, match="dr_grpo divides by a fixed length"):
        grpo_loss(LOGPROBS, OLD, advantages, MASK, kind="dr_grpo")


def some_groups(count=5, size=4, seed=0, longest=12):
    rng = random.Random(seed)
    draw = lambda low, high: [rng.randrange(30, 900) for _ in range(rng.randint(low, high))]
    return [
        Group(
            draw(5, 30),
            [draw(1, longest) for _ in range(size)],
            [float(i % 2) for i in range(size)],
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def trainer_of_trl(tmp_path_factory, tokenizer):
    """TRL's trainer around the tiny model, and that model."""
    transformers, trl = pytest.importorskip("transformers"), pytest.importorskip("trl")
    from datasets import Dataset

    folder, model = tmp_path_factory.mktemp("trl"), tiny_model()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    def make(**extra):
        options = dict(output_dir=str(folder / "out"), report_to=[], use_cpu=True, bf16=False, epsilon=0.2,
                       per_device_train_batch_size=8, num_generations=4, max_completion_length=12)  # fmt: skip
        options |= extra
        return trl.GRPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(
                folder / "model", dtype=torch.float32
            ),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(**options),
            train_dataset=Dataset.from_list([{"prompt": "a"}]),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder / "model"),
        )

    return make, model


@pytest.mark.parametrize(
    "kind, options",
    [
        ("grpo", {}), ("bnpo", {}), ("dr_grpo", {}), ("dapo", {}), ("dapo", dict(epsilon_high=0.28)),
        ("cispo", dict(epsilon_high=4.0)), ("grpo", dict(beta=0.04)), ("dapo", dict(beta=0.04)),
        ("grpo", dict(beta=0.04, bias_corrected_kl=True)), ("dapo", dict(beta=0.04, bias_corrected_kl=True)),
    ],
)  # fmt: skip
def test_the_whole_chain_is_that_of_trl(trainer_of_trl, kind, options):
    """Prompts and responses in, loss out: our shared prompts against TRL's padded rows."""
    make, model = trainer_of_trl
    corrected = options.get("bias_corrected_kl", False)
    options = {name: value for name, value in options.items() if name != "bias_corrected_kl"}
    theirs = options | (
        {"epsilon_high": 5.0} if kind == "cispo" else {}
    )  # TRL's bound is 1 + ε_high itself there
    trainer = make(loss_type=kind, use_bias_correction_kl=corrected, **theirs)
    groups = some_groups()
    rows = [(g.prompt, r) for g in groups for r in g.responses]
    left = lambda ids: [0] * (30 - len(ids)) + ids
    right = lambda ids: ids + [0] * (12 - len(ids))
    rng = torch.Generator().manual_seed(0)
    noise = [0.3 * torch.randn(len(rows), 12, generator=rng) for _ in range(2)]
    with torch.no_grad():
        now, mask = group_logprobs(model, groups)
    width = mask.shape[1]
    old, reference = (
        (now + x[:, :width] * mask for x in noise)
        if width <= 12
        else (now[:, :12] + x for x in noise)
    )
    now, mask = now[:, :12], mask[:, :12]
    old, reference = old[:, :12], reference[:, :12]
    advantages = group_advantages([g.rewards for g in groups]).flatten()
    fill = lambda x: torch.cat([x, torch.zeros(len(rows), 12 - x.shape[1])], 1)
    inputs = {
        "prompt_ids": torch.tensor([left(p) for p, _ in rows]),
        "prompt_mask": torch.tensor([left([1] * len(p)) for p, _ in rows]),
        "completion_ids": torch.tensor([right(r) for _, r in rows]),
        "completion_mask": torch.tensor([right([1] * len(r)) for _, r in rows]),
        "advantages": advantages,
        "old_per_token_logps": fill(old),
        "ref_per_token_logps": fill(reference),
        "num_items_in_batch": mask.sum(),
    }
    trainer.model.eval()
    with torch.no_grad():
        theirs = trainer._compute_loss(trainer.model, inputs)
    reference = reference if "beta" in options else None
    numbers = {"max_length": 12, "bias_corrected_kl": corrected} | options
    ours, _ = grpo_loss(now, old, advantages, mask, reference, kind, **numbers)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_shared_prompts_give_the_numbers_and_gradients_of_plain_rows():
    groups = some_groups(seed=3)
    rows = [response_row(g.prompt, r) for g in groups for r in g.responses]
    pick = torch.randn(len(rows), 40, generator=torch.Generator().manual_seed(1))
    gradients = []
    for shared in (True, False):
        model = tiny_model().double()
        if shared:
            found, mask = group_logprobs(model, groups, temperature=0.8)
        else:
            batch = to_batch(rows)
            spread = token_logprobs(model, batch, temperature=0.8)
            found = torch.zeros(mask.shape).masked_scatter(mask, spread[batch.weights != 0])
        (found * pick[:, : found.shape[1]]).sum().backward()
        gradients.append([found.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert model.attention.func.__name__ == "causal_attention"


def answers_of(pattern, task="story", level=1):
    example = TASKS[task].generate(random.Random(0), level)
    return [Answer(example, "x", True, Verdict(s == "+", True), [5, 6]) for s in pattern]


def test_queries_follow_the_variance_of_their_kind_and_repeat_exactly():
    kinds = [
        ("story", 1, "shown"),
        ("rules", 1, "shown"),
        ("story", 2, "shown"),
        ("story", 2, "asked"),
    ]
    rewards = verified(
        [answers_of("+-+-"), answers_of("++++"), answers_of("+---"), answers_of("+-+-")]
    )
    assert rewards[0] == [1.0, 0.0, 1.0, 0.0]
    weights = query_weights(kinds, rewards)
    assert weights[kinds[1]] == 0 and weights[kinds[0]] / weights[kinds[2]] == pytest.approx(4 / 3)
    assert weights[kinds[3]] == weights[kinds[0]] and sum(weights.values()) == pytest.approx(1)
    assert query_weights(kinds[:2], rewards[:2]) == {kinds[0]: 1.0, kinds[1]: 0.0}
    drawn = fresh_queries(400, weights, 0, 7)
    assert {(e.task, e.level) for e in drawn} == {("story", 1), ("story", 2)}
    # stories of level 1 that pre-training has shown are training problems whatever their hash
    assert all(split_of(f"{e.task}/{e.key}") == "train" for e in drawn if e.level == 2)
    assert [e.key for e in drawn] == [e.key for e in fresh_queries(400, weights, 0, 7)]
    assert [e.key for e in drawn] != [e.key for e in fresh_queries(400, weights, 0, 8)]
    new = [e for e in drawn if e.messages[-1]["content"].startswith(("First", "Say how many"))]
    assert 110 < len(new) < 185 and all(e.level == 2 for e in new)
    with pytest.raises(NoVariance, match="no group has any variance in its rewards"):
        query_weights(kinds[1:2], rewards[1:2])


def test_the_probe_asks_every_task_at_every_level_shown_and_asked(config, monkeypatch):
    asked = []

    def roll_out(model, tokenizer, examples, settings, seed=0):
        asked.extend(examples)
        return None, [Group([1], [[1], [2]], [1.0, 0.0]) for _ in examples]

    monkeypatch.setattr("qwen_mini.grpo.roll_out", roll_out)
    weights = probe(None, None, config.grpo)
    every = {
        (t, level, how) for t in TASKS for level in config.grpo.levels for how in ("shown", "asked")
    }
    assert set(weights) == every and len(asked) == config.grpo.probe * len(every)
    assert all(weight == pytest.approx(1 / len(every)) for weight in weights.values())
    assert {(e.task, e.level) for e in asked} == {kind[:2] for kind in every}


def test_the_curriculum_puts_the_highest_variance_first():
    assert order_by_reward_variance([[1, 1, 1], [1, 0, 0], [5, 0, 5], [0, 0, 0]]) == [2, 1, 0, 3]


@pytest.fixture
def config():
    return small_policy_run()


def test_an_update_raises_what_was_rewarded(config):
    groups = some_groups(6, longest=6)
    trainer = new_trainer(config, FOLDER, config.grpo)
    advantages = group_advantages([g.rewards for g in groups]).flatten()

    def gain(model):
        with torch.no_grad():
            found, _ = group_logprobs(model, groups)
        return (found.sum(1) * advantages).mean().item()

    before = gain(trainer.model)
    record = policy_update(trainer, groups, config.grpo)
    assert gain(trainer.model) > before
    assert record["groups"] == 1 and record["reward"] == 0.5 and record["grad_norm"] > 0
    assert record["clipped"] == 0 and json.dumps(record)


def test_micro_batches_change_nothing(config):
    groups, weights = some_groups(6, longest=6), []
    groups[2] = dataclasses.replace(groups[2], rewards=[1.0] * 4)  # no variance: left out
    for micro in (1, 6):
        trainer = new_trainer(config, FOLDER, config.grpo)
        record = policy_update(
            trainer, groups, dataclasses.replace(config.grpo, micro_groups=micro)
        )
        weights.append([p.detach().clone() for p in trainer.masters])
        assert record["groups"] == pytest.approx(5 / 6)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_groups_without_variance_are_left_out_and_counted(config, kind):
    """Their gradient is zero; the loss of the rest is divided as if they had been computed."""
    groups = some_groups(4, longest=6)
    groups[1] = dataclasses.replace(groups[1], rewards=[1.0] * 4)
    trainer = new_trainer(config, FOLDER, config.grpo)
    with torch.no_grad():
        now, mask = group_logprobs(trainer.model, groups)
    gains = group_advantages([g.rewards for g in groups], scale=kind != "dr_grpo").flatten()
    whole, _ = grpo_loss(now, now, gains, mask, kind=kind, max_length=config.grpo.max_new_tokens)
    record = policy_update(trainer, groups, config.grpo, kind)
    assert record["loss"] == pytest.approx(whole.item(), abs=1e-6)
    assert record["groups"] == 0.75


def test_a_flat_batch_is_drawn_again_and_then_an_error(config, tokenizer, monkeypatch):
    from qwen_mini import grpo

    trainer = new_trainer(config, FOLDER, config.grpo)
    flat, varied = some_groups(2, longest=6), some_groups(2, longest=6)
    flat = [dataclasses.replace(g, rewards=[0.0] * 4) for g in flat]
    batches, seeds = [flat, varied], []

    def drawn(model, tokenizer, examples, settings, seed, reward):
        seeds.append((seed, examples[0].key))
        return [answers_of("+-")], batches[min(len(seeds), len(batches)) - 1]

    monkeypatch.setattr(grpo, "roll_out", drawn)
    step = optimize_policy(trainer, tokenizer, config.grpo, {("story", 1, "asked"): 1.0})
    assert step(0)["step"] == 1 and len(set(seeds)) == 2
    batches[1] = flat
    seeds.clear()
    with pytest.raises(NoVariance, match="no group has any variance"):
        step(1)
    assert len(seeds) == 3 and trainer.step_count == 1


def test_fewer_queries_than_processes_are_refused(config, tokenizer, monkeypatch):
    from qwen_mini import grpo

    monkeypatch.setattr(grpo, "world", lambda: (0, config.grpo.queries + 1))
    trainer = new_trainer(config, FOLDER, config.grpo)
    step = optimize_policy(trainer, tokenizer, config.grpo, {("story", 1, "asked"): 1.0})
    with pytest.raises(CourseError, match="leave some of .* processes without a problem"):
        step(0)


def test_a_second_inner_step_is_off_policy_and_a_kl_term_is_seen(config):
    settings = dataclasses.replace(config.grpo, learning_rate=3e-3, warmup_steps=0, beta=0.1)
    trainer = new_trainer(config, FOLDER, settings)
    reference = Qwen.from_pretrained(FOLDER).eval()
    record = policy_update(trainer, some_groups(4), settings, inner_steps=3, reference=reference)
    assert record["clipped"] > 0 and record["kl"] > 0
    assert trainer.step_count == 3


def test_a_batch_without_any_signal_is_an_error_and_leaves_the_weights(config):
    trainer = new_trainer(config, FOLDER, config.grpo)
    before = trainer.model.model.norm.weight.detach().clone()
    flat = [dataclasses.replace(g, rewards=[0.0] * 4) for g in some_groups()]
    with pytest.raises(NoVariance, match="no group has any variance"):
        policy_update(trainer, flat, config.grpo)
    broken = [dataclasses.replace(g, rewards=[0.0, 1.0, float("nan"), 0.0]) for g in some_groups()]
    with pytest.raises(CourseError, match="is nan"):
        policy_update(trainer, broken, config.grpo)
    assert torch.equal(trainer.model.model.norm.weight, before) and trainer.step_count == 0


def test_equal_rewards_still_have_the_gradient_of_a_kl_term(config):
    settings = dataclasses.replace(config.grpo, beta=0.1)
    trainer, groups = new_trainer(config, FOLDER, settings), some_groups(3, longest=6)
    flat = [dataclasses.replace(g, rewards=[1.0] * 4) for g in groups]
    torch.manual_seed(0)
    reference = Qwen(trainer.model.config).eval()
    with torch.no_grad():
        (now, mask), (theirs, _) = (
            group_logprobs(model, flat) for model in (trainer.model, reference)
        )
    d = (theirs - now)[mask].double()
    record = policy_update(trainer, flat, settings, reference=reference)
    assert record["kl"] == pytest.approx((d.exp() - d - 1).mean().item(), rel=1e-4)
    assert record["loss"] == pytest.approx(0.1 * record["kl"], rel=1e-4)
    assert record["groups"] == 0 and record["grad_norm"] > 0


def test_a_verifier_that_raises_stops_the_run(config, monkeypatch):
    from qwen_mini.tasks import VerifierError

    def broken(example, found):
        raise ZeroDivisionError("inside")

    task = dataclasses.replace(TASKS["story"], check=broken)
    monkeypatch.setitem(TASKS, "story", task)
    example = task.generate(random.Random(0))
    with pytest.raises(VerifierError, match="the verifier of 'story' failed"):
        task.verify(example, example.response)


@pytest.fixture
def rewarded(config, tmp_path, monkeypatch):
    """GRPO from the base model, with a reward that even an untrained answer can get: its first token."""
    from qwen_mini import grpo

    monkeypatch.setenv("QWEN_MINI_RUNS", str(tmp_path))
    monkeypatch.setattr(grpo, "dpo_checkpoint", lambda *_: FOLDER)
    kinds = [("story", 1, "shown"), ("rules", 1, "shown")]
    groups = [Group([1, 2, 3], [[4], [5, 6]], [1.0, 0.0]) for _ in kinds]
    monkeypatch.setattr(grpo, "probe_groups", lambda *_: (kinds, groups))
    spread = lambda answers: [[float(a.tokens[0] % 5) for a in group] for group in answers]
    original = grpo.optimize_policy

    def by_first_token(trainer, tokenizer, settings, weights, seed, **options):
        return original(trainer, tokenizer, settings, weights, seed, spread, **options)

    monkeypatch.setattr(grpo, "optimize_policy", by_first_token)
    return dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, beta=0.01))


def test_an_interrupted_run_reaches_the_same_weights(rewarded):
    config = rewarded
    whole = optimize(config, stage="whole")
    state = optimize(config, stage="cut", stop_after=2)
    assert state.suffix == ".safetensors"
    cut = optimize(config, stage="cut")
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    records = stages.metrics(whole)
    assert [r["step"] for r in records] == [1, 2, 3, 4] and all(r["grad_norm"] > 0 for r in records)
    assert records[0]["kl"] == 0 < records[-1]["kl"]  # measured against the start
    assert (
        len(records[0]["view"]["answers"])
        == len(records[3]["end"]["answers"])
        == config.grpo.group_size
    )


def test_the_probe_is_kept_with_the_tokens_that_it_took(rewarded):
    weights, tokens = read_probe(probe_stage(rewarded).folder())
    assert weights == {("story", 1, "shown"): 0.5, ("rules", 1, "shown"): 0.5}
    assert tokens == 2 * (3 + 1 + 2)


@pytest.mark.parametrize("flat, kind", [((2,), "dapo"), ((0, 2, 4), "grpo"), ((2,), "bnpo")])
def test_two_processes_update_as_one(config, tmp_path, flat, kind):
    """Each brings half of the groups, some or all of one half without variance; "bnpo" is the mean of both halves."""
    body = (
        "import json\n"
        "from qwen_mini import course\n"
        "from qwen_mini.course import artifacts\n"
        "from qwen_mini.grpo import Group, new_trainer, policy_update\n"
        "from qwen_mini.course.ranks import world\n"
        "groups = [Group(**g) for g in json.load(open(sys.argv[1]))]\n"
        "config = course.load_scale('quick')\n"
        "trainer = new_trainer(config, artifacts.shipped_dir('long_context'), config.grpo)\n"
        "rank, size = world()\n"
        "record = policy_update(trainer, groups[rank::size], config.grpo, sys.argv[3])\n"
        "if rank == 0:\n"
        "    json.dump(record, open(sys.argv[2], 'w'))"
    )
    groups = some_groups(6, longest=6)
    for i in flat:
        groups[i] = dataclasses.replace(groups[i], rewards=[1.0] * 4)
    given, found = tmp_path / "groups.json", tmp_path / "found.json"
    given.write_text(json.dumps([dataclasses.asdict(g) for g in groups]))
    run_two_processes(tmp_path, body, given, found, kind)
    two = json.loads(found.read_text())
    one = lambda part: policy_update(
        new_trainer(config, FOLDER, config.grpo), part, config.grpo, kind
    )
    record = one(groups)
    if kind == "bnpo":
        halves = [one(groups[rank::2])["loss"] for rank in range(2)]
        assert abs(record.pop("loss") - two["loss"]) > 1e-4  # of all tokens: not the same
        assert two.pop("loss") == pytest.approx(sum(halves) / 2, rel=1e-4)
        del record["grad_norm"], two["grad_norm"]
    assert two == pytest.approx(record, rel=1e-4, abs=1e-6)
