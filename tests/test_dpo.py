"""DPO: the loss of TRL, pairs, the Online Merging Optimizer's goldens, exact resume."""

import dataclasses
import json

import pytest
import torch
from conftest import some_pairs, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sft import changed, watched

from qwen_mini import course
from qwen_mini.course import artifacts, stages, versions
from qwen_mini.dpo import (
    OnlineMergingAdamW,
    build_pairs,
    dpo_loss,
    dpo_stage,
    fresh_pairs,
    make_trainer,
    optimize_preferences,
    pair_batch,
    pair_logprobs,
    pairs_stage,
    prefer,
    preferred_stage,
    read_pairs,
    read_preferred,
    reference_logprobs,
    token_logprobs,
)
from qwen_mini.model import Qwen
from qwen_mini.sft import Answer, draw_examples
from qwen_mini.tasks import TASKS, Verdict
from qwen_mini.tokenizer import Tokenizer

FOLDER = artifacts.shipped_dir("long_context")


GOLDEN = [torch.tensor(x) for x in ([-10.0, -5.0], [-12.0, -4.0], [-11.0, -5.5], [-11.5, -4.2])]


@pytest.mark.parametrize("beta, wanted", [(0.1, [0.620957, 0.678260]), (0.5, [0.386871, 0.620957])])
def test_the_loss_is_golden(beta, wanted):
    torch.testing.assert_close(dpo_loss(*GOLDEN, beta), torch.tensor(wanted), rtol=0, atol=1e-6)


def test_the_loss_begins_at_ln_2_and_has_the_gradient_of_the_paper():
    chosen, rejected = (torch.tensor([-3.0, -7.0], requires_grad=True) for _ in range(2))
    loss = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach())
    torch.testing.assert_close(loss, torch.full((2,), 2.0).log())
    chosen, rejected, *then = (x.clone().requires_grad_() for x in GOLDEN)
    dpo_loss(chosen, rejected, *then, 0.5).sum().backward()
    push = -0.5 * torch.sigmoid(-0.5 * torch.tensor([1.5, 0.3]))
    torch.testing.assert_close(chosen.grad, push)
    torch.testing.assert_close(rejected.grad, -push)


def test_unknown_losses_are_refused():
    with pytest.raises(ValueError, match="there is no DPO loss 'kto': use sigmoid, hinge or ipo"):
        dpo_loss(*GOLDEN, kind="kto")


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_the_loss_is_that_of_trl(kind, tokenizer, tmp_path):
    transformers, trl = pytest.importorskip("transformers"), pytest.importorskip("trl")
    from datasets import Dataset

    policy, reference = tiny_model(0), tiny_model(1)
    for model, name in ((policy, "policy"), (reference, "reference")):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    load = lambda name: transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / name, dtype=torch.float32
    )
    pairs = some_pairs()
    text = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    options = dict(
        output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True, bf16=False, max_length=None
    )
    options |= dict(beta=0.3, loss_type=[kind], disable_dropout=True, gradient_checkpointing=False)
    trainer = trl.DPOTrainer(
        model=load("policy"),
        ref_model=load("reference"),
        args=trl.DPOConfig(**options),
        train_dataset=Dataset.from_list(text),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "policy"),
    )
    data = [
        {"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs
    ]
    batch = trainer.data_collator(data)
    trainer.model.eval()
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, batch)
        counts = pair_batch(pairs).weights.sum(1).view(2, -1)
        now, then = (
            token_logprobs(m, pair_batch(pairs)).sum(1).view(2, -1) for m in (policy, reference)
        )
    if kind == "ipo":
        now, then = now / counts, then / counts
    ours = dpo_loss(*now, *then, 0.3, kind).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    parts = reference_logprobs(policy, [pairs[:4], pairs[4:]])
    torch.testing.assert_close(torch.cat(parts, 1), pair_logprobs(policy, pairs))


