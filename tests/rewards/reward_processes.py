"""What the tests see of the processes of a scorer, in /proc."""

from pathlib import Path


def children(parent):
    """Numbers and command lines of the children of a process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                ppid = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if ppid == parent:
                found[int(entry.name)] = command
    return found


def guard_pids(trainer):
    return [pid for pid, command in children(trainer).items() if "llm_pg.rewards.worker" in command]


def worker_pids(trainer):
    found = [children(guard) for guard in guard_pids(trainer)]
    return [pid for each in found for pid, command in each.items() if "llm_pg.rewards.worker" in command]


def marked(name, value):
    """Living processes that were started with this in their environment."""
    found, mark = [], f"{name}={value}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if mark in environment.split(b"\0") and is_alive(int(entry.name)):
                found.append(int(entry.name))
    return found


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False
