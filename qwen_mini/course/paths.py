"""Where things are: the repository and the folder of results."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def home() -> Path:
    """Root of the repository: `QWEN_MINI_HOME`, else the folder that holds this package, else the working folder."""
    if os.environ.get("QWEN_MINI_HOME"):
        return Path(os.environ["QWEN_MINI_HOME"]).resolve()
    root = PACKAGE.parent
    if (root / "data" / "sources.toml").exists() or (root / "pyproject.toml").exists():
        return root
    return Path.cwd()


def runs() -> Path:
    """Folder of everything that runs produce: `QWEN_MINI_RUNS`, else `runs/` in the repository."""
    if os.environ.get("QWEN_MINI_RUNS"):
        return Path(os.environ["QWEN_MINI_RUNS"]).resolve()
    return home() / "runs"


def shown(path: Path) -> str:
    """`path` as a reader wants to see it: relative to the repository when it lies inside."""
    path = Path(path)
    return path.relative_to(home()).as_posix() if path.is_relative_to(home()) else str(path)
