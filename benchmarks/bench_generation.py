"""Sampling speed against transformers: the same weights, one process, one thread, in turns; one JSON object a line.

256 rows, 32 prompt and 64 new tokens, the model of the laptop scale. Each side runs in the dtype that suits it better.
Then one prompt alone, greedily, all in float32, also against llama.cpp on the GGUF file of the same checkpoint where
`pip install xllamacpp` has been run.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import transformers
from lines import report
from transformers import AutoModelForCausalLM

from qwen_mini import course
from qwen_mini.course import artifacts
from qwen_mini.generation import generate, inference_copy, sample
from qwen_mini.model import ModelConfig, Qwen
from qwen_mini.scaling_up import export_gguf, load_model

try:
    import xllamacpp
except ImportError:
    xllamacpp = None

ROWS, PROMPT, NEW = 256, 32, 64
ALONE = 192  # new tokens of one prompt alone
WAYS = {
    "sample": {"temperature": 1.0},
    "greedy": {"temperature": 0.0},
    "instruct defaults": {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
    },
}


def fastest(functions: dict, rounds: int) -> dict[str, float]:
    """Best CPU seconds of each, in turns so that a busy moment of the machine hits all."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.process_time()
            function()
            best[name] = min(best[name], time.process_time() - begin)
    return best


def compare(
    name: str, models: dict, prompts: torch.Tensor, copies: int, way: dict, rounds: int
) -> None:
    """One way of sampling on both sides, in both dtypes."""
    hf = {"do_sample": way["temperature"] > 0, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0,
          "num_return_sequences": copies, "repetition_penalty": way.get("repetition_penalty", 1.0)}  # fmt: skip
    if hf["do_sample"]:
        hf |= {
            "temperature": way["temperature"],
            "top_k": way.get("top_k", 0),
            "top_p": way.get("top_p", 1.0),
        }
    lists, mask = prompts.tolist(), torch.ones_like(prompts)
    functions = {}
    for dtype, (mine, theirs) in models.items():
        functions[f"ours {dtype}"] = lambda m=mine: generate(
            m, lists, NEW, num_return_sequences=copies, **way
        )
        functions[f"peer {dtype}"] = lambda m=theirs: m.generate(prompts, attention_mask=mask, **hf)
    seconds = fastest(functions, rounds)
    best = {
        side: min((s, key) for key, s in seconds.items() if key.startswith(side))
        for side in ("ours", "peer")
    }
    tokens = len(prompts) * copies * NEW
    dtypes = {side: key.split()[1] for side, (_, key) in best.items()}
    report(f"{name} ({dtypes['ours']})", tokens / best["ours"][0], tokens / best["peer"][0],
           f"transformers {transformers.__version__} generate ({dtypes['peer']})", "tokens/s")  # fmt: skip


def compare_alone(rounds: int) -> None:
    """One prompt, greedily, float32: the shipped base model against transformers and, if it is there, llama.cpp."""
    folder = artifacts.shipped_dir("pretraining")
    prompt = torch.arange(100, 100 + PROMPT)[None]
    mine = inference_copy(load_model(folder), torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    hf = {"do_sample": False, "max_new_tokens": ALONE, "attention_mask": torch.ones_like(prompt)}
    functions = {
        "ours": lambda: generate(mine, prompt, ALONE),
        f"transformers {transformers.__version__} generate": lambda: theirs.generate(prompt, **hf),
    }
    if xllamacpp:
        server = llama_server(folder)
        request = {"prompt": prompt[0].tolist(), "n_predict": ALONE, "temperature": 0, "top_k": 1,
                   "repeat_penalty": 1.0, "ignore_eos": True, "cache_prompt": False}  # fmt: skip
        functions["llama.cpp"] = lambda: server.handle_completions(request)
    speeds = {name: ALONE / seconds for name, seconds in fastest(functions, 3 * rounds).items()}
    for name in list(speeds)[1:]:
        report("greedy, 1 prompt (float32)", speeds["ours"], speeds[name], f"{name} (float32)", "tokens/s")  # fmt: skip


def llama_server(folder: Path):
    """llama.cpp with one thread and the checkpoint's weights in float32; the file is in memory afterwards."""
    options = xllamacpp.CommonParams()
    options.n_ctx, options.n_parallel = PROMPT + ALONE, 1
    options.warmup, options.fit_params, options.verbosity = False, False, -1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    with tempfile.TemporaryDirectory() as place:
        options.model.path = str(export_gguf(folder, Path(place) / "model.gguf", torch.float32))
        return xllamacpp.Server(options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Qwen(ModelConfig.from_scale(course.load_scale("laptop"))).eval()
    prompts = torch.randint(0, model.config.vocab_size, (ROWS, PROMPT))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        models = {str(dtype).removeprefix("torch."): (inference_copy(model, dtype),
                                                      AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())
                  for dtype in (torch.float32, torch.bfloat16)}  # fmt: skip
    for theirs in (pair[1] for pair in models.values()):
        theirs.generation_config.eos_token_id = None
    for name, way in WAYS.items():
        compare(f"{name}, {ROWS} prompts", models, prompts, 1, way, rounds)
    compare("sample, 8 prompts x 32", models, prompts[:8], 32, WAYS["sample"], rounds)
    compare_alone(rounds)

    logits, uniform = torch.randn(ROWS, 2_048), torch.rand(ROWS, 1)
    seconds = fastest({"ours": lambda: sample(logits, uniform),
                       "peer": lambda: torch.multinomial(torch.softmax(logits, -1), 1)}, 10 * rounds)  # fmt: skip
    report(
        "draw from 2,048 ids",
        ROWS / seconds["ours"],
        ROWS / seconds["peer"],
        "torch.multinomial",
        "draws/s",
    )


if __name__ == "__main__":
    main()
