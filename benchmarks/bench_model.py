"""The decoder alone, float32: this package against transformers' Qwen2 with the same weights.

Tokens per second of one forward pass without gradients, and of forward, the same plain
loss, and backward, in turns in one process, best of several rounds.
"""

import time

import torch
import torch.nn.functional as F
from lines import report
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen_mini.model import ModelConfig, Qwen

SIZES = {
    "1M": ModelConfig(2048, 128, 352, 5, 4, 2, 32, 256, 10_000.0, 1e-6, True),
    "3M": ModelConfig(2048, 224, 640, 5, 8, 4, 28, 256, 10_000.0, 1e-6, True),
}
ROWS, LENGTH, ROUNDS = 8, 256, 9


@torch.no_grad()
def forward(logits_of, ids):
    logits_of(ids)


def forward_backward(logits_of, ids):
    F.cross_entropy(logits_of(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()


def best_seconds(models, work, ids):
    """Best time of `work` for every model, measured in turns after two rounds of warming up."""
    best = dict.fromkeys(models, float("inf"))
    for round_ in range(ROUNDS + 2):
        for name, logits_of in models.items():
            begin = time.perf_counter()
            work(logits_of, ids)
            seconds = time.perf_counter() - begin
            if round_ >= 2:
                best[name] = min(best[name], seconds)
    return best


def main():
    for size, config in SIZES.items():
        torch.manual_seed(0)
        ours, theirs = (
            Qwen(config),
            Qwen2ForCausalLM(Qwen2Config(**config.to_dict(), use_cache=False)),
        )
        theirs.load_state_dict(ours.state_dict())
        ids = torch.randint(config.vocab_size, (ROWS, LENGTH))
        models = {"ours": ours, "theirs": lambda ids, model=theirs: model(ids).logits}
        for work in (forward, forward_backward):
            best = best_seconds(models, work, ids)
            what = f"{work.__name__} {size} float32, {torch.get_num_threads()} thread(s)"
            rate = {who: ids.numel() / seconds for who, seconds in best.items()}
            peer_name = "transformers Qwen2ForCausalLM"
            report(what, rate["ours"], rate["theirs"], peer_name, "tokens/s")


if __name__ == "__main__":
    main()
