"""A layer with experts, float32, forward and backward: against Hugging Face's block, and against a dense layer.

Both blocks of Qwen2Moe have the same weights and get the same tokens. The dense layer is as wide as all that a token
uses, shared expert included. Milliseconds, in turns in one process, best of several rounds.
"""

import time

import torch
from lines import report
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from qwen_mini.layers import SwiGLU
from qwen_mini.moe import MoeConfig, SparseMoeBlock

# tokens, hidden size, experts, experts a token uses, width of one, width of the shared expert
SHAPES = {
    "8 experts, 2 a token, 4,096 tokens": (4_096, 256, 8, 2, 256, 0),
    "32 experts, 4 a token, 4,096 tokens": (4_096, 256, 32, 4, 128, 0),
    "60 experts, 4 a token, a shared one, 1,024 tokens": (1_024, 128, 60, 4, 48, 192),
    "64 experts, 8 a token, 1,024 tokens": (1_024, 128, 64, 8, 44, 0),
}
ROUNDS = 9


def blocks(tokens, hidden, experts, k, width, shared):
    """Ours, theirs with the same weights, and a dense layer of the active width."""
    torch.manual_seed(0)
    config = MoeConfig(
        64, hidden, width, 1, 4, 4, hidden // 4, num_experts=experts, num_experts_per_tok=k,
        moe_intermediate_size=width, shared_expert_intermediate_size=shared or 1,
    )  # fmt: skip
    ours, theirs = (
        SparseMoeBlock(config),
        Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**config.to_dict())),
    )
    theirs.load_state_dict(ours.state_dict())
    return {"ours": ours, "theirs": theirs, "dense": SwiGLU(hidden, k * width + shared)}


def best_seconds(layers, x):
    """Best time of forward and backward of every layer, after two rounds of warming up."""
    best = dict.fromkeys(layers, float("inf"))
    for round_ in range(ROUNDS + 2):
        for name, layer in layers.items():
            begin = time.perf_counter()
            layer(x).sum().backward()
            seconds = time.perf_counter() - begin
            if round_ >= 2:
                best[name] = min(best[name], seconds)
    return best


def main():
    for name, (tokens, hidden, *sizes) in SHAPES.items():
        x = torch.randn(1, tokens, hidden, requires_grad=True)
        best = best_seconds(blocks(tokens, hidden, *sizes), x)
        threads = torch.get_num_threads()
        for peer, label in (
            ("theirs", "transformers Qwen2MoeSparseMoeBlock"),
            ("dense", "dense layer of equal active width"),
        ):
            what = f"experts, forward and backward, {name}, float32, {threads} thread(s)"
            report(what, best["ours"] * 1e3, best[peer] * 1e3, label, "ms")


if __name__ == "__main__":
    main()
