"""Pages of documentation made from the code: `python -m llm_pg.guides.metrics docs/metrics.md`, `.api`, `.from_trl`."""

import sys
from pathlib import Path


def publish(page: str) -> None:
    """Write the page to the file that the command names, or print it."""
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page, encoding="utf-8")
    else:
        print(page, end="")
