"""`report.html`: one offline page about one run or several. Imports no torch."""

from .page import render, write_report

__all__ = ["render", "write_report"]
