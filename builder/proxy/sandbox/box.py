"""The sandbox: chooses a mechanism by trying it, runs programs in it, and tells which ended well."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import FileIO
from typing import IO, Literal

from builder.errors import SandboxError
from builder.proxy.sandbox import inside, mechanisms
from builder.proxy.sandbox.mechanisms import Mechanism, View, Way

Language = Literal["python", "javascript"]

_FILES: dict[Language, str] = {"python": "program.py", "javascript": "program.js"}
_LAST_LINES: dict[Language, str] = {
    "python": f'\n\n__import__("os").write({inside.VERDICT}, __import__("os").read({inside.TOKEN}, 64))\n',
    # beforeExit comes when there is nothing left to do, and never after process.exit.
    "javascript": '\n\n;globalThis.process.on("beforeExit", () => {\n'
    'const fs = require("node:fs"), token = Buffer.alloc(64)\n'
    f"fs.writeSync({inside.VERDICT}, token, 0, fs.readSync({inside.TOKEN}, token))\n}})\n",
}
"""A program passes when it gets as far as this: one that leaves before its tests ran does not."""

_KILLED = "killed"
_TAIL = 4096
_GRACE = 5.0
"""Seconds that the first process has, beyond the limits, to end all."""
_NODES_OWN = 128 << 20
_OUT_OF_MEMORY = re.compile(r"^MemoryError|heap out of memory|Array buffer allocation failed", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use, with all that it starts.

    processes: threads count; node alone has a dozen. output_bytes: of stdout and stderr; more of it fails the program.
    tmp_bytes: of a file, and of the private folder where that is one of its own.
    """

    memory: int = 512 << 20
    cpu_seconds: int = 10
    wall_seconds: float = 15.0
    processes: int = 32
    output_bytes: int = 64 << 10
    tmp_bytes: int = 32 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program."""

    passed: bool
    """It ran to its last line and exited with 0, within all limits."""
    reason: str
    output: str
    """The end of what it printed, stderr included."""
    seconds: float


def _print_warning(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


class Sandbox:
    """Where generated programs run.

    With bubblewrap or namespaces they see a read-only system, no home, no network and no process but their own. With
    rlimits they have the limits alone, which a warning says.
    """

    def __init__(
        self,
        *,
        limits: Limits = Limits(),
        unsafe: bool = False,
        warn: Callable[[str], None] = _print_warning,
        mechanism: Mechanism | None = None,
    ) -> None:
        """`mechanism`: this one or none.

        Raises SandboxError where no mechanism works, and for root, unless `unsafe`, where rlimits alone does.
        """
        self._limits = limits
        self._view = mechanisms.view()
        self._works: set[Language] = {"python"}
        self._way, failures = self._choose(mechanism)
        if self.mechanism == "rlimits":
            if os.geteuid() == 0 and not unsafe:
                raise SandboxError(
                    "generated programs are not run as root without bubblewrap or namespaces: install bubblewrap "
                    "(apt-get install bubblewrap), run as another user, or accept the risk with --unsafe-code"
                    + (f" ({failures})" if failures else "")
                )
            warn(
                "generated programs run with limits alone: they can read your files and use the network, and write "
                "where you can; install bubblewrap to close them off"
            )

    @property
    def mechanism(self) -> Mechanism:
        """What closes the programs off."""
        return self._way.mechanism

    def has(self, language: Language) -> bool:
        """Whether what runs programs of this language is installed."""
        return language == "python" or shutil.which("node") is not None

    def run(self, program: str, language: Language = "python") -> Outcome:
        """Run one program to its end or to a limit; nothing of it is left afterwards."""
        self._require(language)
        return self._run(program, language, self._way, self._limits)

    def run_all(
        self, programs: Sequence[str], language: Language = "python", workers: int | None = None
    ) -> list[Outcome]:
        """Run programs side by side, as many as there are CPUs unless told; outcomes in their order."""
        self._require(language)
        with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(partial(self.run, language=language), programs))

    def _choose(self, wanted: Mechanism | None) -> tuple[Way, str]:
        """The first way that works, and why those before it do not."""
        failures: list[str] = []
        for way in mechanisms.ways(root=os.geteuid() == 0):
            if wanted in (None, way.mechanism):
                failure = self._try(way)
                if failure is None:
                    return way, "; ".join(failures)
                failures.append(f"{way.mechanism}: {failure}")
        raise SandboxError(f"generated programs cannot be run here; {'; '.join(failures)}")

    def _try(self, way: Way) -> str | None:
        """Why a mechanism does not hold what it promises."""
        if way.mechanism == "bubblewrap" and shutil.which("bwrap") is None:
            return "not installed"
        try:
            with tempfile.NamedTemporaryFile() as secret:
                probe = "" if way.mechanism == "rlimits" else _probe(secret.name)
                outcome = self._run(probe, "python", way, Limits())
        except SandboxError as exc:
            return str(exc)
        return None if outcome.passed else f"{outcome.reason} {outcome.output.strip()[-200:]}".strip()

    def _require(self, language: Language) -> None:
        if language in self._works:
            return
        if not self.has(language):
            raise SandboxError("node is not installed, and JavaScript programs need it (apt-get install nodejs)")
        outcome = self._run("", language, self._way, Limits())
        if not outcome.passed:
            raise SandboxError(f"node does not run in the sandbox: {outcome.reason} {outcome.output.strip()[-200:]}")
        self._works.add(language)

    def _run(self, program: str, language: Language, way: Way, limits: Limits) -> Outcome:
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(_private_folder(way))
            source = stack.enter_context(tempfile.TemporaryFile())
            source.write((program + _LAST_LINES[language]).encode(errors="replace"))
            source.seek(0)
            (lifeline, holder), (report, reporter), (output, printer) = (_pipe(stack) for _ in range(3))
            job = _job(folder, language, way, limits, self._view, lifeline=lifeline.fileno(), report=reporter.fileno())
            process = _start(mechanisms.command(way, self._view, job), way, source, printer, job)
            stack.callback(_end, process, holder)
            for end in (lifeline, reporter, printer):
                end.close()
            text, excess = _collect(process, output, limits)
            _end(process, holder)
            ending = _read_report(report, process, text) if excess is None else inside.Report(stopped=excess)
            if ending.group is not None and ending.stopped == _KILLED and way.mechanism == "rlimits":
                _kill_group(ending.group)  # the program killed its watch, and what it started may go on
        tail = text[-_TAIL:].decode(errors="replace")
        reason = _reason(ending, tail)
        return Outcome(reason == "passed", reason, tail, time.monotonic() - started)


def _private_folder(way: Way) -> contextlib.AbstractContextManager[str]:
    """The host's path of it; a mount of its own, where the mechanism can make one."""
    if way.mechanism != "rlimits":
        return contextlib.nullcontext(mechanisms.PRIVATE)
    folder = tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True)
    if way.run_as is not None:
        os.chown(folder.name, way.run_as, way.run_as)
    return folder


