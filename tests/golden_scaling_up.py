"""Goldens of chapter 22: what a run without a group computes, bytes and days, names and metadata of GGUF."""

import dataclasses

import torch
from golden_registry import columns, digest, golden

from qwen_mini import scaling_up as s
from qwen_mini.course import gguf_files, load_scale
from qwen_mini.model import QWEN2_5, ModelConfig, Qwen
from qwen_mini.moe import QWEN_MOE, MoeConfig, QwenMoe

SMALL = ModelConfig(61, 32, 48, 2, 4, 2, 8, 64, 1_000.0, 1e-6, True)
EXPERTS = dict(num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=16)


@golden("scaling_up", "a run")
def _():
    torch.manual_seed(0)
    rows = torch.randint(61, (8, 17))
    settings = dataclasses.replace(
        load_scale("quick").pretraining, grad_accumulation=1, warmup_steps=1
    )
    return columns(s.train_distributed(Qwen(SMALL), s.rows_of(rows, 3), settings, 4))


@golden("scaling_up", "plans")
def _():
    models = QWEN2_5 | QWEN_MOE
    memory = {
        name: [s.memory_per_rank(config, n, 4_096, recompute=n > 1) for n in (1, 8, 1_000)]
        for name, config in models.items()
    }
    return {"memory": memory, "days": s.training_plan(QWEN2_5["0.5B"], 1e12, 8)}


@golden("scaling_up", "GGUF")
def _():
    experts = MoeConfig(**dataclasses.asdict(SMALL), **EXPERTS)
    names = [
        [(name, tuple(x.shape)) for name, x in s.gguf_tensors(model)]
        for model in (Qwen(SMALL), QwenMoe(experts))
    ]
    return {
        "names": list(map(digest, names)),
        "values": [gguf_files.metadata_of(c) for c in (SMALL, experts)],
    }


@golden("scaling_up", "load")
def _():
    return s.global_expert_load(torch.tensor([[0, 1], [1, 3], [1, 2]]), 4)
