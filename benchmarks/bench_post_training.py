"""A step of DPO and a step of GRPO: ours against TRL's trainers, same weights and data, on the CPU.

DPO trains on one batch of mixed lengths; GRPO samples, scores and updates on the same problems each time (what is
sampled differs, the model is the same). After a step to warm up several are timed, and the median counts. TRL runs in
float32 and once more under bfloat16 autocast, and the faster of the two counts; ours runs in the scale's precision. The
ratio is TRL's time / ours.
"""

import contextlib
import dataclasses
import io
import random
import statistics
import tempfile
import time

from lines import report

from qwen_mini import course  # first: it keeps threads that wait from spinning

# isort: split
import torch
import transformers
import trl
from datasets import Dataset

from qwen_mini.course import artifacts, hardware
from qwen_mini.dpo import build_pairs, make_trainer
from qwen_mini.grpo import new_trainer, policy_update, roll_out
from qwen_mini.model import Qwen
from qwen_mini.sft import draw_examples, evaluate_tasks
from qwen_mini.tasks import TASKS, verify_many
from qwen_mini.tokenizer import Tokenizer

STEPS, PAIRS, QUERIES = 3, 32, 32  # steps after one more to warm up


class Stopwatch(transformers.TrainerCallback):
    """Seconds of every step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.begun = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.begun)


def our_step(step) -> float:
    """Seconds of step(number), the median."""
    seconds = []
    for number in range(STEPS + 1):
        begun = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def trl_step(folder, trainer, settings, rows, numbers, **options) -> float:
    """Seconds of a step of one of TRL's trainers: the median, in the better precision. numbers: for `settings`."""
    numbers = numbers | dict(output_dir=f"{folder}/out", report_to=[], use_cpu=True, max_steps=STEPS + 1,
                             save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
                             logging_strategy="no")  # fmt: skip
    found = []
    for bf16 in (False, True):
        watch = Stopwatch()
        with contextlib.redirect_stdout(io.StringIO()):
            trainer(
                model=transformers.AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32
                ),
                args=settings(bf16=bf16, **numbers),
                train_dataset=Dataset.from_list(rows),
                processing_class=transformers.AutoTokenizer.from_pretrained(folder),
                callbacks=[watch],
                **options,
            ).train()
        found.append(statistics.median(watch.seconds[1:]))
    return min(found)


def bench_dpo(config, start, folder, tokenizer, dtype):
    """The reference's log-probabilities are computed before, by both."""
    policy = Qwen.from_pretrained(start, dtype).eval()
    pairs = build_pairs(
        tokenizer, evaluate_tasks(policy, tokenizer, draw_examples(24, 0), 1.0, 8, 128, 0, 512)
    )
    pairs = random.Random(0).sample(pairs, PAIRS)
    settings = dataclasses.replace(config.dpo, batch_pairs=PAIRS, epochs=STEPS + 1)
    _, step = make_trainer(config, start, pairs, settings, dtype=dtype)
    ours = our_step(step)
    texts = [
        (p.prompt, p.chosen[:-1], p.rejected[:-1]) for p in pairs
    ]  # TRL adds the end token itself
    rows = [
        dict(zip(("prompt", "chosen", "rejected"), map(tokenizer.decode, ids), strict=True))
        for ids in texts
    ]
    numbers = dict(
        per_device_train_batch_size=PAIRS, precompute_ref_log_probs=True, max_length=None
    )
    peer = trl_step(folder, trl.DPOTrainer, trl.DPOConfig, rows, numbers)
    report(f"a DPO step on {PAIRS} pairs", ours, peer, "TRL's DPOTrainer")


def bench_grpo(config, start, folder, tokenizer, dtype):
    """Sampling, verifying and the update; both with the same verifiers and longest answer."""
    settings, examples = config.grpo, draw_examples(-(-QUERIES // len(TASKS)), 1)[:QUERIES]
    trainer = new_trainer(config, start, settings, dtype)

    def step(number):
        _, groups = roll_out(trainer.model.eval(), tokenizer, examples, settings, number)
        policy_update(trainer, groups, settings)

    ours = our_step(step)
    rows = [{"prompt": list(e.messages), "number": i} for i, e in enumerate(examples)]

    def reward(completions, number, **_):
        pairs = [(examples[i], c[0]["content"]) for i, c in zip(number, completions, strict=True)]
        return [float(v.correct) for v in verify_many(pairs)]

    numbers = dict(per_device_train_batch_size=QUERIES * settings.group_size, num_generations=settings.group_size,
                   max_completion_length=settings.max_new_tokens, learning_rate=settings.learning_rate)  # fmt: skip
    peer = trl_step(folder, trl.GRPOTrainer, trl.GRPOConfig, rows, numbers, reward_funcs=reward)
    report(
        f"a GRPO step, {QUERIES} problems x {settings.group_size} answers",
        ours,
        peer,
        "TRL's GRPOTrainer",
    )


def main():
    transformers.logging.set_verbosity_error()
    config, start = course.load_scale("laptop"), artifacts.shipped_dir("sft")
    torch.set_num_threads(hardware.threads(config))
    tokenizer, dtype = Tokenizer.from_pretrained(start), hardware.pick_dtype(config.run.dtype)
    with tempfile.TemporaryDirectory() as folder:
        Qwen.from_pretrained(start).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        bench_dpo(config, start, folder, tokenizer, dtype)
        bench_grpo(config, start, folder, tokenizer, dtype)


if __name__ == "__main__":
    main()
