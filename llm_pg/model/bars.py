"""Progress bars of the libraries below, which would break into the lines and the screen of a run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from transformers.utils import logging


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Inside the block transformers and datasets draw no bars: the run shows itself what it does. They are as they were
    afterwards."""
    datasets = sys.modules.get("datasets")
    of_datasets = datasets is not None and not datasets.are_progress_bars_disabled()
    of_transformers = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    if datasets is not None and of_datasets:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if of_transformers:
            logging.enable_progress_bar()
        if datasets is not None and of_datasets:
            datasets.enable_progress_bars()
