"""What the generators of documentation pages share. Each prints its page, or writes it to the file that is named:

python docs/generators/metrics_page.py docs/metrics.md
"""

import sys
from pathlib import Path


def publish(page: str) -> None:
    """Write the page to the file that the command names, or print it."""
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page, encoding="utf-8")
    else:
        print(page, end="")
