"""Look at, and remove, folders that hostile code has filled: any depth, any modes, links never followed.

Used by the supervisor and by the trainer's side; standard library only, and cheap to import.
"""

import os
import stat


def usage(folder: str, max_entries: int) -> tuple[int, int]:
    """Bytes on disk and number of entries below `folder`; the walk ends at more than `max_entries`."""
    num_bytes, num_entries, queue = 0, 0, [folder]
    while queue and num_entries <= max_entries:
        try:
            with os.scandir(queue.pop()) as entries:
                for entry in entries:
                    num_entries += 1
                    num_bytes += 512 * entry.stat(follow_symlinks=False).st_blocks
                    if entry.is_dir(follow_symlinks=False):
                        queue.append(entry.path)
        except (FileNotFoundError, PermissionError):
            continue  # it goes on working while we look; a folder it closed to itself it cannot fill
        except OSError:
            return num_bytes, max_entries + 1  # a path too long to be honest
    return num_bytes, num_entries


def unlinked_bytes(pid: int) -> int:
    """Bytes on disk of files that the process has open and has removed, so that no folder shows them."""
    num_bytes = 0
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            facts = os.stat(f"/proc/{pid}/fd/{name}")
            if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 0:
                num_bytes += 512 * facts.st_blocks
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return num_bytes  # the process or the descriptor went while we looked
    return num_bytes


def empty(folder: str) -> None:
    """Remove everything in `folder`. A folder in it is hoisted: its own folders move up beside it, so that depth,
    recursion and the length of paths never matter."""
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fchmod(top, 0o700)
        hoisted = 0
        while names := os.listdir(top):
            for name in names:
                if not _is_folder(name, top):
                    os.unlink(name, dir_fd=top)
                    continue
                hoisted = _hoist(name, top, hoisted)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)


def remove_empty(folder: str) -> None:
    """Remove an empty folder, if it is still there and ours to remove."""
    try:
        os.rmdir(folder)
    except (FileNotFoundError, PermissionError):
        return  # the other side did, or will


def _hoist(name: str, top: int, hoisted: int) -> int:
    os.chmod(name, 0o700, dir_fd=top)
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
    try:
        for child in os.listdir(inner):
            if not _is_folder(child, inner):
                os.unlink(child, dir_fd=inner)
                continue
            os.chmod(child, 0o700, dir_fd=inner)  # moving a folder rewrites its "..", so it must be writable
            while True:
                hoisted += 1
                try:
                    os.stat(f"hoisted-{hoisted}", dir_fd=top, follow_symlinks=False)
                except FileNotFoundError:
                    break
            os.rename(child, f"hoisted-{hoisted}", src_dir_fd=inner, dst_dir_fd=top)
    finally:
        os.close(inner)
    return hoisted


def _is_folder(name: str, parent: int) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
