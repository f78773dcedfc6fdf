"""Chapters 08 and 09: the loss, the schedule, the optimisers, the batches, exact resume, and the measures of held-out text."""

import collections
import dataclasses
import json
import lzma
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_two_processes
from safetensors.torch import load_file
from torch import nn

from qwen_mini import corpus as corpus_module
from qwen_mini import pretraining
from qwen_mini.corpus import open_corpus, open_prepared, prepare_corpus
from qwen_mini.course import CourseError, artifacts, load_scale, stages
from qwen_mini.course.scales import FOLDER, Phase, Pretraining
from qwen_mini.model import ModelConfig, Qwen
from qwen_mini.pretraining import (
    AdamW,
    Batch,
    MixtureSampler,
    Muon,
    Trainer,
    cross_entropy,
    evaluate_bits_per_byte,
    heldout_nll,
    learning_rate_factor,
    linear_cross_entropy,
    load_training_state,
    ngram_nll,
    pretrain,
    pretraining_stage,
    save_training_state,
    token_sizes,
    xz_bits_per_byte,
)
from qwen_mini.tokenizer import Tokenizer

TINY = """
[run]
threads = 1
memory_gib = 2.0
dtype = "{dtype}"
[tokenizer]
vocab_size = 384
training_bytes = 60_000
[model]
vocab_size = 384
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 8
max_position_embeddings = 64
rope_theta = 1000.0
rms_norm_eps = 1e-6
tie_word_embeddings = true
initializer_range = 0.02
[corpus]
sources = ["python"]
max_bytes_per_source = 150_000
heldout_fraction = 0.1
max_heldout_bytes = 20_000
task_documents = 200
chat_documents = 30
needle_rows = 60
needle_lengths = [64]
[pretraining]
batch_tokens = 512
optimizer = "muon"
learning_rate = 3e-3
matrix_learning_rate = 0.02
min_lr_ratio = 0.1
warmup_steps = 4
schedule = "cosine"
decay_fraction = 0.2
beta1 = 0.9
beta2 = 0.95
eps = 1e-8
weight_decay = 0.1
clip_norm = 1.0
grad_accumulation = 1
[[pretraining.phases]]
tokens = 5_120
length = 32
mixture = {{ python = 0.7, tasks = 0.3 }}
[[pretraining.phases]]
tokens = 10_240
length = 64
mixture = {{ python = 0.6, tasks = 0.15, chat = 0.1, needles_64 = 0.15 }}

[long_context]
start = "own"
batch_tokens = 1024
learning_rate = 1e-3
matrix_learning_rate = 0.004
warmup_steps = 1
needle_share = 0.3
needle_rows = 8

[[long_context.stages]]
tokens = 1024
rope_theta = 20000.0
lengths = [512]
shares = [1.0]

[dual_chunk]
factors = [1, 4]
tries = 2

[sparse_prefill]
lengths = [128, 256]
chunk_tokens = 384
tries = 1

[sft]
demonstrations = 2
replay = 0.25
replay_weight = 0.2
epochs = 1
batch_rows = 4
learning_rate = 1e-3
matrix_learning_rate = 0.01
min_lr_ratio = 0.1
warmup_steps = 1

[reward_model]
start = "own"
demonstrations = 1
problems = 1
samples = 2
epochs = 1
batch_pairs = 2
learning_rate = 1e-3
warmup_steps = 1
center = 0.01

[dpo]
start = "own"
problems = 1
samples = 2
pairs_per_problem = 1
max_new_tokens = 8
epochs = 1
batch_pairs = 2
beta = 0.1
learning_rate = 1e-4
warmup_steps = 1
alpha = 1e-3
keep = 0.5

[grpo]
start = "own"
steps = 1
queries = 2
group_size = 2
micro_groups = 1
levels = [1]
probe = 1
max_new_tokens = 8
learning_rate = 1e-4
warmup_steps = 1
epsilon = 0.2
epsilon_high = 0.28
beta = 0.0

[measure]
eval_every = 10
eval_tokens = 512
needle_tries = 2
sft_problems = 1
sft_fresh = 1
ablation_demonstrations = 2
long_rows = 2
reward_heldout = 1
best_of = 2
dpo_heldout = 1
dpo_seeds = 1
grpo_heldout = 1
grpo_seeds = 1
side_steps = 1
"""


