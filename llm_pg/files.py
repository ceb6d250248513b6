"""Python files that a user names by their path, as in `my.py:function`. Imports nothing of ours."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def load_file(path: Path) -> ModuleType:
    """Returns a Python file as a module; loaded once, whoever asks for it.

    Its folder joins the import path, so that it can import its neighbours. Its name is not `__main__`, so a script's
    guarded main part does not run.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: it is not a Python file. Whatever the file raises passes through.
    """
    name = f"llm_pg_file_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickling helpers look it up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
