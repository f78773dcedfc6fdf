"""`make check`: what must agree without executing anything. Each check returns its problems, one sentence each."""

import ast
import json
import re
import shlex
from pathlib import Path

from qwen_mini.course.nb import cell_imports, notebooks, source
from qwen_mini.course.paths import home
from qwen_mini.course.stale import record_files, stale
from qwen_mini.course.versions import imported_chapters

from .digits import typed_numbers
from .measurements import measurements_are_current
from .report_map import map_is_current

ROOMS = {
    "course": set(),
    "world": {"course"},
    "kernels": {"course"},
}  # hand-written package → what it may import
SHORT_NAMES = {"06_mixture_of_experts": "moe"}  # chapters whose module has a name of its own
MAX_NOTEBOOK_BYTES = 1_000_000
MAX_RECORDS = 2_000_000
MAX_COLUMNS = 120  # of texts in code; the formatter breaks code at 100
NAMED_FILE = re.compile(r"`((?:qwen_mini|notebooks|tests|docs|benchmarks|data)/[\w./-]+\.\w+)`")
LINK = re.compile(r"\]\(\s*<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\s*\)|(?:src|href)=\"([^\"]+)\"")


def modules_equal_notebooks(root: Path) -> list[str]:
    """Every module is what nbdev makes of its notebook, and none is without a notebook."""
    from .sync import generate

    books = notebooks(root)
    problems = []
    generated = generate(root, books)
    for name, text in generated.items():
        path = root / "qwen_mini" / f"{name}.py"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            problems.append(
                f"qwen_mini/{name}.py differs from its notebook: run `python -m authoring.sync`"
            )
    for nb in books:
        own = nb.name.endswith(f"_{nb.module}") or SHORT_NAMES.get(nb.name) == nb.module
        if nb.module and not own:
            problems.append(
                f"{nb.path.name} exports to {nb.module}, not to the module of its own name"
            )
    for path in sorted((root / "qwen_mini").glob("*.py")):
        if path.stem not in generated and path.name not in ("__init__.py", "_modidx.py"):
            problems.append(f"qwen_mini/{path.name} has no notebook that exports it")
    return problems


def imports_point_backwards(root: Path) -> list[str]:
    """course ← world, kernels ← chapters, and a chapter uses only earlier ones; imports inside functions count."""
    books = notebooks(root)
    chapters = {nb.module: nb.number for nb in books if nb.module}
    problems = []
    for nb in books:
        if nb.module is None:  # the first page and the report look at everything
            continue
        path = root / "qwen_mini" / f"{nb.module}.py"
        try:
            used = {nb.path.name: (set().union(*map(cell_imports, nb.code)), nb.number)}
        except SyntaxError as error:
            line = (error.text or "").strip()
            problems.append(f"{nb.path.name} has a cell that is not Python: {error.msg}: `{line}`")
            continue
        if path.exists():
            used[f"qwen_mini/{path.name}"] = (
                imported_chapters(path.read_text(encoding="utf-8")),
                nb.number - 1,
            )
        for where, (names, last) in used.items():
            for name in sorted(names):
                if name in chapters and chapters[name] > last:
                    problems.append(f"{where} imports {name}, which is not an earlier chapter")
                elif name not in chapters and name not in (*ROOMS, "__version__"):
                    problems.append(f"{where} imports qwen_mini.{name}, which no notebook exports")
    return problems + [
        problem for room, allowed in ROOMS.items() for problem in _room_imports(root, room, allowed)
    ]