def tiny_scale(folder: Path, dtype: str = "float32") -> str:
    """Write a scale that trains for 30 steps in about a second; returns its path."""
    path = folder / "tiny.toml"
    path.write_text(TINY.format(dtype=dtype))
    return str(path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(environment, scale path, corpus): one corpus that all tests of this module read."""
    folder = tmp_path_factory.mktemp("pretraining")
    old, threads = os.environ["QWEN_MINI_RUNS"], torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["QWEN_MINI_RUNS"] = str(folder / "runs")
    scale = tiny_scale(folder)
    config = load_scale(scale)
    corpus = open_corpus(prepare_corpus(config))
    yield config, scale, corpus, folder / "runs"
    os.environ["QWEN_MINI_RUNS"] = old
    torch.set_num_threads(threads)


def fresh(config, dtype=torch.float32, total_steps=30, **changes) -> Trainer:
    torch.manual_seed(0)
    settings = dataclasses.replace(config.pretraining, **changes)
    return Trainer(Qwen(ModelConfig.from_scale(config)), settings, total_steps, dtype)


# ---------------------------------------------------------------- loss
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tokens", [7, 512, 1300])
def test_linear_cross_entropy_equals_the_plain_one(weighted, tokens):
    hidden = torch.randn(tokens, 24, requires_grad=True)
    head = torch.randn(50, 24, requires_grad=True)
    targets = torch.randint(0, 50, (tokens,))
    weights = torch.rand(tokens) if weighted else None
    plain, fast = (f(hidden, head, targets, weights) for f in (cross_entropy, linear_cross_entropy))
    torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(3 * fast, (hidden, head)),
        torch.autograd.grad(3 * plain, (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_linear_cross_entropy_of_a_hopeless_target():
    """A target whose probability is 0 in float32 still has a finite loss, and the right one."""
    hidden, head = 40 * torch.randn(20, 24), 4 * torch.randn(50, 24)
    targets = (hidden @ head.T).argmin(-1)
    plain = cross_entropy(hidden, head, targets)
    assert plain > 500
    torch.testing.assert_close(linear_cross_entropy(hidden, head, targets), plain, rtol=1e-5, atol=1e-3)


def test_loss_and_gradients_equal_transformers():
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(97, 32, 48, 2, 4, 2, 8, 64, 10_000.0, 1e-6, True)
    model = Qwen(config)
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config.to_dict()))
    theirs.load_state_dict(model.state_dict())
    ids = torch.randint(0, 97, (3, 40))
    theirs(input_ids=ids, labels=ids).loss.backward()
    hidden = model.hidden_states(ids[:, :-1]).flatten(0, 1)
    loss = linear_cross_entropy(hidden, model.lm_head.weight, ids[:, 1:].flatten())
    loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(loss, theirs(input_ids=ids, labels=ids).loss, rtol=1e-6, atol=1e-6)
    reference = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, reference[name].grad, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- schedule and optimisers
def test_schedule_golden():
    golden = {0: 3e-5, 4: 1.5e-4, 9: 3e-4, 10: 3e-4, 32: 2.6211e-4, 55: 1.65e-4, 77: 7.122e-5, 100: 3e-5}
    for step, value in golden.items():
        assert 3e-4 * learning_rate_factor(step, 100, 10) == pytest.approx(value, rel=1e-4)


def test_wsd_is_flat_then_falls():
    factors = [learning_rate_factor(s, 100, 10, "wsd", 0.1, 0.2) for s in range(101)]
    assert set(factors[10:82]) == {1.0}
    assert factors[100] == pytest.approx(0.1)
    assert factors[91] == pytest.approx(0.55)


@pytest.mark.parametrize("shapes", [[(40, 24), (40, 24), (24, 40)], [(16, 16)]])
def test_optimisers_equal_pytorch(shapes):
    for ours, theirs, options in [
        (AdamW, torch.optim.AdamW, {"betas": (0.9, 0.95), "eps": 1e-8}),
        (Muon, torch.optim.Muon, {"momentum": 0.95}),
    ]:
        p = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        q = [nn.Parameter(x.detach().clone()) for x in p]
        a, b = ours(p, lr=0.02, weight_decay=0.1, **options), theirs(q, lr=0.02, weight_decay=0.1, **options)
        for _ in range(6):
            for x, y in zip(p, q, strict=True):
                x.grad = torch.randn_like(x)
                y.grad = x.grad.clone()
            a.step()
            b.step()
        for x, y in zip(p, q, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_muon_iterates_in_the_precision_of_the_run(shape):
    """Newton–Schulz acts on singular values alone: U p(p(…(S))) Vᵀ, with the same polynomial five times."""
    matrix = torch.randn(3, *shape)
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    want = (u @ torch.diag_embed(values) @ v).float()
    exact = pretraining.orthogonalize(matrix, dtype=torch.float32)
    torch.testing.assert_close(exact, want, rtol=1e-4, atol=1e-5)
    rough = (pretraining.orthogonalize(matrix) - want).abs().max()
    assert 1e-4 < rough < 0.1  # the default is bfloat16
    settings = dataclasses.replace(load_scale("laptop").pretraining, optimizer="muon")
    for dtype in (torch.float32, torch.bfloat16):
        model = Qwen(ModelConfig(64, 16, 32, 1, 2, 1, 8, 32, 10_000.0, 1e-6, True))
        muon = pretraining.Trainer(model, settings, 1, dtype).optimizers[0]
        assert isinstance(muon, Muon) and muon.dtype == dtype


# ---------------------------------------------------------------- batches
def test_batches_depend_on_seed_and_step_alone(prepared):
    config, _, corpus, _ = prepared
    make = lambda seed: MixtureSampler(corpus, config.pretraining.phases, 512, seed)
    one, other = make(0), make(0)
    late = other.batch(25)
    for step in range(25):
        one.batch(step)
    assert torch.equal(one.batch(25).input_ids, late.input_ids)
    assert not torch.equal(make(1).batch(25).input_ids, late.input_ids)


def test_shares_are_kept_at_every_step(prepared):
    config, _, corpus, _ = prepared
    sampler = MixtureSampler(corpus, config.pretraining.phases, 512)
    for plan, phase in zip(sampler.plans, sampler.phases, strict=True):
        rows = 512 // phase.length
        wanted = np.arange(len(plan))[:, None] * rows * np.array(list(phase.mixture.values()))
        assert (np.diff(plan, axis=0).sum(1) == rows).all()
        assert (np.diff(plan, axis=0) >= 0).all()
        assert np.abs(plan - wanted).max() < 2


def test_every_window_comes_once_before_any_comes_again(prepared):
    _, _, corpus, _ = prepared
    sampler = MixtureSampler(corpus, (Phase(100_000, 64, {"chat": 1.0}),), 512)
    tokens = np.asarray(corpus.tokens("chat", "train")).astype(np.int64)
    count = (len(tokens) - 65) // 64 + 1
    seen = [tuple(row.tolist()) for step in range(count // 8) for row in sampler.batch(step).input_ids]
    windows = collections.Counter(tuple(tokens[i * 64 : i * 64 + 64].tolist()) for i in range(count))
    assert not collections.Counter(seen) - windows


def test_ranks_share_one_batch(prepared):
    config, _, corpus, _ = prepared
    sampler = MixtureSampler(corpus, config.pretraining.phases, 512)
    whole = sampler.batch(20)
    parts = [sampler.batch(20, rank, 3) for rank in range(3)]
    for rank, part in enumerate(parts):
        assert torch.equal(part.input_ids, whole.input_ids[rank::3])
        assert torch.equal(part.weights, whole.weights[rank::3])


def test_targets_follow_inputs_and_needles_carry_weights(prepared):
    config, _, corpus, _ = prepared
    batch = MixtureSampler(corpus, config.pretraining.phases, 512).batch(12)
    assert torch.equal(batch.input_ids[:, 1:], batch.targets[:, :-1])
    needles = torch.from_numpy(batch.domain_ids == batch.domains.index("needles_64"))
    assert needles.any() and (~needles).any()
    assert (batch.weights[~needles] == 1).all()
    assert batch.weights[needles].max() > 1 > batch.weights[needles].min()


def test_sampler_errors_say_what_to_do(prepared):
    _, _, corpus, _ = prepared
    with pytest.raises(ValueError, match="names the domain 'poems'.*prepare the corpus again"):
        MixtureSampler(corpus, (Phase(512, 32, {"poems": 1.0}),), 512)
    with pytest.raises(ValueError, match="rows of 64 tokens.*windows of 32"):
        MixtureSampler(corpus, (Phase(512, 32, {"needles_64": 1.0}),), 512).batch(0)
    with pytest.raises(ValueError, match="shorter than one window"):
        MixtureSampler(corpus, (Phase(2**20, 2**20, {"chat": 1.0}),), 2**20).batch(0)


# ---------------------------------------------------------------- trainer
def test_accumulation_changes_nothing(prepared):
    config, _, corpus, _ = prepared
    sampler = MixtureSampler(corpus, config.pretraining.phases, 512)
    whole, parts = fresh(config, optimizer="adamw"), fresh(config, optimizer="adamw", grad_accumulation=4)
    for step in range(10, 14):
        a, b = whole.step(sampler.batch(step)), parts.step(sampler.batch(step))
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_step_equals_a_loop_written_by_hand(prepared):
    """Trainer in float32 with AdamW against torch's optimiser, clipping and the plain loss."""
    config, _, corpus, _ = prepared
    sampler = MixtureSampler(corpus, config.pretraining.phases, 512)
    trainer = fresh(config, optimizer="adamw")
    torch.manual_seed(0)
    model = Qwen(ModelConfig.from_scale(config))
    s = config.pretraining
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(s.beta1, s.beta2),
        eps=s.eps,
    )
    for step in range(6):
        batch = sampler.batch(step + 10)
        record = trainer.step(batch)
        losses = nn.functional.cross_entropy(
            model(batch.input_ids).flatten(0, 1), batch.targets.flatten(), reduction="none"
        )
        loss = (losses * batch.weights.flatten()).sum() / batch.weights.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), s.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = s.learning_rate * learning_rate_factor(step, 30, s.warmup_steps, s.schedule, s.min_lr_ratio)
        optimizer.step()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(trainer.masters, model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_is_exact(prepared, tmp_path, dtype, optimizer):
    config, _, corpus, _ = prepared
    sampler = MixtureSampler(corpus, config.pretraining.phases, 512)
    through = fresh(config, dtype, optimizer=optimizer)
    expected = [through.step(sampler.batch(s)) for s in range(12)]
    first = fresh(config, dtype, optimizer=optimizer)
    metrics = [first.step(sampler.batch(s)) for s in range(7)]
    save_training_state(tmp_path / "state.safetensors", first, metrics)
    second = fresh(config, dtype, optimizer=optimizer)
    metrics = load_training_state(tmp_path / "state.safetensors", second)
    metrics += [second.step(sampler.batch(s)) for s in range(7, 12)]
    assert metrics == expected
    for a, b in zip(through.masters, second.masters, strict=True):
        assert torch.equal(a, b)


def test_bfloat16_works_on_float32_masters(prepared):
    config, _, corpus, _ = prepared
    trainer = fresh(config, torch.bfloat16)
    trainer.step(MixtureSampler(corpus, config.pretraining.phases, 512).batch(0))
    for master, p in zip(trainer.masters, trainer.working, strict=True):
        assert master.dtype == torch.float32 and p.dtype == torch.bfloat16
        assert torch.equal(master.bfloat16(), p)


def test_a_gradient_that_is_not_finite_stops_the_run(prepared):
    config, _, corpus, _ = prepared
    trainer = fresh(config)
    with torch.no_grad():
        trainer.masters[0][:] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss at step 0 is nan.*last training state and lower"):
        trainer.step(MixtureSampler(corpus, config.pretraining.phases, 512).batch(0))


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_told_apart(prepared):
    config, _, corpus, _ = prepared
    trainer = fresh(config)
    before = [p.detach().clone() for p in trainer.masters]
    trainer.masters[-1].register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(FloatingPointError, match="the gradient at step 0 is (inf|nan) though the loss is .*: lower"):
        trainer.step(MixtureSampler(corpus, config.pretraining.phases, 512).batch(0))
    assert all(torch.equal(p, old) for p, old in zip(trainer.masters, before, strict=True))


@pytest.mark.parametrize("scale", [0.4, 0.8, 1.2, 1.6])
def test_linear_cross_entropy_in_bfloat16_of_tokens_that_the_model_is_sure_of(scale):
    """Of a loss of 1 to 1e-4 the gradient has the relative error of 16 bits, not of a difference after rounding."""
    torch.manual_seed(0)
    head = torch.randn(64, 48)
    targets = torch.randint(64, (200,))
    hidden = scale * head[targets] / head[targets].norm(dim=1, keepdim=True) + 0.1 * torch.randn(200, 48)
    hidden, head = hidden.bfloat16(), head.bfloat16()
    exact = [t.double().requires_grad_() for t in (hidden, head)]
    want = nn.functional.cross_entropy(exact[0] @ exact[1].t(), targets)
    want.backward()
    ours = [t.clone().requires_grad_() for t in (hidden, head)]
    loss = linear_cross_entropy(*ours, targets)
    loss.backward()
    for one, other in zip(ours, exact, strict=True):
        assert (one.grad.double() - other.grad).norm() < 0.05 * other.grad.norm()


def test_micro_batches_are_summed_in_float32(prepared):
    """64 of them in bfloat16: no worse than their gradients added up in float32."""
    config, _, corpus, _ = prepared

    def gradient(dtype, parts, rows=slice(None)):
        trainer, seen = fresh(config, dtype, grad_accumulation=parts, clip_norm=1e9, batch_tokens=128 * 64), []
        batch = MixtureSampler(corpus, config.pretraining.phases, 64 * 64).batch(0)
        cut = {name: getattr(batch, name)[rows] for name in ("input_ids", "targets", "weights")}
        for optimizer in trainer.optimizers:
            optimizer.step = lambda *_: None
        trainer._publish_weights = lambda: seen.extend(p.grad.double().flatten() for p in trainer.masters)
        trainer.step(dataclasses.replace(batch, **cut))
        return torch.cat(seen)

    count = len(MixtureSampler(corpus, config.pretraining.phases, 64 * 64).batch(0).input_ids)
    exact = gradient(torch.float32, 1)
    error = lambda found: ((found - exact).norm() / exact.norm()).item()
    apart = sum(gradient(torch.bfloat16, 1, slice(i, i + 1)) for i in range(count)) / count
    assert error(gradient(torch.bfloat16, count)) < 1.05 * error(apart)


@pytest.mark.parametrize("parts", [1, 4])
def test_a_batch_that_trains_no_token_names_the_cause(prepared, parts):
    """Not the learning rate, which has no part in it; and the weights stay as they were."""
    config, _, corpus, _ = prepared
    trainer = fresh(config, grad_accumulation=parts)
    before = {name: value.clone() for name, value in trainer.state_dict().items()}
    batch = MixtureSampler(corpus, config.pretraining.phases, 512).batch(12)
    with pytest.raises(CourseError, match="this batch trains no token, because every weight is 0: look at the rows"):
        trainer.step(dataclasses.replace(batch, weights=torch.zeros_like(batch.weights)))
    assert trainer.step_count == 0 and trainer.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in trainer.state_dict().items())


