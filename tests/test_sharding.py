"""kernels/sharding.py and the trainer's states: two ranks, each with a piece of every tensor, against one process."""

import dataclasses
from functools import partial

import pytest
import torch
from conftest import small_config
from tiny import text_batch
from torch.distributed.tensor import DTensor

from qwen_mini import course
from qwen_mini.course.launch import on_ranks
from qwen_mini.course.ranks import highest, is_first, world
from qwen_mini.kernels.sharding import gathered, shard, whole
from qwen_mini.model import Qwen
from qwen_mini.moe import MoeConfig, QwenMoe
from qwen_mini.training import (
    Batch,
    Trainer,
    finished_model,
    load_training_state,
    save_training_state,
)

SHAPE = small_config(vocab_size=384)
MOE = MoeConfig(**vars(SHAPE), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
IDS = torch.randint(384, (4, 9), generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("one_thread")


def made(config=SHAPE):
    torch.manual_seed(0)
    return (QwenMoe if isinstance(config, MoeConfig) else Qwen)(config)


def new_trainer(config=SHAPE, dtype=torch.float32, **changes):
    plain = {"optimizer": "adamw"} if isinstance(config, MoeConfig) else {}
    numbers = dataclasses.replace(course.load_scale("quick").pretraining, **plain, **changes)
    return Trainer(made(config), numbers, 10, dtype)


def own_rows(batch):
    rank, ranks = world()
    return Batch(*(x[rank::ranks] for x in vars(batch).values()))


def flat(tensors):
    return torch.cat([x.flatten() for x in tensors]).double()


def outputs(model):
    """Logits by `forward` and by `hidden_states`, as lists."""
    with torch.no_grad():
        return model(IDS).tolist(), model.lm_head(model.hidden_states(IDS)).tolist()


# ---------------------------------------------------------------- gathered weights
def first_rank_computes():
    model = shard(made())
    cut = [isinstance(p, DTensor) for p in model.parameters()]
    with gathered(model):
        found = outputs(model) if is_first() else None
    return found, cut, [isinstance(p, DTensor) for p in model.parameters()]


def test_inside_gathered_one_rank_computes_without_the_other():
    (found, *cut), (nothing, *other) = on_ranks(first_rank_computes, 2)
    assert list(found) == list(outputs(made())) and nothing is None
    assert all(map(all, (*cut, *other)))  # before, and after


def trains_after_evaluating(config, dtype):
    """Records of steps, between which ranks evaluate unequally often."""
    trainer, records = new_trainer(config, dtype), []
    for step in range(3):
        with gathered(trainer.model), torch.no_grad():
            for _ in range(world()[0] * step):
                trainer.model(IDS)
        records.append(trainer.step(own_rows(text_batch(step))))
    with gathered(trainer.model), torch.no_grad():
        seen = trainer.model(IDS).flatten().tolist()  # with the weights of after the last step
    model = finished_model(trainer)
    weights = (
        [p.tolist() for p in model.parameters()] if is_first() else model.lm_head.weight.is_meta
    )
    return records, weights, seen, type(model).__name__


@pytest.mark.parametrize("config", [SHAPE, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_steps_and_finished_model_are_those_of_one_process(config, dtype):
    records, weights, seen, kind = trains_after_evaluating(config, dtype)
    (found, two, here, name), (again, empty, _, _) = on_ranks(
        partial(trains_after_evaluating, config, dtype), 2
    )
    assert found == again and name == kind and empty is True
    narrow = dtype == torch.bfloat16
    for one, other in zip(records, found, strict=True):
        assert other == pytest.approx(one, rel=1e-2 if narrow else 1e-5)
    start = flat(p.detach() for p in made(config).parameters())
    moved = [flat(map(torch.tensor, x)) - start for x in (weights, two)]
    near = 0.3 if narrow else 1e-3  # of how far the weights have come
    assert (moved[0] - moved[1]).norm() < near * moved[0].norm()
    untrained = torch.tensor(outputs(made(config))[0]).flatten()
    changes = [torch.tensor(x) - untrained for x in (seen, here)]
    assert (changes[0] - changes[1]).norm() < near * changes[0].norm()


def rounded_weights():
    """The loss of the first step in 16 bits: of tokens whose weights 16 bits cannot hold."""
    return new_trainer(dtype=torch.bfloat16).step(own_rows(text_batch(0)))["loss"]


def test_weights_of_tokens_are_not_rounded_to_16_bits():
    alone = rounded_weights()
    assert on_ranks(rounded_weights, 2) == pytest.approx([alone] * 2, rel=1e-5)


# ---------------------------------------------------------------- losses that are not text
def loss_of_hidden_states(count):
    """Whole gradients of a loss that begins with `hidden_states`, of unequally many parts with a weight."""
    trainer = new_trainer()
    mine = IDS[world()[0] :: world()[1]]

    def losses():
        for part in mine.tensor_split(2):
            yield trainer.model.hidden_states(part).square().sum()
        for _ in range(highest(count * is_first()) - count * is_first()):
            yield 0 * trainer.model.hidden_states(mine).sum()
        for _ in range(count * is_first()):
            yield trainer.model.hidden_states(IDS).mean()

    trainer.forward_backward(losses())
    loss = trainer.loss
    return [None if p.grad is None else whole(p.grad).tolist() for p in trainer.masters], loss


def test_any_loss_is_summed_over_the_ranks():
    gradients, loss = loss_of_hidden_states(2)
    found = on_ranks(partial(loss_of_hidden_states, 2), 2)
    assert sum(own for _, own in found) == pytest.approx(loss, rel=1e-6)
    one, other = (flat(map(torch.tensor, x)) for x in (gradients, found[0][0]))
    assert (one - other).norm() < 1e-6 * one.norm()


def test_a_rank_without_rows_keeps_step():
    """Three rows on two ranks in two parts each: one part of one rank is empty."""
    batch = Batch(*(x[:3] for x in vars(text_batch(0)).values()))

    def loss():
        return new_trainer(grad_accumulation=2).step(own_rows(batch))["loss"]

    assert on_ranks(loss, 2) == pytest.approx([loss()] * 2, rel=1e-5)


# ---------------------------------------------------------------- training states
def some_steps(path, first, last):
    """Losses of steps `first` to `last` − 1 from the state in the file, in which they leave theirs."""
    trainer, records = new_trainer(), []
    if first:
        records = load_training_state(path, trainer)
        assert trainer.step_count == first == len(records)
    records += [trainer.step(own_rows(text_batch(step))) for step in range(first, last)]
    save_training_state(path, trainer, records)
    return [record["loss"] for record in records]


@pytest.mark.parametrize("first, then", [(1, 2), (2, 1), (2, 3)])
def test_any_number_of_processes_goes_on_from_a_state(first, then, tmp_path):
    def run(ranks, *steps):
        work = partial(some_steps, tmp_path / "state", *steps)
        return work() if ranks == 1 else on_ranks(work, ranks)[0]

    whole_run = some_steps(tmp_path / "other", 0, 6)
    run(first, 0, 3)
    assert run(then, 3, 6) == pytest.approx(whole_run, rel=1e-4)
