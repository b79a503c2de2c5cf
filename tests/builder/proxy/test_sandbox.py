from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
from waiting import wait_until

from builder.errors import SandboxError
from builder.proxy.sandbox import Language, Limits, Mechanism, Sandbox
from builder.proxy.sandbox.inside import descendants

_SUBREAPER = 36
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root is refused")


@cache
def sandbox(mechanism: Mechanism, **limits: float) -> Sandbox:
    return Sandbox(mechanism=mechanism, unsafe=True, warn=lambda _: None, limits=Limits(**limits))  # type: ignore[arg-type]


def available() -> tuple[Mechanism, ...]:
    found = []
    for mechanism in get_args(Mechanism):
        with contextlib.suppress(SandboxError):
            sandbox(mechanism)
            found.append(mechanism)
    return tuple(found)


AVAILABLE = available()


@pytest.fixture(params=get_args(Mechanism))
def mechanism(request: pytest.FixtureRequest) -> Mechanism:
    if request.param not in AVAILABLE:
        pytest.skip(f"{request.param} does not work here")
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def closed(mechanism: Mechanism) -> Mechanism:
    if mechanism == "rlimits":
        pytest.skip("rlimits alone close nothing off")
    return mechanism


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """Every test ends with the processes it began with; orphans come to this process, so none can hide."""
    libc = ctypes.CDLL(None)
    before = set(descendants(os.getpid()))
    libc.prctl(_SUBREAPER, 1, 0, 0, 0)
    yield
    left = wait_for_the_end_of_others_than(before)
    libc.prctl(_SUBREAPER, 0, 0, 0, 0)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left


def wait_for_the_end_of_others_than(pids: set[int], seconds: float = 30) -> set[int]:
    give_up = time.monotonic() + seconds
    while True:
        left = set(descendants(os.getpid())) - pids
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if not left or time.monotonic() > give_up:
            return left
        time.sleep(0.02)


# What passes, and what does not.


def check(box: Sandbox, expected: dict[str, str], language: Language = "python") -> None:
    outcomes = dict(zip(expected, box.run_all(list(expected), language), strict=True))
    assert {program: outcome.reason for program, outcome in outcomes.items()} == expected, outcomes
    assert all(outcome.passed == (outcome.reason == "passed") for outcome in outcomes.values())


def test_programs_that_end_well_pass(mechanism: Mechanism) -> None:
    programs = [
        "assert 1 + 1 == 2",
        "x = 1  # a comment is the last",
        "from __future__ import annotations\nif __name__ == '__main__':\n    import math",
        "import sys\nsys.stdout = None",
        "import subprocess\nassert subprocess.run(['true']).returncode == 0",
        "import multiprocessing, threading\nmultiprocessing.Lock()\nthreading.Thread(target=print).start()",
        "open('note', 'w').write('x')\nassert open('note').read() == 'x'",
        "s = '\udc80'",
    ]
    check(sandbox(mechanism), dict.fromkeys(programs, "passed"))


@needs_node
def test_javascript_programs_that_end_well_pass(mechanism: Mechanism) -> None:
    programs = [
        "'use strict'\nconst fs = require('fs'), process = 1 // shadowed",
        "const test = async () => { await null; if (1 + 1 !== 2) throw Error() }\ntest()",
        "require('child_process').execFileSync('true')",
    ]
    check(sandbox(mechanism), dict.fromkeys(programs, "passed"), "javascript")


def test_programs_that_fail_or_leave_early_do_not_pass(mechanism: Mechanism) -> None:
    expected = {
        "assert 1 + 1 == 3": "exit 1",
        "def f(:": "exit 1",
        "import os\nos.kill(os.getpid(), 11)": "signal 11",
        "import sys\nsys.exit(0)\nassert False": "ended early",
        "import os\nos._exit(0)\nassert False": "ended early",
        "import os\nos.write(3, b'passed')\nos._exit(0)": "ended early",
    }
    check(sandbox(mechanism), expected)


@needs_node
def test_javascript_programs_that_fail_or_leave_early_do_not_pass(mechanism: Mechanism) -> None:
    expected = {
        "throw new Error('wrong')": "exit 1",
        "process.exit(0)\nthrow new Error('never')": "ended early",
        "setTimeout(() => process.exit(0), 1)": "ended early",
        "Promise.reject(new Error('late'))": "exit 1",
    }
    check(sandbox(mechanism), expected, "javascript")


def test_outcomes_come_in_the_order_of_the_programs(mechanism: Mechanism) -> None:
    programs = [f"import time; time.sleep({0.3 if i == 0 else 0}); print({i})" for i in range(4)]
    assert [outcome.output for outcome in sandbox(mechanism).run_all(programs, workers=2)] == [
        f"{i}\n" for i in range(4)
    ]


def test_hashes_are_the_same_on_every_run(mechanism: Mechanism) -> None:
    first, second = sandbox(mechanism).run_all(["print(hash('a'))"] * 2)
    assert first.output == second.output