@pytest.mark.parametrize("loss", [cross_entropy, linear_cross_entropy])
def test_tokens_without_weight_have_a_loss_and_a_gradient_of_zero(loss):
    hidden = torch.randn(20, 24, requires_grad=True)
    head = torch.randn(50, 24, requires_grad=True)
    value = loss(hidden, head, torch.randint(0, 50, (20,)), torch.zeros(20))
    gradients = torch.autograd.grad(value, (hidden, head))
    assert value == 0 and all((gradient == 0).all() for gradient in gradients)


def test_a_micro_batch_without_trained_tokens_changes_nothing(prepared):
    config, _, corpus, _ = prepared
    batch = MixtureSampler(corpus, config.pretraining.phases, 512).batch(12)
    batch.weights[4:6] = 0  # of 8 rows, the third of four micro-batches
    whole, parts = (fresh(config, optimizer="adamw", grad_accumulation=n).step(batch) for n in (1, 4))
    assert math.isfinite(whole["loss"]) and parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_a_foreign_or_truncated_training_state_is_refused(prepared, tmp_path):
    config, _, _, _ = prepared
    path = tmp_path / "state.safetensors"
    save_training_state(path, fresh(config), [])
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], b"", b"\0" * 100):
        path.write_bytes(broken)
        with pytest.raises(CourseError, match="no training state of this model.*delete it"):
            load_training_state(path, fresh(config))


