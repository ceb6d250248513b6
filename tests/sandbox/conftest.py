import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from escape_attempts import runs_in
from sandbox_levels import LEVELS, level_or_skip

from llm_pg.sandbox import Level


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Level:
    return level_or_skip(request.param)


@pytest.fixture
def runs() -> Iterator[str]:
    """A folder that all runs of a test are made in, so that what they leave behind shows."""
    with tempfile.TemporaryDirectory(prefix="llm-pg-test-") as folder:
        Path(folder).chmod(0o1777)
        with runs_in(folder):
            yield folder
