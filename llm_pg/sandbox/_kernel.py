"""The kernel's own means, through ctypes: namespaces, Landlock, capabilities, the filter of system calls.

Runs in the supervisor, a fresh interpreter without site packages, and imports nothing of the package: what it needs
comes in arguments. Every function raises OSError when the kernel says no, so that a run is contained or does not start.
"""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on all architectures
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << bit for bit in range(6))
_MAKE_DIR, _MAKE_REG, _REFER, _TRUNCATE, _IOCTL_DEV = 1 << 7, 1 << 8, 1 << 13, 1 << 14, 1 << 15
_FILESYSTEM_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_NETWORK_RIGHTS, _SCOPES = 0b11, 0b11  # TCP bind and connect; abstract sockets and signals

_CLONE_NEW = {"mount": 0x20000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000, "pid": 0x20000000}
_CLONE_NEWNET = 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x4000, 1 << 18
_MNT_DETACH = 2
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS = 4, 22, 24, 28, 38
_NO_ROOT_PRIVILEGE = 0b11  # SECBIT_NOROOT and its lock
_SECCOMP_FILTER = 2


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)  # not at import: Windows has none


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int, what: str, pointer: ctypes.Structure | None = None) -> None:
    extra = ctypes.byref(pointer) if isinstance(pointer, ctypes.Structure) else ctypes.c_ulong(0)
    _check(_libc().prctl(option, ctypes.c_ulong(value), extra, ctypes.c_ulong(0), ctypes.c_ulong(0)), what)


def landlock_abi() -> int:
    """The kernel's Landlock ABI; 0 when it has none or it is switched off."""
    return max(0, _libc().syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def become_user(uid: int) -> None:
    """From root to a user id that owns nothing but the run's folder."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    _prctl(_PR_SET_DUMPABLE, 1, "dumpable")  # else /proc/self, and so the user namespace's maps, stays root's


def enter_namespaces(folder: str, size_mb: int, files: int) -> None:
    """New namespaces for this process (pid: for its children), and a private file system over `folder`."""
    uid, gid = os.getuid(), os.getgid()
    _check(_libc().unshare(sum(_CLONE_NEW.values()) | _CLONE_NEWNET), "new namespaces")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _check(_libc().mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "private mounts")
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    options = f"size={size_mb}m,nr_inodes={files},mode=0700".encode()
    _check(_libc().mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options), "private file system")


def leave_mount(folder: str) -> None:
    """Take the private file system off `folder`."""
    _check(_libc().umount2(os.fsencode(folder), _MNT_DETACH), "unmount")


def drop_privileges() -> None:
    """No capability now or after an exec, for user id 0 too; and no way to gain one."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "no new privileges")
    if os.geteuid() == 0:
        for capability in range(64):
            if _libc().prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
                break
        _libc().prctl(_PR_SET_SECUREBITS, ctypes.c_ulong(_NO_ROOT_PRIVILEGE), 0, 0, 0)  # refused without CAP_SETPCAP
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3, this thread
    _check(_libc().capset(header, bytes(24)), "drop capabilities")


def landlock(abi: int, read: list[str], execute: list[str], write: list[str]) -> None:
    """Only these files and folders (and what is below) can be read, executed or written from now on.

    Paths that do not exist are left out. With ABI 4 no TCP, with ABI 6 no abstract sockets and no signals outside.
    """
    handled = _FILESYSTEM_RIGHTS[min(abi, 5)]
    attributes = struct.pack("=QQQ", handled, _NETWORK_RIGHTS, _SCOPES)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    create = _libc().syscall(_LANDLOCK_CREATE, attributes[:size], ctypes.c_size_t(size), ctypes.c_uint32(0))
    ruleset = _check(create, "Landlock ruleset")
    work = (
        _READ_FILE | _READ_DIR | _WRITE_FILE | _TRUNCATE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER
    )
    for paths, rights in ((read, _READ_FILE | _READ_DIR), (execute, _EXECUTE | _READ_FILE | _READ_DIR), (write, work)):
        for path in paths:
            _allow(ruleset, path, rights & handled)
    _check(_libc().syscall(_LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0)), "Landlock")
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        rights &= _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
    rule = struct.pack("=Qi", rights, descriptor)
    _check(_libc().syscall(_LANDLOCK_ADD, ruleset, 1, rule, ctypes.c_uint32(0)), f"Landlock rule for {path}")
    os.close(descriptor)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def filter_system_calls(program: bytes) -> None:
    """Install the filter; it holds for this process and all it starts, and cannot be taken off."""
    _prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, "system call filter", _Program(len(program) // 8, program))