# ---------------------------------------------------------------- the stage
@pytest.fixture
def own(prepared, tmp_path, monkeypatch):
    """(config, runs): the corpus of this module in a folder that one test may spoil."""
    config, _, _, runs = prepared
    for name in ("corpus", "tokenizer"):
        shutil.copytree(runs / "tiny" / name, tmp_path / "runs" / "tiny" / name)
    monkeypatch.setenv("QWEN_MINI_RUNS", str(tmp_path / "runs"))
    return config, tmp_path / "runs"


@pytest.fixture
def saved_often(monkeypatch):
    """A training state after every step."""
    monkeypatch.setattr(stages, "SAVE_EVERY", 0.0)


def run_pretrain(scale: str, runs: Path, stage: str, **options) -> subprocess.Popen:
    """A training in another process that saves its state after every step."""
    code = (
        f"from qwen_mini import course; from qwen_mini.pretraining import pretrain; import torch; "
        f"course.stages.SAVE_EVERY = 0.0; "
        f"torch.set_num_threads(1); pretrain(course.load_scale({scale!r}), stage={stage!r})"
    )
    environment = os.environ | {"QWEN_MINI_RUNS": str(runs)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **options)


def losses_of(folder: Path) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"], r.get("heldout")) for r in stages.metrics(folder)]


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(prepared):
    """The folder of a run that nothing has interrupted."""
    config, *_ = prepared
    return pretrain(config, stage="whole")


