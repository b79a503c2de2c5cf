"""The command line: read a bundle, open the port, serve it; and answer the prompts of --ask on the way."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Sequence
from contextlib import aclosing, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from rich.console import Console

from routers import bundle as bundles
from routers.errors import ModelGlueError
from routers.prompt import PromptRouter
from service.app import create_app
from service.completions import start
from service.decisions import Decision, Request, evidence
from service.engines.base import Engine, Message, Sampling
from service.metrics import Metrics
from service.sessions import Sessions

ASK_TOKENS = 64
POLL_SECONDS = 0.1

console = Console(highlight=False, emoji=False)
cli = typer.Typer(add_completion=False)


class ListenError(ModelGlueError):
    """The service cannot listen where it should."""


class LogLevel(StrEnum):
    """How much the service says."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


@cli.command()
def serve(
    bundle: Annotated[Path, typer.Option(help="The folder that `builder build` wrote.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8000,
    ask: Annotated[list[str] | None, typer.Option(help="Answer this prompt once ready, then go on serving.")] = None,
    grace: Annotated[int, typer.Option(min=0, help="Seconds that answers may go on once told to stop.")] = 5,
    log_level: Annotated[LogLevel, typer.Option(help="How much to log.")] = LogLevel.info,
) -> None:
    """Serve a bundle behind the OpenAI API."""
    read = bundles.read(bundle)
    listening = listen(host, port)
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s: %(message)s")
    # Only now: torch takes seconds to load, and a mistake in the command should not.
    from service.engines.local import LocalEngine

    engine = LocalEngine({expert: read.folder(expert) for expert in read.manifest.names})
    console.print(f"playground: [bold]{address(host, listening)}[/]   (Ctrl-C stops)")
    # Whoever runs this has asked for the end, so the end is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    app = create_app(read, engine)
    config = uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=grace, server_header=False)
    with suppress(KeyboardInterrupt):
        asyncio.run(run(config, listening, answer_all(ask or (), read.router, engine)))


async def run(config: uvicorn.Config, listening: socket.socket, asking: Coroutine[None, None, None]) -> None:
    """Serve on a socket until a signal comes, and ask on the way."""
    await Server(config, asyncio.create_task(asking)).serve(sockets=[listening])


class Server(uvicorn.Server):
    """Stops asking before it stops the engine that is asked."""

    def __init__(self, config: uvicorn.Config, asking: asyncio.Task[None]) -> None:
        super().__init__(config)
        self._asking = asking

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._asking.cancel()
        await super().shutdown(sockets)


async def answer_all(prompts: Sequence[str], router: PromptRouter, engine: Engine) -> None:
    """Print the prompts with their answers, once no expert is loading any more."""
    # An engine loads in threads of its own and has no event to wait for.
    while any(status.state == "loading" for status in engine.status().values()):  # noqa: ASYNC110
        await asyncio.sleep(POLL_SECONDS)
    for prompt in prompts:
        say(f"\n> {prompt}\n", style="bold")
        try:
            await answer(prompt, router, engine)
        except ModelGlueError as exc:
            say(f"error: {exc}\n")


async def answer(prompt: str, router: PromptRouter, engine: Engine) -> None:
    """Print why an expert was chosen for a chat of one turn, and its greedy answer as it comes."""
    request = Request((Message("user", prompt),), Sampling(ASK_TOKENS, 0.0))
    uncounted = Metrics(router.experts)  # /metrics is about the service's clients
    async with aclosing(await start([request], router, engine, uncounted, Sessions())) as completion:
        (part,) = completion.parts
        say(f"{why(part.decision, router)}\n", style="dim")
        async for piece in part.answers[0].pieces():
            say(piece.text)
    say("\n")


def why(decision: Decision, router: PromptRouter) -> str:
    """A line on a route: the expert, its score, how far it is ahead, and the words that spoke for it."""
    route = decision.route
    words = ", ".join(f"{pull.word} {pull.score:+.3f}" for pull in evidence(decision, router))
    line = f"{route.expert} ({route.reason}): score {route.ranking[0].score:.3f}, margin {route.margin:.3f}"
    return f"{line}; words: {words}" if words else line


def say(text: str, style: str | None = None) -> None:
    """Print text of others as it is: no line breaks of ours, and brackets in it are no markup."""
    console.print(text, end="", style=style, markup=False, soft_wrap=True)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens already. Raises ListenError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as exc:
        reason = "is in use" if exc.errno == errno.EADDRINUSE else f"cannot be opened ({exc.strerror})"
        raise ListenError(f"port {port} of {host} {reason}: stop what is there, or choose another with --port") from exc
    # asyncio does this for sockets that it makes; without it every answer waits 40 ms for the client's ACK.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def address(host: str, listening: socket.socket) -> str:
    """Where a browser on this machine finds the playground."""
    name = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{listening.getsockname()[1]}/"


def main() -> None:
    """Run the command line; a failure that the user can mend is one sentence and exit code 1."""
    # Threads that spin while they wait starve the event loop. Before torch loads, for it reads this then.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        cli()
    except ModelGlueError as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
