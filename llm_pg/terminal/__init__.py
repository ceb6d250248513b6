"""What a person reads while a run goes on: a live screen in a terminal, else plain lines, or JSON lines."""

from .choose import make_terminal
from .json_lines import JsonTerminal
from .live import LiveTerminal
from .plain import Terminal

__all__ = ["JsonTerminal", "LiveTerminal", "Terminal", "make_terminal"]