@pytest.fixture
def steps_taken(monkeypatch):
    """The numbers of the steps that are computed from now on."""
    taken, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, batch: taken.append(self.step_count) or step(self, batch))
    return taken


def test_killed_at_random_moments_reaches_the_same_numbers(prepared, whole):
    _, scale, _, runs = prepared
    state, rng = runs / "tiny" / "training_state", random.Random(0)
    written = lambda: {path: path.stat().st_mtime_ns for path in state.glob("killed-*")}
    for _ in range(3):
        before = written()
        process = run_pretrain(scale, runs, "killed")
        while written() == before and process.poll() is None:  # wait for the next training state, then strike
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL, "the run was over before it could be killed"
    assert run_pretrain(scale, runs, "killed").wait(120) == 0
    assert losses_of(runs / "tiny" / "killed") == losses_of(whole)
    assert weights_of(runs / "tiny" / "killed") == weights_of(whole)
    assert not list(state.glob("*killed*"))


@pytest.mark.skipif(os.name == "nt", reason="nothing keeps two writers apart there")
def test_a_second_process_waits_and_finds_the_stage_made(prepared, whole):
    config, scale, _, runs = prepared
    with artifacts.stage_lock("tiny", "twice"):
        second = run_pretrain(scale, runs, "twice", stdout=subprocess.PIPE, text=True)
        assert f"twice is being made by process {os.getpid()} on " in second.stdout.readline()
        weights = pretrain(config, stage="twice") / "model.safetensors"
        made = weights.stat().st_mtime_ns
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0 and said == "" and weights.stat().st_mtime_ns == made
    assert weights_of(runs / "tiny" / "twice") == weights_of(whole)


@pytest.mark.parametrize("stop", [1, 10, 17, 29])  # in the middle, at an evaluation, in the second phase, at the end
def test_an_interrupted_run_reaches_the_same_numbers(prepared, whole, steps_taken, stop):
    config, *_ = prepared
    state = pretrain(config, stage="interrupted", stop_after=stop)
    assert state.suffix == ".safetensors" and pretraining_stage(config, stage="interrupted").find() is None
    folder = pretrain(config, stage="interrupted")
    assert steps_taken == list(range(30))
    assert losses_of(folder) == losses_of(whole) and weights_of(folder) == weights_of(whole)
    assert not state.exists()
    shutil.rmtree(folder)


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_full_disk_keeps_the_previous_state(prepared, saved_often, monkeypatch):
    config, _, _, _ = prepared
    state = pretrain(config, stage="full_disk", stop_after=5)
    before = state.read_bytes()
    monkeypatch.setattr(artifacts, "check_writable", lambda _: None)  # it is full only later
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(artifacts.ArtifactError, match="the disk is full; the previous version, if any, is kept"):
        pretrain(config, stage="full_disk")
    monkeypatch.undo()
    assert state.read_bytes() == before
    assert load_training_state(state, fresh(config))[-1]["step"] == 5


def test_a_disk_that_is_full_from_the_beginning_costs_no_step(own, steps_taken, monkeypatch):
    config, runs = own
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(artifacts.ArtifactError, match="the disk is full"):
        pretrain(config)
    assert steps_taken == []


def test_a_full_disk_at_the_end_keeps_the_state(own, whole, steps_taken, monkeypatch):
    """The last checkpoint does not fit, a training state does: no step is computed again."""
    config, runs = own
    monkeypatch.setattr(stages, "_write_metrics", no_space)
    place = re.escape(str(Path("tiny", "full_end")))
    with pytest.raises(artifacts.ArtifactError, match=rf"{place} was not written because the disk is full"):
        pretrain(config, stage="full_end")
    monkeypatch.undo()
    monkeypatch.setenv("QWEN_MINI_RUNS", str(runs))
    assert len(steps_taken) == 30
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("a step was computed again"))
    folder = pretrain(config, stage="full_end")
    assert losses_of(folder) == losses_of(whole) and weights_of(folder) == weights_of(whole)
    assert not list((runs / "tiny" / "training_state").glob("*"))


