"""Tests never touch the repository's own results: whatever they make goes to a temporary folder."""

import dataclasses
import os
import random
import subprocess
import sys

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core, and a thread for each worker
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import qwen_mini  # noqa: F401, E402  before torch: it keeps threads that wait from spinning


@pytest.fixture(scope="session", autouse=True)
def _own_runs(tmp_path_factory):
    old = os.environ.get("QWEN_MINI_RUNS")
    os.environ["QWEN_MINI_RUNS"] = str(tmp_path_factory.mktemp("runs"))
    yield
    if old is None:
        del os.environ["QWEN_MINI_RUNS"]
    else:
        os.environ["QWEN_MINI_RUNS"] = old


@pytest.fixture
def runs_folder(tmp_path, monkeypatch):
    """An empty folder of results for one test."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("QWEN_MINI_RUNS", str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of every shipped checkpoint."""
    from qwen_mini.course import artifacts
    from qwen_mini.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(artifacts.shipped_dir("long_context"))


def run_two_processes(folder, body, *arguments, **variables):
    """Run Python lines under torchrun in two processes of one thread each, in a gloo group; `sys.argv`: arguments."""
    script = folder / "worker.py"
    script.write_text(
        "import sys, torch, torch.distributed as dist\n"
        "torch.set_num_threads(1)\n"
        "dist.init_process_group('gloo')\n"
        f"{body}\n"
        "dist.barrier()\n"  # neither leaves while the other still reads from it
        "dist.destroy_process_group()\n"
    )
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    subprocess.run([*launch, *map(str, arguments)], check=True, timeout=600, env=environment)


def small_config(**changes):
    """The `quick` model, two layers and 32 channels of it: what a test of losses and gradients needs."""
    from qwen_mini import course
    from qwen_mini.model import ModelConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2} | changes
    return dataclasses.replace(ModelConfig.from_scale(course.load_scale("quick")), **sizes)


def tiny_model(seed=0):
    """A model of `small_config` with large random weights, so that its distributions are far from flat."""
    import torch

    from qwen_mini.model import Qwen

    torch.manual_seed(seed)
    model = Qwen(small_config()).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def small_policy_run():
    """The scale `quick` in float32, with a run of GRPO of four steps."""
    from qwen_mini import course

    config = course.load_scale("quick")
    grpo = dataclasses.replace(config.grpo, queries=4, steps=4, max_new_tokens=8, micro_groups=2)
    run = dataclasses.replace(config.run, dtype="float32")
    return dataclasses.replace(config, run=run, grpo=grpo)


HEAD_DIM = 8  # of the attention that tests compute


def heads(batch, query_heads, kv_heads, length, head_dim=HEAD_DIM, **options):
    """Random q, k, v."""
    import torch

    return [
        torch.randn(batch, n, length, head_dim, **options)
        for n in (query_heads, kv_heads, kv_heads)
    ]


def some_pairs(count=6, seed=0):
    """Preference pairs of random ids, none of them a control token."""
    from qwen_mini.reward_model import Pair

    rng = random.Random(seed)
    draw = lambda low, high: [rng.randrange(30, 900) for _ in range(rng.randint(low, high))]
    return [Pair(draw(5, 20), draw(1, 9), draw(1, 9)) for _ in range(count)]


@pytest.fixture
def qwen2():
    """The reference implementation of the layers; skips the test where transformers is not installed."""
    pytest.importorskip("transformers")
    from transformers.models.qwen2 import modeling_qwen2

    return modeling_qwen2


@pytest.fixture(scope="module")
def one_thread():
    """The tests of a module, and the forks that they start, compute with one thread each."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
