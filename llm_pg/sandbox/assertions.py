"""What in the text of a test is an assertion, what takes its failure away, and what can never fail. Syntax alone.

Assertions are `assert`, calls of functions and methods named `assert...` or `fail`, `with` of `raises` and
`assertRaises`, an `if` that raises or exits, the handler of an exception that the test expects, and calls of the text's
own functions that hold one.
"""

import ast
from collections.abc import Iterable, Iterator, Sequence

_CATCH_ASSERTIONS = {"Exception", "BaseException", "AssertionError"}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_ENDS = (ast.Return, ast.Continue, ast.Break)
_EXITS = ("exit", "quit", "_exit", "abort")
_LOGS = ("print", "debug", "info", "warning", "error", "exception", "print_exc")


class Assertions:
    """The assertions of one module.

    helpers: the names of its own functions and methods that hold an assertion, directly or through one another.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.own: dict[str, list[ast.AST]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self.own.setdefault(node.name, []).append(node)
        self.helpers: set[str] = set()
        while more := {n for n in self.own.keys() - self.helpers if any(map(self.inside, self.own[n]))}:
            self.helpers |= more

    def inside(self, function: ast.AST) -> bool:
        """Whether calling the function can reach an assertion."""
        return any(map(self.holds, _running(function)))

    def holds(self, node: ast.AST) -> bool:
        """Whether running the node can reach an assertion."""
        if isinstance(node, _DEFINITIONS) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Lambda)):
            return False
        return self.is_assertion(node) or any(map(self.holds, _running(node)))

    def is_assertion(self, node: ast.AST) -> bool:
        """Whether the node itself, whatever is below it, is an assertion."""
        if isinstance(node, ast.Assert):
            return not _is_true(node.test)
        if isinstance(node, ast.Expr):
            name = name_called(node.value)
            return name not in self.own and (name.lower().startswith("assert") or name == "fail")
        if isinstance(node, ast.With):
            return any(name_called(item.context_expr).startswith(("assert", "raises")) for item in node.items)
        if isinstance(node, ast.If):
            return not _is_dead(node) and (_raises(node.body) or _raises(node.orelse))
        if isinstance(node, ast.Try):
            return bool(node.handlers) and _raises(node.body)
        if isinstance(node, ast.Attribute):
            return node.attr in self.helpers
        return isinstance(node, ast.Name) and node.id in self.helpers

    def expects_exceptions(self, node: ast.Try) -> bool:
        """Whether its handlers are assertions: something in its body or `else` fails when no exception comes."""
        return _raises(node.body) or any(map(self.holds, [*node.body, *node.orelse]))

    def taken_by(self, node: ast.AST) -> str | None:
        """What takes the failure of an assertion inside the node and leaves no trace of it, in words; else None."""
        if isinstance(node, ast.Try) and (_raises(node.body) or any(map(self.holds, node.body))):
            for handler in node.handlers:
                if catches_assertions(handler) and all(map(_is_idle, handler.body)):
                    return f"the 'except' in line {handler.lineno} takes the failure of the assertion above it"
        if isinstance(node, ast.With) and any(map(self.holds, node.body)):
            for call in (item.context_expr for item in node.items):
                if isinstance(call, ast.Call) and name_called(call) == "suppress" and _names(call.args):
                    return f"'suppress' in line {node.lineno} takes the failure of its assertion"
        return None


def always_true(test: ast.expr) -> str | None:
    """Why a condition can never fail, in words; None where it can. A bare constant is not meant: it asserts nothing."""
    if isinstance(test, ast.Tuple) and test.elts:
        return "assert (value, ...) is always true, as a tuple is; leave the brackets out"
    if (isinstance(test, ast.List | ast.Set) and test.elts) or (isinstance(test, ast.Dict) and test.keys):
        return "it asserts a container with something in it, which is always true"
    if isinstance(test, ast.GeneratorExp):
        return "it asserts a generator, which is always true; say all(...)"
    if isinstance(test, ast.Lambda):
        return "it asserts a lambda, which is always true and which nothing calls"
    either = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or) else []
    return "one side of its 'or' is always true" if any(_is_true(v) or always_true(v) for v in either) else None


def answer_expected(statement: ast.stmt) -> str | None:
    """The value that an assertion of the form f(...) == value expects, equal for equal values; None for others."""
    match statement:
        case ast.Assert(test=ast.Compare(left=ast.Call(), ops=[ast.Eq() | ast.Is()], comparators=[value])):
            return ast.dump(value)
        case ast.Assert(test=ast.Compare(left=value, ops=[ast.Eq() | ast.Is()], comparators=[ast.Call()])):
            return ast.dump(value)
        case ast.Assert(test=ast.Call()):
            return ast.dump(ast.Constant(True))
        case ast.Assert(test=ast.UnaryOp(op=ast.Not(), operand=ast.Call())):
            return ast.dump(ast.Constant(False))
    return None


def name_called(call: ast.expr) -> str:
    """The last part of the name of the function that is called; empty where it has none."""
    if not isinstance(call, ast.Call):
        return ""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def catches_assertions(handler: ast.ExceptHandler) -> bool:
    """Whether a failed assertion ends in this handler."""
    if handler.type is None:
        return True
    return _names(handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type])


def _names(kinds: Iterable[ast.expr]) -> bool:
    return bool({getattr(kind, "id", "") for kind in kinds} & _CATCH_ASSERTIONS)


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes directly below that can run when the node does: no dead branch, nothing after a `return`."""
    for name, value in ast.iter_fields(node):
        if name == "body" and _is_dead(node):
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.AST):
                yield item
            if isinstance(item, _ENDS):
                break


def _is_dead(node: ast.AST) -> bool:
    if isinstance(node, ast.For):
        return _is_empty(node.iter)
    if isinstance(node, ast.While | ast.If):
        return isinstance(node.test, ast.Constant) and not node.test.value
    return False


def _is_empty(node: ast.expr) -> bool:
    match node:
        case ast.List(elts=[]) | ast.Tuple(elts=[]) | ast.Dict(keys=[]) | ast.Constant(value=""):
            return True
        case ast.Call(func=ast.Name(id="range"), args=[ast.Constant(value=0)]):
            return True
        case ast.Call(func=ast.Name(id="list" | "tuple" | "set" | "dict"), args=[], keywords=[]):
            return True
    return False


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and bool(node.value)


def _raises(statements: Sequence[ast.stmt]) -> bool:
    return any(
        (isinstance(statement, ast.Raise) and statement.exc is not None)
        or (isinstance(statement, ast.Expr) and name_called(statement.value) in _EXITS)
        for statement in statements
    )


def _is_idle(statement: ast.stmt) -> bool:
    """Whether a statement of a handler leaves nothing that an assertion could find later."""
    if isinstance(statement, ast.Pass | ast.Continue | ast.Break | ast.Return):
        return True
    if not isinstance(statement, ast.Expr):
        return False
    return isinstance(statement.value, ast.Constant) or name_called(statement.value) in _LOGS