def test_a_finished_run_is_not_repeated(prepared, steps_taken):
    config, _, _, _ = prepared
    folder = pretrain(config, stage="finished")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    steps_taken.clear()
    assert pretrain(config, stage="finished") == folder and steps_taken == []
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    again = dataclasses.replace(config.pretraining, weight_decay=0.2)
    assert pretrain(config, stage="finished", settings=again) == folder
    assert steps_taken == list(range(30)) and (folder / "model.safetensors").stat().st_mtime_ns != before


def test_a_finished_run_can_be_made_anew(prepared, whole, steps_taken):
    config, *_ = prepared
    before = weights_of(whole)
    assert pretraining_stage(config, stage="whole").make() == whole
    assert steps_taken == list(range(30)) and weights_of(whole) == before


def test_domains_that_could_not_be_fetched_leave_the_mixture(prepared):
    config, _, corpus, _ = prepared
    phases = (Phase(512, 32, {"wiki_en": 0.5, "python": 0.3, "tasks": 0.2}),)
    monkey = type(
        "Corpus",
        (),
        {"domains": corpus.domains, "manifest": corpus.manifest | {"left_out": {"wiki_en": "?"}}},
    )
    assert pretraining.available_phases(phases, monkey)[0].mixture == pytest.approx({"python": 0.6, "tasks": 0.4})
    with pytest.raises(ValueError, match="names the domain 'wiki_en'"):
        MixtureSampler(corpus, pretraining.available_phases(phases, corpus), 512)


def test_a_run_keeps_the_precision_it_began_with(prepared, whole, capsys, monkeypatch):
    config, _, _, _ = prepared
    pretrain(config, stage="precision", stop_after=3)
    monkeypatch.setenv("QWEN_MINI_DTYPE", "bfloat16")
    folder = pretrain(config, stage="precision")
    assert "precision: goes on in torch.float32, as it began, not in torch.bfloat16" in capsys.readouterr().out
    assert artifacts.read_manifest(folder)["provenance"]["precision"] == "float32"
    assert losses_of(folder) == losses_of(whole)
    other = pretrain(config, stage="other_precision")
    assert artifacts.read_manifest(other)["provenance"]["precision"] == "bfloat16"
    assert losses_of(other) != losses_of(whole)


SETTINGS = {"phases": lambda p: (dataclasses.replace(p[0], tokens=2 * p[0].tokens), *p[1:]),
            "optimizer": lambda _: "adamw", "schedule": lambda _: "wsd"}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Pretraining)])
def test_every_setting_is_in_the_key(prepared, field):
    config, *_ = prepared
    value = getattr(config.pretraining, field)
    other = SETTINGS.get(field, lambda x: x * 2 if isinstance(x, int) else x / 2)(value)
    settings = dataclasses.replace(config.pretraining, **{field: other})
    assert pretraining_stage(config, settings=settings).key != pretraining_stage(config).key


def test_model_corpus_and_seed_are_in_the_key_and_measurements_are_not(prepared):
    config, *_ = prepared
    key, replace = pretraining_stage(config).key, dataclasses.replace
    others = [
        pretraining_stage(config, seed=1),
        pretraining_stage(replace(config, model=replace(config.model, rope_theta=2000.0))),
        pretraining_stage(replace(config, corpus=replace(config.corpus, chat_documents=31))),
        pretraining_stage(replace(config, tokenizer=replace(config.tokenizer, training_bytes=50_000))),
    ]
    assert len({key, *(stage.key for stage in others)}) == 5
    measure = replace(config.measure, eval_every=7, eval_tokens=128)
    assert pretraining_stage(replace(config, measure=measure)).key == key
    assert pretraining_stage(config, stage="other_name").key == key  # a name says where, the key says what


def test_the_size_of_evaluations_changes_no_training(prepared, whole):
    config, *_ = prepared
    often = dataclasses.replace(config, measure=dataclasses.replace(config.measure, eval_every=7, eval_tokens=128))
    folder = pretrain(often, stage="often")
    assert weights_of(folder) == weights_of(whole)
    evaluated = lambda where: [step for step, _, _, heldout in losses_of(where) if heldout]
    assert evaluated(folder) == [7, 14, 21, 28, 30] and evaluated(whole) == [10, 20, 30]


def test_other_settings_do_not_resume_each_other(prepared):
    config, _, _, _ = prepared
    one = pretrain(config, stage="settings", stop_after=3)
    settings = dataclasses.replace(config.pretraining, clip_norm=0.05)
    other = pretrain(config, stage="settings", settings=settings, stop_after=3)
    assert one != other and one.exists() and other.exists()


