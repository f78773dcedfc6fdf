"""A model's parameters shared out among the processes of torchrun: what the trainer needs around `fully_shard`.

Chapter 22 builds the same by hand (all-gather, reduce-scatter) and compares.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from ..course.ranks import world


def shard(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Share a model's parameters among all ranks with `fully_shard`, layer by layer; without a group nothing changes.

    dtype: of the gathered weights; what the optimiser updates stays float32, and gradients are summed in it. They are
    summed, not averaged: the losses of the course's `Trainer` are shares of one loss.
    """
    if not dist.is_initialized() or isinstance(model, FSDPModule):
        return model
    mesh = init_device_mesh(next(model.parameters()).device.type, (world()[1],))
    # inputs stay as they are: the weights of tokens and the tables of positions are float32
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale within a sum
    _hook_hidden_states(model)
    return model


def _hook_hidden_states(model: nn.Module) -> None:
    """Losses that begin with `hidden_states` gather weights as `forward` does; within `forward` they are there."""
    plain = model.hidden_states
    register_fsdp_forward_method(model, "hidden_states")
    hooked = model.hidden_states

    def use(method):
        model.hidden_states = method

    model.register_forward_pre_hook(lambda *_: use(plain))
    model.register_forward_hook(lambda *_: use(hooked), always_call=True)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Every weight of a sharded model whole, on every rank: inside, ranks may compute without each other.

    For evaluating and sampling, without gradients. All ranks enter and leave together.
    """
    units = _units(model)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)


def cut_again(model: nn.Module) -> None:
    """Drop every gathered weight: after an update it would be an old one."""
    for unit in _units(model):
        unit.reshard()


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def whole(x: Tensor) -> Tensor:
    """All of a tensor of which each rank has a piece; all ranks call it together. Another tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def cut_like(x: Tensor, p: Tensor) -> Tensor:
    """A whole tensor, on the device of `p` and cut as `p` is: each rank keeps its piece, and nothing is sent."""
    if isinstance(p, DTensor) and not isinstance(x, DTensor):
        own = x.detach().to(p.device)
        return distribute_tensor(own, p.device_mesh, p.placements, src_data_rank=None)
    return x.to(p.device)
