"""Chapter 08: the loss, the schedule, the optimisers, a step, and a state from which a run goes on exactly."""

import dataclasses
import math

import pytest
import torch
from conftest import run_two_processes
from tiny import fresh, text_batch, tiny_scale
from torch import nn

from qwen_mini import training
from qwen_mini.course import CourseError, load_scale
from qwen_mini.model import ModelConfig, Qwen
from qwen_mini.training import (
    AdamW,
    Batch,
    Muon,
    cross_entropy,
    learning_rate_factor,
    linear_cross_entropy,
    load_training_state,
    save_training_state,
    training_tensors,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_scale(tiny_scale(tmp_path_factory.mktemp("training")))
    torch.set_num_threads(threads)


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
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_linear_cross_entropy_of_a_hopeless_target():
    """A target whose probability is 0 in float32 still has a finite loss, and the right one."""
    hidden, head = 40 * torch.randn(20, 24), 4 * torch.randn(50, 24)
    targets = (hidden @ head.T).argmin(-1)
    plain = cross_entropy(hidden, head, targets)
    assert plain > 500
    torch.testing.assert_close(
        linear_cross_entropy(hidden, head, targets), plain, rtol=1e-5, atol=1e-3
    )


def test_loss_and_gradients_equal_transformers():
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(97, 32, 48, 2, 4, 2, 8, 64, 10_000.0, 1e-6, True)
    model = Qwen(config)
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config.to_dict()))
    theirs.load_state_dict(model.state_dict())
    ids = torch.randint(0, 97, (3, 40))
    theirs(input_ids=ids, labels=ids).loss.backward()
    loss = model(ids[:, :-1], targets=ids[:, 1:])
    loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(
            loss, theirs(input_ids=ids, labels=ids).loss, rtol=1e-6, atol=1e-6
        )
    reference = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, reference[name].grad, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- schedule and optimisers
def test_schedule_golden():
    golden = {
        0: 3e-5,
        4: 1.5e-4,
        9: 3e-4,
        10: 3e-4,
        32: 2.6211e-4,
        55: 1.65e-4,
        77: 7.122e-5,
        100: 3e-5,
    }
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
        a, b = (
            ours(p, lr=0.02, weight_decay=0.1, **options),
            theirs(q, lr=0.02, weight_decay=0.1, **options),
        )
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
    exact = training.orthogonalize(matrix, dtype=torch.float32)
    torch.testing.assert_close(exact, want, rtol=1e-4, atol=1e-5)
    rough = (training.orthogonalize(matrix) - want).abs().max()
    assert 1e-4 < rough < 0.1  # the default is bfloat16
    settings = dataclasses.replace(load_scale("laptop").pretraining, optimizer="muon")
    for dtype in (torch.float32, torch.bfloat16):
        model = Qwen(ModelConfig(64, 16, 32, 1, 2, 1, 8, 32, 10_000.0, 1e-6, True))
        muon = training.Trainer(model, settings, 1, dtype).optimizers[0]
        assert isinstance(muon, Muon) and muon.dtype == dtype


# ---------------------------------------------------------------- trainer
def test_accumulation_changes_nothing(config):
    whole, parts = (
        fresh(config, optimizer="adamw"),
        fresh(config, optimizer="adamw", grad_accumulation=4),
    )
    for step in range(10, 14):
        a, b = whole.step(text_batch(step)), parts.step(text_batch(step))
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_step_equals_a_loop_written_by_hand(config):
    """Trainer in float32 with AdamW against torch's optimiser, clipping and the plain loss."""
    trainer = fresh(config, optimizer="adamw")
    torch.manual_seed(0)
    model = Qwen(ModelConfig.from_scale(config))
    s = config.pretraining
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": s.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(s.beta1, s.beta2),
        eps=s.eps,
    )
    for step in range(6):
        batch = text_batch(step + 10)
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
def test_resume_is_exact(config, tmp_path, dtype, optimizer):
    through = fresh(config, dtype, optimizer=optimizer)
    expected = [through.step(text_batch(s)) for s in range(12)]
    first = fresh(config, dtype, optimizer=optimizer)
    metrics = [first.step(text_batch(s)) for s in range(7)]
    save_training_state(tmp_path / "state.safetensors", first, metrics)
    second = fresh(config, dtype, optimizer=optimizer)
    metrics = load_training_state(tmp_path / "state.safetensors", second)
    metrics += [second.step(text_batch(s)) for s in range(7, 12)]
    assert metrics == expected
    for a, b in zip(through.masters, second.masters, strict=True):
        assert torch.equal(a, b)