def _pipe(stack: contextlib.ExitStack) -> tuple[FileIO, FileIO]:
    reader, writer = os.pipe()
    return stack.enter_context(FileIO(reader, "r")), stack.enter_context(FileIO(writer, "w"))


def _job(
    folder: str, language: Language, way: Way, limits: Limits, view: View, *, lifeline: int, report: int
) -> inside.Job:
    return inside.Job(
        command=_interpreter(language, limits),
        environment={
            "HOME": folder,
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "PYTHONHASHSEED": "0",  # the same program passes or fails on every run
            "TMPDIR": folder,
        },
        file=f"{folder}/{_FILES[language]}",
        lifeline=lifeline,
        report=report,
        run_as=way.run_as,
        pid_namespace=way.mechanism != "rlimits",
        make_namespaces=way.mechanism == "namespaces",
        binds=list(view.binds),
        links=list(view.links),
        memory=limits.memory,
        # node reserves more addresses than it uses, and has stacks and code that its heap's limit does not count.
        data=limits.memory if language == "python" else limits.memory + _NODES_OWN,
        addresses=limits.memory if language == "python" else None,
        cpu_seconds=limits.cpu_seconds,
        wall_seconds=limits.wall_seconds,
        processes=limits.processes,
        tmp_bytes=limits.tmp_bytes,
    )


