"""Reads server-sent events from bytes that are cut anywhere."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from service.engines.base import EngineError

DONE: Final = "[DONE]"
"""The data of OpenAI's last event."""

LONGEST: Final = 64 << 20
"""Bytes of an event; log-probabilities of a long prompt come in one."""

# Not str.splitlines: it also breaks at U+2028 and others, which JSON strings may hold.
LINE_END: Final = re.compile(rb"\r\n|\r|\n")


class Event(NamedTuple):
    """Its name, mostly empty, and its data, the lines joined."""

    name: str
    data: str


class Events:
    """A stream of events, fed as it comes."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._after_cr = False
        self._name = ""
        self._data: list[str] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that end in this chunk. Raises EngineError for one that is too long."""
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._after_cr = False
        if not chunk:
            return []
        self._after_cr = chunk.endswith(b"\r")
        events: list[Event] = []
        begun, *lines = LINE_END.split(chunk)
        self._line += begun
        for line in lines:
            events += self._end_of_line()
            self._line = bytearray(line)
        if len(self._line) + self._size > LONGEST:
            raise EngineError(f"an event is longer than {LONGEST} bytes")
        return events

    def _end_of_line(self) -> list[Event]:
        if not self._line:
            return self._end_of_event()
        name, _, value = self._line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
            self._size += len(self._line)
        elif name == "event":
            self._name = value
        return []  # a comment's name is empty; ids and retry times are for readers who come back

    def _end_of_event(self) -> list[Event]:
        events = [Event(self._name, "\n".join(self._data))] if self._data else []
        self._name, self._data, self._size = "", [], 0
        return events
