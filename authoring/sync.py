"""Generate the modules of `qwen_mini/` from their notebooks: `python -m authoring.sync [notebook ...]`."""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from qwen_mini.course.artifacts import write_file
from qwen_mini.course.errors import CourseError
from qwen_mini.course.nb import Notebook, select
from qwen_mini.course.paths import home


def run_ruff(*words: str | Path) -> subprocess.CompletedProcess:
    """The formatter and linter of this environment."""
    command = [sys.executable, "-m", "ruff", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def generate(root: Path, books: list[Notebook]) -> dict[str, str]:
    """Module name -> text that nbdev makes of the notebooks, generated aside in a copy of the project's skeleton."""
    from nbdev.export import nb_export

    modules: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder).resolve()
        shutil.copy(root / "pyproject.toml", aside)
        (aside / "notebooks").mkdir()
        for nb in books:
            if nb.module is None:
                continue
            copy = shutil.copy(nb.path, aside / "notebooks")
            with contextlib.chdir(aside):
                nb_export(copy, lib_path=aside / "qwen_mini")
            made = aside / "qwen_mini" / f"{nb.module}.py"
            if not made.exists():
                raise CourseError(
                    f"{nb.path.name} names the module {nb.module} but exports no cell"
                )
            modules[nb.module] = ""
        run_ruff("format", "--quiet", aside / "qwen_mini")
        return {
            name: (aside / "qwen_mini" / f"{name}.py").read_text(encoding="utf-8")
            for name in modules
        }


def tidy(nb: Notebook) -> bool:
    """Remove the cell and notebook metadata that editors leave behind; returns whether there was any."""
    own = {
        key: value
        for key, value in nb.data["metadata"].items()
        if key in ("kernelspec", "qwen_mini")
    }
    foreign = own != nb.data["metadata"] or any(
        set(cell["metadata"]) - {"tags"} for cell in nb.cells
    )
    if foreign:
        nb.data["metadata"] = own
        for cell in nb.cells:
            cell["metadata"] = {
                key: value for key, value in cell["metadata"].items() if key == "tags"
            }
        write_file(nb.path, json.dumps(nb.data, indent=1, ensure_ascii=False) + "\n")
    return foreign


def main(words: list[str] | None = None) -> int:
    """Format everything, and write the modules of the named notebooks, or of all."""
    root = home()
    formatted = run_ruff("format", root)
    if "reformatted" in formatted.stdout:
        print(formatted.stdout.strip())
    try:
        books = select(root, sys.argv[1:] if words is None else words)
        for nb in books:
            if tidy(nb):
                print(f"tidied notebooks/{nb.path.name}")
        modules = generate(root, books)
    except CourseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, text in modules.items():
        path = root / "qwen_mini" / f"{name}.py"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_file(path, text)
            print(f"wrote qwen_mini/{name}.py")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
