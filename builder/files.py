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
def whole(path: Path) -> Iterator[Path]:
    """A folder to fill, beside `path`; it becomes `path` at the end, and is removed when the block fails."""
    partial = path.with_name(f"{path.name}.partial")
    remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        remove(partial)
        raise
    partial.rename(path)


def free(path: Path) -> int:
    """Bytes that are free where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


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
