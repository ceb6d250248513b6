"""The command `llm-pg report`: its arguments and what it prints."""

from __future__ import annotations

import argparse
import json
import sys

from ..doctor import by_gravity, examine_run, show
from .page import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `llm-pg report`."""
    parser.add_argument("runs", nargs="+", help="folders of runs, finished or still going on")
    parser.add_argument("--out", help="where to write the page; by default report.html in the first run")
    parser.add_argument("--json", action="store_true", help="the doctor's findings as JSON on standard output")


def main(arguments: argparse.Namespace) -> int:
    """Write the page and print where it is, and what the doctor finds."""
    place = write_report(arguments.runs, arguments.out)
    found = {run: by_gravity(examine_run(run)) for run in arguments.runs}
    if arguments.json:
        print(json.dumps({run: [finding.as_json() for finding in findings] for run, findings in found.items()}))
        print(place, file=sys.stderr)
        return 0
    for run, findings in found.items():
        print(f"{run}: {show(findings)}" if len(found) > 1 else show(findings))
    print(f"Page: {place}")
    return 0
