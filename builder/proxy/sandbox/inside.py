"""The sandbox's first process: runs one program within its limits, ends all that it started, says how it went.

A script for an isolated interpreter, with the standard library alone. It reads the program from stdin and lives no
longer than its lifeline, a pipe whose other end the sandbox's caller holds: a caller that is killed ends it too.
"""

# Not pathlib: its import would cost every program some milliseconds.
# ruff: noqa: PTH102, PTH103, PTH106, PTH112, PTH116, PTH120, PTH123, PTH208, PTH211

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

VERDICT, TOKEN = 3, 4
"""The program's descriptors, beside 0 to 2: its last line copies the one's token to the other."""

_LET_GO = "stopped"
_TICK_MS = 20
_OPEN_FILES = 64
_INODES = 4096
_DEVICES = ("null", "zero", "full", "random", "urandom")

_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 1 << 12, 1 << 14, 1 << 18
_MNT_DETACH = 2
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID = 1, 2
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 1 << 17, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38

_libc = ctypes.CDLL(None, use_errno=True)


class Job(NamedTuple):
    """One program to run, and within what."""

    command: list[str]
    environment: dict[str, str]
    file: str
    """Where the program is written: the last of the command, in the private folder."""
    lifeline: int
    report: int
    run_as: int | None
    """The user that the program becomes; None where this process is not root or has to stay it."""
    pid_namespace: bool
    """Whether this process is the first of a pid namespace, or will be: then nothing outlives it."""
    make_namespaces: bool
    binds: list[tuple[str, str]]
    """What the program sees, read-only: where it is, and where it will be."""
    links: list[tuple[str, str]]
    memory: int
    data: int
    """Bytes of memory that one process may map to write."""
    addresses: int | None
    """Bytes of memory that one process may map at all."""
    cpu_seconds: int
    wall_seconds: float
    processes: int
    tmp_bytes: int


class Report(NamedTuple):
    """How it went; before that, a report with the program's process group alone says that it was started.

    failure: the sandbox's own, not the program's.
    """

    group: int | None = None
    status: int | None = None
    finished: bool = False
    stopped: str | None = None
    failure: str | None = None


def main() -> None:
    """Run the job of the first argument."""
    job = Job(*json.loads(sys.argv[1]))
    for descriptor in (job.lifeline, job.report):
        os.set_inheritable(descriptor, False)
    try:
        os.umask(0o022)
        program = sys.stdin.buffer.read()
        if job.make_namespaces:
            _enter_namespaces(job)
        with open(job.file, "wb") as file:
            file.write(program)
        report = _run(job)
    except Exception as exc:
        report = Report(failure=f"{type(exc).__name__}: {exc}")
    _send(job.report, report)
    os._exit(0)


def descendants(pid: int) -> Iterator[int]:
    """The processes below one, the nearest first."""
    waiting = [pid]
    while waiting:
        parent = waiting.pop(0)
        with contextlib.suppress(OSError):  # it has ended since
            for thread in os.listdir(f"/proc/{parent}/task"):
                children = [int(child) for child in _read(f"/proc/{parent}/task/{thread}/children").split()]
                yield from children
                waiting += children


def _run(job: Job) -> Report:
    # Dumpable no more: the program can neither trace this process nor read the token in its memory.
    _prctl(_PR_SET_DUMPABLE, 0)
    if not job.pid_namespace:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    secret = os.urandom(16).hex().encode()
    token, token_writer = os.pipe()
    verdict, verdict_writer = os.pipe()
    os.write(token_writer, secret)
    child = os.fork()
    if child == 0:
        _become_program(job, token, verdict_writer)
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)  # the caller reads the output to its end: only the program may hold it open
    os.close(verdict_writer)
    _send(job.report, Report(child))
    status, stopped = _watch(job, child)
    if not job.pid_namespace:
        _end_descendants(child)
        if stopped == _LET_GO:
            _remove(os.path.dirname(job.file))  # the caller may be gone, and can remove it no more
    os.set_blocking(verdict, False)
    with contextlib.suppress(BlockingIOError):
        return Report(child, status, os.read(verdict, len(secret)) == secret, stopped)
    return Report(child, status, False, stopped)


def _send(descriptor: int, report: Report) -> None:
    os.write(descriptor, json.dumps(report).encode() + b"\n")


# The program's side.


def _become_program(job: Job, token: int, verdict: int) -> None:
    report = _above(job.report)
    try:
        os.setsid()
        token, verdict = _above(token), _above(verdict)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(verdict, VERDICT)
        os.dup2(token, TOKEN)
        os.closerange(TOKEN + 1, report)
        os.closerange(report + 1, os.sysconf("SC_OPEN_MAX"))
        own_count = _drop_privileges(job)
        _set_limits(job, own_count)
        os.chdir(os.path.dirname(job.file))
        os.execve(job.command[0], job.command, job.environment)
    except Exception as exc:
        _send(report, Report(failure=f"cannot run {job.command[0]}: {exc}"))
    finally:
        os._exit(1)


def _above(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, TOKEN + 1)


def _drop_privileges(job: Job) -> bool:
    """Whether the processes of this user are now counted from zero."""
    fresh = job.pid_namespace and job.run_as is None
    if job.run_as is not None:
        os.setgroups([])
        os.setresgid(job.run_as, job.run_as, job.run_as)
        os.setresuid(job.run_as, job.run_as, job.run_as)
        # A user namespace counts its processes apart, so that samples side by side do not share one limit.
        fresh = _libc.unshare(_NEWUSER) == 0
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return fresh and _kernel() >= (5, 14)


