"""Tests never touch the repository's own results: whatever they make goes to a temporary folder."""

import os

import pytest


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


@pytest.fixture
def qwen2():
    """The reference implementation of the layers; skips the test where transformers is not installed."""
    pytest.importorskip("transformers")
    from transformers.models.qwen2 import modeling_qwen2

    return modeling_qwen2
