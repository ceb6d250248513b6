"""Where a reward function lives, and how any process finds it there: by module or file, and qualified name."""

import ast
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, Literal

from ..files import load_file


@dataclass(frozen=True)
class Target:
    """The address of a function. At least one of module (an import name) and file (an absolute path) is given."""

    module: str | None
    file: str | None
    qualname: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class LoadError(Exception):
    """A target cannot be loaded. kind says what is at fault, near holds the names that exist in its place."""

    def __init__(self, kind: Literal["module", "name", "import", "signature"], message: str, near: list[str]) -> None:
        super().__init__(message)
        self.kind: str = kind
        self.near = near


def load(target: Target) -> Callable[..., Any]:
    """The function at a target. LoadError names what is missing; what the module itself raises passes through."""
    module = _module(target)
    found: Any = module
    for part in target.qualname.split("."):
        if not hasattr(found, part):
            near = [name for name in dir(found) if not name.startswith("_") and callable(getattr(found, name, None))]
            raise LoadError("name", f"{getattr(found, '__name__', found)} has no {part!r}", near)
        found = getattr(found, part)
    if not callable(found):
        raise LoadError("name", f"{target.qualname!r} is a {type(found).__name__}, not a function", [])
    for required in getattr(getattr(found, "reward_info", None), "requires", ()):
        import_module(required)  # now, so that a slow import does not count towards the first deadline
    return found


def _module(target: Target) -> ModuleType:
    if target.module is not None and (target.file is None or _is_importable(target.module)):
        try:
            return import_module(target.module)
        except ModuleNotFoundError as error:
            if error.name is None or not (target.module == error.name or target.module.startswith(f"{error.name}.")):
                raise  # an import inside it, not the module itself
            raise LoadError("module", f"there is no module {error.name!r}", _siblings(error.name)) from error
    assert target.file is not None
    return load_file(Path(target.file))


def _is_importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _siblings(module: str) -> list[str]:
    parent, _, _ = module.rpartition(".")
    if not parent:
        return sorted(found.name for found in iter_modules() if not found.name.startswith("_"))
    package = sys.modules.get(parent)
    return sorted(f"{parent}.{found.name}" for found in iter_modules(getattr(package, "__path__", [])))


def target_of(function: Callable[..., Any]) -> Target | str:
    """The target that finds this very object in another process, or in words why there is none."""
    qualname, module_name = getattr(function, "__qualname__", None), getattr(function, "__module__", None)
    if qualname is None or module_name is None:
        return f"it is a {type(function).__name__} object, which has no import name"
    if "<lambda>" in qualname:
        return "it is a lambda"
    if "<locals>" in qualname:
        return "it is defined inside another function"
    module = sys.modules.get(module_name)
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if found is not function:
        return f"{module_name}.{qualname} is not this object"
    file = getattr(module, "__file__", None)
    path = os.path.abspath(file) if file else None
    if module_name != "__main__":
        return Target(module_name, path, qualname)
    if path is None or not path.endswith(".py"):
        return "it is defined in a notebook or an interactive session"
    if not has_main_guard(Path(path)):
        return f'{path} has no `if __name__ == "__main__":`, so loading it again would run the whole script'
    if is_under_main_guard(Path(path), qualname.partition(".")[0]):
        return f'{path} defines it under `if __name__ == "__main__":`, where loading it again finds nothing'
    return Target(None, path, qualname)


def has_main_guard(path: Path) -> bool:
    """Whether a script keeps its main part under a test of `__name__`."""
    return bool(_main_guards(path))


def is_under_main_guard(path: Path, name: str) -> bool:
    """Whether a script defines a function or class of this name under a test of `__name__`."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    inside = [node for guard in _main_guards(path) for node in ast.walk(guard)]
    return any(isinstance(node, kinds) and node.name == name for node in inside)


def _main_guards(path: Path) -> list[ast.If]:
    def tests_name(node: ast.If) -> bool:
        return any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(node.test))

    return [node for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.If) and tests_name(node)]
