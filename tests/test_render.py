"""Committed outputs are what stages and records show: CI renders what changed last and four others in turn."""

import os
import subprocess

import pytest
from tiny import forks

from qwen_mini.course import home, runner
from qwen_mini.course.nb import notebooks
from qwen_mini.course.outputs import SCALE, differences
from qwen_mini.course.stale import record_files
from qwen_mini.course.verify import _commits, in_turn, verify

BOOKS = [nb for nb in notebooks(home()) if os.name != "nt" or not forks(nb)]
IN_TURN = 4


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(home()), *words], capture_output=True, text=True).stdout


def _changed() -> set[str]:
    """Notebooks of the last commit that touched any, and of the working tree."""
    names = _git("log", "-1", "--format=", "--name-only", "--", "notebooks")
    names += _git("diff", "--name-only", "HEAD", "--", "notebooks")
    return {line.rpartition("/")[2].removesuffix(".ipynb") for line in names.split()}


def _chosen() -> list:
    start = _commits(home()) * IN_TURN
    turn = {BOOKS[(start + i) % len(BOOKS)].name for i in range(IN_TURN)}
    return [book for book in BOOKS if book.name in turn | _changed()]


def _render(books: list, tmp_path_factory) -> list[str]:
    """What does not run from records alone, or shows something else than what is committed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_MINI_RUNS", str(tmp_path_factory.mktemp("render")))
        results = runner.run(books, SCALE, keep_going=True, timeout=600, records_only=True)
        problems = [f"{result.notebook}: {result.problem}" for result in results if not result.ok]
        for book, result in zip(books, results, strict=True):
            problems += differences(book) if result.ok else []
        return problems


def test_what_changed_and_four_in_turn_show_what_is_committed(tmp_path_factory):
    assert _render(_chosen(), tmp_path_factory) == []


@pytest.mark.render
def test_all_notebooks_show_what_is_committed(tmp_path_factory):
    assert _render(BOOKS, tmp_path_factory) == []


def test_one_record_in_turn_is_computed_anew(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("QWEN_MINI_RUNS", str(tmp_path_factory.mktemp("verify")))
    assert record_files(home()), "no records are shipped"
    assert verify(home(), in_turn(home(), 1, longest=40)) == 0
