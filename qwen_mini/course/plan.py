"""What a run costs before a second of it is spent: a scale's model counted on the meta device, or N and D by the laws."""

import re
import time

from .scales import ScaleConfig, load_scale

GIB = 2**30
STATE_BYTES = 20  # bfloat16 weight and gradient; float32 master, gradient and two moments
UTILISATION = 0.4
# Peak of dense bfloat16 (T4: float16) products in FLOP/s, from NVIDIA's data sheets of each card.
GPUS = {"T4": 65e12, "L4": 121e12, "RTX 4090": 165e12, "A100": 312e12, "H100 SXM": 989e12}
# Word in the name that the driver gives a card -> card; an H200 has the peak of an H100.
CARDS = {name.split()[-1]: name for name in ("T4", "L4", "RTX 4090", "A100")}
CARDS |= dict.fromkeys(("H100", "H200"), "H100 SXM")
ACCELERATOR_FLOPS = UTILISATION * GPUS["A100"]


def peak_flops(name: str) -> float | None:
    """Peak of a card in FLOP/s by the driver's name for it; None for one that `GPUS` does not list."""
    words = set(re.split(r"[\s-]", name))
    known = [GPUS[CARDS[word]] for word in words & CARDS.keys()]
    # another card of that name, or a part of one
    slower = words & {"Laptop", "MIG", "NVL", "D"} or {"H100", "PCIe"} <= words
    return known[0] if known and not slower else None


def activation_bytes_per_token(model) -> int:
    """Rule of thumb without recomputation, bfloat16: what the layers keep for backward, and float32 logits.

    A layer keeps four vectors of the hidden size, q, k, v, the attention's output, and three of the feed-forward size.
    """
    attention = 2 * (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    layer = 4 * model.hidden_size + attention + 3 * model.intermediate_size
    return 2 * model.num_hidden_layers * layer + 4 * model.vocab_size


def plan(config: ScaleConfig, gpus: int = 1) -> list[tuple[str, str]]:
    """Rows of name and value: parameters, memory per device, FLOPs and time of the pre-training of a scale."""
    import torch

    from qwen_mini.model import ModelConfig, Qwen, count_parameters
    from qwen_mini.model import flops_per_token, kv_cache_bytes_per_token

    shape = ModelConfig.from_scale(config)
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in Qwen(shape).parameters())
    parameters = count_parameters(shape)
    if built != parameters:
        raise AssertionError(f"the model has {built:,} parameters, the formula says {parameters:,}")
    training, phases = config.pretraining, config.pretraining.phases
    tokens = sum(phase.tokens for phase in phases)
    per_token = lambda phase: flops_per_token(shape, phase.length, training=True)
    flops = sum(phase.tokens * per_token(phase) for phase in phases)
    state, told = _state_bytes(shape, gpus)
    share = training.batch_tokens // (training.grad_accumulation * gpus)
    micro = max(share, *(phase.length for phase in phases))  # a device reads a row at least
    activations = micro * activation_bytes_per_token(config.model)
    layers, steps = count_parameters(shape, embedding=False), tokens // training.batch_tokens
    hours = flops / ACCELERATOR_FLOPS / gpus / 3600
    rows = {
        "parameters": f"{parameters:,} ({layers:,} without embeddings)",
        "tokens": f"{tokens:,} in {steps:,} steps, {tokens / parameters:.1f} per parameter",
        "weights, gradients, optimizer": f"{state / GIB:.2f} GiB a device ({told})",
        "activations": f"{activations / GIB:.2f} GiB a device ({micro:,} tokens at once, rule of thumb)",
        "memory": _verdict((state + activations) / GIB, config.run.memory_gib),
        "KV cache": f"{kv_cache_bytes_per_token(shape):,} bytes a token in bfloat16",
        "FLOPs per token": f"{flops / tokens:.3g} in training",
        "FLOPs in total": f"{flops:.3g}, {hours:.1f} h at {UTILISATION:.0%} of {gpus} A100(s)",
        "tokens a second": f"{gpus * ACCELERATOR_FLOPS * tokens / flops:,.0f} at that utilisation",
    }
    return list(rows.items())


def _state_bytes(shape, gpus: int) -> tuple[int, str]:
    """Bytes of weights, gradients and optimiser on the fullest device, and how they come about."""
    from qwen_mini.scaling_up import OWNED_BYTES, memory_per_rank

    found = memory_per_rank(shape, gpus)
    if gpus == 1:
        return found["owned"], f"{STATE_BYTES} bytes a parameter"
    gathered = found["gathered"] + found["gradients"]
    owned = f"{found['owned'] / GIB:.2f} owned: {OWNED_BYTES} bytes a parameter, shared by {gpus}"
    return found["owned"] + gathered, f"{owned}; {gathered / GIB:.2f} gathered"


def _verdict(needed: float, budget: float) -> str:
    if needed <= budget:
        return f"{needed:.2f} GiB of {budget:g}"
    return f"{needed:.2f} GiB, more than the scale's {budget:g}: raise grad_accumulation, or share among more devices"


def plan_run(params: float, tokens: float) -> list[tuple[str, str]]:
    """Rows of name and value for N parameters and D tokens: settings by chapter 11's laws, cost, and time here and elsewhere.

    ValueError unless both are positive.
    """
    from qwen_mini.scaling_laws import recommend

    said = recommend(params, tokens)
    speed = measured_speed()
    here = f"{duration(said.flops / speed)} at {speed / 1e9:.0f} GFLOP/s"
    memory = f"{said.memory / GIB:.3g} GiB without activations"
    rows = {
        "learning rate": f"{said.learning_rate:.2e} (peak, AdamW)",
        "batch": f"{said.batch_tokens:,} tokens",
        "steps": f"{said.steps:,}",
        "FLOPs": f"{said.flops:.3g} (6 N D)",
        "memory": f"{memory} ({STATE_BYTES} bytes a parameter)",
        "time on this machine": f"{here}, measured on a small model",
    }
    for name, peak in GPUS.items():
        seconds, share = said.flops / peak / UTILISATION, f"{UTILISATION:.0%}"
        rows[f"time on one {name}"] = f"{duration(seconds)} at {share} of {peak / 1e12:.0f} TFLOP/s"
    if said.beyond > 1:
        warning = f"N or D is {said.beyond:,.3g} times the largest run of the fits: a guess"
        rows["beyond the laws"] = warning
    return list(rows.items())


def measured_speed(seconds: float = 1.0) -> float:
    """FLOP/s of training a model of a million parameters here, the best of the steps within some seconds."""
    import torch

    from qwen_mini.model import ModelConfig, Qwen, flops_per_token

    shape = ModelConfig.from_scale(load_scale("laptop"))
    model, length = Qwen(shape), 128
    ids = torch.randint(shape.vocab_size, (8, length + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    taken, begun = [], time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        optimizer.zero_grad()
        model(ids[:, :-1], targets=ids[:, 1:]).backward()
        optimizer.step()
        taken.append(time.perf_counter() - start)
    return 8 * length * flops_per_token(shape, length, training=True) / min(taken)


def duration(seconds: float) -> str:
    """`90 s`, `2.5 h`, `40 days`, `3e+05 years`."""
    for size, unit in ((31_557_600, "years"), (86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds:.3g} s"