def _set_limits(job: Job, own_count: bool) -> None:
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: job.cpu_seconds,
        resource.RLIMIT_DATA: job.data,
        resource.RLIMIT_FSIZE: job.tmp_bytes,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
    }
    if job.addresses is not None:
        wanted[resource.RLIMIT_AS] = job.addresses
    if own_count:
        wanted[resource.RLIMIT_NPROC] = job.processes
    elif not job.pid_namespace:
        wanted[resource.RLIMIT_NPROC] = job.processes + _tasks_of(os.getuid())
    for kind, value in wanted.items():
        # Past the soft limit of CPU seconds comes a signal of their own, past the hard one SIGKILL.
        _lower(kind, value, value + 1 if kind == resource.RLIMIT_CPU else value)


def _lower(kind: int, soft: int, hard: int) -> None:
    _, most = resource.getrlimit(kind)
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(kind, (soft, hard))


def _kernel() -> tuple[int, ...]:
    """Since 5.14 user namespaces have counts of their own."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in os.uname().release.split(".")[:2])


def _tasks_of(user: int) -> int:
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


# The watch.


def _watch(job: Job, child: int) -> tuple[int | None, str | None]:
    """The program's status, or why it has to be stopped."""
    deadline = time.monotonic() + job.wall_seconds
    poll = select.poll()
    poll.register(os.pidfd_open(child), select.POLLIN)
    poll.register(job.lifeline, select.POLLHUP)
    while True:
        ready = poll.poll(_TICK_MS)
        status = _reap(child)
        if status is not None:
            return status, None
        if any(descriptor == job.lifeline for descriptor, _ in ready):
            return None, _LET_GO
        if time.monotonic() > deadline:
            return None, "timed out"
        if excess := _excess(job):
            return None, excess


def _reap(child: int) -> int | None:
    """The program's status if it has ended; orphans that ended are buried, for they count as processes until then."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == child:
                return status
            if pid == 0:
                break
    return None


def _excess(job: Job) -> str | None:
    """What the processes use too much of, all together: one alone is held by its limits already."""
    tasks = pages = 0
    ended = os.times()
    seconds = ended.children_user + ended.children_system
    for pid in _members(job):
        with contextlib.suppress(OSError):
            fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
            seconds += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
            tasks += int(fields[17])
            pages += int(fields[21])
    if tasks > job.processes:
        return "process limit"
    if pages * resource.getpagesize() > job.memory:
        return "memory"
    return "cpu limit" if seconds > job.cpu_seconds else None


def _members(job: Job) -> Iterator[int]:
    if not job.pid_namespace:
        return descendants(os.getpid())
    return (int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1")


def _end_descendants(group: int) -> None:
    """Kill them until there are none.

    The group first: no fork escapes a signal to a group. The others are stopped first, for then they fork no more.
    """
    give_up = time.monotonic() + 5
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    while time.monotonic() < give_up:
        for sign in (signal.SIGSTOP, signal.SIGKILL):
            for pid in list(descendants(os.getpid())):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sign)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # no child is left, hence no descendant: orphans come to this process
            return
        time.sleep(0.002)


def _remove(folder: str) -> None:
    import shutil  # seldom needed, and slow to import

    shutil.rmtree(folder, ignore_errors=True)


# The namespaces.


def _enter_namespaces(job: Job) -> None:
    """Returns in the first process of new namespaces; this one waits for it and ends as it does."""
    user, group = os.getuid(), os.getgid()
    unprivileged = job.run_as is None
    _check(_libc.unshare(_NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET | (_NEWUSER if unprivileged else 0)))
    if unprivileged:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    child = os.fork()
    if child:
        os.closerange(0, os.sysconf("SC_OPEN_MAX"))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)
    _change_root(job)


def _change_root(job: Job) -> None:
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount_new("tmpfs", "/tmp", "size=1m,mode=755")
    os.mkdir("/tmp/old")
    _check(_libc.pivot_root(b"/tmp", b"/tmp/old"))
    os.chdir("/")
    small = f"size={job.tmp_bytes},nr_inodes={_INODES},mode=1777"
    _mount_new("tmpfs", "/tmp", small)  # before the others: this file or Python may lie below it
    for source, target in job.binds:
        _bind(f"/old{source}", target)
        _make_read_only(target, recursive=True)
    for to, at in job.links:
        os.makedirs(os.path.dirname(at), exist_ok=True)
        os.symlink(to, at)
    for name in _DEVICES:
        _bind(f"/old/dev/{name}", f"/dev/{name}")
    os.symlink("/proc/self/fd", "/dev/fd")
    _mount_new("tmpfs", "/dev/shm", small)
    _mount_new("proc", "/proc")
    _check(_libc.umount2(b"/old", _MNT_DETACH))
    os.rmdir("/old")
    _make_read_only("/", recursive=False)


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "w").close()
    _mount(source, target, None, _MS_BIND | _MS_REC)


def _mount_new(kind: str, target: str, options: str | None = None) -> None:
    os.makedirs(target, exist_ok=True)
    _mount(kind, target, kind, _MS_NOSUID | _MS_NODEV, options)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _check(_libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]), target)


def _make_read_only(path: str, *, recursive: bool) -> None:
    """No set-user files either; `recursive`, for a mount below a bound folder would stay writable."""
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID)
    where = (_AT_FDCWD, os.fsencode(path), _AT_RECURSIVE if recursive else 0)
    _check(_libc.syscall(_MOUNT_SETATTR, *where, ctypes.byref(attributes), ctypes.c_size_t(32)), path)


def _check(result: int, path: str | None = None) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), *(ctypes.c_ulong(0),) * 3))


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


if __name__ == "__main__":
    main()
