"""A disk that fails at its n-th write, sync or change of a folder, in this process; and one that is small."""

import ctypes
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors import SafetensorError

from llm_pg.config import ConfigError
from llm_pg.run.guard import RunStopped
from llm_pg.run.saving.checkpoint_files import CheckpointError

_NEW_MOUNTS, _NEW_USER, _PRIVATE, _REMOUNT = 0x20000, 0x10000000, 0x4000 | 1 << 18, 32
# Where llm_pg and transformers write tensors: safetensors' own code opens those files.
SAVERS = (
    "llm_pg.run.saving.checkpoint_files.save_file",
    "llm_pg.run.saving.crash.save_file",
    "llm_pg.model.critic.save_file",
    "peft.peft_model.safe_save_file",
    "transformers.modeling_utils.safe_save_file",
)


class FailingDisk:
    """What reaches the disk is counted; the n-th time fails with `code`, and all after it where it is `lasting`.

    The failing write brings half of its bytes to the disk, as one does that meets its end.
    """

    def __init__(self, folder: Path, number: int, code: int, *, lasting: bool) -> None:
        self.folder, self.number, self.code, self.lasting = str(folder.resolve()), number, code, lasting
        self.count, self.hit = 0, ""

    def fails(self, path: str, what: str) -> bool:
        """Count one operation; whether it is to fail."""
        if not path.startswith(self.folder):
            return False
        self.count += 1
        failing = self.count == self.number or (self.lasting and self.count > self.number)
        if failing:
            self.hit = self.hit or f"{what} of {path}"
        return failing

    def error(self, path: str) -> OSError:
        return OSError(self.code, os.strerror(self.code), path)

    @contextmanager
    def open(self) -> Iterator[None]:
        """While it is open, files are opened through it."""
        patches = [
            mock.patch("builtins.open", self._opened(io.open)),
            mock.patch("io.open", self._opened(io.open)),
            mock.patch("os.fsync", self._synced(os.fsync)),
        ]
        for name in ("mkdir", "rename", "replace", "unlink"):
            patches.append(mock.patch(f"os.{name}", self._changed(name, getattr(os, name))))
        for name in SAVERS:
            patches.append(mock.patch(name, self._saved))
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()

    def _opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", buffering: int = -1, *given: Any, **named: Any) -> Any:
            path = "" if isinstance(file, int) else os.path.abspath(os.fspath(file))
            if not path.startswith(self.folder) or not set(mode) & set("wax+"):
                return real(file, mode, buffering, *given, **named)
            raw = _Raw(self, path, mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *given, **named)

        return opened

    def _synced(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def synced(handle: int) -> None:
            path = os.readlink(f"/proc/self/fd/{handle}")
            if self.fails(path, "fsync"):
                raise OSError(self.code, os.strerror(self.code))
            real(handle)

        return synced

    def _changed(self, name: str, real: Callable[..., None]) -> Callable[..., None]:
        def changed(path: Any, *given: Any, **named: Any) -> None:
            place = os.path.abspath(os.fspath(path))
            makes_nothing = os.path.lexists(place) == (name == "mkdir")
            if named.get("dir_fd") is None and not makes_nothing and self.fails(place, name):
                raise self.error(place)
            real(path, *given, **named)

        return changed

    def _saved(self, tensors: Any, path: Any, *given: Any, **named: Any) -> None:
        from safetensors.torch import save_file

        save_file(tensors, path, *given, **named)
        if self.fails(os.path.abspath(path), "save_file"):
            os.truncate(path, os.path.getsize(path) // 2)
            raise SafetensorError(
                f"Error while serializing: I/O error: {os.strerror(self.code)} (os error {self.code})"
            )


class _Raw(io.FileIO):
    """The unbuffered file under a buffer: what it writes has reached the disk."""

    def __init__(self, disk: FailingDisk, path: str, mode: str) -> None:
        super().__init__(path, mode)
        self.disk, self.path, self.is_full = disk, path, False

    def write(self, data: Any) -> int | None:
        if self.is_full:
            self.is_full = False
            raise self.disk.error(self.path)
        if self.disk.fails(self.path, "write"):
            half = len(data) // 2
            self.is_full = half > 0
            if not half:
                raise self.disk.error(self.path)
            return super().write(bytes(data)[:half])
        return super().write(data)


def on_a_small_disk(given: dict[str, Any], run: Callable[[dict[str, Any]], None]) -> None:
    """The run's folder is a file system of `given["kilobytes"]`, later one that is large enough for `--resume`.

    What ends the first run is printed after "ended:"; the metrics at the end are left beside the folder. For a process
    of its own that has one thread. Exits with 3 where no file system can be mounted.
    """
    folder = Path(given["out"]) / given["name"]
    folder.mkdir()
    if not _mount(folder, given["kilobytes"]):
        os._exit(3)
    try:
        run(given)
    except (RunStopped, ConfigError, CheckpointError) as error:
        print(f"ended: {error}", flush=True)
    else:
        print("whole", flush=True)
    _remount(folder)
    run({**given, "resume": True})
    folder.with_suffix(".jsonl").write_bytes((folder / "metrics.jsonl").read_bytes())


def _mount(folder: Path, kilobytes: int) -> bool:
    libc, own = ctypes.CDLL(None, use_errno=True), os.geteuid() != 0
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_NEW_MOUNTS | (_NEW_USER if own else 0)):
        return False
    if own:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    if libc.mount(b"none", b"/", None, ctypes.c_ulong(_PRIVATE), None):
        return False
    options = f"size={kilobytes}k".encode()
    return libc.mount(b"none", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(0), options) == 0


def _remount(folder: Path) -> None:
    done = ctypes.CDLL(None).mount(b"none", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(_REMOUNT), b"size=64m")
    assert done == 0
