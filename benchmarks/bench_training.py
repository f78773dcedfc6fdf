"""Training tokens per second: this package against transformers' Qwen2, same sizes, same
batch, one process, in turns.
"""

import dataclasses
import statistics
import time

import torch
from lines import report
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen_mini.course import hardware, load_scale
from qwen_mini.model import ModelConfig, Qwen
from qwen_mini.training import Batch, Trainer

SIZES = {
    "1M": ModelConfig(2048, 128, 352, 5, 4, 2, 32, 256, 10_000.0, 1e-6, True),
    "3M": ModelConfig(2048, 224, 640, 5, 8, 4, 28, 256, 10_000.0, 1e-6, True),
}
ROWS, LENGTH, ROUNDS = 16, 256, 9


def ours(config: ModelConfig):
    """The course's step with AdamW, in the faster precision of this machine."""
    settings = dataclasses.replace(load_scale("gpu").pretraining, grad_accumulation=1)
    trainer = Trainer(Qwen(config), settings, 1_000, hardware.pick_dtype())
    weights = torch.ones(ROWS, LENGTH)

    def step(ids):
        return trainer.step(Batch(ids[:, :-1], ids[:, 1:], weights))["loss"]

    return step


def theirs(config: ModelConfig, bfloat16: bool):
    """The usual loop: model(labels=...), backward, clip, fused AdamW."""
    model = Qwen2ForCausalLM(Qwen2Config(**config.to_dict(), use_cache=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main():
    threads = torch.get_num_threads()
    for name, config in SIZES.items():
        ids = torch.randint(0, config.vocab_size, (ROWS, LENGTH + 1))
        steps = {
            "ours": ours(config),
            "fp32": theirs(config, False),
            "bf16 autocast": theirs(config, True),
        }
        seconds = {key: [] for key in steps}
        for round_ in range(ROUNDS + 2):
            for key, step in steps.items():
                begin = time.perf_counter()
                step(ids)
                if round_ >= 2:  # the first two warm up
                    seconds[key].append(time.perf_counter() - begin)
        rate = {key: ROWS * LENGTH / statistics.median(values) for key, values in seconds.items()}
        for peer in ("fp32", "bf16 autocast"):
            what = f"training, {name} parameters, {threads} threads"
            report(what, rate["ours"], rate[peer], f"transformers Qwen2 {peer}", "tokens/s")


if __name__ == "__main__":
    main()
