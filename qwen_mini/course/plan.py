"""What a scale costs before a second of it is spent: the model on the meta device, counted."""

from .scales import ScaleConfig

GIB = 2**30
STATE_BYTES = 20  # bfloat16 weight and gradient; float32 master, gradient and two moments
ACCELERATOR_FLOPS = 0.4 * 312e12  # 40 % of an A100's bfloat16 peak


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

    from qwen_mini.model import (
        ModelConfig,
        Qwen,
        count_parameters,
        flops_per_token,
        kv_cache_bytes_per_token,
    )

    shape = ModelConfig.from_scale(config)
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in Qwen(shape).parameters())
    parameters = count_parameters(shape)
    if built != parameters:
        raise AssertionError(f"the model has {built:,} parameters, the formula says {parameters:,}")
    training, phases = config.pretraining, config.pretraining.phases
    tokens = sum(phase.tokens for phase in phases)
    flops = sum(
        phase.tokens * flops_per_token(shape, phase.length, training=True) for phase in phases
    )
    state = STATE_BYTES * parameters  # on every device: nothing is sharded before chapter 22
    micro = training.batch_tokens // (training.grad_accumulation * gpus)
    activations = micro * activation_bytes_per_token(config.model)
    return [
        (
            "parameters",
            f"{parameters:,} ({count_parameters(shape, embedding=False):,} without embeddings)",
        ),
        (
            "tokens",
            f"{tokens:,} in {tokens // training.batch_tokens:,} steps, {tokens / parameters:.1f} per parameter",
        ),
        (
            "weights, gradients, optimizer",
            f"{state / GIB:.2f} GiB a device ({STATE_BYTES} bytes a parameter, on every device)",
        ),
        (
            "activations",
            f"{activations / GIB:.2f} GiB a device ({micro:,} tokens at once, rule of thumb)",
        ),
        ("memory", _verdict((state + activations) / GIB, config.run.memory_gib)),
        ("KV cache", f"{kv_cache_bytes_per_token(shape):,} bytes a token in bfloat16"),
        ("FLOPs per token", f"{flops / tokens:.3g} in training"),
        (
            "FLOPs in total",
            f"{flops:.3g}, {flops / ACCELERATOR_FLOPS / gpus / 3600:.1f} h at 40 % of {gpus} A100(s)",
        ),
    ]


def _verdict(needed: float, budget: float) -> str:
    if needed <= budget:
        return f"{needed:.2f} GiB of {budget:g}"
    return f"{needed:.2f} GiB, more than the scale's {budget:g}: raise grad_accumulation, or share among more devices"
