"""A vLLM server on this machine, started for a run and ended with it."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...config.vllm import need_vllm
from ...processes.child import Child, end_of
from .client import Client
from .errors import EngineError, Unreachable

GRACE = 10.0  # seconds to end in order


def find_python(asked: str | None) -> str:
    """The interpreter whose vllm is started: the one asked for, else this one. ValueError where there is no vllm."""
    if asked is not None:
        if not os.access(asked, os.X_OK):
            raise ValueError(
                f"vllm_python is {asked!r}, which is no program. Give the python of an environment with vllm."
            )
        return asked
    need_vllm(colocated=False)
    return sys.executable


def arguments(python: str, model: Path, port: int, dtype: str, options: Mapping[str, Any]) -> list[str]:
    """The command line. `options` are further flags of vLLM: name -> value, True for a flag alone, False to omit."""
    flags = {
        "model": str(model),
        "host": "127.0.0.1",
        "port": port,
        "dtype": dtype,
        "generation-config": "vllm",  # else the model's own top-k or penalty would be sampled and not trained
        "logprobs-mode": "processed_logprobs",
        "enable-prefix-caching": True,
        "uvicorn-log-level": "warning",
        **{name.replace("_", "-"): value for name, value in options.items()},
    }
    words = [python, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in flags.items():
        if value is not False and value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


class LocalServer:
    """One server of a model folder.

    Args:
        python: of an environment with vllm. model: a folder as `weights.write_model` leaves it. log: its output.
        dtype: of its weights. options: further flags of vLLM.
    """

    def __init__(self, python: str, model: Path, log: Path, dtype: str, options: Mapping[str, Any]) -> None:
        self.log = log
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            **os.environ,
            "VLLM_SERVER_DEV_MODE": "1",  # the calls that replace weights
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",  # where adapters are brought alone
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",  # the folder has everything
        }
        environment.pop("PYTHONPATH", None)  # this environment's packages are not those of the server's
        command = arguments(python, model.absolute(), port, dtype, options)
        with log.open("wb") as file:
            self.child = Child(command, output=file, env=environment, grace=GRACE)

    def wait(self, seconds: float) -> None:
        """Until it answers. EngineError when it ended, or has not answered within `seconds`."""
        client, deadline = Client(self.url, timeout=5.0), time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.child.has_ended:
                raise EngineError(f"The vLLM server ended before it answered: {self.child.end()}. {self.reported()}")
            try:
                client.get("/health")
            except Unreachable:
                time.sleep(0.2)
            else:
                return
        self.stop()
        raise EngineError(
            f"The vLLM server has not answered within rollout.vllm_server_timeout = {seconds:g} s and was stopped. "
            f"Raise it for a large model. {self.reported()}"
        )

    def reported(self) -> str:
        """Where its log is, and the last lines of it."""
        return end_of(self.log)

    def stop(self) -> None:
        """Ends it and everything it started."""
        self.child.end()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
