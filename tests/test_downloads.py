"""What a reader is told when a wheel cannot be had, and that the advice helps."""

import importlib.util
import os
import shlex
import stat
import subprocess
import sys
import venv
import zipfile

import pytest

from qwen_mini.course import corpus_files, downloads
from qwen_mini.course.scales import load_scale

WHEEL = ("pack", "1.0", "0" * 64)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No cache, no package index, no settings of the machine's own."""
    monkeypatch.setattr(downloads, "cache_dir", lambda: tmp_path / "cache")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")


def refusal() -> downloads.SourceUnavailable:
    with pytest.raises(downloads.SourceUnavailable) as error:
        downloads.fetch_wheel(*WHEEL)
    assert "pack" in str(error.value) and "\n" not in str(error.value)
    return error.value


def pretend(tmp_path, monkeypatch, said: str) -> None:
    """A Python whose pip fails with these words."""
    (tmp_path / "said").write_text(said)
    stub = tmp_path / "python"
    stub.write_text(f"#!/bin/sh\ncat {shlex.quote(str(tmp_path / 'said'))} >&2\nexit 1\n")
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(stub))


@pytest.mark.skipif(
    not importlib.util.find_spec("ensurepip"), reason="this Python has no ensurepip"
)
def test_without_pip_the_advice_installs_it(tmp_path, monkeypatch):
    venv.create(tmp_path / "bare env", with_pip=False, symlinks=os.name != "nt")
    folder = "Scripts" if os.name == "nt" else "bin"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare env" / folder / "python"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    error = refusal()
    assert "pip, which downloads texts, is not installed" in str(error) and "index" not in str(
        error
    )
    command = str(error).partition("`")[2].partition("`")[0]
    subprocess.run(shlex.split(command), check=True, capture_output=True)
    assert "pip finds no pack==1.0" in str(refusal())


def test_an_index_that_is_not_reached(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    assert "package index not reached" in str(refusal())
    assert refusal().reason == "package index not reached"


def test_an_index_that_lacks_the_package_or_the_version(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    error = refusal()
    assert error.reason == "pip finds no pack==1.0 in its package index" and "reached" not in str(
        error
    )
    with zipfile.ZipFile(tmp_path / "pack-2.0-py3-none-any.whl", "w") as archive:
        archive.writestr("pack/text.txt", "text")
    assert refusal().reason == "pip finds no pack==1.0 in its package index, only 2.0"


def test_anything_else_is_said_in_pips_words(tmp_path, monkeypatch):
    pretend(
        tmp_path, monkeypatch, "ERROR: Could not install packages due to an OSError: no space left"
    )
    assert "pip says: Could not install packages due to an OSError: no space left" in str(refusal())


@pytest.mark.skipif(os.name == "nt", reason="files have no mode that forbids to start them")
def test_a_python_that_does_not_start_is_not_blamed_on_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    error = refusal()
    assert f"{tmp_path / 'gone'} could not be started" in str(error) and "stored" not in str(error)


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_index(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(downloads, "cache_dir", lambda: tmp_path / "file")
    error = refusal()
    assert "could not be stored in" in error.reason and "index" not in str(error)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("python: No module named pip", "pip, which downloads texts, is not installed here"),
        (
            "WARNING: connection broken by 'X'\nERROR: No matching distribution",
            "package index not reached",
        ),
        ("ERROR: no pack==1 (from versions: none)", "pip finds no "),
    ],
)
def test_the_corpus_says_why_it_goes_on_without_sources(
    tmp_path, monkeypatch, capsys, said, reason
):
    pretend(tmp_path, monkeypatch, said)
    monkeypatch.setattr(corpus_files, "_said", set())
    config = load_scale("quick")
    kept, gone = corpus_files.available_sources(config)
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.startswith(reason) for line in lines)
    assert gone and all(any(name in line for line in lines) for name in gone)
    assert {source.name for source in kept} | set(gone) == set(config.corpus.sources)
    corpus_files.available_sources(config)
    assert capsys.readouterr().out == ""  # once is enough
