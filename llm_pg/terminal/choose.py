"""Which terminal a process gets."""

from __future__ import annotations

from rich.console import Console

from .json_lines import JsonTerminal
from .live import LiveTerminal
from .notebook import NotebookTerminal
from .plain import Terminal


def make_terminal(*, quiet: bool = False, as_json: bool = False) -> Terminal:
    """In a notebook a table that is brought up to date; the live screen where standard output is a terminal that can
    move its cursor; else plain lines.

    quiet: only warnings, findings and the end's table. as_json: one JSON line a step on standard output, the rest on
    standard error.
    """
    if as_json:
        return JsonTerminal(quiet=quiet)
    console = Console(highlight=False)
    if console.is_jupyter and not quiet:
        return NotebookTerminal()
    if console.is_terminal and not console.is_dumb_terminal and not quiet:
        return LiveTerminal(console=console)
    return Terminal(quiet=quiet)
