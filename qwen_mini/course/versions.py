"""The chapters' versions, and which chapters a chapter's results depend on: its own and all that it imports."""

import ast
import functools
import tomllib

from .errors import CourseError
from .paths import PACKAGE

FILE = PACKAGE / "course" / "versions.toml"


@functools.cache
def versions() -> dict[str, int]:
    """Chapter → whole number, from `versions.toml`."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))["modules"]


def versions_of(*modules: str) -> dict[str, int]:
    """The versions of chapters and of every chapter that they import, in alphabetical order."""
    known = versions()
    needed = set().union(*(closure(module) for module in modules))
    if missing := sorted(needed - set(known)):
        lacks = f"{', '.join(missing)} has no number in {FILE.name}"
        raise CourseError(f"{lacks}: add `{missing[0]} = 1`")
    return {module: known[module] for module in sorted(needed)}


def other_versions(made_with: dict[str, int]) -> str:
    """`sft 1 → 2`, the chapters whose version has changed since; '' if none has."""
    now = versions()
    changed = {name: old for name, old in made_with.items() if now.get(name) != old}
    return ", ".join(f"{name} {old} → {now.get(name)}" for name, old in changed.items())


@functools.cache
def closure(module: str) -> frozenset[str]:
    """The chapter and all chapters that it imports, directly or not."""
    path = PACKAGE / f"{module}.py"
    if not path.exists():
        raise CourseError(f"there is no chapter module {module!r}")
    found = {module}
    for name in imported_chapters(path.read_text(encoding="utf-8")) & set(versions()) - {module}:
        found |= closure(name)
    return frozenset(found)


def imported_chapters(text: str, here: str = ".") -> set[str]:
    """Names directly under `qwen_mini` that code imports; `here` is how the code spells the package relatively."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {_below("", alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            relative = node.level == len(here)
            if module == "qwen_mini" or (relative and node.module is None):
                names |= {alias.name for alias in node.names}
            else:
                names.add(_below(here if relative else "", module))
        elif isinstance(node, ast.Call):
            words = [word.value for word in node.args if isinstance(word, ast.Constant)]
            if ast.unparse(node.func).endswith(("import_module", "__import__")):
                names |= {_below("", word) for word in words}
    return names - {""}


def _below(here: str, module) -> str:
    """`attention` from `qwen_mini.attention.x` (or `.attention.x` when `here` is `.`), else ''."""
    prefix = here or "qwen_mini."
    return module.removeprefix(prefix).split(".")[0] if str(module).startswith(prefix) else ""
