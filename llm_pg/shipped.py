"""Configs and recipes that travel with the package."""

from __future__ import annotations

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
    """Copy a shipped file to a folder or file name; never over an existing file."""
    source, place = find(name), Path(target)
    if place.is_dir():
        place = place / source.name
    if place.exists():
        raise ConfigError(f"{place} exists already; give another name.")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
    except OSError as error:
        raise ConfigError(f"{source.name} cannot be copied to {place}: {error}. Give a folder to write in.") from None
    return place
