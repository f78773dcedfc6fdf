"""Code as what it computes: a text that comments, layout, docstrings, annotations and local names do not change."""

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field

SILENT = {"ctx", "kind", "type_comment", "type_params", "returns", "annotation"}  # say nothing
FIELD_MARKS = ("ClassVar", "InitVar", "KW_ONLY")  # annotations that a dataclass obeys


def normalised(source: str) -> str:
    """A canonical text of a module, a cell or a function, the same in every version of Python.

    Two sources have the same text if they differ in comments, layout, docstrings, annotations, and
    names that only a function sees: its local variables, the functions inside it, variables of
    comprehensions and lambdas. Parameters, attributes and top-level names are how others call it:
    they count. SyntaxError if it is no Python.
    """
    tree = ast.parse(textwrap.dedent(source) if source[:1].isspace() else source)
    body = tree.body
    shown = body[-1:] if body and _is_text(body[-1]) else []  # a notebook shows its last expression
    scope = _Scope("module", None)
    return _Writer(tree).statements(body, scope) + "".join(_write_plain(node) for node in shown)


@dataclass
class _Scope:
    """Names that one function (class, comprehension, module) binds; only those in `local` change."""

    kind: str
    parent: "_Scope | None"
    bound: set[str] = field(default_factory=set)
    local: set[str] = field(default_factory=set)
    declared_global: set[str] = field(default_factory=set)
    order: dict[str, int] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1

    def name(self, name: str) -> str:
        """What stands for a name that is used here: `%depth.number` for a local one."""
        scope = self
        while scope is not None:
            if name in scope.declared_global:
                return name
            # what a class body binds is seen in that body, not in the functions inside it
            if name in scope.bound and (scope.kind == "function" or scope is self):
                if name not in scope.local:
                    return name
                return f"%{scope.depth}.{scope.order.setdefault(name, len(scope.order))}"
            scope = scope.parent
        return name