def test_logprobs_are_those_of_the_whole_softmax():
    model, pairs = tiny_model(), some_pairs(3)
    batch = pair_batch(pairs)
    with torch.no_grad():
        found = token_logprobs(model, batch, temperature=0.7)
        full = torch.log_softmax(model(batch.input_ids) / 0.7, -1).gather(
            -1, batch.targets[..., None]
        )[..., 0]
    torch.testing.assert_close(found, full * batch.weights, rtol=1e-5, atol=1e-5)
    assert (found != 0).sum() == sum(len(p.chosen) + len(p.rejected) for p in pairs)


def group(pattern, seed=0):
    """Answers right (+) and wrong (-), each of different tokens."""
    [example] = draw_examples(1, seed, tasks=["story"])
    return [
        Answer(example, str(i), True, Verdict(sign == "+", True), [100 + i] * (i + 1))
        for i, sign in enumerate(pattern)
    ]


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="+-", min_size=1, max_size=8), st.integers(1, 5))
def test_pairs_are_right_over_wrong_and_use_no_answer_twice(pattern, most):
    tokenizer, answers = Tokenizer.from_pretrained(FOLDER), group(pattern)
    pairs = build_pairs(tokenizer, [answers], most=most)
    assert len(pairs) == min(most, pattern.count("+"), pattern.count("-"))
    signs = {tuple(a.tokens): a.verdict.correct for a in answers}
    assert all(signs[tuple(p.chosen)] and not signs[tuple(p.rejected)] for p in pairs)
    used = [tuple(x) for p in pairs for x in (p.chosen, p.rejected)]
    assert len(set(used)) == len(used)
    prompt = tokenizer.encode_chat(answers[0].example.messages, add_generation_prompt=True)
    assert all(p.prompt == prompt for p in pairs)


def test_two_problems_of_three_are_in_wordings_without_demonstrations(monkeypatch):
    slots = "{name} {start} {thing} {events}"
    task = dataclasses.replace(TASKS["story"], shown=(f"shown {slots}",), asked=(f"asked {slots}",))
    monkeypatch.setattr("qwen_mini.sft.TASKS", {"story": task})
    drawn = []
    take = lambda model, tokenizer, problems, *_: drawn.extend(problems) or []
    monkeypatch.setattr("qwen_mini.dpo.evaluate_tasks", take)
    numbers = dataclasses.replace(course.load_scale("quick").dpo, problems=12)
    assert fresh_pairs(None, None, numbers) == []
    first = [problem.messages[-1]["content"].split()[0] for problem in drawn]
    assert first.count("asked") == 8 and first.count("shown") == 4


def test_pairs_may_match_in_length(tokenizer):
    [pair] = build_pairs(tokenizer, [group("+---+++-")], match_length=True)
    assert abs(len(pair.chosen) - len(pair.rejected)) == 1
    assert build_pairs(tokenizer, [group("+-")], seed=1) == build_pairs(
        tokenizer, [group("+-")], seed=1
    )


BASE, START = torch.tensor([0.5, 1.2, 0.9, 1.4]), torch.ones(4)
GRADIENTS = [torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([0.5, 1.0, -1.0, 2.0])]


@pytest.mark.parametrize(
    "method, keep, wanted",
    [
        (
            "dare",
            1.0,
            [[0.960003, 1.069999, 0.920006, 0.870001], [0.926109, 1.073969, 0.962954, 0.742670]],
        ),
        ("ties", 1.0, [[1.05, 0.98, 1.01, 0.870001], [1.1, 0.96, 1.052948, 0.742670]]),
        ("ties", 0.5, [[1.05, 1.089999, 1.0, 0.870001], [1.1, 1.089999, 1.0, 0.742670]]),
    ],
)
def test_online_merging_is_golden(method, keep, wanted):
    p = torch.nn.Parameter(START.clone())
    optimizer = OnlineMergingAdamW([p], [BASE], lr=0.1, alpha=0.1, keep=keep, method=method)
    for gradient, after in zip(GRADIENTS, wanted, strict=True):
        p.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.tensor(after), rtol=0, atol=2e-6)


