"""A scale whose stages train in a second, and what tests ask of such runs."""

import dataclasses
import itertools
import json
import re
import textwrap
from pathlib import Path

import pytest
import torch

from qwen_mini.course import stages
from qwen_mini.course.nb import Notebook
from qwen_mini.course.versions import closure
from qwen_mini.long_context import task_scores
from qwen_mini.model import ModelConfig, Qwen
from qwen_mini.training import Batch, Trainer

TINY = """
[run]
threads = 1
memory_gib = 2.0
dtype = "{dtype}"
[tokenizer]
vocab_size = 384
training_bytes = 60_000
[model]
vocab_size = 384
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 8
max_position_embeddings = 64
rope_theta = 1000.0
rms_norm_eps = 1e-6
tie_word_embeddings = true
initializer_range = 0.02
[moe]
facts = 100
fact_steps = 10
text_steps = 10
upcycle_steps = 10
seeds = 2

[corpus]
sources = ["python"]
max_bytes_per_source = 150_000
heldout_fraction = 0.1
max_heldout_bytes = 20_000
task_documents = 200
chat_documents = 30
needle_rows = 60
needle_lengths = [64]
[pretraining]
batch_tokens = 512
optimizer = "muon"
learning_rate = 3e-3
matrix_learning_rate = 0.02
min_lr_ratio = 0.1
warmup_steps = 4
schedule = "cosine"
decay_fraction = 0.2
beta1 = 0.9
beta2 = 0.95
eps = 1e-8
weight_decay = 0.1
clip_norm = 1.0
grad_accumulation = 1
[[pretraining.phases]]
tokens = 5_120
length = 32
mixture = {{ python = 0.7, tasks = 0.3 }}
[[pretraining.phases]]
tokens = 10_240
length = 64
mixture = {{ python = 0.6, tasks = 0.15, chat = 0.1, needles_64 = 0.15 }}

[long_context]
start = "own"
batch_tokens = 1024
learning_rate = 1e-3
matrix_learning_rate = 0.004
warmup_steps = 1
needle_share = 0.3
needle_rows = 8

[scaling_laws]
ladder = [[16, 1]]
budgets = [1e8]
ratio = [0.1, 100.0]
heldout_model = [16, 2]
heldout_tokens = 4096
widths = [16]
width_tokens = 2048
moe_models = [[16, 1]]
moe_tokens = 4096
[[scaling_laws.sweeps]]
model = [16, 1]
batches = [64]
tokens = [4096]
rates = [1e-3, 4e-3, 1.6e-2]

[[long_context.stages]]
tokens = 1024
rope_theta = 20000.0
lengths = [512]
shares = [1.0]

[data_quality]
start = "own"
crawl_bytes = 20_000
noise = 8
documents = 20
tokens = 2_048
mixtures = 8
mixture_tokens = 1_024
test_items = 50

[dual_chunk]
factors = [1, 4]
tries = 2

[sparse_prefill]
lengths = [128, 256]
chunk_tokens = 384
tries = 1

[sft]
demonstrations = 2
replay = 0.25
replay_weight = 0.2
epochs = 1
batch_rows = 4
learning_rate = 1e-3
matrix_learning_rate = 0.01
min_lr_ratio = 0.1
warmup_steps = 1

[reward_model]
start = "own"
demonstrations = 1
problems = 1
samples = 2
epochs = 1
batch_pairs = 2
learning_rate = 1e-3
warmup_steps = 1
center = 0.01

[dpo]
start = "own"
problems = 1
samples = 2
pairs_per_problem = 1
max_new_tokens = 8
epochs = 1
batch_pairs = 2
beta = 0.1
learning_rate = 1e-4
warmup_steps = 1
alpha = 1e-3
keep = 0.5

[grpo]
start = "own"
steps = 1
queries = 2
group_size = 2
micro_groups = 1
levels = [1]
probe = 1
max_new_tokens = 8
learning_rate = 1e-4
warmup_steps = 1
epsilon = 0.2
epsilon_high = 0.28
beta = 0.0

[measure]
eval_every = 10
eval_tokens = 512
needle_tries = 2
sft_problems = 1
sft_fresh = 1
ablation_demonstrations = 2
long_rows = 2
reward_heldout = 1
best_of = 2
dpo_heldout = 1
dpo_seeds = 1
grpo_heldout = 1
grpo_seeds = 1
side_steps = 1
"""


def toml(value) -> str:
    """A value as TOML writes it; a dict becomes an inline table."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {toml(one)}' for key, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value) if isinstance(value, str | bool) else repr(value)


def whole_file(config) -> str:
    """A scale as a file that says everything, a line per key."""
    sections = dataclasses.asdict(config)
    del sections["name"]
    return "".join(
        f"[{section}]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in values.items())
        for section, values in sections.items()
    )


def tiny_scale(folder: Path, dtype: str = "float32") -> str:
    """Write a scale that trains for 30 steps in about a second; returns its path."""
    path = folder / "tiny.toml"
    path.write_text(TINY.format(dtype=dtype))
    return str(path)


def fresh(config, dtype=torch.float32, total_steps=30, **changes) -> Trainer:
    torch.manual_seed(0)
    settings = dataclasses.replace(config.pretraining, **changes)
    return Trainer(Qwen(ModelConfig.from_scale(config)), settings, total_steps, dtype)


def text_batch(step: int, rows: int = 8, length: int = 64) -> Batch:
    """Rows of random ids with random weights, of which some are 0."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 384, (rows, length + 1), generator=generator)
    weights = torch.rand(rows, length, generator=generator)
    return Batch(ids[:, :-1], ids[:, 1:], torch.where(weights < 0.2, 0.0, weights))


def losses_of(folder: Path) -> list[tuple]:
    return [
        (r["step"], r["loss"], r["grad_norm"], r.get("heldout")) for r in stages.metrics(folder)
    ]


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def needle_share(*question, **options) -> float:
    """The mean score of a model at a task of the mini-RULER; arguments as for `long_context.task_scores`."""
    scores = task_scores(*question, **options)
    return sum(scores) / len(scores)


def exercises(book: Notebook) -> list[tuple[str, str]]:
    """Of each exercise of a notebook the cell of its solution and the one that checks it."""
    return [pair for pair in itertools.pairwise(book.code) if "# BEGIN SOLUTION" in pair[0]]


def answered(code: str, body: str) -> str:
    """The cell of an exercise with another body between its marks."""
    before, rest = re.split(r"[ ]*# BEGIN SOLUTION\n", code)
    after = rest.split("# END SOLUTION")[1]
    return before + textwrap.indent(body, "    " if "def " in before else "") + after


def passes(exercise, space: dict) -> None:
    """Run an exercise (its solution's cell, its check): the check holds."""
    for code in exercise:
        exec(code, space)


def refuses(exercise, body: str, space: dict, errors=AssertionError) -> None:
    """Assert that the check of an exercise (its solution's cell, its check) refuses another body."""
    solution, check = exercise
    exec(answered(solution, body), space)
    with pytest.raises(errors):
        exec(check, space)


def forks(nb: Notebook) -> bool:
    """Whether a notebook forks: chapter 22 its ranks, chapter 15 its sandbox, in which later ones judge programs."""
    return nb.module == "scaling_up" or bool(nb.module and "tasks" in closure(nb.module))