class _Writer:
    """Writes a syntax tree as text; the names in it go through their scope."""

    def __init__(self, tree: ast.Module):
        nodes = list(ast.walk(tree))
        self.keywords = {node.arg for node in nodes if isinstance(node, ast.keyword)}
        self.renames = not any(map(_reads_names, nodes))

    def statements(self, body: list, scope: _Scope) -> str:
        """A block without what does nothing: docstrings, `pass`, annotations without a value."""
        kept = [node for node in body if not (isinstance(node, ast.Pass) or _is_text(node))]
        if scope.kind != "class":
            kept = [n for n in kept if not (isinstance(n, ast.AnnAssign) and n.value is None)]
        return "[" + ", ".join(self.write(node, scope) for node in kept) + "]"

    def write(self, node, scope: _Scope) -> str:
        if isinstance(node, list):
            if node and isinstance(node[0], ast.stmt):
                return self.statements(node, scope)
            return "[" + ", ".join(self.write(item, scope) for item in node) + "]"
        if not isinstance(node, ast.AST):
            return ascii(node)
        special = getattr(self, f"_{type(node).__name__}", None)
        return special(node, scope) if special else self.generic(node, scope)

    def generic(self, node: ast.AST, scope: _Scope, skip=(), **written: str) -> str:
        """Type and fields; `written` replaces fields, empty ones are left out (versions differ in them)."""
        parts = {}
        for name, value in ast.iter_fields(node):
            if name not in SILENT and name not in skip and value is not None and value != []:
                text = written.get(name) or self.write(value, scope)
                if text != "[]":
                    parts[name] = text
        return f"{type(node).__name__}({', '.join(f'{k}={v}' for k, v in parts.items())})"

    def _Name(self, node, scope):
        return scope.name(node.id)

    def _Constant(self, node, scope):
        return f"Constant({ascii(node.value)})"

    def _JoinedStr(self, node, scope):
        parts = []  # neighbouring texts are joined: versions of Python cut them differently
        for value in node.values:
            text = value.value if isinstance(value, ast.Constant) else None
            if text is None:
                parts.append(self.write(value, scope))
            elif parts and isinstance(parts[-1], list):
                parts[-1][0] += text
            elif text:
                parts.append([text])
        return f"JoinedStr({', '.join(p if isinstance(p, str) else ascii(p[0]) for p in parts)})"

    def _AnnAssign(self, node, scope):
        if scope.kind == "class":  # `x: int` makes a field of a dataclass, `x = 1` does not
            marked = any(mark in ast.unparse(node.annotation) for mark in FIELD_MARKS)
            mark = _write_plain(node.annotation) if marked else ""
            return self.generic(node, scope, skip=("simple",)) + mark
        return self.write(ast.Assign(targets=[node.target], value=node.value), scope)

    def _FunctionDef(self, node, scope):
        inner = self._function_scope(node, scope)
        head = f"{ascii(scope.name(node.name))}, {self.write(node.decorator_list, scope)}"
        arguments, body = self._arguments(node.args, scope, None), self.statements(node.body, inner)
        return f"{type(node).__name__}({head}, {arguments}, {body})"

    _AsyncFunctionDef = _FunctionDef

    def _Lambda(self, node, scope):
        inner = self._function_scope(node, scope)
        return f"Lambda({self._arguments(node.args, scope, inner)}, {self.write(node.body, inner)})"

    def _arguments(self, node: ast.arguments, scope: _Scope, inner: _Scope | None) -> str:
        """Parameters, with the names that `inner` gives them; defaults belong to the scope outside."""
        parts = []
        for name in ("posonlyargs", "args", "vararg", "kwonlyargs", "kwarg"):
            value = getattr(node, name)
            args = value if isinstance(value, list) else [value] if value else []
            names = [inner.name(arg.arg) if inner else arg.arg for arg in args]
            parts.append(f"{name}={names}")
        defaults = self.write(node.defaults, scope), self.write(node.kw_defaults, scope)
        return ", ".join((*parts, *defaults))

    def _function_scope(self, node, scope: _Scope) -> _Scope:
        a = node.args
        positional = [*a.posonlyargs, *a.args, *filter(None, (a.vararg, a.kwarg))]
        parameters = {arg.arg for arg in (*positional, *a.kwonlyargs)}
        body = node.body if isinstance(node.body, list) else [node.body]
        kept = set(parameters)
        if isinstance(node, ast.Lambda):  # nobody calls it by name, unless a call says so
            kept = {arg.arg for arg in a.kwonlyargs} | (parameters & self.keywords)
        return self._scope("function", scope, body, parameters, kept)

    def _scope(self, kind, parent, body: list, extra=frozenset(), kept=frozenset()) -> _Scope:
        bound, interface, elsewhere, global_names = set(extra), set(kept), set(), set()
        for node in body:
            for name, maker in _bindings(node):
                if isinstance(maker, ast.Global | ast.Nonlocal):
                    elsewhere.add(name)
                    global_names |= {name} if isinstance(maker, ast.Global) else set()
                    continue
                bound.add(name)
                dotted = isinstance(maker, ast.alias) and not maker.asname and "." in maker.name
                if dotted or isinstance(maker, ast.ClassDef):  # a class shows its name
                    interface.add(name)
        bound -= elsewhere
        renamed = bound - interface if kind == "function" and self.renames else set()
        return _Scope(kind, parent, bound, renamed, global_names)

    def _ClassDef(self, node, scope):
        inner = self._scope("class", scope, node.body)
        body, name = self.statements(node.body, inner), ascii(scope.name(node.name))
        return self.generic(node, scope, name=name, body=body)

    def _comprehension_scope(self, node, scope):
        names = {name for part in node.generators for name, _ in _bindings(part.target)}
        inner = self._scope("function", scope, [], names)
        parts = []
        for number, part in enumerate(node.generators):  # the first iterable is computed outside
            source = self.write(part.iter, scope if number == 0 else inner)
            parts.append(self.generic(part, inner, iter=source))
        results = [self.write(getattr(node, name, None), inner) for name in ("elt", "key", "value")]
        return f"{type(node).__name__}({', '.join((*parts, *results))})"

    _ListComp = _SetComp = _DictComp = _GeneratorExp = _comprehension_scope

    def _alias(self, node, scope):
        bound = node.asname or node.name
        if node.name == "*" or (not node.asname and "." in node.name):
            return f"alias({node.name})"
        return f"alias({node.name}, {scope.name(bound)})"

    def _declaration(self, node, scope):
        return f"{type(node).__name__}({', '.join(map(scope.name, node.names))})"

    _Global = _Nonlocal = _declaration

    def _named(self, node, scope, field="name"):
        name = getattr(node, field)
        renamed = {field: ascii(scope.name(name))} if name else {}
        return self.generic(node, scope, **renamed)

    _ExceptHandler = _MatchAs = _MatchStar = _named

    def _MatchMapping(self, node, scope):
        return self._named(node, scope, "rest")


def _bindings(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Names that code binds in the scope where it stands, with the node that does it."""
    match node:
        case ast.Name():
            if not isinstance(node.ctx, ast.Load):
                yield node.id, node
            return
        case ast.Global() | ast.Nonlocal():
            yield from ((name, node) for name in node.names)
            return
        case ast.Import() | ast.ImportFrom():
            yield from ((a.asname or a.name.split(".")[0], a) for a in node.names)
            return
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            yield node.name, node
            inside = [*node.decorator_list, *_defaults(node.args)]
        case ast.ClassDef():
            yield node.name, node
            inside = [*node.decorator_list, *node.bases, *node.keywords]
        case ast.Lambda():
            inside = _defaults(node.args)
        case ast.comprehension():  # its target is its own, a walrus inside is not
            inside = [node.iter, *node.ifs]
        case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar() | ast.MatchMapping():
            name = node.rest if isinstance(node, ast.MatchMapping) else node.name
            if name:
                yield name, node
            inside = ast.iter_child_nodes(node)
        case _:
            inside = ast.iter_child_nodes(node)
    for child in inside:
        yield from _bindings(child)


def _defaults(arguments: ast.arguments) -> list[ast.AST]:
    return [*arguments.defaults, *filter(None, arguments.kw_defaults)]


def _is_text(node: ast.AST) -> bool:
    """Whether a statement is only a string: a docstring, wherever it stands."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _reads_names(node: ast.AST) -> bool:
    """Whether code can see what its local variables are called."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return False
    alone = not node.args and not node.keywords
    return node.func.id in ("locals", "eval", "exec") or (node.func.id in ("vars", "dir") and alone)


def _write_plain(node: ast.AST) -> str:
    return ascii(ast.unparse(node))