def test_bfloat16_works_on_float32_masters(config):
    trainer = fresh(config, torch.bfloat16)
    trainer.step(text_batch(0))
    for master, p in zip(trainer.masters, trainer.working, strict=True):
        assert master.dtype == torch.float32 and p.dtype == torch.bfloat16
        assert torch.equal(master.bfloat16(), p)


def test_a_gradient_that_is_not_finite_stops_the_run(config):
    trainer = fresh(config)
    with torch.no_grad():
        trainer.masters[0][:] = float("nan")
    with pytest.raises(
        FloatingPointError, match="the loss at step 0 is nan.*last training state and lower"
    ):
        trainer.step(text_batch(0))


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_told_apart(config):
    trainer = fresh(config)
    before = [p.detach().clone() for p in trainer.masters]
    trainer.masters[-1].register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(
        FloatingPointError, match="the gradient at step 0 is (inf|nan) though the loss is .*: lower"
    ):
        trainer.step(text_batch(0))
    assert all(torch.equal(p, old) for p, old in zip(trainer.masters, before, strict=True))


@pytest.mark.parametrize("scale", [0.4, 0.8, 1.2, 1.6])
def test_linear_cross_entropy_in_bfloat16_of_tokens_that_the_model_is_sure_of(scale):
    """Of a loss of 1 to 1e-4 the gradient has the relative error of 16 bits, not of a difference after rounding."""
    torch.manual_seed(0)
    head = torch.randn(64, 48)
    targets = torch.randint(64, (200,))
    hidden = scale * head[targets] / head[targets].norm(dim=1, keepdim=True) + 0.1 * torch.randn(
        200, 48
    )
    hidden, head = hidden.bfloat16(), head.bfloat16()
    exact = [t.double().requires_grad_() for t in (hidden, head)]
    want = nn.functional.cross_entropy(exact[0] @ exact[1].t(), targets)
    want.backward()
    ours = [t.clone().requires_grad_() for t in (hidden, head)]
    loss = linear_cross_entropy(*ours, targets)
    loss.backward()
    for one, other in zip(ours, exact, strict=True):
        assert (one.grad.double() - other.grad).norm() < 0.05 * other.grad.norm()


def test_micro_batches_are_summed_in_float32(config):
    """64 of them in bfloat16: no worse than their gradients added up in float32."""

    def gradient(dtype, parts, rows=slice(None)):
        trainer, batch = (
            fresh(config, dtype, grad_accumulation=parts, batch_tokens=64 * 64),
            text_batch(0, 64),
        )
        trainer.forward_backward(
            Batch(batch.input_ids[rows], batch.targets[rows], torch.ones(64, 64)[rows])
        )
        return torch.cat([p.grad.double().flatten() for p in trainer.masters])

    exact = gradient(torch.float32, 1)
    error = lambda found: ((found - exact).norm() / exact.norm()).item()
    apart = sum(gradient(torch.bfloat16, 1, slice(i, i + 1)) for i in range(64)) / 64
    assert error(gradient(torch.bfloat16, 64)) < 1.05 * error(apart)


