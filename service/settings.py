"""What the service is told: the command line's options, checked, and frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from routers.errors import ModelGlueError
from service.api import MAX_BODY
from service.engines.remote.address import Remote
from service.routelog import MOST_ROWS

GIGABYTE: Final = 10**9
LOCAL_HOSTS: Final = ("127.0.0.1", "::1", "localhost")


class SettingsError(ModelGlueError):
    """Options that cannot be followed, or not together."""


class LogLevel(StrEnum):
    """How much the service says."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class LogFormat(StrEnum):
    """How it says it."""

    text = "text"
    json = "json"


class Dtype(StrEnum):
    """torch's names of what weights are computed in."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Kind(StrEnum):
    """What linear layers can be stored in (service/engines/local/linear.py and bits.py)."""

    int8 = "int8"
    int4 = "int4"
    bnb_int8 = "bnb-int8"
    bnb_nf4 = "bnb-nf4"


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that can be chosen. What each means is in `service --help`; None is the default that it names there.

    remotes: experts at other servers. kinds: of the experts named. Sizes are in bytes, times in seconds.
    """

    bundle: Path
    host: str = "127.0.0.1"
    port: int = 8000
    ask: tuple[str, ...] = ()
    remotes: Mapping[str, Remote] = field(default_factory=dict)
    max_batch: int = 64
    queue: int = 256
    kv_memory: int | None = None
    memory_budget: int | None = None
    dtype: Dtype | None = None
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    threads: int | None = None
    device: str | None = None
    api_keys: Path | None = None
    cors: tuple[str, ...] = ()
    deadline: float | None = None
    max_body: int = MAX_BODY
    grace: float = 5.0
    route_log: Path | None = None
    route_log_rows: int = MOST_ROWS
    log_level: LogLevel = LogLevel.info
    log_format: LogFormat = LogFormat.text
    log_prompts: bool = False
    trace: bool = False


def remotes(
    said: Sequence[str], experts: Sequence[str], *, keys: Sequence[str] = (), windows: Sequence[str] = ()
) -> dict[str, Remote]:
    """The experts that other servers run, from NAME=URL[#MODEL].

    keys: NAME=VARIABLE, where the environment has the server's key. windows: NAME=TOKENS, of servers that do not tell.
    Raises SettingsError or RemoteError.
    """
    found: dict[str, Remote] = {}
    for each in said:
        name, remote = Remote.parse(each)
        if name in found:
            raise SettingsError(f"--expert has {name} twice: an expert is in one place")
        found[name] = remote
    _check_known("--expert", found, experts)
    for name, variable in _named("--expert-key", keys, found):
        found[name] = replace(found[name], api_key=variable)
    for name, tokens in _named("--expert-window", windows, found):
        if not tokens.isdecimal() or not int(tokens):
            raise SettingsError(f"--expert-window says {tokens!r} of {name}: write a number of tokens")
        found[name] = replace(found[name], window=int(tokens))
    return found


def kinds(said: Sequence[str], local: Sequence[str]) -> dict[str, Kind]:
    """What the local experts' layers are stored in, from KIND for all of them and NAME=KIND. Raises SettingsError."""
    everyone: dict[str, Kind] = {}
    named: dict[str, Kind] = {}
    for each in said:
        name, mark, kind = each.rpartition("=")
        if kind not in list(Kind):
            raise SettingsError(f"--quantise {each!r} has no kind of {', '.join(Kind)}: write KIND or NAME=KIND")
        for expert in [name] if mark else local:
            chosen = named if mark else everyone
            if chosen.setdefault(expert, Kind(kind)) != kind:
                raise SettingsError(f"--quantise says {chosen[expert]} and {kind} of {expert}: say one")
    _check_known("--quantise", named, local)
    return everyone | named


def size(gigabytes: float | None) -> int | None:
    """In bytes."""
    return None if gigabytes is None else int(gigabytes * GIGABYTE)


def _named(option: str, said: Sequence[str], remotes: Mapping[str, Remote]) -> Iterator[tuple[str, str]]:
    """The values of an option for experts that are elsewhere. Raises SettingsError."""
    for each in said:
        name, _, value = each.partition("=")
        if name not in remotes:
            raise SettingsError(f"{option} {each!r} is of no expert that --expert names: write NAME=VALUE")
        if not value:
            raise SettingsError(f"{option} {each!r} says nothing of {name}: write NAME=VALUE")
        yield name, value


def _check_known(option: str, named: Mapping[str, object], experts: Sequence[str]) -> None:
    for name in named:
        if name not in experts:
            known = ", ".join(experts) or "none"
            raise SettingsError(f"{option} names {name!r}, and this machine's experts of the bundle are: {known}")
