"""One step of DPO and of GRPO: ours against TRL's trainers, same weights, pairs, problems and lengths, on the CPU.

A GRPO step samples eight answers to every problem, verifies them and updates. Best of several steps each; TRL runs in
float32 and once more under bfloat16 autocast, and the faster counts. The ratio is TRL's time / ours.
"""

import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset

from qwen_mini import course
from qwen_mini.course import artifacts, hardware
from qwen_mini.dpo import build_pairs, make_trainer
from qwen_mini.grpo import new_trainer, policy_update, roll_out
from qwen_mini.model import Qwen
from qwen_mini.sft import draw_examples, evaluate_tasks
from qwen_mini.tasks import verify_many
from qwen_mini.tokenizer import Tokenizer

STEPS = 3


def report(name, ours, peer, unit="s a step"):
    line = {"name": name, "ours": round(ours, 3), "peer": round(peer, 3), "peer_name": "TRL", "unit": unit}
    print(json.dumps(line | {"ratio": round(peer / ours, 2)}), flush=True)


class Stopwatch(transformers.TrainerCallback):
    """Seconds of every step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.begun = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.begun)


def best_of_trl(make):
    """The fastest step of a trainer, in float32 or under autocast."""
    best = float("inf")
    for bf16 in (False, True):
        with contextlib.redirect_stdout(io.StringIO()):
            watch, trainer = Stopwatch(), make(bf16)
            trainer.add_callback(watch)
            trainer.train()
        best = min(best, *watch.seconds)
    return best


def options(folder, bf16, rows):
    return dict(output_dir=f"{folder}/out", report_to=[], use_cpu=True, bf16=bf16, max_steps=STEPS, save_strategy="no",
                per_device_train_batch_size=rows, disable_tqdm=True, gradient_checkpointing=False,
                logging_strategy="no")  # fmt: skip


def bench_dpo(config, start, folder, tokenizer, theirs, count=32):
    policy = Qwen.from_pretrained(start, hardware.pick_dtype()).eval()
    asked = draw_examples(12, 0)
    pairs = build_pairs(tokenizer, evaluate_tasks(policy, tokenizer, asked, 1.0, 8, 96, 0, 512))[: count * STEPS]
    settings = course.load_scale("laptop").dpo
    trainer, step = make_trainer(config, start, pairs, settings, 0, hardware.pick_dtype())
    seconds = []
    for number in range(min(STEPS, trainer.total_steps)):
        begun = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - begun)
    texts = [(p.prompt, p.chosen[:-1], p.rejected[:-1]) for p in pairs]  # TRL adds the end token itself
    rows = [dict(zip(("prompt", "chosen", "rejected"), map(theirs.decode, ids), strict=True)) for ids in texts]

    def make(bf16):
        return trl.DPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=trl.DPOConfig(max_length=None, precompute_ref_log_probs=True, **options(folder, bf16, count)),
            train_dataset=Dataset.from_list(rows),
            processing_class=theirs,
        )

    report(f"DPO, {count} pairs, reference precomputed", min(seconds), best_of_trl(make))


def bench_grpo(config, start, folder, tokenizer, theirs, queries=32):
    settings = config.grpo
    examples = draw_examples(-(-queries // 15), 1)[:queries]
    trainer, seconds = new_trainer(config, start, settings, hardware.pick_dtype()), []
    for number in range(STEPS):
        begun = time.perf_counter()
        _, groups = roll_out(trainer.model.eval(), tokenizer, examples, settings, number)
        policy_update(trainer, groups, settings)
        seconds.append(time.perf_counter() - begun)
    rows = [{"prompt": list(e.messages), "number": i} for i, e in enumerate(examples)]

    def reward(completions, number, **_):
        pairs = [(examples[i], c[0]["content"]) for i, c in zip(number, completions, strict=True)]
        return [float(v.correct) for v in verify_many(pairs)]

    def make(bf16):
        sampling = dict(num_generations=settings.group_size, max_completion_length=settings.max_new_tokens)
        rest = options(folder, bf16, queries * settings.group_size)
        return trl.GRPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=reward,
            args=trl.GRPOConfig(learning_rate=settings.learning_rate, **sampling, **rest),
            train_dataset=Dataset.from_list(rows),
            processing_class=theirs,
        )

    report(f"GRPO, {queries} problems x {settings.group_size} answers", min(seconds), best_of_trl(make))


def main():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config, start = course.load_scale("laptop"), artifacts.shipped_dir("sft")
    torch.set_num_threads(hardware.threads(config))
    tokenizer = Tokenizer.from_pretrained(start)
    with tempfile.TemporaryDirectory() as folder:
        Qwen.from_pretrained(start).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        bench_dpo(config, start, Path(folder), tokenizer, theirs)
        bench_grpo(config, start, Path(folder), tokenizer, theirs)


if __name__ == "__main__":
    main()
