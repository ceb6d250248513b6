"""The arrows between rooms point one way, and nothing dangerous stands outside the sandbox."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A room may import the rooms before it, never those after it.
ORDER = [
    "__init__",
    "words",
    "columns",
    "files",
    "device",
    "kernels",
    "processes",
    "estimators",
    "rollouts",
    "algorithms",
    "config",
    "distributed",
    "model",
    "sampling",
    "metrics",
    "learner",
    "prompts",
    "sandbox",
    "evaluate",
    "rewards",
    "environments",
    "rollout",
    "time_budget",
    "doctor",
    "terminal",
    "report",
    "run",
    "trainer",
    "from_trl",
    "prove",
    "control",
    "watch",
    "advise",
    "plan",
    "shipped",
    "commands",
    "cli",
    "__main__",
]
# config checks words against the table of algorithms, which is torch-free.


def imported_rooms(path: Path, tree: ast.AST) -> set[str]:
    """Rooms of llm_pg that a module imports, relative imports resolved."""
    package = ["llm_pg", *path.relative_to(ROOT / "llm_pg").parts[:-1]]
    rooms = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module] if module.count(".") else [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("llm_pg.")}
    return rooms


def reverse_arrows(files: dict[Path, str]) -> list[str]:
    found = []
    for path, source in files.items():
        own = path.relative_to(ROOT / "llm_pg").parts[0].removesuffix(".py")
        if own == "__init__":  # it shows the public names to type checkers, and imports none of them
            continue
        for room in imported_rooms(path, ast.parse(source)) & set(ORDER):
            if ORDER.index(room) > ORDER.index(own):
                found.append(f"{path.relative_to(ROOT)} imports {room}")
    return found


def sources() -> dict[Path, str]:
    return {path: path.read_text() for path in sorted((ROOT / "llm_pg").rglob("*.py"))}


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {path.relative_to(ROOT / "llm_pg").parts[0].removesuffix(".py") for path in sources()}
    assert rooms <= set(ORDER)


def test_no_module_imports_a_room_that_comes_after_its_own() -> None:
    assert reverse_arrows(sources()) == []


@pytest.mark.parametrize(
    "file, line",
    [
        ("estimators/returns.py", "from ..model.policy import Policy"),
        ("algorithms/table.py", "import llm_pg.trainer"),
        ("model/policy.py", "def f():\n    from ..trainer import GRPOTrainer"),
        ("sampling/native.py", "from .. import cli"),
    ],
)
def test_a_planted_reverse_import_is_found(file: str, line: str) -> None:
    path = ROOT / "llm_pg" / file
    assert reverse_arrows({path: path.read_text() + "\n" + line + "\n"})


def modules_imported(path: Path, tree: ast.AST, known: set[str]) -> set[str]:
    """Modules of llm_pg that a module imports when it is loaded, or for its types, or inside a function."""
    package = ["llm_pg", *path.relative_to(ROOT / "llm_pg").parts[:-1]]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def rings(files: dict[Path, str]) -> list[list[str]]:
    """Modules that import one another, at any distance."""
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files if path.name != "__init__.py"
    }
    arrows = {name: modules_imported(path, ast.parse(files[path]), set(names)) for name, path in names.items()}
    sorter = TopologicalSorter(arrows)
    try:
        sorter.prepare()
    except CycleError as error:
        return [error.args[1]]
    return []


def test_no_two_modules_import_one_another() -> None:
    assert rings(sources()) == []


def test_a_planted_ring_is_found() -> None:
    files = sources()
    guard = ROOT / "llm_pg/run/guard.py"
    assert rings({**files, guard: files[guard] + "\ndef f():\n    from .saving.crash import *\n"})


def test_a_class_of_the_control_track_shares_its_name_with_no_other_class() -> None:
    places: dict[str, list[Path]] = {}
    for path, source in sources().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path)
    control = {name for name, paths in places.items() if any(path.parent.name == "control" for path in paths)}
    assert len(control) > 15
    assert {name: places[name] for name in control if len(places[name]) > 1} == {}


def test_the_package_imports_no_generator_of_documentation() -> None:
    generators = {path.stem for path in (ROOT / "docs" / "generators").glob("*.py")}
    assert generators
    for path, source in sources().items():
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not (generators | {"docs"}) & {name.split(".")[0] for name in names}, path


def test_estimators_import_torch_and_nothing_else_that_is_heavy() -> None:
    allowed = {"torch", "math", "zlib", "typing", "collections", "dataclasses", "itertools", "functools", "__future__"}
    for path in (ROOT / "llm_pg" / "estimators").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] in allowed, path


DANGEROUS_CALLS = {"eval", "exec", "parse_expr", "compile"}
SAFE_VALUES = {"trust_remote_code": "False", "weights_only": "True"}


def dangerous(source: str) -> list[str]:
    """Calls and arguments through which text or a file becomes code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            found += [
                name for name in names if name.split(".")[0] in {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
            ]
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        if (isinstance(node.func, ast.Name) and name in DANGEROUS_CALLS) or name == "parse_expr":
            found.append(name)
        if owner == "yaml" and name in {"load", "unsafe_load", "full_load"}:
            found.append(f"yaml.{name}")
        if owner == "torch" and name == "load":
            found.append("torch.load")
        for keyword in node.keywords:
            if keyword.arg in SAFE_VALUES and ast.unparse(keyword.value) != SAFE_VALUES[keyword.arg]:
                found.append(f"{keyword.arg}={ast.unparse(keyword.value)}")
    return found


@pytest.mark.faults
def test_no_text_or_file_becomes_code_outside_the_sandbox() -> None:
    for package in ("llm_pg", "reward_fns", "recipes"):
        for path in (ROOT / package).rglob("*.py"):
            if "sandbox" not in path.parts:
                assert dangerous(path.read_text()) == [], path


@pytest.mark.faults
@pytest.mark.parametrize(
    "line",
    [
        "eval('1')",
        "import pickle",
        "yaml.load(x)",
        "torch.load(p)",
        "f(trust_remote_code=True)",
        "from sympy import x; x.parse_expr('1')",
    ],
)
def test_each_dangerous_form_is_recognised(line: str) -> None:
    assert dangerous(line)
