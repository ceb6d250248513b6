"""Read a test that is Python text, before anything runs: what in it is tested, and what is to be called for it.

A test that asserts nothing passes every program, and most of those look as if they did: a `check` that nothing calls,
a `unittest` class without its runner, `assert (value, "text")`, an assertion that an `except` takes. So a text is
either rewritten so that the referee (`inside/`) counts the assertions that were reached, or refused here with the
reason. This file runs no test, so it can look at every row of a dataset.
"""

import ast
import builtins
import doctest
import marshal
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NoReturn

from llm_pg.sandbox.assertions import Assertions, always_true, answer_expected, catches_assertions

SOLUTION = "solution"  # tests may import the program's names from a module of this name
_EXAMPLE = re.compile(r"^\s*>>> ", re.MULTILINE)
_NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)
_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class TestUnit:
    """What is passed or failed as a whole.

    label: its source, or its name. answer: the value that it expects of a call, as text that is equal for equal values;
    None when its form does not show it.
    """

    label: str
    answer: str | None = None


@dataclass(frozen=True)
class ReadTest:
    """A test, ready for the referee.

    code: the rewritten text, compiled and marshalled; empty for a doctest that is no Python.
    steps: what the referee calls afterwards: ("check", function, name of the program's), ("function", unit, name),
        ("method", unit, class, method), ("examples", first unit, text).
    units: in the order of their numbers. free: names that the text uses and neither binds nor finds in Python.
    """

    code: bytes
    steps: tuple[tuple[Any, ...], ...]
    units: tuple[TestUnit, ...]
    free: tuple[str, ...]


@lru_cache(maxsize=1024)
def read_test(source: str, entry: str | None = None, packages: bool = False) -> ReadTest:
    """Find what a test asserts and what must be called for it.

    A unit is: a statement of the text, or of the body of `check(candidate)`, that holds an assertion (see
    `assertions.py`); a `test...` function without parameters; a `test...` method of a class; an example of a doctest
    with its output. Statements under `if __name__ == "__main__":` count as statements of the text.

    entry: the name of the program's that `check` is called with. packages: whether installed packages can be imported.
    Raises ValueError, with the reason, for a text that is no Python, asserts nothing, or cannot be run.
    """
    try:
        tree = _parse(source)
    except ValueError:
        if not _EXAMPLE.search(source):
            raise
        if not (units := _wanted(source)):
            _refuse(source, "none of its examples says what is expected")
        return ReadTest(b"", (("examples", 0, source),), tuple(units), tuple(free_names([source])))
    _check_imports(tree, packages)
    return _Reader(tree, source, entry).read()


def free_names(sources: Iterable[str]) -> list[str]:
    """Names that the sources use and neither bind nor find in Python, in order of first use."""
    used: dict[str, None] = {}
    bound = set(dir(builtins))
    for node in (node for source in sources for node in ast.walk(_parse_any(source))):
        if isinstance(node, ast.ImportFrom) and node.module == SOLUTION:
            used.update(dict.fromkeys(alias.name for alias in node.names if alias.name != "*"))
            bound.update(alias.asname for alias in node.names if alias.asname)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == SOLUTION:
            used[node.attr] = None
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            used[node.id] = None
        elif isinstance(node, ast.Name):
            bound.add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, _NAMED) and node.name:
            bound.add(node.name)
    return [name for name in used if name not in bound and name != SOLUTION]


