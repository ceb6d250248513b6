"""Where a run's numbers come from: `sessions.jsonl` has a line for each start, the first and every resume. No torch."""

from __future__ import annotations

import json
import platform
import shlex
import socket
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

NAME = "sessions.jsonl"
PACKAGES = (
    "llm-policy-gradient",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "peft",
    "trl",
    "vllm",
)


def session(ranks: int, device: str) -> dict[str, Any]:
    """Returns when, where and how this process was started.

    Args:
        ranks: processes of the run.
        device: that it computes on, in words.
    """
    return {
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "device": device,
        "ranks": ranks,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def note(folder: Path, facts: dict[str, Any]) -> None:
    """Adds a line to the run's sessions."""
    with (folder / NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of the folder in which the run was started, with a plus where files have changed since."""
    try:
        words = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        found = subprocess.run(words, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
