"""A test that is skipped without being named fails the run that asks for it; what CI alone runs are tests."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import pytest

def test_passes():
    assert True

def test_is_skipped():
    pytest.skip("because it rains")
"""


def run(folder: Path, named: str) -> subprocess.CompletedProcess[str]:
    for name in ("conftest.py", "ci_only.txt"):
        (folder / name).write_text((ROOT / "tests" / name).read_text())
    (folder / "test_it.py").write_text(TESTS)
    (folder / "skips.txt").write_text(named)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    return subprocess.run(
        [*command, "-c", "/dev/null", "--named-skips=skips.txt", "test_it.py"],
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_a_skip_that_is_not_named_fails_the_run(tmp_path: Path) -> None:
    done = run(tmp_path, "# none\ntest_other.py: because it rains\n")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "test_it.py::test_is_skipped: Skipped: because it rains" in done.stdout


def test_a_skip_that_is_named_does_not(tmp_path: Path) -> None:
    done = run(tmp_path, "test_it.py: rains\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 skipped" in done.stdout


def test_what_is_left_to_ci_is_there() -> None:
    for line in (ROOT / "tests" / "ci_only.txt").read_text().splitlines():
        if not line.startswith("#"):
            file, _, name = line.partition("::")
            text = (ROOT / file).read_text()
            assert f"def {name.partition('[')[0]}" in text, line
