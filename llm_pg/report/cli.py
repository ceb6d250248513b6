"""The command `llm-pg report`: what it writes and prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from ..config import ConfigError
from ..doctor import by_gravity, examine_run, show
from .page import write_report


def main(runs: Sequence[str], out: str | None, as_json: bool) -> int:
    """Write the page about these folders and print where it is, and what the doctor finds."""
    try:
        place = write_report(runs, out)
    except OSError as error:
        raise ConfigError(f"The page cannot be written: {error}. Give another place with --out.") from None
    found = {run: by_gravity(examine_run(run)) for run in runs}
    if as_json:
        print(json.dumps({run: [finding.as_json() for finding in findings] for run, findings in found.items()}))
        print(f"Page: {place}", file=sys.stderr)
        return 0
    for run, findings in found.items():
        print(f"{run}: {show(findings)}" if len(found) > 1 else show(findings))
    print(f"Page: {place}")
    return 0
