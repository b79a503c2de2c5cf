"""A builder command that a signal meets at a chosen result, however slow or fast the machine is."""

from __future__ import annotations

import signal
import subprocess
import sys

STOPPED = """
import itertools, os, sys
from builder.__main__ import main
from builder.journal import Journal

signal, last = int(sys.argv[1]), int(sys.argv[2])
sys.argv = ["builder", *sys.argv[3:]]
keep, kept = Journal.keep, itertools.count(1)

def keep_and_stop(*result):
    keep(*result)
    if next(kept) == last:
        os.kill(os.getpid(), signal)

Journal.keep = keep_and_stop
main()
"""


def stopped(by: signal.Signals, at: int, *words: object) -> subprocess.CompletedProcess[str]:
    """Run `builder *words` until its `at`-th new result is in the journal; there it gets the signal `by`."""
    return subprocess.run(
        [sys.executable, "-c", STOPPED, str(int(by)), str(at), *map(str, words)],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
        capture_output=True,
        text=True,
        timeout=120,
    )
