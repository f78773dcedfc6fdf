"""What counts as a change of code, and what does not."""

import ast
import json
import random
from pathlib import Path

import pytest

from qwen_mini.course.nb import Notebook
from qwen_mini.course.syntax import normalised

MODULES = sorted((Path(__file__).parent.parent / "qwen_mini").rglob("*.py"))

SAME = {
    "comment": ("x = 1", "x = 1  # one"),
    "layout": ("f(a, b)", "f(\n    a,\n    b,\n)"),
    "quotes": ("x = 'a' 'b'", 'x = "ab"'),
    "docstring": ("def f():\n    return 1", 'def f():\n    """One."""\n    return 1'),
    "module docstring": ("x = 1", '"""About x."""\nx = 1'),
    "docstring only": ("def f():\n    pass", 'def f():\n    """Nothing."""'),
    "annotations": ("def f(x):\n    return x", "def f(x: int) -> int:\n    return x"),
    "annotated value": ("x = 1", "x: int = 1"),
    "annotated local": (
        "def f():\n    a = 2\n    b = 1\n    return a - b",
        "def f():\n    b: int\n    a: int = 2\n    b = 1\n    return a - b",
    ),
    "annotated attribute": ("def f(self):\n    self.x = 1", "def f(self):\n    self.x: int = 1"),
    "local variable": (
        "def f(x):\n    y = x + 1\n    return y * y",
        "def f(x):\n    total = x + 1\n    return total * total",
    ),
    "loop variable": (
        "def f(x):\n    for a, (b, *c) in x:\n        g(a, b, c)",
        "def f(x):\n    for p, (q, *r) in x:\n        g(p, q, r)",
    ),
    "nested function": (
        "def f(x):\n    def step(n):\n        return step(n - 1)\n    return step(x)",
        "def f(x):\n    def go(n):\n        return go(n - 1)\n    return go(x)",
    ),
    "closure": (
        "def f():\n    n = 0\n    def g():\n        nonlocal n\n        n += 1\n        return n\n    return g",
        "def f():\n    k = 0\n    def h():\n        nonlocal k\n        k += 1\n        return k\n    return h",
    ),
    "closure through a class": (
        "def f(y):\n    a = y\n    class C:\n        def m(self):\n            return a\n    return C",
        "def f(y):\n    b = y\n    class C:\n        def m(self):\n            return b\n    return C",
    ),
    "comprehension": ("x = [i * 2 for i in y if i]", "x = [k * 2 for k in y if k]"),
    "nested comprehension": (
        "x = {a: [b for b in a] for a in y for c in a}",
        "x = {p: [q for q in p] for p in y for r in p}",
    ),
    "walrus": (
        "def f(x):\n    return [y for i in x if (y := g(i))], y",
        "def f(x):\n    return [z for k in x if (z := g(k))], z",
    ),
    "lambda": ("f = lambda x, *y: x(y)", "f = lambda a, *b: a(b)"),
    "import inside": (
        "def f():\n    import torch\n    from math import pi\n    return torch.ones(pi)",
        "def f():\n    import torch as t\n    from math import pi as p\n    return t.ones(p)",
    ),
    "except, with, del": (
        "def f():\n    try:\n        with g() as a:\n            del a\n    except E as e:\n        h(e)",
        "def f():\n    try:\n        with g() as b:\n            del b\n    except E as x:\n        h(x)",
    ),
    "match": (
        "def f(x):\n    match x:\n        case {'k': v, **rest}:\n            return v, rest\n"
        "        case [a, *b] as c:\n            return a, b, c",
        "def f(x):\n    match x:\n        case {'k': w, **more}:\n            return w, more\n"
        "        case [p, *q] as r:\n            return p, q, r",
    ),
    "f-string": (
        "def f(x):\n    a = x\n    return f'{a:.2f} and ' f'{a!r}'",
        "def f(x):\n    b = x\n    return f'{b:.2f} and {b!r}'",
    ),
    "indented": ("def f():\n    return 1", "    def f():\n        return 1\n"),
    "two equal variables": (
        "def f():\n    a = 1\n    b = 2\n    return a - b",
        "def f():\n    b = 1\n    a = 2\n    return b - a",
    ),
}

