"""`report.html`: one offline page about one run or several. Imports no torch."""

from .page import leave_report, render, write_report

__all__ = ["leave_report", "render", "write_report"]
