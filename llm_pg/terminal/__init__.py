"""What a person reads while a run goes on: a live screen in a terminal, a table in a notebook, else plain lines, JSON
lines, or records of Python's logging."""

from .choose import make_terminal
from .json_lines import JsonTerminal
from .live import LiveTerminal
from .log import LogTerminal
from .notebook import NotebookTerminal
from .plain import Terminal

__all__ = ["JsonTerminal", "LiveTerminal", "LogTerminal", "NotebookTerminal", "Terminal", "make_terminal"]