def test_the_end_of_the_output_is_kept(mechanism: Mechanism) -> None:
    outcome = sandbox(mechanism).run("print('x' * 9000)\nraise ValueError('the last words')")
    assert outcome.output.rstrip().endswith("ValueError: the last words")
    assert len(outcome.output) <= 4096


# Limits.


def test_a_fork_bomb_is_held(mechanism: Mechanism) -> None:
    outcome = sandbox(mechanism, wall_seconds=1).run(
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    )
    assert not outcome.passed


def test_no_more_processes_run_than_the_limit_says(mechanism: Mechanism) -> None:
    counting = "import os, time\nfor i in range(500):\n    print(i, flush=True)\n    os.fork() or time.sleep(60)"
    outcome = sandbox(mechanism, processes=16).run(counting)
    assert not outcome.passed
    started = [int(line) for line in outcome.output.splitlines() if line.isdigit()]
    # One user's processes are counted together where there is no namespace, and root's not at all: a watch holds those.
    assert max(started) <= 16 or (mechanism == "rlimits" and outcome.reason == "process limit")


def test_cpu_seconds_end_a_loop_and_are_counted_over_all_processes(mechanism: Mechanism) -> None:
    relay = "import os, time\nwhile True:\n    if os.fork() == 0:\n        while time.process_time() < 0.3: pass\n"
    relay += "        os._exit(0)\n    os.wait()"
    check(sandbox(mechanism, cpu_seconds=1, wall_seconds=120), dict.fromkeys(["while True: pass", relay], "cpu limit"))


def test_programs_that_wait_are_timed_out(mechanism: Mechanism) -> None:
    silent = "import os\nos.close(1)\nos.close(2)\nos.read(os.pipe()[0], 1)"
    check(sandbox(mechanism, wall_seconds=0.7), dict.fromkeys(["import time\ntime.sleep(60)", silent], "timed out"))
    assert sandbox(mechanism, wall_seconds=0.7).run(silent).seconds < Limits().wall_seconds


def test_ten_gigabytes_are_refused(mechanism: Mechanism) -> None:
    outcome = sandbox(mechanism).run("x = bytearray(10 << 30)")
    assert (outcome.passed, outcome.reason) == (False, "memory")


def test_memory_is_counted_over_all_processes(mechanism: Mechanism) -> None:
    program = "import os, time\nfor _ in range(8): os.fork() or [b'x' * (60 << 20), time.sleep(60)]\ntime.sleep(60)"
    outcome = sandbox(mechanism, memory=200 << 20).run(program)
    assert (outcome.passed, outcome.reason) == (False, "memory")


@needs_node
def test_memory_of_javascript_is_limited(mechanism: Mechanism) -> None:
    programs = ["const all = []\nfor (;;) all.push(Buffer.alloc(8 << 20, 1))", "const all = []\nfor (;;) all.push([1])"]
    check(sandbox(mechanism, memory=200 << 20), dict.fromkeys(programs, "memory"), "javascript")


def test_an_output_flood_ends_the_program(mechanism: Mechanism) -> None:
    outcome = sandbox(mechanism, wall_seconds=120, cpu_seconds=120).run("while True: print('x' * 999)")
    assert (outcome.passed, outcome.reason) == (False, "output limit")
    assert outcome.seconds < 60
    assert len(outcome.output) <= 4096


def test_a_file_grows_to_the_limit_only(mechanism: Mechanism) -> None:
    outcome = sandbox(mechanism, tmp_bytes=1 << 20).run("open('big', 'wb').write(bytes(2 << 20))")
    assert not outcome.passed
    assert "OSError" in outcome.output


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm"])
def test_many_files_share_the_limit(closed: Mechanism, folder: str) -> None:
    program = f"for i in range(40): open(f'{folder}/{{i}}', 'wb').write(bytes(100_000))"
    outcome = sandbox(closed, tmp_bytes=1 << 20).run(program)
    assert not outcome.passed
    assert "No space left" in outcome.output


# The host.


def test_a_process_that_went_its_own_way_ends_with_the_program(mechanism: Mechanism) -> None:
    program = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\n    os._exit(0)"
    )
    assert sandbox(mechanism).run(program + "\nos.wait()\ntime.sleep(0.1)").passed


def test_a_program_that_kills_its_parent_does_not_pass(mechanism: Mechanism) -> None:
    program = "import os, time\nif os.fork(): os.kill(os.getppid(), 9)\ntime.sleep(60)"
    assert not sandbox(mechanism, wall_seconds=1).run(program).passed