def _parse(source: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except _NOT_PYTHON as error:
        raise ValueError(f"A test is not Python: {error}. It begins {source[:80]!r}.") from error


def _parse_any(source: str) -> ast.Module:
    """Python, or the Python of a doctest's examples."""
    try:
        return _parse(source)
    except ValueError:
        if not _EXAMPLE.search(source):
            raise
        return _parse("".join(example.source for example in _examples(source)))


def _refuse(source: str, reason: str) -> NoReturn:
    raise ValueError(f"A test asserts nothing, so every program would pass it: {reason}. It begins {source[:80]!r}.")


def _check_imports(tree: ast.Module, packages: bool) -> None:
    wanted: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            wanted.append(node.module)
    for name in (name.partition(".")[0] for name in wanted):
        if name in sys.stdlib_module_names or name == SOLUTION:
            continue
        if not packages or find_spec(name) is None:
            how = "which is not installed here" if packages else "and tests have the standard library only"
            raise ValueError(f"A test imports {name!r}, {how}. Set packages=True where it is installed, or rewrite it.")


def _examples(text: str) -> list[doctest.Example]:
    try:
        return doctest.DocTestParser().get_examples(text)
    except ValueError as error:
        raise ValueError(f"A doctest cannot be read: {error}. It begins {text[:80]!r}.") from error


def _wanted(text: str) -> list[TestUnit]:
    """The examples that say what is expected."""
    return [TestUnit(example.source.strip()) for example in _examples(text) if example.want]


class _Reader:
    """One text: finds what nothing calls, numbers the units, has assertions reported."""

    def __init__(self, tree: ast.Module, source: str, entry: str | None) -> None:
        self.tree, self.source, self.entry = tree, source, entry
        self.body = list(_without_guard(tree.body))
        self.functions = {n.name: n for n in self.body if isinstance(n, _Function)}
        self.classes = {n.name: n for n in self.body if isinstance(n, ast.ClassDef)}
        self.defined: dict[str, ast.stmt] = {**self.functions, **self.classes}
        self.assertions = Assertions(tree)
        self.units: list[TestUnit] = []
        self.steps: list[tuple[Any, ...]] = []
        self.called: list[ast.stmt] = []  # by the steps

    def read(self) -> ReadTest:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assert) and (reason := always_true(node.test)):
                _refuse(self.source, f"{reason} (line {node.lineno})")
            if reason := self.assertions.taken_by(node):
                _refuse(self.source, reason)
        checks = self._checks_called_once()
        self.body = [node for node in self.body if node not in checks.values()]
        self._find_functions(checks)
        self._find_methods()
        self._refuse_uncalled()
        self.body = self._in_units(self.body)
        free = tuple(free_names([self.source, *self._find_examples()]))
        if not self.units:
            _refuse(self.source, _why_nothing(self.tree))
        return ReadTest(self._compiled(), tuple(self.steps), tuple(self.units), free)

    def _checks_called_once(self) -> dict[str, ast.stmt]:
        """Calls `check(NAME)` that the text makes itself, once: the body is split into its units all the same."""
        calls: dict[str, list[ast.stmt]] = {}
        for node in self.body:
            match node:
                case ast.Expr(value=ast.Call(func=ast.Name(id=name), args=[ast.Name()], keywords=[])) if (
                    name in self.functions and _is_check(self.functions[name])
                ):
                    calls.setdefault(name, []).append(node)
        used = [node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)]
        return {name: found[0] for name, found in calls.items() if len(found) == 1 and used.count(name) == 1}

    def _find_functions(self, checks: dict[str, Any]) -> None:
        reached = self._reached(node for node in self.body if node not in self.defined.values())
        for name, function in self.functions.items():
            if name in reached or not self.assertions.inside(function):
                continue
            required = _required(function)
            entry = checks[name].value.args[0].id if name in checks else self.entry
            if _is_check(function) and entry is not None:
                self.steps.append(("check", name, entry))
                self.called.append(function)
                function.body = self._in_units(function.body)
            elif _is_check(function):
                raise ValueError(f"Nothing calls {name}({required[0]}), and 'entry' does not say with what to call it.")
            elif name.startswith("test"):
                if required or isinstance(function, ast.AsyncFunctionDef):
                    what = f"needs {', '.join(required)}, which nothing gives" if required else "is async"
                    raise ValueError(
                        f"The test {name} {what}: no pytest runs here. Call it in the text, in plain code."
                    )
                self._step("function", function, name)

    def _find_methods(self) -> None:
        reached = self._reached(node for node in self.body if node not in self.defined.values())
        for name, node in self.classes.items():
            is_case = self._is_case(node)
            if is_case or (name.startswith("Test") and name not in reached):
                for method in self._methods(node):
                    self._step("method", node, name, method)

    def _refuse_uncalled(self) -> None:
        roots = [*self.called, *(node for node in self.body if node not in self.defined.values())]
        reached = self._reached(roots) | {node.name for node in self.called if isinstance(node, _Function)}
        for name in self.functions:
            if name in self.assertions.helpers and name not in reached:
                _refuse(self.source, f"nothing calls {name!r}, which holds assertions; call it, or name it test_...")

    def _step(self, kind: str, node: ast.stmt, *names: str) -> None:
        self.called.append(node)
        self.steps.append((kind, len(self.units), *names))
        self.units.append(TestUnit(".".join(names)))

    def _reached(self, roots: Iterable[ast.AST]) -> set[str]:
        """Functions and classes of the text that the nodes name, directly or through others."""
        queue = list(roots)
        found: set[str] = set()
        while queue:
            for node in ast.walk(queue.pop()):
                if isinstance(node, ast.Name) and node.id in self.defined and node.id not in found:
                    found.add(node.id)
                    queue.append(self.defined[node.id])
        return found

    def _bases(self, node: ast.ClassDef) -> list[str]:
        return [base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in node.bases]

    def _is_case(self, node: ast.ClassDef) -> bool:
        bases = self._bases(node)
        return any(b.endswith("TestCase") or (b in self.classes and self._is_case(self.classes[b])) for b in bases)

    def _methods(self, node: ast.ClassDef) -> list[str]:
        """Test methods that assert, of a class and of its bases in the text."""
        names: dict[str, None] = {}
        for base in self._bases(node):
            names.update(dict.fromkeys(self._methods(self.classes[base]) if base in self.classes else ()))
        for method in node.body:
            if isinstance(method, _Function) and method.name.startswith("test") and self.assertions.inside(method):
                if isinstance(method, ast.AsyncFunctionDef) or len(_required(method)) > 1:
                    raise ValueError(f"The test {node.name}.{method.name} is async or needs arguments: not run here.")
                names[method.name] = None
        return list(names)

    def _in_units(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        """The statements, each that asserts in a context of its own.

        The others run when an `assert` fails; what a loop or block would have done for them is not there when it fails.
        """
        result: list[ast.stmt] = []
        for node in statements:
            if self.assertions.holds(node):
                number = ast.Constant(len(self.units))
                unit = ast.Call(
                    ast.Name("__unit__", ast.Load()), [number, ast.Constant(isinstance(node, ast.Assert))], []
                )
                self.units.append(TestUnit(ast.unparse(node)[:200], answer_expected(node)))
                node = ast.copy_location(ast.With([ast.withitem(unit)], [node]), node)
            result.append(node)
        return result

    def _find_examples(self) -> list[str]:
        """Docstrings with examples, where the text runs them itself or tests nothing else."""
        runs = any(_starts_runner(node, "doctest") for node in ast.walk(self.tree))
        if self.units and not runs:
            return []
        texts: dict[str, None] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                text = ast.get_docstring(node) or ""
                if text not in texts and _EXAMPLE.search(text) and (wanted := _wanted(text)):
                    texts[text] = None
                    self.steps.append(("examples", len(self.units), text))
                    self.units += wanted
        return list(texts)

    def _compiled(self) -> bytes:
        module = _Reporter(self.assertions).visit(ast.Module(self.body, []))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = compile(ast.fix_missing_locations(module), "test.py", "exec", dont_inherit=True)
        except _NOT_PYTHON as error:
            raise ValueError(f"A test is not Python: {error}. It begins {self.source[:80]!r}.") from error
        return marshal.dumps(code)


class _Reporter(ast.NodeTransformer):
    """Has every assertion report to the referee that it was reached, and `assert` what came of it."""

    def __init__(self, assertions: Assertions) -> None:
        self.assertions = assertions

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Expr) and _starts_runner(node.value, "unittest", "pytest", "doctest"):
            return ast.Pass()  # what it would run is run all the same
        if _starts_runner(node, "unittest", "pytest", "doctest"):
            raise ValueError("A test uses the result of main() or testmod(), which is not run here; call it alone.")
        asserts = isinstance(node, ast.Expr | ast.With | ast.If) and self.assertions.is_assertion(node)
        result = super().visit(node)
        return [result, _saw(ast.Constant(True))] if asserts else result

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        if self.assertions.is_assertion(node):
            node.test = _saw(node.test).value
        return node

    def visit_Try(self, node: ast.Try) -> ast.AST:
        expects = self.assertions.expects_exceptions(node)
        within = any(map(self.assertions.holds, node.body))
        self.generic_visit(node)
        for handler in node.handlers:
            if expects and not (within and catches_assertions(handler)):
                handler.body.insert(0, _saw(ast.Constant(True)))
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        """All that the text uses of the program is in its namespace already."""
        return ast.Pass() if node.module == SOLUTION and node.names[0].name == "*" else node


