"""`report.html`: one offline page about one run or several. Imports no torch."""

from .live import LivePage
from .page import leave_report, render, write_report

__all__ = ["LivePage", "leave_report", "render", "write_report"]
