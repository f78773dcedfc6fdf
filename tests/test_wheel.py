"""The built package works away from the repository: it imports, lists scales, loads a checkpoint and generates."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_mini.course import artifacts, home

USE = """
import sys
import qwen_mini
from qwen_mini import course
from qwen_mini.course.scales import scale_names
from qwen_mini.course.versions import versions
from qwen_mini.generation import generate
from qwen_mini.model import Qwen
from qwen_mini.tasks import TASKS
from qwen_mini.tokenizer import Tokenizer

assert versions() and all(task.shown for task in TASKS.values())  # read from files of the package
assert qwen_mini.__file__.startswith(sys.argv[1]), qwen_mini.__file__
print(*scale_names())
model, tokenizer = Qwen.from_pretrained(sys.argv[2]), Tokenizer.from_pretrained(sys.argv[2])
(answer,) = generate(model, [tokenizer.encode("The river")], max_new_tokens=5, temperature=0)
print(len(answer.tokens))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which the package was installed from its wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(home() / name, source)
    shutil.copytree(
        home() / "qwen_mini", source / "qwen_mini", ignore=shutil.ignore_patterns("__pycache__")
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True
    )
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def _run(site: Path, *words: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("QWEN_MINI")} | {
        "PYTHONPATH": str(site)
    }
    done = subprocess.run(
        [sys.executable, *words], cwd=site.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_imports_lists_scales_loads_and_generates(site):
    scales, tokens = _run(
        site, "-c", USE, str(site), str(artifacts.shipped_dir("pretraining"))
    ).splitlines()
    assert scales.split() == ["quick", "laptop", "gpu", "cluster"]
    assert int(tokens) == 5


def test_its_command_line_plans_a_scale(site):
    assert "parameters" in _run(site, "-m", "qwen_mini.course", "plan", "--scale", "cluster")
