"""docs/metrics.md is what the table of metrics says."""

import subprocess
import sys
from pathlib import Path

from metrics_page import READING, markdown

from llm_pg.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
GENERATORS = ROOT / "docs" / "generators"


def test_the_page_of_the_metrics_is_made_from_their_table() -> None:
    """Where this fails: python docs/generators/metrics_page.py docs/metrics.md"""
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == markdown()


def test_every_metric_is_a_row_of_four_cells_and_advice_is_given_of_metrics_only() -> None:
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == len(METRICS)
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)
    assert set(READING) <= set(METRICS)


def test_the_command_writes_the_page_without_loading_torch(tmp_path: Path) -> None:
    code = "import sys, metrics_page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=GENERATORS).returncode == 0
    command = [sys.executable, str(GENERATORS / "metrics_page.py"), str(tmp_path / "m.md")]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert (tmp_path / "m.md").read_text(encoding="utf-8") == markdown()