def _room_imports(root: Path, room: str, allowed: set[str]) -> list[str]:
    """What the files of a hand-written package import of `qwen_mini` besides `allowed`."""
    problems = []
    for path in sorted((root / "qwen_mini" / room).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if room == "course":  # commands load chapters when they run
            tree.body = [
                node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
            ]
        text = ast.unparse(_WithoutTypeChecking().visit(tree))
        for name in sorted(imported_chapters(text, "..") - allowed - {room, "__version__"}):
            what = name if name in ROOMS else f"the chapter {name}"
            rule = f"{room} may import only {' and '.join(sorted({room, *allowed}))}"
            problems.append(f"qwen_mini/{room}/{path.name} imports {what}, but {rule}")
    return problems


class _WithoutTypeChecking(ast.NodeTransformer):
    """Leaves out what stands under `if TYPE_CHECKING:`, which never runs."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return [ast.Pass(), *(self.visit(statement) for statement in node.orelse)]
        return self.generic_visit(node)


def parameters_are_literal(root: Path) -> list[str]:
    """Exactly one `parameters` cell, with `scale` and `seed` and nothing else."""
    problems = []
    for nb in notebooks(root):
        try:
            names = set(nb.parameters())
        except (ValueError, SyntaxError) as error:
            problems.append(f"{nb.path.name} {error}")
            continue
        if names != {"scale", "seed"}:
            problems.append(
                f"{nb.path.name} has the parameters {sorted(names)} instead of scale and seed"
            )
        if not re.search(rf"course\.start\(\s*[\"']{re.escape(nb.name)}[\"']", "\n".join(nb.code)):
            problems.append(f'{nb.path.name} does not begin with course.start("{nb.name}", …)')
    return problems


def results_are_current(root: Path) -> list[str]:
    """Outputs are there, free of errors, and of today's code, stages and records; these of today's versions."""
    problems = []
    for thing in stale(root):
        remedy = "`qwen-mini outputs --dry-run` tells what to do"
        problems.append(f"{thing.what} is not current, because {thing.reason}: {remedy}")
    for nb in notebooks(root):
        outputs = [output for cell in nb.cells for output in cell.get("outputs", [])]
        if any(
            output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs
        ):
            problems.append(f"{nb.path.name} has an error or a warning among its outputs")
    return problems


def records_are_small(root: Path) -> list[str]:
    """All shipped records together stay small: they hold numbers, not texts."""
    total = sum(path.stat().st_size for path in record_files(root))
    return (
        [f"the records take {total:,} bytes, more than {MAX_RECORDS:,}"]
        if total > MAX_RECORDS
        else []
    )


def notebooks_are_tidy(root: Path) -> list[str]:
    """Small files, plain metadata, distinct cell ids, narrow code."""
    problems = []
    for nb in notebooks(root):
        name = nb.path.name
        if nb.path.stat().st_size > MAX_NOTEBOOK_BYTES:
            problems.append(f"{name} is larger than {MAX_NOTEBOOK_BYTES:,} bytes")
        if unknown := set(nb.data["metadata"]) - {"kernelspec", "qwen_mini"}:
            problems.append(f"{name} carries the metadata {', '.join(sorted(unknown))}")
        if any(set(cell["metadata"]) - {"tags"} for cell in nb.cells):
            problems.append(f"{name} has a cell with metadata other than tags")
        if len({cell.get("id") for cell in nb.cells}) < len(nb.cells):
            problems.append(f"{name} has cells without an id of their own")
        for code in nb.code:
            widest = max(map(len, code.splitlines()), default=0)
            if widest > MAX_COLUMNS and not re.search(r"^#\|\s*export", code, re.MULTILINE):
                line = next(line for line in code.splitlines() if len(line) > MAX_COLUMNS).strip()
                problems.append(
                    f"{name} has a line wider than {MAX_COLUMNS} columns: `{line[:50]}…`"
                )
    return problems


def code_is_clean(root: Path) -> list[str]:
    """ruff finds nothing, and the formatter has been over everything."""
    from .sync import run_ruff

    problems = []
    for command in (["check"], ["format", "--check"]):
        done = run_ruff(*command, "--output-format", "json", "--quiet", root)
        try:
            found = json.loads(done.stdout or ("" if done.returncode else "[]"))
        except json.JSONDecodeError:
            return [f"ruff could not run: {done.stderr.strip()[:300]}"]
        for item in found:
            path = Path(item["filename"]).relative_to(root.resolve()).as_posix()
            cell = f" cell {item['cell']}" if item.get("cell") else ""
            where = f"{path}{cell} line {item['location']['row']}"
            if item["code"] == "unformatted":
                problems.append(f"{where} is not formatted: run `python -m authoring.sync`")
            else:
                problems.append(f"{where}: {item['code']} {item['message']}")
    return problems


def links_exist(root: Path) -> list[str]:
    """Relative links, and modules or files named in backticks, exist."""
    problems = []
    for path, text in _prose(root):
        where = path.relative_to(root).as_posix()
        for groups in LINK.findall(text):
            target = (groups[0] or groups[1]).split("#")[0]
            if target and not re.match(r"[a-z]+:", target) and not (path.parent / target).exists():
                problems.append(f"{where} links to {target}, which does not exist")
        for named in sorted(set(re.findall(r"`(?:import |from )?qwen_mini\.(\w+)", text))):
            package = root / "qwen_mini"
            if not (package / f"{named}.py").exists() and not (package / named).exists():
                problems.append(f"{where} names the module qwen_mini.{named}, which does not exist")
        for named in sorted(set(re.findall(NAMED_FILE, text))):
            if not (root / named).exists():
                problems.append(f"{where} names the file {named}, which does not exist")
    return problems


def commands_exist(root: Path) -> list[str]:
    """`make` targets and `qwen-mini` commands that the documentation shows exist, their options too."""
    makefile = root / "Makefile"
    targets = set(
        re.findall(
            r"^([\w-]+):", makefile.read_text(encoding="utf-8") if makefile.exists() else "", re.M
        )
    )
    problems = []
    for path, text in _prose(root):
        where = path.relative_to(root).as_posix()
        for target in sorted(
            set(re.findall(r"(?:^|`|&& )make ([a-z][\w-]*)", text, re.MULTILINE)) - targets
        ):
            problems.append(f"{where} shows `make {target}`, which the Makefile does not have")
        for line in re.findall(
            r"(?:^|`|-m )(?:qwen-mini|qwen_mini\.course) ([a-z][^`\n#]*)", text, re.MULTILINE
        ):
            if problem := _command_problem(line):
                problems.append(f"{where} shows `qwen-mini {line.strip()}`, {problem}")
    return problems


def _command_problem(line: str) -> str:
    """What is wrong with the arguments of a shown `qwen-mini` command, '' if nothing."""
    from qwen_mini.course.cli import parser

    commands = parser()._subparsers._group_actions[0].choices
    words = (
        shlex.split(line.replace("…", ""), posix=True) if line.count("'") % 2 == 0 else line.split()
    )
    if words[0] not in commands:
        return "which is no command" if "|" not in words[0] else ""
    options = set(commands[words[0]]._option_string_actions)
    unknown = [
        word for word in words if word.startswith("--") and word.split("=")[0] not in options
    ]
    return f"which does not know {unknown[0]}" if unknown else ""


def _prose(root: Path) -> list[tuple[Path, str]]:
    """Every text a reader follows: README, docs, and the markdown cells of the notebooks."""
    files = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    texts = [(path, path.read_text(encoding="utf-8")) for path in files if path.exists()]
    for nb in notebooks(root):
        cells = [source(cell) for cell in nb.cells if cell["cell_type"] == "markdown"]
        texts.append((nb.path, "\n\n".join(cells)))
    return texts


CHECKS = [
    modules_equal_notebooks,
    imports_point_backwards,
    parameters_are_literal,
    results_are_current,
    records_are_small,
    notebooks_are_tidy,
    code_is_clean,
    links_exist,
    commands_exist,
    typed_numbers,
    measurements_are_current,
    map_is_current,
]


def problems(root: Path | None = None) -> list[str]:
    """Everything that every check finds."""
    return [problem for check in CHECKS for problem in check(root or home())]


def main() -> int:
    """Print the problems; returns 1 if there are any."""
    found = problems()
    for problem in found:
        print(problem)
    print(f"{len(found)} problem(s)" if found else f"all {len(CHECKS)} checks passed")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
