"""The builder's command line as a user meets it: what a command prints, and its exit code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Result:
    """Exit code and output of one command."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]
"""Runs a command, given as words."""


def sockets_are_closed(*_: object) -> None:
    """For socket.connect: there is no network."""
    raise AssertionError("the network was asked")
