"""Configs and recipes that travel with the package."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

from .config import ConfigError, nearest

_PACKAGE = Path(__file__).parent


def folder(kind: str) -> Path:
    """The folder of shipped `configs` or `recipes`: inside an installed wheel, or beside the package in a checkout."""
    installed = _PACKAGE / "data" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def find(name: str) -> Path:
    """The shipped file of this name (with or without its ending). Raises ConfigError with the near names."""
    files = {p.name: p for kind in ("configs", "recipes") for p in sorted(folder(kind).rglob("*")) if p.is_file()}
    for candidate in (name, f"{name}.yaml", f"{name}.py"):
        if candidate in files:
            return files[candidate]
    raise ConfigError(
        f"Nothing called {name!r} is shipped.{nearest(name, files)} There are: {', '.join(sorted(files))}."
    )


def copy(name: str, target: str) -> Path:
    """Copy a shipped file, and the modules beside it that it imports, to a folder or file name; never over a file."""
    source, place = find(name), Path(target)
    if place.is_dir():
        place = place / source.name
    if place.exists():
        raise ConfigError(f"{place} exists already; give another name.")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
        for module in _imported_neighbours(source):
            if not (place.parent / module.name).exists():
                shutil.copyfile(module, place.parent / module.name)
    except OSError as error:
        raise ConfigError(f"{source.name} cannot be copied to {place}: {error}. Give a folder to write in.") from None
    return place


def _imported_neighbours(source: Path) -> list[Path]:
    """The modules in the folder of a shipped file that it imports."""
    if source.suffix != ".py":
        return []
    names = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) and node.module and not node.level else set()
    return sorted(path for path in source.parent.glob("*.py") if path.stem in names)
