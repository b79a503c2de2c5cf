"""The ways to close a program off, best first, and the command that starts inside.py in each."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from builder.proxy.sandbox import inside

Mechanism = Literal["bubblewrap", "namespaces", "rlimits"]

NOBODY = 65534
PRIVATE = "/tmp"
"""The private folder where the program does not see the host's files."""

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store")
_SETTINGS = ("alternatives", "group", "ld.so.cache", "localtime", "nsswitch.conf", "passwd")


@dataclass(frozen=True, slots=True)
class Way:
    """A mechanism, and who is who in it.

    start_as: the user that sets it up; None for this process's own. run_as: the user that the program becomes inside.
    """

    mechanism: Mechanism
    start_as: int | None = None
    run_as: int | None = None


@dataclass(frozen=True, slots=True)
class View:
    """What a program sees, read-only; everything else of the host is hidden."""

    binds: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...]


def ways(*, root: bool) -> tuple[Way, ...]:
    """Every way, best first. Root gives itself up before a program starts: its own processes know no limit."""
    if not root:
        return (Way("bubblewrap"), Way("namespaces"), Way("rlimits"))
    return (
        Way("bubblewrap", run_as=NOBODY),
        Way("bubblewrap", start_as=NOBODY),
        Way("namespaces", run_as=NOBODY),
        Way("namespaces", start_as=NOBODY),
        Way("rlimits", run_as=NOBODY),
        Way("rlimits"),
    )


def command(way: Way, view: View, job: inside.Job) -> list[str]:
    """What to start for a job."""
    start = [sys.executable, "-I", "-S", str(Path(inside.__file__)), json.dumps(job)]
    return [*_bubblewrap(way, view, job.tmp_bytes), *start] if way.mechanism == "bubblewrap" else start


def _bubblewrap(way: Way, view: View, tmp_bytes: int) -> list[str]:
    private = ["--perms", "1777", "--size", str(tmp_bytes), "--tmpfs"]
    return [
        shutil.which("bwrap") or "bwrap",
        *("--die-with-parent", "--as-pid-1", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"),
        # Root needs no user namespace, and in one it could not become another user.
        *(["--unshare-user"] if way.run_as is None else ["--cap-drop", "ALL", *_capabilities("SETUID", "SETGID")]),
        *(*private, PRIVATE),  # before the others: inside.py or Python may lie below it
        *(part for folder in _folders(view) for part in ("--dir", folder)),
        *(part for source, target in view.binds for part in ("--ro-bind", source, target)),
        *(part for to, at in view.links for part in ("--symlink", to, at)),
        *("--proc", "/proc", "--dev", "/dev", *private, "/dev/shm", "--remount-ro", "/dev"),
        *("--chdir", PRIVATE, "--remount-ro", "/", "--"),
    ]


def _folders(view: View) -> list[str]:
    """Those above the places to see; bubblewrap would make them for their owner alone."""
    targets = (target for _, target in (*view.binds, *view.links))
    return sorted({str(folder) for target in targets for folder in Path(target).parents} - {"/"})


def _capabilities(*names: str) -> Iterator[str]:
    for name in names:
        yield from ("--cap-add", f"CAP_{name}")


def view() -> View:
    """The system's programs and libraries, this Python with its packages, node; no home, no settings but a few."""
    places = [Path(path) for path in (*_SYSTEM, *(f"/etc/{name}" for name in _SETTINGS))]
    places += [Path(sys.prefix), Path(sys.base_prefix), Path(inside.__file__), *_hops(Path(sys.executable))]
    if node := shutil.which("node"):
        places += [*_hops(Path(node)), *_libraries(Path(node).resolve())]
    links: list[Path] = []
    binds: list[Path] = []
    found = {Path(os.path.normpath(place)) for place in places if os.path.lexists(place)}
    for place in sorted(found, key=lambda place: (len(place.parts), place)):
        if not any(place.is_relative_to(seen) for seen in binds + links):
            (links if place.is_symlink() else binds).append(place)
    return View(
        tuple((str(place.resolve()), str(place)) for place in binds),
        tuple((str(place.readlink()), str(place)) for place in links),
    )


def _hops(program: Path) -> Iterator[Path]:
    """The program, and every link on the way to the file that it is."""
    yield program
    while program.is_symlink():
        program = program.parent / program.readlink()
        yield program


def _libraries(program: Path) -> Iterator[Path]:
    """The folder of a program that was installed apart, never a home."""
    prefix = program.parent.parent
    if not Path.home().is_relative_to(prefix):
        yield prefix