def test_the_checkpoint_is_a_hugging_face_folder(prepared, whole):
    transformers = pytest.importorskip("transformers")
    _, _, corpus, _ = prepared
    names = {path.name for path in whole.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "metrics.jsonl",
        "manifest.json",
    } <= names
    ids = torch.from_numpy(np.asarray(corpus.tokens("python", "heldout")[:60]).astype(np.int64))[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    assert theirs.generation_config.eos_token_id == Tokenizer.from_pretrained(whole).endoftext_id
    with torch.no_grad():
        torch.testing.assert_close(Qwen.from_pretrained(whole)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_checkpoint_holds_the_masters_as_they_are_shipped(prepared, whole):
    """bfloat16, rounded from the float32 weights of the last step."""
    config, _, corpus, _ = prepared
    torch.manual_seed(0)
    trainer = Trainer(Qwen(ModelConfig.from_scale(config)), config.pretraining, 30)
    sampler = MixtureSampler(corpus, config.pretraining.phases, 512)
    for step in range(30):
        trainer.step(sampler.batch(step))
    stored = load_file(whole / "model.safetensors")
    for name, p in zip(trainer.names, trainer.masters, strict=True):
        assert torch.equal(stored[name], p.detach().bfloat16())
    finished = pretraining.finished_model(trainer)
    assert {p.dtype for p in finished.parameters()} == {torch.float32}


def test_a_missing_corpus_says_which_command_makes_it(runs_folder, tmp_path):
    with pytest.raises(artifacts.MissingStage, match="'corpus' of scale 'tiny' is missing: make it with"):
        pretrain(load_scale(tiny_scale(tmp_path)))


def test_tokenizer_and_corpus_of_different_recipes_are_told_apart(own, monkeypatch, steps_taken):
    """A preparation with another seed that ends between its two stages leaves its tokenizer beside the old corpus."""
    config, _ = own
    monkeypatch.setattr(corpus_module, "CorpusWriter", no_space)
    with pytest.raises(artifacts.ArtifactError):
        prepare_corpus(config, seed=1)
    monkeypatch.undo()
    monkeypatch.setenv("QWEN_MINI_RUNS", str(own[1]))
    with pytest.raises(CourseError, match="corpus and the tokenizer of scale 'tiny' were made from different settings"):
        open_prepared(config)
    with pytest.raises(CourseError, match="were made from different settings.*run `qwen-mini run corpus"):
        pretrain(config)
    assert steps_taken == []
    prepare_corpus(config, seed=1)  # what the message says to run
    corpus, tokenizer = open_prepared(config)
    assert tokenizer.decode(corpus.tokens("python", "heldout")[:200]) in corpus.heldout_bytes("python").decode()


def test_a_corpus_of_another_seed_or_size_is_not_trained_on(own, steps_taken):
    """The key names the corpus that a run has read: any other would make a model that is not what its key says."""
    config, _ = own
    with pytest.raises(CourseError, match="prepared with other settings or another seed"):
        pretrain(config, seed=1)
    larger = dataclasses.replace(config, corpus=dataclasses.replace(config.corpus, chat_documents=31))
    with pytest.raises(CourseError, match="prepared with other settings or another seed"):
        pretrain(larger)
    assert steps_taken == []


# ---------------------------------------------------------------- two processes
BODY = """
import dataclasses, json, os, pathlib
from qwen_mini import course
from qwen_mini.model import ModelConfig, Qwen
from qwen_mini.pretraining import Batch, Trainer, pretrain
config, rank = course.load_scale(sys.argv[1]), dist.get_rank()
runs, told = pathlib.Path(os.environ["QWEN_MINI_RUNS"]), {}


def failure(**options):
    try:
        pretrain(config, **options)
    except course.CourseError as error:
        return str(error)
    return "no error"


pretrain(config, stage="two_processes")
told["finished"] = pretrain(config, stage="two_processes").name
pretrain(config, stage="cut", stop_after=12)
pretrain(config, stage="cut")
many = dataclasses.replace(config.pretraining, grad_accumulation=8)
told["rows"] = failure(stage="rows", settings=many)

rows = torch.load(sys.argv[2])
torch.manual_seed(0)
trainer = Trainer(Qwen(ModelConfig.from_scale(config)), config.pretraining, 30)
told["loss"] = trainer.step(Batch(*(x[rank::2] for x in rows), None, None))["loss"]
try:
    trainer.step(Batch(rows[0][1::2], rows[1][1::2], rows[2][1::2], None, None))
except course.CourseError as error:
    told["nothing"] = str(error)

for stage in ("begun", "made"):  # a disk each from here on; the first process alone has what is there already
    for first in (0, 1):
        os.environ["QWEN_MINI_RUNS"] = str(runs.parent / f"{stage}{int(rank == first)}")
        told[f"{stage}{first}"] = failure(stage=stage)
pathlib.Path(sys.argv[3], f"{rank}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def two(prepared, whole, tmp_path_factory):
    """What two processes tell, one dict each; their stages lie in the folder of results."""
    config, scale, corpus, runs = prepared
    for stage in ("begun", "made"):
        for process in (0, 1):  # folder 1 holds what folder 0 lacks
            folder = runs.parent / f"{stage}{process}" / "tiny"
            for name in ("corpus", "tokenizer"):
                shutil.copytree(runs / "tiny" / name, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_MINI_RUNS", str(runs.parent / "begun1"))
        pretrain(config, stage="begun", stop_after=3)
        patch.setenv("QWEN_MINI_RUNS", str(runs.parent / "made1"))
        pretrain(config, stage="made")
    folder = tmp_path_factory.mktemp("two")
    torch.save(half_empty(config, corpus), folder / "rows.pt")
    run_two_processes(folder, BODY, scale, folder / "rows.pt", folder, QWEN_MINI_RUNS=str(runs))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def half_empty(config, corpus) -> list[torch.Tensor]:
    """A batch whose odd rows train nothing: all that the second of two processes gets."""
    batch = MixtureSampler(corpus, config.pretraining.phases, 512).batch(12)
    weights = batch.weights.clone()
    weights[1::2] = 0
    return [batch.input_ids, batch.targets, weights]


@pytest.mark.parametrize("name", ["two_processes", "cut"])
def test_two_processes_train_as_one(prepared, whole, two, name):
    *_, runs = prepared
    done, one = losses_of(runs / "tiny" / name), losses_of(whole)
    assert [r[0] for r in done] == [r[0] for r in one] and {told["finished"] for told in two} == {"two_processes"}
    assert [r[1] for r in done] == pytest.approx([r[1] for r in one], rel=1e-4)


def test_rows_that_cannot_be_shared_are_refused(two):
    for told in two:
        assert told["rows"].startswith("8 rows of 64 tokens cannot be shared by 2 process(es) x 8 micro-batches")


@pytest.mark.parametrize(("case", "stands"), [("begun", "at step 3"), ("made", "finished")])
@pytest.mark.parametrize("first", [0, 1])
def test_processes_that_do_not_see_the_same_folder_end_with_a_sentence(two, case, stands, first):
    for told in two:
        sentence = told[f"{case}{first}"]
        assert sentence.startswith("these processes do not see the same folder") and "\n" not in sentence
        assert stands in sentence and "put QWEN_MINI_RUNS on a disk that all of them share" in sentence


def test_a_process_may_have_nothing_to_train_but_not_all_of_them(prepared, two):
    config, _, corpus, _ = prepared
    alone = fresh(config).step(Batch(*half_empty(config, corpus), None, None))
    for told in two:
        assert told["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert told["nothing"].startswith("this batch trains no token")


# ---------------------------------------------------------------- measures
@pytest.mark.parametrize("stride", [8, 16])
def test_heldout_nll_equals_token_by_token(prepared, stride):
    config, _, corpus, _ = prepared
    torch.manual_seed(0)
    model = Qwen(ModelConfig.from_scale(config))
    tokens = np.asarray(corpus.tokens("python", "heldout")[:150]).astype(np.int64)
    nll = heldout_nll(model, tokens, 16, stride=stride)
    assert len(nll) == 149
    starts = list(range(0, 149, stride))
    for t in range(1, 150):  # token t is scored in the first window that reaches it
        start = next(s for s in starts if s + 16 >= t)
        context = torch.from_numpy(tokens[start:t])[None]
        logprobs = model(context)[0, -1].log_softmax(-1)
        assert nll[t - 1].item() == pytest.approx(-logprobs[tokens[t]].item(), abs=1e-4)


def test_bits_per_byte_of_a_uniform_model(prepared):
    config, _, corpus, _ = prepared
    tokenizer = Tokenizer.from_pretrained(artifacts.find(config.name, "tokenizer"))
    model = Qwen(ModelConfig.from_scale(config))
    nn.init.zeros_(model.model.norm.weight)
    tokens = np.asarray(corpus.tokens("python", "heldout"))
    expected = (len(tokens) - 1) * math.log2(384) / token_sizes(tokenizer)[tokens[1:]].sum()
    assert evaluate_bits_per_byte(model, corpus, tokenizer, "python", 64) == pytest.approx(expected, rel=1e-5)


def test_token_sizes_count_the_held_out_bytes(prepared):
    config, _, corpus, _ = prepared
    tokenizer = Tokenizer.from_pretrained(artifacts.find(config.name, "tokenizer"))
    for name in ("python", "tasks"):
        assert token_sizes(tokenizer)[np.asarray(corpus.tokens(name, "heldout"))].sum() == len(
            corpus.heldout_bytes(name)
        )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngram_equals_a_dictionary(order):
    rng = np.random.default_rng(0)
    train, heldout = rng.integers(0, 6, 300), rng.integers(0, 8, 80)

    def probability(context, token, n):
        if n == 0:
            return 1 / 8
        lower = probability(context[1:], token, n - 1)
        follow = collections.Counter(
            train[i + n - 1] for i in range(len(train) - n + 1) if tuple(train[i : i + n - 1]) == context
        )
        total, kinds = sum(follow.values()), len(follow)
        return (follow[token] + kinds * lower) / (total + kinds) if total else lower

    expected = [
        -math.log(probability(tuple(heldout[max(0, i - order + 1) : i]), heldout[i], min(order, i + 1)))
        for i in range(1, len(heldout))
    ]
    np.testing.assert_allclose(ngram_nll(train, heldout, 3, 8)[order - 1], expected, rtol=1e-9)


def test_xz_is_the_real_xz():
    data = b"the same words over and over, " * 100
    assert xz_bits_per_byte(data) == 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


# ---------------------------------------------------------------- every scale
@pytest.mark.parametrize("scale", sorted(path.stem for path in FOLDER.glob("*.toml")))
def test_every_scale_fits_its_stages(scale):
    """The model can be built (on the meta device) and the phases are whole numbers of batches and rows."""
    config = load_scale(scale)
    with torch.device("meta"):
        model = Qwen(ModelConfig.from_scale(config))
    trained = pretraining.make_optimizers(
        [(name, nn.Parameter(torch.empty(p.shape, device="meta"))) for name, p in model.named_parameters()],
        config.pretraining,
    )
    grouped = sum(len(group["params"]) for optimizer in trained for group in optimizer.param_groups)
    assert grouped == len(list(model.parameters()))
    for phase in config.pretraining.phases:
        assert phase.tokens >= config.pretraining.batch_tokens
        for name in phase.mixture:
            if name.startswith("needles_"):
                assert int(name.removeprefix("needles_")) == phase.length in config.corpus.needle_lengths
