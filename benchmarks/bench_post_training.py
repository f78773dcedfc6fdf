"""One step of DPO: ours against TRL's trainer, same weights and pairs, on the CPU.

Best of several steps each; TRL runs in float32 and once more under bfloat16 autocast, and the faster counts. The ratio
is TRL's time / ours.
"""

import contextlib
import io
import json
import tempfile
import time

import torch
import transformers
import trl
from datasets import Dataset

from qwen_mini import course
from qwen_mini.course import artifacts, hardware
from qwen_mini.dpo import build_pairs, make_trainer, pair_logprobs
from qwen_mini.model import Qwen
from qwen_mini.sft import draw_examples, evaluate_tasks
from qwen_mini.tokenizer import Tokenizer

STEPS, PAIRS = 3, 32


class Stopwatch(transformers.TrainerCallback):
    """Seconds of every step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.begun = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.begun)


def our_steps(config, start, policy, pairs) -> list[float]:
    """Seconds of each of our steps, in the precision that is faster here, the reference computed before."""
    reference, dtype = pair_logprobs(policy, pairs), policy.model.norm.weight.dtype
    trainer, step = make_trainer(config, start, pairs, reference, config.dpo, dtype=dtype)
    seconds = []
    for number in range(min(STEPS, trainer.total_steps)):
        begun = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - begun)
    return seconds


def trl_steps(folder, pairs, bf16: bool) -> list[float]:
    """Seconds of each of TRL's steps, the reference's log-probabilities computed before."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [(p.prompt, p.chosen[:-1], p.rejected[:-1]) for p in pairs]  # TRL adds the end token itself
    rows = [dict(zip(("prompt", "chosen", "rejected"), map(tokenizer.decode, ids), strict=True)) for ids in texts]
    options = dict(output_dir=f"{folder}/out", report_to=[], use_cpu=True, bf16=bf16, max_steps=STEPS, max_length=None,
                   per_device_train_batch_size=PAIRS, precompute_ref_log_probs=True, save_strategy="no",
                   gradient_checkpointing=False, disable_tqdm=True, logging_strategy="no")  # fmt: skip
    watch = Stopwatch()
    with contextlib.redirect_stdout(io.StringIO()):
        trl.DPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=trl.DPOConfig(**options),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[watch],
        ).train()
    return watch.seconds


def main():
    transformers.logging.set_verbosity_error()
    config, start = course.load_scale("laptop"), artifacts.shipped_dir("sft")
    torch.set_num_threads(hardware.threads(config))
    tokenizer, policy = Tokenizer.from_pretrained(start), Qwen.from_pretrained(start, hardware.pick_dtype()).eval()
    asked = draw_examples(24, 0)
    pairs = build_pairs(tokenizer, evaluate_tasks(policy, tokenizer, asked, 1.0, 8, 96, 0, 512))[: PAIRS * STEPS]
    with tempfile.TemporaryDirectory() as folder:
        Qwen.from_pretrained(start).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        peer = min(second for bf16 in (False, True) for second in trl_steps(folder, pairs, bf16))
    ours = min(our_steps(config, start, policy, pairs))
    line = {"name": f"a DPO step on {PAIRS} pairs", "ours": round(ours, 3), "peer": round(peer, 3)}
    print(json.dumps(line | {"peer_name": "TRL's DPOTrainer", "unit": "s", "ratio": round(peer / ours, 2)}), flush=True)


if __name__ == "__main__":
    main()