def test_any_loss_goes_through_the_two_halves_of_a_step(config):
    """A batch in parts, each as a loss of its own, is the batch; what came since the last update is added up."""
    batch, whole, parts = (
        text_batch(3),
        fresh(config, optimizer="adamw"),
        fresh(config, optimizer="adamw"),
    )
    # AdamW divides by a gradient's size: in float32 one of almost nothing carries its last digits into the weight
    for trainer in (whole, parts):
        trainer.model.double()
    expected, share = whole.step(batch), batch.weights[:3].sum() / batch.weights.sum()
    for rows, part in ((slice(3), share), (slice(3, None), 1 - share)):
        cut = batch.input_ids[rows], batch.targets[rows], batch.weights[rows]
        parts.forward_backward(
            part * parts.model(cut[0], targets=cut[1], weights=cut[2]) for _ in range(1)
        )
    found = parts.update()
    assert found == pytest.approx(expected, rel=1e-5)
    for a, b in zip(whole.masters, parts.masters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert parts.step(text_batch(4))["loss"] == pytest.approx(
        whole.step(text_batch(4))["loss"], rel=1e-5
    )


@pytest.mark.parametrize("parts", [1, 4])
def test_a_batch_that_trains_no_token_names_the_cause(config, parts):
    """Not the learning rate, which has no part in it; and the weights stay as they were."""
    trainer = fresh(config, grad_accumulation=parts)
    before = {name: value.clone() for name, value in training_tensors(trainer).items()}
    batch = text_batch(12)
    with pytest.raises(
        CourseError, match="this batch trains no token, because every weight is 0: look at the rows"
    ):
        trainer.step(dataclasses.replace(batch, weights=torch.zeros_like(batch.weights)))
    assert trainer.step_count == 0 and training_tensors(trainer).keys() == before.keys()
    assert all(
        torch.equal(value, before[name]) for name, value in training_tensors(trainer).items()
    )


@pytest.mark.parametrize("loss", [cross_entropy, linear_cross_entropy])
def test_tokens_without_weight_have_a_loss_and_a_gradient_of_zero(loss):
    hidden = torch.randn(20, 24, requires_grad=True)
    head = torch.randn(50, 24, requires_grad=True)
    value = loss(hidden, head, torch.randint(0, 50, (20,)), torch.zeros(20))
    gradients = torch.autograd.grad(value, (hidden, head))
    assert value == 0 and all((gradient == 0).all() for gradient in gradients)


def test_a_micro_batch_without_trained_tokens_changes_nothing(config):
    batch = text_batch(12)
    batch.weights[4:6] = 0  # of 8 rows, the third of four micro-batches
    whole, parts = (
        fresh(config, optimizer="adamw", grad_accumulation=n).step(batch) for n in (1, 4)
    )
    assert math.isfinite(whole["loss"]) and parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_a_foreign_or_truncated_training_state_is_refused(config, tmp_path):
    path = tmp_path / "state.safetensors"
    save_training_state(path, fresh(config), [])
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], b"", b"\0" * 100):
        path.write_bytes(broken)
        with pytest.raises(CourseError, match="no training state of this model.*delete it"):
            load_training_state(path, fresh(config))


# ---------------------------------------------------------------- two processes
SHARDED = """
import dataclasses
from torch.distributed.tensor import DTensor
from qwen_mini.course import load_scale
from qwen_mini.model import ModelConfig, Qwen
from qwen_mini.training import Batch, Trainer
config, rank = load_scale(sys.argv[1]), dist.get_rank()
torch.manual_seed(0)
model = Qwen(ModelConfig.from_scale(config))
settings = dataclasses.replace(config.pretraining, optimizer="adamw", grad_accumulation=2)
trainer, found = Trainer(model, settings, 30), []
assert all(isinstance(p, DTensor) for p in trainer.masters)
for rows in torch.load(sys.argv[2]):
    trainer.forward_backward(Batch(*(x[rank::2] for x in rows)))
    loss = torch.tensor(trainer.loss, dtype=torch.float64)
    dist.all_reduce(loss)
    found.append(loss.item())
gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
record = trainer.update()
weights = {name: p.full_tensor() for name, p in model.named_parameters()}
if rank == 0:
    torch.save([found, gradients, record, weights], sys.argv[3])
"""


def test_two_processes_with_all_parameters_sharded_take_the_step_of_one(config, tmp_path):
    """`fully_shard` sees the whole forward pass, the loss included, also when gradients of two batches are added up."""
    batches = [text_batch(step) for step in (0, 1)]
    batches[1].weights[1::2] = 0  # all that the second process gets
    torch.save([[b.input_ids, b.targets, b.weights] for b in batches], tmp_path / "batches.pt")
    run_two_processes(
        tmp_path, SHARDED, tiny_scale(tmp_path), tmp_path / "batches.pt", tmp_path / "found.pt"
    )
    losses, gradients, record, weights = torch.load(tmp_path / "found.pt")
    alone = fresh(config, optimizer="adamw", grad_accumulation=2)
    for batch, loss in zip(batches, losses, strict=True):
        alone.forward_backward(batch)
        assert loss == pytest.approx(alone.loss, rel=1e-6)
    expected = {name: p.grad for name, p in zip(alone.names, alone.masters, strict=True)}
    assert gradients.keys() == expected.keys()
    flat = lambda found: torch.cat([found[name].double().flatten() for name in expected])
    assert (flat(gradients) - flat(expected)).norm() < 1e-6 * flat(expected).norm()
    assert record == pytest.approx(alone.update(), rel=1e-6)
    for name, p in zip(alone.names, alone.masters, strict=True):
        torch.testing.assert_close(weights[name], p.detach(), rtol=1e-5, atol=1e-6)
