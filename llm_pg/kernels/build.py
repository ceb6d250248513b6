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

log = logging.getLogger("llm_pg.kernels")

FOLDER = Path(__file__).parent
SOURCES = tuple(sorted((*FOLDER.glob("*.h"), *FOLDER.glob("*.cpp"))))
# No -ffast-math: NaN has to stay NaN, and linking with it changes how the whole process rounds.
FLAGS = (
    "-std=gnu++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
)
SWITCH = "LLM_PG_KERNELS"  # an environment variable, so that a run's children follow it; "off" = without the kernels
LIMIT = 120  # seconds of the compiler
# After $CXX, which may be a C compiler: PEFT leaves gcc there once it has tried to build BOFT's kernel.
COMPILERS = ("c++", "g++", "clang++")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels; None = there are none here, and the log says why, once."""
    if os.environ.get(SWITCH) == "off":
        return None
    compilers = [path for name in (os.environ.get("CXX"), *COMPILERS) if name and (path := shutil.which(name))]
    if not compilers:
        log.info("Without compiled kernels, which is slower on a CPU: there is no C++ compiler (c++, g++ or $CXX).")
        return None
    reasons = []
    for compiler in dict.fromkeys(compilers):
        try:
            return _loaded(compiler)
        except subprocess.CalledProcessError as error:
            reasons.append(f"{compiler}: {error.stderr.strip().partition(chr(10))[0]}")
        except (OSError, subprocess.TimeoutExpired) as error:
            reasons.append(f"{compiler}: {error}")
    log.warning("Without compiled kernels, which is slower on a CPU: no compiler made them. %s", "; ".join(reasons))
    return None


def _loaded(compiler: str) -> ctypes.CDLL:
    """The library, made where it is missing. It is kept only where it can be loaded."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm_pg"
    target = cache / f"kernels-{_key()}.so"
    if target.exists():
        return ctypes.CDLL(str(target))
    cache.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / target.name
        command = [compiler, *FLAGS, *(str(x) for x in SOURCES if x.suffix == ".cpp"), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT)
        ctypes.CDLL(str(made))  # what a C compiler links has no C++ runtime, which shows only here
        made.replace(target)  # other processes that build it at the same time make the same
    log.info(
        "Compiled the kernels for this CPU in %.1f s, once for this machine: %s", time.perf_counter() - start, target
    )
    return ctypes.CDLL(str(target))


def _key() -> str:
    """What the library depends on. A home folder may be shared by machines with other processors; the compiler does not
    count, so that processes with another $CXX share one."""
    processor = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        processor += next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    parts = (*(source.read_text() for source in SOURCES), *FLAGS, processor)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
