"""How much of the machine, or of its container's share, this process may take, and what memory it gives back."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import psutil
import torch

GROUP = Path("/sys/fs/cgroup")
SHARE = 0.25
"""Of the free memory, for keys and values, unless it is said."""
MOST = 8 << 30
"""Bytes of it on a processor: more is of no use before its arithmetic is at its limit."""


def for_keys_and_values(device: torch.device) -> int:
    """Bytes that key-value memory takes unless it is said."""
    if device.type == "cuda":
        return int(SHARE * torch.cuda.mem_get_info(device)[0])
    return min(int(SHARE * free()), MOST)


def free(group: Path = GROUP) -> int:
    """Bytes of the machine's free memory, or what is left of the container's."""
    available = int(psutil.virtual_memory().available)
    try:
        most = (group / "memory.max").read_text("utf-8").strip()
        used = int((group / "memory.current").read_text("utf-8"))
    except (OSError, ValueError):  # no control group of version 2
        return available
    return min(available, max(int(most) - used, 0)) if most.isdecimal() else available


def cores(group: Path = GROUP) -> int:
    """How many it may run on: the machine's, or as many as the container's share of their time makes, rounded up."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = (group / "cpu.max").read_text("utf-8").split()
    except (OSError, ValueError):  # no control group of version 2
        return allowed
    return min(allowed, -(-int(quota) // int(period))) if quota.isdecimal() else allowed


def give_back() -> None:
    """Let the system have what was freed: glibc keeps it, and loading a model frees as much again as it keeps."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