DIFFERENT = {
    "operator": ("x = a + b", "x = a - b"),
    "comparison": ("x = a < b", "x = a <= b"),
    "constant": ("x = 1", "x = 2"),
    "type of a constant": ("x = 1", "x = 1.0"),
    "truth": ("x = 1", "x = True"),
    "text": ("f('a')", "f('b')"),
    "text or name": ("f('a')", "f(a)"),
    "infinite": ("x = 1e999", "x = inf"),
    "bytes": ("x = 'a'", "x = b'a'"),
    "called function": ("def f(x):\n    return g(x)", "def f(x):\n    return h(x)"),
    "method": ("x.a()", "x.b()"),
    "attribute": ("x.a = 1", "x.b = 1"),
    "default": ("def f(x=1):\n    return x", "def f(x=2):\n    return x"),
    "which has the default": ("def f(a, *, b=1, c): pass", "def f(a, *, b, c=1): pass"),
    "order": ("f()\ng()", "g()\nf()"),
    "roles of locals": (
        "def f():\n    a = 1\n    b = 2\n    return a - b",
        "def f():\n    a = 1\n    b = 2\n    return b - a",
    ),
    "local or global": ("def f():\n    a = 1\n    return a", "def f():\n    a = 1\n    return b"),
    "declared global": ("def f():\n    a = 1", "def f():\n    global a\n    a = 1"),
    "shadowed": (
        "def f():\n    a = 1\n    def g():\n        a = 2\n    g()\n    return a",
        "def f():\n    a = 1\n    def g():\n        nonlocal a\n        a = 2\n    g()\n    return a",
    ),
    "inner or outer variable": (
        "def f(x):\n    a = x\n    return [a for b in x]",
        "def f(x):\n    a = x\n    return [b for b in x]",
    ),
    "first iterable": (
        "def f():\n    x = 1\n    return [x for x in x]",
        "def f():\n    x = 1\n    return [x for y in x]",
    ),
    "parameter": ("def f(a):\n    return a", "def f(b):\n    return b"),
    "parameter of a nested function": (
        "def f():\n    def g(a): return a\n    return g",
        "def f():\n    def g(b): return b\n    return g",
    ),
    "lambda called by keyword": (
        "f = lambda a=1, b=2: a - b\nf(a=5)",
        "f = lambda b=1, a=2: b - a\nf(a=5)",
    ),
    "keyword": ("f(a=x)", "f(b=x)"),
    "top-level name": ("a = 1", "b = 1"),
    "function's name": ("def f(): pass", "def g(): pass"),
    "method's name": ("class A:\n    def f(self): pass", "class A:\n    def g(self): pass"),
    "field": ("class A:\n    x: int = 1", "class A:\n    x = 1"),
    "field without default": ("class A:\n    x: int", "class A:\n    y: int"),
    "class variable": ("class A:\n    x: int = 1", "class A:\n    x: ClassVar[int] = 1"),
    "decorator": ("@a\ndef f(): pass", "@b\ndef f(): pass"),
    "async": ("def f(): pass", "async def f(): pass"),
    "global module": (
        "def f():\n    import torch\n    return torch",
        "def f():\n    import numpy as torch\n    return torch",
    ),
    "names that code can see": (
        "def f():\n    a = 1\n    return locals()",
        "def f():\n    b = 1\n    return locals()",
    ),
    "name shown": (
        "def f():\n    a = 1\n    return f'{a=}'",
        "def f():\n    b = 1\n    return f'{b=}'",
    ),
    "format": ("f'{x:.2f}'", "f'{x:.3f}'"),
    "shown text": ("x = 1\n'shown'", "x = 1"),
    "empty list": ("f([])", "f()"),
    "else": ("if a:\n    f()\nelse:\n    g()", "if a:\n    f()\ng()"),
    "starred": ("f(*a)", "f(a)"),
    "dict spread": ("x = {**a, 'k': b}", "x = {'k': b, **a}"),
}


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_count(name):
    first, second = SAME[name]
    assert normalised(first) == normalised(second)


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_counts(name):
    first, second = DIFFERENT[name]
    assert normalised(first) != normalised(second)