def _saw(value: ast.expr) -> ast.Expr:
    return ast.Expr(ast.Call(ast.Name("__saw__", ast.Load()), [value], []))


def _starts_runner(node: ast.AST, *modules: str) -> bool:
    """`unittest.main()`, `pytest.main()`, `doctest.testmod()`."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id=module), attr="main" | "testmod")):
            return module in modules
    return False


def _without_guard(statements: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements, with those under `if __name__ == "__main__":` as statements of the text."""
    for node in statements:
        match node:
            case ast.If(test=ast.Compare(left=ast.Name(id="__name__"), ops=[ast.Eq()])):
                yield from node.body
            case _:
                yield node


def _required(function: _Function) -> list[str]:
    """Parameters without a default."""
    arguments = function.args
    by_place = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    by_name = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    count = len(by_place) - len(arguments.defaults)
    return [*by_place[:count], *(argument.arg for argument, default in by_name if default is None)]


def _is_check(function: _Function) -> bool:
    """Whether a function is one of HumanEval's kind: it wants the function under test, and nothing else."""
    required = _required(function)
    named = function.name.startswith("check") or required == ["candidate"]
    return isinstance(function, ast.FunctionDef) and len(required) == 1 and named


def _why_nothing(tree: ast.Module) -> str:
    nodes = list(ast.walk(tree))
    asserted = [node.test for node in nodes if isinstance(node, ast.Assert)]
    if not tree.body:
        return "it holds nothing but comments"
    if any(not isinstance(test, ast.Constant) for test in asserted):
        return "its assertions are in a loop over nothing, behind a condition that is never true, or never called"
    if asserted:
        return "what it asserts is a constant"
    if any(isinstance(node, ast.Lambda) for node in nodes):
        return "it holds a lambda that nothing asserts"
    if any(isinstance(node, ast.Expr) and isinstance(node.value, ast.Compare) for node in nodes):
        return "it compares and does not assert; write 'assert' before the comparison"
    return "there is no assertion in it"
