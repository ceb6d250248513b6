"""The filter of system calls: what a Python program needs, by number, and nothing else.

An allowed list, so that a call added to the kernel tomorrow is refused. Refused calls fail with EPERM; those newer than
the list with ENOSYS, for which C libraries have a fallback. No call that creates a socket, signals or changes another
process, changes the mode, owner or times of a file, or makes something that outlives the process is on the list. Nor is
setsid or setpgid: all that a run starts stays in one process group, which the kernel kills as a whole, between forks.
"""

import struct
import sys
from functools import cache
from platform import machine

# name, number on x86-64, number on arm64 ("-": does not exist there)
FREE = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69,
pwritev 296 70, preadv2 327 286, pwritev2 328 287, lseek 8 62, sendfile 40 71, copy_file_range 326 285,
fallocate 285 47, ftruncate 77 46, close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24,
pipe 22 -, pipe2 293 59,
open 2 -, openat 257 56, creat 85 -, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -,
unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, getdents 78 -, getdents64 217 61,
execve 59 221, stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, statfs 137 43, fstatfs 138 44,
access 21 -, faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78, getcwd 79 17,
chdir 80 49, fchdir 81 50, umask 95 166,
mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, madvise 28 233, msync 26 227, brk 12 214,
membarrier 324 283,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136,
rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, pause 34 -, restart_syscall 219 128,
exit 60 93, exit_group 231 94, wait4 61 260, waitid 247 95, set_tid_address 218 96,
set_robust_list 273 99, futex 202 98, rseq 334 293, arch_prctl 158 -, sched_yield 24 124, sched_getaffinity 204 123,
getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176,
getegid 108 177, getgroups 115 158, getpgrp 111 -, getpgid 121 155, getsid 124 156,
getresuid 118 148, getresgid 120 150, getrlimit 97 163, setrlimit 160 164,
getrusage 98 165, sysinfo 99 179, uname 63 160, getcpu 309 168, getrandom 318 278,
times 100 153, time 201 -, gettimeofday 96 169, clock_gettime 228 113, clock_getres 229 114,
clock_nanosleep 230 115, nanosleep 35 101, getitimer 36 102, setitimer 38 103, alarm 37 -,
timer_create 222 107, timer_settime 223 110, timer_gettime 224 108, timer_getoverrun 225 109,
timer_delete 226 111, timerfd_create 283 85, timerfd_settime 286 86, timerfd_gettime 287 87,
select 23 -, pselect6 270 72, poll 7 -, ppoll 271 73, epoll_create 213 -, epoll_create1 291 20,
epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, eventfd 284 -, eventfd2 290 19,
sendto 44 206, recvfrom 45 207, sendmsg 46 211, recvmsg 47 212, shutdown 48 210, getsockname 51 204,
getpeername 52 205, getsockopt 55 209
"""
CONDITIONAL = """
clone 56 220, clone3 435 435, fork 57 -, vfork 58 -, kill 62 129, tkill 200 130, tgkill 234 131, ioctl 16 29,
fcntl 72 25, prctl 157 167, prlimit64 302 261, socketpair 53 199, fsync 74 82, fdatasync 75 83
"""
_COLUMN = {"x86_64": 0, "aarch64": 1}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS, _PRETEND = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38, 0x00050000
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16
_FIRST_UNLISTED = 424  # from here on numbers are equal on all architectures, and newer than any fallback-free caller

_CLONE_THREAD = 0x00010000
_CLONE_NAMESPACES = 0x7E020000
_TERMINAL_QUESTIONS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIO(N)CLEX
_DESCRIPTOR_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)  # F_DUPFD to F_SETLKW, F_DUPFD_CLOEXEC, F_GETPIPE_SZ
_PRCTL_NAMES = (15, 16, 0x53564D41)  # PR_SET_NAME, PR_GET_NAME, PR_SET_VMA
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE_MASK = 1, 1, 0xF


def numbers(table: str, arch: str) -> dict[str, int]:
    """Names to numbers of one of the tables above for "x86_64" or "aarch64"."""
    rows = (entry.split() for entry in table.replace("\n", " ").split(",") if entry.strip())
    return {row[0]: int(row[1 + _COLUMN[arch]]) for row in rows if row[1 + _COLUMN[arch]] != "-"}


def architecture() -> str | None:
    """The architecture if the filter knows it and the process is a 64-bit one on Linux; else None."""
    known = sys.platform == "linux" and struct.calcsize("P") == 8 and machine() in _COLUMN
    return machine() if known else None


@cache
def filter_program(arch: str, *, fork: bool, signals: bool) -> bytes:
    """The classic BPF program as bytes, 8 an instruction.

    fork: new processes are allowed (new namespaces never).
    signals: signals may be sent, since something else (a pid namespace, Landlock ABI 6) confines them. Otherwise only
        to the process's own group: the filter can compare a pid but not know whose it is.
    """
    code = [_op(_LOAD, _ARCH), _op(_JUMP_EQUAL, _AUDIT_ARCH[arch], 1, 0), _op(_RETURN, _KILL), _op(_LOAD, _NUMBER)]
    for low, high in _ranges(sorted(numbers(FREE, arch).values())):
        code += [
            _op(_JUMP_GREATER_EQUAL, low, 0, 2),
            _op(_JUMP_GREATER_EQUAL, high + 1, 1, 0),
            _op(_RETURN, _ALLOW),
        ]
    rules = _rules(fork, signals)
    for name, number in numbers(CONDITIONAL, arch).items():
        code += [_op(_JUMP_EQUAL, number, 0, len(rules[name])), *rules[name]]
    code += [_op(_JUMP_GREATER_EQUAL, _FIRST_UNLISTED, 0, 1), _op(_RETURN, _ENOSYS), _op(_RETURN, _EPERM)]
    return b"".join(code)


def _rules(fork: bool, signals: bool) -> dict[str, list[bytes]]:
    """What to do with each conditional call; every rule ends in a return."""
    allow, refuse = [_op(_RETURN, _ALLOW)], [_op(_RETURN, _EPERM)]
    clone = [_op(_LOAD, _FIRST_ARGUMENT), _op(_JUMP_ANY_BIT, _CLONE_NAMESPACES, 0, 1), *refuse]
    clone += allow if fork else [_op(_JUMP_ANY_BIT, _CLONE_THREAD, 0, 1), *allow, *refuse]
    socketpair = [
        _op(_LOAD, _FIRST_ARGUMENT),
        _op(_JUMP_EQUAL, _AF_UNIX, 1, 0),
        *refuse,
        _op(_LOAD, _FIRST_ARGUMENT + 8),
        _op(_AND, _SOCK_TYPE_MASK),
        *_one_of((_SOCK_STREAM,)),  # a datagram pair could still be sent to an address
    ]
    return {
        "clone": clone,
        "clone3": [_op(_RETURN, _ENOSYS)],  # its flags lie in memory, where a filter cannot look
        "fork": allow if fork else refuse,
        "vfork": allow if fork else refuse,
        "kill": allow if signals else [_op(_LOAD, _FIRST_ARGUMENT), *_one_of((0,))],
        "tkill": allow if signals else refuse,
        "tgkill": allow if signals else refuse,
        "ioctl": [_op(_LOAD, _FIRST_ARGUMENT + 8), *_one_of(_TERMINAL_QUESTIONS)],
        "fcntl": [_op(_LOAD, _FIRST_ARGUMENT + 8), *_one_of(_DESCRIPTOR_COMMANDS)],
        "prctl": [_op(_LOAD, _FIRST_ARGUMENT), *_one_of(_PRCTL_NAMES)],
        "prlimit64": [_op(_LOAD, _FIRST_ARGUMENT), *_one_of((0,))],
        # Reported as done: the run's folder does not outlive the run, and the disk is the trainer's.
        "fsync": [_op(_RETURN, _PRETEND)],
        "fdatasync": [_op(_RETURN, _PRETEND)],
        "socketpair": socketpair,
    }


def _one_of(values: tuple[int, ...]) -> list[bytes]:
    code: list[bytes] = []
    for value in values:
        code += [_op(_JUMP_EQUAL, value, 0, 1), _op(_RETURN, _ALLOW)]
    return [*code, _op(_RETURN, _EPERM)]


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _ranges(values: list[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for value in values:
        if ranges and ranges[-1][1] == value - 1:
            ranges[-1] = (ranges[-1][0], value)
        else:
            ranges.append((value, value))
    return ranges
