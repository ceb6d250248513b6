"""Datasets by hub name (or a local folder laid out as one), through `datasets.load_dataset`."""

from __future__ import annotations

import http.client
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ..config import ConfigError
from ..config.schema import DataConfig
from .table import Table, head

REACH_SECONDS = 5.0


def read_hub(data: DataConfig, split: str, most: int, setting: str) -> Table:
    """The rows of one split; with `dataset_streaming` the first `most`, which `setting` sets.

    Raises:
        ConfigError: it cannot be had; within seconds and without retries.
    """
    name = data.dataset_name
    assert name is not None
    if Path(name).is_file():
        raise ConfigError(f"data.dataset_name is a file ({name}); name files with data.data_files.")
    if Path(name).is_dir():
        # In a folder with a dataset card, `datasets` 5.2 does not see that a file has changed and gives the rows that
        # it cached before; so it gets a cache that lives as long as this call.
        with tempfile.TemporaryDirectory() as cache:
            return _loaded(data, split, cache, most, setting)
    with nullcontext() if _reachable() else _no_network():
        return _loaded(data, split, None, most, setting)


def _loaded(data: DataConfig, split: str, cache_dir: str | None, most: int, setting: str) -> Table:
    import datasets

    config = f"/{data.dataset_config}" if data.dataset_config else ""
    title = f"{data.dataset_name}{config} [{split}]"
    place = (data.dataset_name, data.dataset_config)
    try:
        try:
            if data.dataset_streaming:
                stream = datasets.load_dataset(*place, split=split, cache_dir=cache_dir, streaming=True)
                return Table(title, head(stream, most, title, setting))
            rows = datasets.load_dataset(*place, split=split, cache_dir=cache_dir).to_list()
        except datasets.exceptions.DatasetGenerationError:
            # `datasets` gives all splits the schema of the first: read the files of the wanted one alone.
            builder, name = datasets.load_dataset_builder(*place, cache_dir=cache_dir), split.partition("[")[0]
            files = builder.config.data_files or {}
            if name not in files or len(files) < 2:
                raise
            kind = builder.__module__.rpartition(".")[2]
            own = {name: list(files[name])}
            rows = datasets.load_dataset(kind, data_files=own, split=split, cache_dir=cache_dir).to_list()
    except ConnectionError as error:
        raise ConfigError(
            f"The hub cannot be reached, and the dataset {title} (data.dataset_name) is not in the local cache "
            f"({error}). Connect to a network, fill the cache on a machine that has one, or name local files with "
            "data.data_files."
        ) from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        causes = dict.fromkeys(" ".join(str(each).split()) for each in (error, error.__cause__) if each is not None)
        raise ConfigError(f"The dataset {title} cannot be loaded: {'; '.join(causes)}") from None
    return Table(title, rows)


def _reachable() -> bool:
    """Whether the hub answers: one request, no retry. Any HTTP status is an answer, and so is a TLS complaint."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=REACH_SECONDS).close()
    except (urllib.error.HTTPError, http.client.HTTPException):
        return True
    except OSError as error:
        return isinstance(getattr(error, "reason", error), ssl.SSLError)
    return True


@contextmanager
def _no_network() -> Iterator[None]:
    """Make `datasets` look into its cache at once; on its own it tries for 23 seconds first."""
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
