"""A service that echoes, in a process of its own: for signals. Its first line is its address.

With --gate, answers stand still after their first piece until that file exists.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from contextlib import suppress
from pathlib import Path

from held import Held

from routers import bundle
from service import logs
from service.app import create_app
from service.ending import Drain
from service.routelog import RouteLog
from service.server import address, listen, run


async def nothing() -> None:
    pass


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path)
    options.add_argument("--gate", type=Path, default="/")
    options.add_argument("--grace", type=float, default=5.0)
    options.add_argument("--route-log", type=Path)
    said = options.parse_args()
    logs.configure("info", "json")
    read, drain, listening = bundle.read(said.folder), Drain(said.grace), listen("127.0.0.1", 0)
    routelog = RouteLog(said.route_log) if said.route_log else None
    engine = Held(read.router.experts, free=1)
    engine.let = said.gate.exists
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(address("127.0.0.1", listening), flush=True)
    with suppress(KeyboardInterrupt):
        asyncio.run(run(create_app(read, engine, drain=drain, routelog=routelog), listening, drain, nothing()))


if __name__ == "__main__":
    main()