def test_what_is_no_python_is_refused():
    with pytest.raises(SyntaxError):
        normalised("%matplotlib inline")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_layout_and_comments_of_every_module_do_not_count(path):
    text = path.read_text(encoding="utf-8")
    assert normalised(ast.unparse(ast.parse(text))) == normalised(text)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_change_of_a_value_an_operator_or_an_order_counts(path):
    """Three changes in every module, at places drawn by its name."""
    text = path.read_text(encoding="utf-8")
    before, draw = normalised(text), random.Random(path.stem)
    places = [place for place in _computing(ast.parse(text)) if _changes(place)]
    for number in draw.sample(range(len(places)), min(3, len(places))):
        tree = ast.parse(text)
        place = [node for node in _computing(tree) if _changes(node)][number]
        _changes(place)()
        changed = ast.unparse(ast.fix_missing_locations(tree))
        assert normalised(changed) != before, ast.unparse(place)


def _computing(tree: ast.AST):
    """All nodes but those of annotations, which do not count."""
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if getattr(node, name, None) is not None:
                setattr(node, name, ast.Name("int", ast.Load()))
    return ast.walk(tree)


def _changes(node: ast.AST):
    """How to change what this node computes; None if it computes nothing by itself."""

    def number():
        node.value += 1

    def operator():
        node.op = ast.FloorDiv() if not isinstance(node.op, ast.FloorDiv) else ast.Mod()

    def attribute():
        node.attr += "_other"

    def comparison():
        node.ops[0] = ast.Gt() if not isinstance(node.ops[0], ast.Gt) else ast.LtE()

    def arguments():
        node.args.append(ast.Constant(7))

    def order():
        node.body.insert(0, node.body.pop())

    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return number
        case ast.BinOp() if not isinstance(node.op, ast.BitOr):  # which annotations use
            return operator
        case ast.Attribute(value=ast.Call()):
            return attribute
        case ast.Compare():
            return comparison
        case ast.Call(keywords=[]):
            return arguments
        case ast.For() | ast.If() if len(node.body) > 1:
            first, last = ast.dump(node.body[0]), ast.dump(node.body[-1])
            return order if first != last else None
    return None


def digest(tmp_path, *cells: str) -> str:
    path = tmp_path / "book.ipynb"
    prose = {"cell_type": "markdown", "source": f"{len(cells)} cells"}
    code = [{"cell_type": "code", "source": cell.splitlines(keepends=True)} for cell in cells]
    cells = [cell | {"metadata": {}} for cell in (prose, *code)]
    path.write_text(json.dumps({"cells": cells, "metadata": {}}))
    return Notebook(path).code_digest


CELLS = ["%matplotlib inline\nx = 1", "def f():\n    a = x\n    return a", "!ls data\nf()", "f(2);"]


@pytest.mark.parametrize(
    ("number", "cell"),
    [
        (0, "%matplotlib inline\n\n\nx = 1    # one"),
        (1, 'def f():\n    """X."""\n    b: int = x\n    return b'),
        (2, "!ls data   \nf( )"),
        (2, "# what is there\n!ls data\nf()"),
    ],
)
def test_cells_that_compute_the_same_have_the_same_digest(tmp_path, number, cell):
    changed = [*CELLS[:number], cell, *CELLS[number + 1 :]]
    assert digest(tmp_path, *changed) == digest(tmp_path, *CELLS)


def test_a_cell_of_comments_does_not_count(tmp_path):
    assert digest(tmp_path, "# nothing yet", *CELLS, "") == digest(tmp_path, *CELLS)


@pytest.mark.parametrize(
    ("number", "cell"),
    [
        (0, "%matplotlib widget\nx = 1"),
        (0, "%matplotlib inline\ny = 1"),
        (2, "!ls\nf()"),
        (2, "!ls data\ng()"),
        (3, "f(2)"),
        (3, "f(3);"),
        (3, "x = !ls"),
        (3, "%%bash\nls"),
    ],
)
def test_cells_that_compute_something_else_have_another_digest(tmp_path, number, cell):
    changed = [*CELLS[:number], cell, *CELLS[number + 1 :]]
    assert digest(tmp_path, *changed) != digest(tmp_path, *CELLS)


def test_cells_that_no_parser_reads_count_by_their_text(tmp_path):
    assert digest(tmp_path, "%%bash\nls a") != digest(tmp_path, "%%bash\nls b")


def test_where_a_cell_ends_counts(tmp_path):
    assert digest(tmp_path, "f()\ng()") != digest(tmp_path, "f()", "g()")
