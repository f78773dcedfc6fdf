"""One GPU, at most eight minutes: does every kind of training compute there what it computes on a CPU, and how fast?

`make gpu-check`, or `python benchmarks/gpu_check.py --device cpu` where there is none. First every stage's loss, a few
steps in bfloat16 with torch.compile, against the same steps on the CPU in float32; then the pre-training of the scale
`gpu`: tokens a second, MFU and peak memory against the plan. Prints one JSON object; the exit code is 1 if a loss is
off by more than a hundredth or a stage was left out.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator

import torch

from qwen_mini.course import load_scale
from qwen_mini.course.plan import STATE_BYTES, activation_bytes_per_token, peak_flops
from qwen_mini.course.provenance import provenance
from qwen_mini.dpo import dpo_loss, token_logprobs
from qwen_mini.grpo import grpo_loss
from qwen_mini.model import ModelConfig, Qwen, count_parameters, flops_per_token
from qwen_mini.moe import MoeConfig, QwenMoe
from qwen_mini.reward_model import RewardModel, bradley_terry_loss
from qwen_mini.training import Batch, Trainer

STEPS, ROWS, LENGTH = 4, 8, 64
TOLERANCE = 1e-2  # of a loss, or of 1 where it is smaller
SMALL = ModelConfig(512, 128, 352, 4, 4, 2, 32, 256, 10_000.0, 1e-6, True)
EXPERTS = {"num_experts": 8, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128}
Losses = Callable[[torch.nn.Module, int], Iterator[torch.Tensor]]


def text(step: int, masked: bool = False) -> Batch:
    """The rows of a step, the same on every device; `masked`: of each row the second half alone is trained on."""
    ids = torch.randint(512, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    weights = torch.ones(ROWS, LENGTH)
    weights[:, : LENGTH // 2 * masked] = 0
    return Batch(ids[:, :-1], ids[:, 1:], weights)


def language(masked: bool) -> Losses:
    def losses(model, step):
        batch = text(step, masked)
        device = model.lm_head.weight.device
        inputs, targets, weights = (
            x.to(device) for x in (batch.input_ids, batch.targets, batch.weights)
        )
        yield model(inputs, targets=targets, weights=weights)

    return losses


def reward(model, step):
    ids = text(step).input_ids.to(model.score.weight.device)
    better, worse = model(ids, torch.full((ROWS,), LENGTH, device=ids.device)).chunk(2)
    yield bradley_terry_loss(better, worse, center=0.01)


def preference(model, step):
    batch = text(step, masked=True)
    chosen, rejected = token_logprobs(model, batch).sum(1).chunk(2)
    base = torch.full_like(chosen, -LENGTH / 2 * 6.2)  # about that of the untrained model
    yield dpo_loss(chosen, rejected, base, base, beta=0.01).mean()


def policy(model, step):
    batch = text(step, masked=True)
    logprobs = token_logprobs(model, batch)
    mask = batch.weights.to(logprobs.device)
    advantages = torch.linspace(-1.0, 2.0, ROWS, device=logprobs.device)
    old = torch.full_like(
        logprobs, -6.2
    )  # near the untrained policy, so that some tokens are clipped
    yield grpo_loss(logprobs, old, advantages, mask)[0]


STAGES: dict[str, tuple[Callable, Losses]] = {
    "pretraining": (lambda: Qwen(SMALL), language(masked=False)),
    "experts": (
        lambda: QwenMoe(MoeConfig(**dataclasses.asdict(SMALL), **EXPERTS)),
        language(masked=False),
    ),
    "sft": (lambda: Qwen(SMALL), language(masked=True)),
    "reward_model": (lambda: RewardModel(SMALL), reward),
    "dpo": (lambda: Qwen(SMALL), preference),
    "grpo": (lambda: Qwen(SMALL), policy),
}


def new_trainer(model, device: str, dtype: torch.dtype, compiled: bool) -> Trainer:
    settings = load_scale("gpu").pretraining
    settings = dataclasses.replace(settings, grad_accumulation=1, warmup_steps=1)
    model = model.to(device)
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    return Trainer(model, settings, 100, dtype)


def stage_losses(name: str, device: str, dtype: torch.dtype, compiled: bool) -> list[float]:
    """The losses of some steps of a stage."""
    torch.manual_seed(0)
    make, losses = STAGES[name]
    trainer = new_trainer(make(), device, dtype, compiled)
    return [trainer.step(losses(trainer.model, step))["loss"] for step in range(STEPS)]


def check_stage(name: str, device: str, compiled: bool) -> dict:
    golden = stage_losses(name, "cpu", torch.float32, False)
    begun = time.perf_counter()
    found = stage_losses(name, device, torch.bfloat16, compiled)
    off = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(found, golden, strict=True))
    seconds = round(time.perf_counter() - begun, 1)
    return {"losses": found, "cpu": golden, "off": off, "good": off < TOLERANCE, "seconds": seconds}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def check_speed(shape: ModelConfig, rows: int, length: int, device: str, compiled: bool) -> dict:
    """Tokens a second, MFU and peak memory of steps of pre-training in bfloat16."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    trainer, taken = new_trainer(Qwen(shape), device, torch.bfloat16, compiled), []
    ids = torch.randint(shape.vocab_size, (rows, length + 1))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(rows, length))
    for _ in range(10 if device == "cuda" else 3):
        begun = time.perf_counter()
        trainer.step(batch)
        synchronize(device)
        taken.append(time.perf_counter() - begun)
    speed = rows * length / sorted(taken[1:])[len(taken[1:]) // 2]
    flops = speed * flops_per_token(shape, length, training=True)
    planned = STATE_BYTES * count_parameters(shape)
    planned += rows * length * activation_bytes_per_token(shape)
    found = {"parameters": count_parameters(shape), "tokens_per_second": round(speed)}
    found |= {"flops_per_second": flops, "planned_bytes": planned}
    if device == "cuda":
        peak = peak_flops(torch.cuda.get_device_name())
        found["mfu"] = flops / peak if peak else None
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found["peak_over_plan"] = found["peak_bytes"] / planned
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--compile", action="store_true", help="torch.compile on a CPU, too")
    parser.add_argument("--seconds", type=float, default=480, help="nothing begins later than this")
    options = parser.parse_args(arguments)
    device, begun = options.device, time.monotonic()
    if device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here: use --device cpu", file=sys.stderr)
        return 2
    compiled = options.compile or device == "cuda"
    report = {"device": device, "compiled": compiled, **provenance(torch.bfloat16), "stages": {}}
    for name in STAGES:
        if time.monotonic() - begun < 0.75 * options.seconds:  # the rest is for the speed
            report["stages"][name] = check_stage(name, device, compiled)
    left_out = sorted(STAGES.keys() - report["stages"].keys())
    if time.monotonic() - begun < 0.9 * options.seconds:
        shape = ModelConfig.from_scale(load_scale("gpu")) if device == "cuda" else SMALL
        sizes = (8, 1_024) if device == "cuda" else (4, 64)
        report["speed"] = check_speed(shape, *sizes, device, compiled)
    report |= {"left_out": left_out, "seconds": round(time.monotonic() - begun, 1)}
    print(json.dumps(report))
    return int(bool(left_out) or not all(stage["good"] for stage in report["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
