"""The kernels as a library of this machine, compiled once into the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

log = logging.getLogger("llm_pg.sampling")

SOURCE = Path(__file__).with_name("kernels.cpp")
# No -ffast-math: NaN has to stay NaN, and linking with it changes how the whole process rounds.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
SWITCH = "LLM_PG_KERNELS"  # an environment variable, so that a run's children follow it; "off" = without the kernels
LIMIT = 120  # seconds of the compiler


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels; None = there are none here, and the log says why, once."""
    if os.environ.get(SWITCH) == "off":
        return None
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
    if compiler is None:
        log.info("Decoding without compiled kernels: there is no C++ compiler (c++, g++ or $CXX).")
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    log.warning("Decoding without compiled kernels, which is slower: %s did not make them: %s", compiler, reason)
    return None


def _built(compiler: str) -> Path:
    """The library's file, made where it is missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm_pg"
    target = cache / f"kernels-{_key(compiler)}.so"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / target.name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT)
        made.replace(target)  # other processes that build it at the same time make the same
    log.info(
        "Compiled the kernels of decoding in %.1f s, once for this machine: %s", time.perf_counter() - start, target
    )
    return target


def _key(compiler: str) -> str:
    """What the library depends on. A home folder may be shared by machines with other processors."""
    processor = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        processor += next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    parts = (SOURCE.read_text(), *FLAGS, compiler, processor)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
