"""The first page and the README say what the repository holds, and their code runs."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from qwen_mini.course import load_scale
from qwen_mini.course.nb import Notebook, notebooks, source
from qwen_mini.course.scales import scale_names

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BOOKS = {book.name: book for book in notebooks(ROOT)}
START = Notebook(ROOT / "notebooks" / "00_start_here.ipynb")


def _chapters() -> list[tuple]:
    """The list `CHAPTERS` of the first notebook."""
    for code in START.code:
        for node in ast.parse(code).body if "CHAPTERS = [" in code else []:
            if isinstance(node, ast.Assign) and node.targets[0].id == "CHAPTERS":
                return ast.literal_eval(node.value)
    raise AssertionError("notebook 00 has no list CHAPTERS")


CHAPTERS = _chapters()


def _row(text: str) -> str:
    """The README's table row of a chapter, by its number."""
    return next(line for line in README.splitlines() if re.match(rf"\| \[?{text} · ", line))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter[0])
def test_every_chapter_is_linked_if_it_exists_and_to_come_if_not(chapter):
    name, module, *_ = chapter
    row = _row(name[:2])
    prose = "\n".join(source(cell) for cell in START.cells if cell["cell_type"] == "markdown")
    exists = name in BOOKS
    assert (f"(notebooks/{name}.ipynb)" in row) == exists
    assert (f"({name}.ipynb)" in prose) == exists
    assert ("*to come*" in row) != exists
    if exists:
        assert (BOOKS[name].module or "") == module
        assert not module or f"[`{module}`](qwen_mini/{module}.py)" in row
        assert f"(../notebooks/{name}.ipynb)" in (ROOT / "docs" / "instructors.md").read_text(
            encoding="utf-8"
        )


def test_every_notebook_stands_on_the_map():
    assert set(BOOKS) <= {"00_start_here", *(chapter[0] for chapter in CHAPTERS)}


def _count(number: float) -> str:
    """`494 M`, `8.2 M`, `4 B`: two or three digits and a unit."""
    unit, name = (1e9, "B") if number >= 1e9 else (1e6, "M")
    digits = f"{number / unit:.1f}" if number / unit < 10 else f"{number / unit:.0f}"
    return f"{digits.removesuffix('.0')} {name}"


@pytest.mark.parametrize("name", scale_names())
def test_the_table_of_scales_is_computed_right(name):
    from qwen_mini.model import ModelConfig, count_parameters

    config = load_scale(name)
    cells = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |")).split(
        "|"
    )
    parameters = count_parameters(ModelConfig.from_scale(config))
    assert cells[3].split(",")[0].strip() == _count(parameters)
    assert cells[4].strip() == _count(sum(phase.tokens for phase in config.pretraining.phases))


def test_the_readme_names_every_source_with_its_licence():
    table = README[README.index("## Data and licences") : README.index("## How it is checked")]
    for entry in tomllib.loads(
        (ROOT / "data" / "sources.toml").read_text(encoding="utf-8")
    ).values():
        if entry["kind"] in ("wheel", "huggingface"):
            row = next(line for line in table.splitlines() if entry["package"] in line)
            assert entry["licence"] in row
        elif entry["kind"] == "python":
            assert entry["licence"] in table


def _stage() -> None:
    """A tiny random checkpoint as a finished stage."""
    import torch

    from qwen_mini.course import artifacts
    from qwen_mini.model import ModelConfig, Qwen
    from qwen_mini.tokenizer import Tokenizer

    with artifacts.write_stage("laptop", "pretraining") as folder:
        tokenizer = Tokenizer.train(["The river is wide and the river is long."], 300)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        Qwen(ModelConfig(300, 16, 32, 1, 2, 1, 8, tie_word_embeddings=True)).save_pretrained(folder)


def test_the_code_in_the_readme_runs(runs_folder, capsys):
    _stage()
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for block, shown in zip(blocks, ("The river is", "58301"), strict=True):
        exec(compile(block, "README.md", "exec"), {})
        assert shown in capsys.readouterr().out


@pytest.mark.notebooks
@pytest.mark.parametrize("trained", [False, True])
def test_the_first_notebook_runs_with_and_without_a_model(runs_folder, trained):
    """A random model fails exactly the claim that training helped."""
    from qwen_mini.course import runner

    if trained:
        _stage()
    result = runner.run([START], "laptop")[0]
    if trained:
        assert result.failed_claims == [
            "training has taken away at least a quarter of the bits per byte"
        ]
    else:
        assert result.ok, result.problem


def test_the_first_notebook_says_what_to_do_when_something_is_missing(monkeypatch, capsys):
    import importlib

    real = importlib.import_module

    def without_torch(name, *rest):
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return real(name, *rest)

    check = next(code for code in START.code if "import_module" in code)
    monkeypatch.setattr(importlib, "import_module", without_torch)
    exec(check, {})
    assert "torch" in (said := capsys.readouterr().out) and "make setup" in said