def merged(steps=3, size=4_000, seed=0, **options):
    """A parameter after some steps on given gradients, and what it began from."""
    torch.manual_seed(0)
    start, base = torch.randn(size), torch.randn(size)
    p = torch.nn.Parameter(start.clone())
    optimizer = OnlineMergingAdamW([p], [base], lr=0.01, seed=seed, **options)
    for gradient in torch.randn(steps, size):
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach(), start, base


def test_without_merging_it_is_adam():
    """α 0 and everything kept: transformers' form of Adam, written in two lines."""
    found, start, _ = merged(alpha=0.0, keep=1.0, weight_decay=0.1)
    torch.manual_seed(0)
    torch.randn(4_000), torch.randn(4_000)
    p, m, v = start.clone(), 0, 0
    for t, g in enumerate(torch.randn(3, 4_000), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - 0.01 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * m / (v.sqrt() + 1e-6)
        p = p * (1 - 0.01 * 0.1)
    torch.testing.assert_close(found, p, rtol=1e-5, atol=1e-6)


def test_rescaling_and_the_drift_towards_the_delta():
    """Without an update of its own the weight moves by α τ a step: n α τ in all, thinned as it was at the start."""
    torch.manual_seed(0)
    start, base = torch.rand(20_000), torch.rand(20_000)
    for rescale, factor in ((True, 2.0), (False, 1.0)):
        p = torch.nn.Parameter(start.clone())
        optimizer = OnlineMergingAdamW([p], [base], lr=0.0, alpha=0.01, keep=0.5, rescale=rescale)
        for _ in range(5):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        moved, tau = p.detach() - start, start - base
        kept = moved.abs() > 0
        assert abs(kept.float().mean() - 0.5) < 0.02
        wanted = (factor * tau[kept]).clamp(-1, 1) * 0.05
        torch.testing.assert_close(moved[kept], wanted, rtol=1e-3, atol=1e-5)


def test_masks_depend_on_seed_and_step_alone():
    one, again, other = (merged(alpha=0.1, seed=s)[0] for s in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_the_papers_sign_rule_lets_the_smaller_one_yield():
    """An update of +0.1 against a delta of −1: unweighted the delta wins, weighted with α 0.01 the update does."""
    for weighted, wanted in ((False, -0.01), (True, 0.099)):
        p = torch.nn.Parameter(torch.zeros(1))
        options = dict(lr=0.1, alpha=0.01, keep=1.0, method="ties", weighted=weighted)
        optimizer = OnlineMergingAdamW([p], [torch.ones(1)], **options)
        p.grad = -torch.ones(1)
        optimizer.step()
        assert p.item() == pytest.approx(wanted, abs=1e-4)


def test_bad_options_are_named():
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="there is no merging method 'avg': use dare or ties"):
        OnlineMergingAdamW([p], [p], method="avg")
    with pytest.raises(ValueError, match="keep must lie in"):
        OnlineMergingAdamW([p], [p], keep=0.0)
    with pytest.raises(ValueError, match="1 parameters, but 2 base tensors"):
        OnlineMergingAdamW([p], [p, p])


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The quick scale in a folder of its own, in float32, from the shipped base model and with given pairs."""
    from qwen_mini import dpo

    monkeypatch.setenv("QWEN_MINI_RUNS", str(tmp_path))
    config = course.load_scale("quick")
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dtype="float32"),
        dpo=dataclasses.replace(config.dpo, batch_pairs=4, learning_rate=1e-4, warmup_steps=1),
    )
    monkeypatch.setattr(dpo, "start_checkpoint", lambda *_: FOLDER)
    monkeypatch.setattr(dpo, "fresh_pairs", lambda *_: some_pairs(24))
    return config


def test_training_prefers_the_chosen_and_pushes_both_where_dpo_pushes_them(small):
    settings = dataclasses.replace(small.dpo, epochs=3)
    pairs = some_pairs(24)
    trainer, records = prefer(small, FOLDER, pairs, settings)
    assert records[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert records[-1]["accuracy"] > 0.8
    assert records[-1]["chosen"] > records[-1]["rejected"]
    assert trainer.step_count == 18 and json.dumps(records)


@pytest.mark.parametrize("epochs", (1, 2))
def test_the_policy_starts_as_its_reference_in_16_bits_too(small, epochs):
    """β 1 and pairs of very different lengths: with a reference from other batches the first loss would miss ln 2."""
    settings = dataclasses.replace(small.dpo, epochs=epochs, learning_rate=1e-12, beta=1.0)
    long = [
        dataclasses.replace(p, rejected=p.rejected * (1 + i % 7))
        for i, p in enumerate(some_pairs(24))
    ]
    trainer, records = prefer(small, FOLDER, long, settings, dtype=torch.bfloat16)
    assert [r["loss"] for r in records] == pytest.approx([0.693147] * len(records), abs=1e-4)
    assert len(records) == 6 * epochs


def test_an_interrupted_run_reaches_the_same_weights(small):
    whole = optimize_preferences(small, stage="whole")
    state = optimize_preferences(small, stage="cut", stop_after=3)
    assert state.suffix == ".safetensors"
    cut = optimize_preferences(small, stage="cut")
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    for name in ("whole", "cut"):  # a run does not take the place of another one's pairs
        assert read_pairs(pairs_stage(small, stage=f"pairs_{name}").find()) == some_pairs(24)
    weight = lambda folder: Qwen.from_pretrained(folder).model.layers[0].mlp.up_proj.weight
    assert not torch.equal(weight(whole), weight(FOLDER))


def test_merging_needs_the_base(small):
    pairs = some_pairs(8)
    merging = dict(base=FOLDER, alpha=0.5, keep=1.0)
    trainer, step = make_trainer(small, FOLDER, pairs, small.dpo, **merging)
    assert all(
        not delta.any() for delta in trainer.optimizers[0].deltas.values()
    )  # the start is the base here
    step(0)
    assert trainer.step_count == 1


def test_the_key_holds_every_number_that_the_training_reads(small):
    reads = set()
    made = dpo_stage(dataclasses.replace(small, dpo=watched(small.dpo, reads)))
    reads.clear()  # what was read for the handle does not count
    made.make()
    own = {field.name for field in dataclasses.fields(small.dpo)} & reads
    assert {"epochs", "batch_pairs", "beta", "learning_rate", "alpha", "keep"} <= own
    own |= {
        "problems",
        "samples",
        "pairs_per_problem",
        "max_new_tokens",
    }  # by which pairs are drawn
    fixed = "optimizer min_lr_ratio weight_decay schedule decay_fraction grad_accumulation".split()
    rest = set(stages.OPTIMIZER) - own - {*fixed, "matrix_learning_rate"}
    others = [changed(small, "dpo", field) for field in sorted(own)]
    others += [changed(small, "pretraining", field) for field in sorted(rest)]
    assert len({dpo_stage(config).key for config in (small, *others)}) == 1 + len(own) + len(rest)


def test_the_key_holds_seed_and_versions_but_no_measurement(small, monkeypatch):
    key, sampled = dpo_stage(small).key, pairs_stage(small).key
    assert dpo_stage(small, seed=1).key != key
    assert dpo_stage(changed(small, "measure", "dpo_heldout")).key == key
    raised = versions.versions() | {"tasks": 99}
    monkeypatch.setattr(versions, "versions", lambda: raised)
    assert dpo_stage(small).key != key and pairs_stage(small).key != sampled  # other wordings


def test_answers_in_the_reports_areas_are_read_as_they_were_sampled(small, monkeypatch):
    sampled = []

    def answer(model, tokenizer, problems, *_):
        made = [Answer(e, "a ⏎\n", True, Verdict(False, True), [5, 6]) for e in problems]
        sampled.append([[answer] for answer in made])
        return sampled[-1]

    monkeypatch.setattr("qwen_mini.dpo.evaluate_tasks", answer)
    made = preferred_stage(small)
    assert read_preferred(made) == read_preferred(made) == sampled[0] and len(sampled) == 1
    areas = {TASKS[group[0].example.task].area for group in sampled[0]}
    assert areas == {"mathematics", "coding", "instruction following", "logic"}
    assert preferred_stage(changed(small, "dpo", "problems")).key != made.key
