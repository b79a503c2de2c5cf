"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from builder.errors import BuildError


@contextlib.contextmanager
def whole(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, beside `path`; synced, it becomes `path` at the end, and is removed when the block fails.

    overwrite: a folder that is there is replaced at the end, else the rename fails on it.
    """
    partial = path.with_name(f"{path.name}.partial")
    remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in (*partial.rglob("*"), partial):
            sync(file)
    except BaseException:
        remove(partial)
        raise
    if overwrite and path.exists():
        old = path.with_name(f"{path.name}.old")
        remove(old)
        path.rename(old)
        partial.rename(path)
        remove(old)
    else:
        partial.rename(path)
    sync(path.parent)


def default_cache() -> Path:
    """MODELGLUE_CACHE, or ~/.cache/modelglue."""
    return Path(os.environ.get("MODELGLUE_CACHE") or Path("~/.cache/modelglue").expanduser())


def free(path: Path) -> int:
    """Bytes that are free where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def available_memory() -> int:
    """Bytes of memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text("utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a folder tree if it is there."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def copy(source: Path, target: Path) -> None:
    """Copy a file's bytes, synced, with the mode that the umask gives."""
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 22)
        writer.flush()
        os.fsync(writer.fileno())


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[Path]:
    """The folder for this process alone; a process that dies lets go of it.

    When another has it: waits, or raises BuildError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield folder
    except BlockingIOError as exc:
        raise BuildError(f"another build is at work in {folder}: wait for it, or choose another --out") from exc
    finally:
        os.close(descriptor)
