"""Tools of the trade that rewrite files leave the project's own marks alone: `make check` stays green after them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from authoring import checks
from qwen_mini.course.paths import home

BIN = Path(sys.executable).parent

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git makes the clone")


def use(folder: Path, *command: str) -> None:
    """Run a tool of this environment there."""
    tool = shutil.which(command[0], path=str(BIN))
    if tool is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([tool, *command[1:]], cwd=folder, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def git(folder: Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", folder, *command], check=True, capture_output=True)
    return done.stdout.decode()


def clone_to(folder: Path) -> Path:
    """A copy of what the project tracks, as it is now."""
    names = git(home(), "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, names):
        source, target = home() / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    git(folder, "init", "--quiet")
    return folder


def round_trip(clone: Path) -> None:
    """Every notebook to a script and back, as an editor that pairs them does."""
    names = sorted(path.name for path in clone.glob("notebooks/*.ipynb"))
    scripts = [name.replace(".ipynb", ".py") for name in names]
    use(clone / "notebooks", "jupytext", "--to", "py:percent", *names)
    use(clone / "notebooks", "jupytext", "--update", "--to", "ipynb", *scripts)
    for script in scripts:
        (clone / "notebooks" / script).unlink()


def test_checks_find_nothing_new_after_the_tools_of_the_trade(tmp_path):
    clone = clone_to(tmp_path / "clone")
    notebooks = {path: path.read_bytes() for path in clone.glob("notebooks/*.ipynb")}
    use(clone, "nbdev-export")
    use(clone, "nbdev-clean", "--fname", "notebooks")
    use(clone, "ruff", "format", ".")  # everything, then as an editor does it: file by file
    use(clone, "ruff", "format", *map(str, notebooks), *map(str, clone.glob("qwen_mini/*.py")))
    round_trip(clone)
    if found := {
        check: problems for check in checks.CHECKS if (problems := check(clone))
    }:  # were they there before?
        untouched = clone_to(tmp_path / "untouched")
        assert not {
            check.__name__: problems
            for check, problems in found.items()
            if len(problems) > len(check(untouched))
        }
    for path, before in notebooks.items():
        old, new = json.loads(before), json.loads(path.read_bytes())
        assert new["metadata"]["qwen_mini"] == old["metadata"]["qwen_mini"], path.name
        assert new["cells"] == old["cells"], path.name
