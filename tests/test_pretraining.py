"""Chapter 08: the loss, the schedule, the optimisers, the batches, exact resume, and the measures of held-out text."""

import collections
import dataclasses
import json
import lzma
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_two_processes
from torch import nn

from qwen_mini import pretraining
from qwen_mini.corpus import open_corpus, prepare_corpus
from qwen_mini.course import artifacts, load_scale
from qwen_mini.course.scales import FOLDER, Phase
from qwen_mini.model import ModelConfig, Qwen
from qwen_mini.pretraining import (
    AdamW,
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
eval_every = 10
eval_tokens = 512
checkpoint_every = 3
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
batch_tokens = 512
learning_rate = 1e-3
matrix_learning_rate = 0.004
warmup_steps = 1
needle_share = 0.3
needle_rows = 8
tries = 2

[[long_context.stages]]
tokens = 512
rope_theta = 20000.0
lengths = [64]
shares = [1.0]

[dual_chunk]
factors = [1, 4]
tries = 2

[sparse_prefill]
lengths = [128, 256]
chunk_tokens = 96
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
problems = 1
ablation_demonstrations = 2
long_rows = 2
fresh = 1

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
heldout = 1
best_of = 2

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
heldout = 1
seeds = 1

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
seeds = 1
heldout = 1
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
            group["lr"] = s.learning_rate * learning_rate_factor(
                step, 30, s.warmup_steps, s.schedule, s.min_lr_ratio
            )
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
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        trainer.step(MixtureSampler(corpus, config.pretraining.phases, 512).batch(0))


def test_a_foreign_or_truncated_training_state_is_refused(prepared, tmp_path):
    config, _, _, _ = prepared
    path = tmp_path / "state.safetensors"
    save_training_state(path, fresh(config), [])
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], b"", b"\0" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="no training state of this model.*delete it"):
            load_training_state(path, fresh(config))


# ---------------------------------------------------------------- the stage
def run_pretrain(scale: str, runs: Path, stage: str) -> subprocess.Popen:
    code = (
        f"from qwen_mini import course; from qwen_mini.pretraining import pretrain; import torch; "
        f"torch.set_num_threads(1); pretrain(course.load_scale({scale!r}), stage={stage!r})"
    )
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"QWEN_MINI_RUNS": str(runs)})


def losses_of(folder: Path) -> list[tuple]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"], r.get("heldout")) for r in records]


def test_killed_at_random_moments_reaches_the_same_numbers(prepared):
    config, scale, _, runs = prepared
    pretrain(config, stage="uninterrupted")
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
    assert losses_of(runs / "tiny" / "killed") == losses_of(runs / "tiny" / "uninterrupted")
    a, b = (Qwen.from_pretrained(runs / "tiny" / name) for name in ("killed", "uninterrupted"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_full_disk_keeps_the_previous_state(prepared, monkeypatch):
    config, _, _, _ = prepared
    state = pretrain(config, stage="full_disk", stop_after=5)
    before = state.read_bytes()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(
        artifacts.ArtifactError, match="the disk is full; the previous version, if any, is kept"
    ):
        pretrain(config, stage="full_disk")
    monkeypatch.undo()
    assert state.read_bytes() == before
    assert load_training_state(state, fresh(config))[-1]["step"] == 5


def test_a_finished_run_is_not_repeated(prepared, capsys):
    config, _, _, _ = prepared
    folder = pretrain(config, stage="finished")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert pretrain(config, stage="finished") == folder
    assert "already trained" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    pretrain(config, seed=1, stage="finished")
    assert (folder / "model.safetensors").stat().st_mtime_ns != before


def test_domains_that_could_not_be_fetched_leave_the_mixture(prepared):
    config, _, corpus, _ = prepared
    phases = (Phase(512, 32, {"wiki_en": 0.5, "python": 0.3, "tasks": 0.2}),)
    monkey = type(
        "Corpus",
        (),
        {"domains": corpus.domains, "manifest": corpus.manifest | {"left_out": {"wiki_en": "?"}}},
    )
    assert pretraining.available_phases(phases, monkey)[0].mixture == pytest.approx(
        {"python": 0.6, "tasks": 0.4}
    )
    with pytest.raises(ValueError, match="names the domain 'wiki_en'"):
        MixtureSampler(corpus, pretraining.available_phases(phases, corpus), 512)


def test_a_run_keeps_the_precision_it_began_with(prepared, monkeypatch):
    config, _, _, _ = prepared
    state = pretrain(config, stage="precision", stop_after=3)
    monkeypatch.setattr(pretraining.hardware, "pick_dtype", lambda _: torch.bfloat16)
    assert pretraining.agreed_dtype("auto", state) == torch.float32
    folder = pretrain(config, stage="precision")
    assert json.loads((folder / "manifest.json").read_text())["inputs"]["dtype"] == "torch.float32"


def test_rows_that_cannot_be_shared_are_refused(prepared, monkeypatch):
    config, _, _, _ = prepared
    monkeypatch.setattr(pretraining, "world", lambda: (0, 3))
    with pytest.raises(ValueError, match=r"16 rows of 32 tokens cannot be shared by 3 process\(es\) x 1"):
        pretrain(config, stage="rows")


def test_other_settings_do_not_resume_each_other(prepared):
    config, _, _, _ = prepared
    one = pretrain(config, stage="settings", stop_after=3)
    other = pretrain(config, seed=1, stage="settings", stop_after=3)
    assert one != other and one.exists() and other.exists()


def test_the_checkpoint_is_a_hugging_face_folder(prepared):
    transformers = pytest.importorskip("transformers")
    config, _, corpus, _ = prepared
    folder = pretrain(config, stage="folder")
    names = {path.name for path in folder.iterdir()}
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
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            Qwen.from_pretrained(folder)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5
        )


def test_two_processes_train_as_one(prepared, tmp_path):
    config, scale, _, runs = prepared
    body = (
        "from qwen_mini import course\n"
        "from qwen_mini.pretraining import pretrain\n"
        f"pretrain(course.load_scale({scale!r}), stage='two_processes')"
    )
    run_two_processes(tmp_path, body, QWEN_MINI_RUNS=str(runs))
    pretrain(config, stage="one_process")
    two, one = (losses_of(runs / "tiny" / name) for name in ("two_processes", "one_process"))
    assert [r[0] for r in two] == [r[0] for r in one]
    assert [r[1] for r in two] == pytest.approx([r[1] for r in one], rel=1e-4)


def test_a_missing_corpus_says_which_command_makes_it(runs_folder, tmp_path):
    with pytest.raises(artifacts.MissingStage, match="'corpus' of scale 'tiny' is missing: make it with"):
        pretrain(load_scale(tiny_scale(tmp_path)))


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