def _interpreter(language: Language, limits: Limits) -> list[str]:
    if language == "python":
        # -I but for PYTHONHASHSEED: the environment has no other variable of Python's.
        return [sys.executable, "-s", "-P", "-B", _FILES[language]]
    return [shutil.which("node") or "node", f"--max-old-space-size={limits.memory * 3 // 4 >> 20}", _FILES[language]]


def _start(
    command: list[str], way: Way, source: IO[bytes], printer: FileIO, job: inside.Job
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            stdin=source,
            stdout=printer,
            stderr=printer,
            pass_fds=(job.lifeline, job.report),
            env={},
            cwd="/",
            start_new_session=True,
            user=way.start_as,
            group=way.start_as,
            extra_groups=None if way.start_as is None else [],
        )
    except OSError as exc:
        raise SandboxError(f"the sandbox failed: {exc}") from exc


def _collect(process: subprocess.Popen[bytes], output: FileIO, limits: Limits) -> tuple[bytes, str | None]:
    """What is printed until the process ends, or so much of it that it has to end."""
    text = bytearray()
    deadline = time.monotonic() + limits.wall_seconds + _GRACE
    poll = select.poll()
    poll.register(output, select.POLLIN)
    with _watched(process) as ended:
        poll.register(ended, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            ready = {descriptor for descriptor, _ in poll.poll(left * 1000)}
            if output.fileno() in ready:
                piece = output.read(1 << 16)
                if not piece:
                    poll.unregister(output)
                text += piece or b""
                if len(text) > limits.output_bytes:
                    return bytes(text), "output limit"
            elif ready:
                return bytes(text), None
    return bytes(text), "timed out"


def _end(process: subprocess.Popen[bytes], holder: FileIO) -> None:
    """Let go of the lifeline, which ends all; force what does not obey."""
    if process.returncode is not None:
        return
    holder.close()
    with _watched(process) as ended:
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        if not poll.poll(_GRACE * 1000):
            for pid in list(inside.descendants(process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    _kill_group(process.pid)  # before the wait: until then the number is nobody else's
    process.wait()


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


@contextlib.contextmanager
def _watched(process: subprocess.Popen[bytes]) -> Iterator[int]:
    """A descriptor that is ready once the process has ended."""
    descriptor = os.pidfd_open(process.pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_report(report: FileIO, process: subprocess.Popen[bytes], text: bytes) -> inside.Report:
    os.set_blocking(report.fileno(), False)
    reports = [inside.Report(*json.loads(line)) for line in (report.read(1 << 16) or b"").splitlines()]
    if failure := next((each.failure for each in reports if each.failure), None):
        raise SandboxError(f"the sandbox failed: {failure}")
    if len(reports) > 1:
        return reports[-1]
    if process.returncode < 0 or process.returncode > 128:
        return inside.Report(reports[0].group if reports else None, stopped=_KILLED)
    raise SandboxError(f"the sandbox failed: {text[-_TAIL:].decode(errors='replace').strip() or process.returncode}")


def _reason(ending: inside.Report, tail: str) -> str:
    if ending.status is None:
        return ending.stopped or _KILLED
    code = os.waitstatus_to_exitcode(ending.status)
    if code == 0:
        return "passed" if ending.finished else "ended early"
    if _OUT_OF_MEMORY.search(tail):
        return "memory"
    if code == -signal.SIGXCPU:
        return "cpu limit"
    return f"exit {code}" if code > 0 else f"signal {-code}"


def _probe(secret: str) -> str:
    """A program that passes where it is closed off; `secret` is a file of the host."""
    outside = {name: os.readlink(f"/proc/self/ns/{name}") for name in ("ipc", "mnt", "net", "pid")}  # noqa: PTH115
    writable = ("/dev/", "/proc", "/tmp")
    return f"""
import os
for name, outside in {outside!r}.items():
    assert os.readlink("/proc/self/ns/" + name) != outside, name + " namespace is the host's"
for line in open("/proc/self/mounts"):
    _, path, _, options, *_ = line.split()
    assert "ro" in options.split(",") or path.startswith({writable!r}), path + " is writable"
assert not os.path.exists({secret!r}), "the host's files are visible"
assert os.getuid() != 0, "the program is root"
"""