def test_all_ends_when_the_caller_is_killed(mechanism: Mechanism, tmp_path: Path) -> None:
    endless = "import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(60)"
    call = f"Sandbox(mechanism={mechanism!r}, unsafe=True).run({endless!r})"
    caller = subprocess.Popen(
        [sys.executable, "-c", f"from builder.proxy.sandbox import Sandbox\n{call}"],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    wait_until(lambda: count_of("program.py", caller.pid) >= 2)
    caller.kill()
    caller.wait()  # whether processes are left is nothing_is_left_running's to see
    wait_until(lambda: not list(tmp_path.iterdir()), seconds=30)


def count_of(word: str, pid: int) -> int:
    count = 0
    for each in descendants(pid):
        with contextlib.suppress(OSError):
            arguments = Path(f"/proc/{each}/cmdline").read_bytes().split(b"\0")
            count += word.encode() in arguments
    return count


def test_a_file_of_the_host_can_be_neither_read_nor_deleted(closed: Mechanism, tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("do not touch")
    attempts = (
        "import os\nfor attempt in (open, os.remove):\n    try: attempt(path)\n    except OSError as exc: print(exc)\n"
    )
    outcome = sandbox(closed).run(f"path = {str(file)!r}\n{attempts}os.remove(path)")
    assert not outcome.passed
    assert file.read_text() == "do not touch"
    assert "do not touch" not in outcome.output


def test_all_that_is_mounted_is_read_only_or_private(closed: Mechanism) -> None:
    outcome = sandbox(closed).run("print(open('/proc/self/mounts').read())")
    mounts = [line.split() for line in outcome.output.splitlines() if line]
    writable = {path for _, path, _, options, *_ in mounts if "ro" not in options.split(",")}
    assert "/tmp" in writable
    assert {path for path in writable if not path.startswith("/dev/")} == {"/proc", "/tmp"}, outcome


def test_homes_and_settings_are_hidden(closed: Mechanism) -> None:
    hidden = [name for name in ("/run", "/var", "/home", "/etc/shadow", "/etc/hostname", "/sys") if Path(name).exists()]
    hidden += [str(path) for path in Path.home().iterdir() if not sys.base_prefix.startswith(str(path))]
    outcome = sandbox(closed).run(f"import os\nassert not [path for path in {hidden!r} if os.path.exists(path)]")
    assert outcome.passed, outcome


def test_processes_of_the_host_are_hidden(closed: Mechanism) -> None:
    outcome = sandbox(closed).run(
        "import os\nassert len([name for name in os.listdir('/proc') if name.isdigit()]) == 2"
    )
    assert outcome.passed, outcome


def test_a_socket_reaches_nobody(closed: Mechanism) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        outcome = sandbox(closed).run(f"import socket\nsocket.create_connection({server.getsockname()!r}, timeout=1)")
        assert not outcome.passed
        with pytest.raises(TimeoutError):
            server.accept()


def test_environment_descriptors_and_input_stay_outside(
    mechanism: Mechanism, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    box = sandbox(mechanism)
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        outcome = box.run(
            "import os\nassert 'HF_TOKEN' not in os.environ\nassert os.readlink('/proc/self/fd/0') == '/dev/null'\n"
            "assert len(os.listdir('/proc/self/fd')) == 6, os.listdir('/proc/self/fd')\n"  # 0 to 4, and the list's own
            "assert os.environ['HOME'] == os.getcwd() and os.path.isfile('program.py')"
        )
    assert outcome.passed, outcome


# The choice.


def test_bubblewrap_is_the_first_choice_and_namespaces_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Sandbox(unsafe=True, warn=lambda _: None).mechanism == AVAILABLE[0]
    monkeypatch.setenv("PATH", "/nowhere")
    without = [mechanism for mechanism in AVAILABLE if mechanism != "bubblewrap"]
    assert Sandbox(unsafe=True, warn=lambda _: None).mechanism == without[0]


@pytest.mark.skipif("bubblewrap" not in AVAILABLE, reason="bubblewrap does not work here")
@pytest.mark.parametrize("left_out", ["net", "ipc"])
def test_a_mechanism_that_leaves_a_way_out_is_not_chosen(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # root starts it as somebody else, too
        leaky = Path(folder, "bwrap")
        keep = f'for each; do shift; [ "$each" = --unshare-{left_out} ] || set -- "$@" "$each"; done'
        leaky.write_text(f'#!/bin/sh\n{keep}\nexec {shutil.which("bwrap")} "$@"\n')
        leaky.chmod(0o755)
        monkeypatch.setenv("PATH", folder)
        with pytest.raises(SandboxError, match=f"{left_out} namespace is the host's"):
            Sandbox(mechanism="bubblewrap")


@needs_root
def test_root_is_refused_where_limits_are_all_there_is() -> None:
    with pytest.raises(SandboxError, match=r"install bubblewrap .*--unsafe-code"):
        Sandbox(mechanism="rlimits")


def test_limits_alone_come_with_a_warning() -> None:
    lines: list[str] = []
    Sandbox(mechanism="rlimits", unsafe=True, warn=lines.append)
    assert len(lines) == 1
    assert "install bubblewrap" in lines[0]


def test_a_language_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    box = Sandbox(unsafe=True, warn=lambda _: None)
    assert box.has("python")
    assert not box.has("javascript")
    with pytest.raises(SandboxError, match="node is not installed"):
        box.run("0", "javascript")
