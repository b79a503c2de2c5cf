"""The command line: read a bundle, open the port, serve it; make keys; have a running service reload."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from routers import bundle as bundles
from routers.bundle import Bundle
from routers.errors import ModelGlueError
from routers.prompt import PromptRouter
from service import logs, tracing
from service import settings as choices
from service.access import Access, new_key
from service.app import create_app, settled
from service.completions import start
from service.decisions import Decision, Request, evidence
from service.ending import Drain
from service.engines.base import Engine, Message, Sampling
from service.engines.later import LaterEngine
from service.errors import ReloadError
from service.metrics import Metrics
from service.routelog import RouteLog
from service.server import address, listen, run
from service.sessions import Sessions
from service.settings import LOCAL_HOSTS, Dtype, LogFormat, LogLevel, Settings, SettingsError

ASK_TOKENS: Final = 64
RELOAD_SECONDS: Final = 60.0
DEFAULTS: Final = Settings(Path())

logger = logging.getLogger(__name__)
console = Console(highlight=False, emoji=False)
cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def option(help: str, name: str, *flags: str, **bounds: Any) -> Any:
    """An option that the environment may give too, as MODELGLUE_ and its name."""
    return typer.Option(*flags, help=help, envvar=f"MODELGLUE_{name}", **bounds)


@cli.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    bundle: Annotated[Path | None, option("The folder that `builder build` wrote.", "BUNDLE")] = None,
    host: Annotated[str, option("Address to listen on; 0.0.0.0 for every one.", "HOST")] = DEFAULTS.host,
    port: Annotated[int, option("Port to listen on; 0 for any free one.", "PORT", min=0, max=65535)] = DEFAULTS.port,
    ask: Annotated[list[str] | None, typer.Option(help="Answer this prompt once ready, then go on serving.")] = None,
    expert: Annotated[
        list[str] | None,
        option(
            "An expert of the bundle that an OpenAI server runs, NAME=URL or NAME=URL#MODEL; its weights here are not "
            "loaded. May be given again; in the environment with spaces between.",
            "EXPERT",
        ),
    ] = None,
    expert_key: Annotated[
        list[str] | None,
        option("The environment variable with the key of an expert's server, NAME=VARIABLE.", "EXPERT_KEY"),
    ] = None,
    expert_window: Annotated[
        list[str] | None,
        option("Tokens that an expert's server takes, NAME=TOKENS, if it does not tell.", "EXPERT_WINDOW"),
    ] = None,
    max_batch: Annotated[
        int, option("Requests of an expert that run at a time.", "MAX_BATCH", min=1)
    ] = DEFAULTS.max_batch,
    queue: Annotated[
        int, option("Requests of an expert that may wait; more get 429.", "QUEUE", min=1)
    ] = DEFAULTS.queue,
    kv_memory: Annotated[
        float | None,
        option("GB of key-value memory, for all experts (default: a quarter of what is free).", "KV_MEMORY", min=0.001),
    ] = None,
    memory_budget: Annotated[
        float | None,
        option(
            "GB of weights in memory at a time; experts over it come and go (default: all stay).",
            "MEMORY_BUDGET",
            min=0.001,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, option("What weights are computed in (default: bfloat16 where the machine can).", "DTYPE")
    ] = None,
    quantise: Annotated[
        list[str] | None,
        option(
            "Fewer bits for linear layers, KIND for all experts or NAME=KIND: int8, int4, bnb-int8, bnb-nf4. "
            "May be given again; in the environment with spaces between.",
            "QUANTISE",
        ),
    ] = None,
    threads: Annotated[
        int | None, option("Threads that compute (default: OMP_NUM_THREADS, or all cores but one).", "THREADS", min=1)
    ] = None,
    device: Annotated[
        str | None, option("torch's name of it: cpu, cuda, cuda:1 (default: cuda, if any).", "DEVICE")
    ] = None,
    api_keys: Annotated[
        Path | None,
        option(
            "A file of keys, a line each: name, SHA-256 in hex, requests a minute, requests at a time (`service key` "
            "makes one; default: everybody may ask).",
            "API_KEYS",
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        option("An origin whose pages may ask, * for any; may be given again (default: none).", "CORS"),
    ] = None,
    deadline: Annotated[
        float | None, option("Seconds that a request may take (default: as long as it takes).", "DEADLINE", min=0.001)
    ] = None,
    max_body: Annotated[int, option("Bytes of a request's body.", "MAX_BODY", min=1)] = DEFAULTS.max_body,
    grace: Annotated[
        float, option("Seconds that answers may go on once told to stop.", "GRACE", min=0)
    ] = DEFAULTS.grace,
    route_log: Annotated[
        Path | None, option("A SQLite file of every decision, for `builder route-replay` (default: none).", "ROUTE_LOG")
    ] = None,
    route_log_rows: Annotated[
        int, option("Decisions that it keeps, the latest.", "ROUTE_LOG_ROWS", min=1)
    ] = DEFAULTS.route_log_rows,
    log_level: Annotated[LogLevel, option("How much to log.", "LOG_LEVEL")] = DEFAULTS.log_level,
    log_format: Annotated[
        LogFormat, option("As lines to read, or as JSON objects.", "LOG_FORMAT")
    ] = DEFAULTS.log_format,
    log_prompts: Annotated[
        bool, option("Keep prompts in the log and the route log.", "LOG_PROMPTS", "--log-prompts")
    ] = DEFAULTS.log_prompts,
    trace: Annotated[
        bool, option("Send OpenTelemetry traces to OTEL_EXPORTER_OTLP_ENDPOINT.", "TRACE", "--trace")
    ] = DEFAULTS.trace,
) -> None:
    """Serve a bundle behind the OpenAI API.

    Every option but --ask is also taken from the environment, as MODELGLUE_HOST is for --host.
    """
    if context.invoked_subcommand is not None:
        return
    if bundle is None:
        raise SettingsError("which bundle? Say --bundle and the folder that `builder build` wrote")
    manifest = bundles.read_manifest(bundle)
    remotes = choices.remotes(expert or (), manifest.names, keys=expert_key or (), windows=expert_window or ())
    serve_with(
        Settings(
            bundle=bundle,
            host=host,
            port=port,
            ask=tuple(ask or ()),
            remotes=remotes,
            max_batch=max_batch,
            queue=queue,
            kv_memory=choices.size(kv_memory),
            memory_budget=choices.size(memory_budget),
            dtype=dtype,
            kinds=choices.kinds(quantise or (), [name for name in manifest.names if name not in remotes]),
            threads=threads,
            device=device,
            api_keys=api_keys,
            cors=tuple(cors or ()),
            deadline=deadline,
            max_body=max_body,
            grace=grace,
            route_log=route_log,
            route_log_rows=route_log_rows,
            log_level=log_level,
            log_format=log_format,
            log_prompts=log_prompts,
            trace=trace,
        )
    )


@cli.command()
def key(
    name: Annotated[str, typer.Argument(help="Whose it is; `admin` may reload.")],
    per_minute: Annotated[int | None, typer.Option(min=1, help="Requests a minute (default: any number).")] = None,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Requests at a time (default: any number).")] = None,
) -> None:
    """Print a new API key, and its line for the file of --api-keys, which cannot tell the key."""
    made, line = new_key(name, per_minute, concurrent)
    print(f"key (shown this once): {made}\nline for --api-keys: {line}")


@cli.command()
def reload(
    url: Annotated[str, typer.Option(help="Where the service is.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="MODELGLUE_API_KEY", help="The key called admin.")] = None,
) -> None:
    """Have a running service read its router and its keys again."""
    import httpx

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.post(f"{url.rstrip('/')}/admin/reload", headers=headers, timeout=RELOAD_SECONDS)
        told = answer.json()
        said: str = told["detail"] if answer.is_success else told["error"]["message"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as exc:
        raise SettingsError(f"{url} does not answer as this service does ({exc}): is it running there?") from exc
    if not answer.is_success:
        raise ReloadError(said)
    print(said)


def serve_with(settings: Settings) -> None:
    """Serve until a signal ends it. The port is open before anything that takes long."""
    logs.configure(settings.log_level, settings.log_format.value)
    access = Access(settings.api_keys) if settings.api_keys else None
    tell, traces = tracing.tracer() if settings.trace else (None, None)
    listening = listen(settings.host, settings.port)
    read = bundles.read(settings.bundle)
    log = (
        RouteLog(settings.route_log, texts=settings.log_prompts, most=settings.route_log_rows)
        if settings.route_log
        else None
    )
    engine, drain = engine_of(settings, read), Drain(settings.grace)
    app = create_app(
        read,
        engine,
        access=access,
        drain=drain,
        routelog=log,
        tell=[tell] if tell else [],
        cors=settings.cors,
        deadline=settings.deadline,
        max_body=settings.max_body,
        log_prompts=settings.log_prompts,
    )
    console.print(f"playground: [bold]{address(settings.host, listening)}[/]   (Ctrl-C stops)")
    # Whoever runs this has asked for the end, so the end is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if settings.host not in LOCAL_HOSTS and access is None:
        logger.warning("whoever reaches %s may ask: --api-keys says who", settings.host)
    try:
        with suppress(KeyboardInterrupt):
            asyncio.run(run(app, listening, drain, answer_all(settings.ask, read.router, engine)))
    finally:
        if traces is not None:
            traces.shutdown()


def engine_of(settings: Settings, read: Bundle) -> Engine:
    """Who runs the bundle's experts: this process, other servers, or some the one and some the other."""
    names = read.manifest.names
    local = [name for name in names if name not in settings.remotes]
    engines: dict[str, Engine] = {}
    if local:
        own = LaterEngine(local, lambda: _local_engine(settings, {name: read.folder(name) for name in local}))
        engines |= dict.fromkeys(local, own)
    if settings.remotes:
        from service.engines.remote import RemoteEngine

        engines |= dict.fromkeys(settings.remotes, RemoteEngine(settings.remotes))
    if len({id(engine) for engine in engines.values()}) == 1:
        return engines[names[0]]
    from service.engines.several import SeveralEngines

    return SeveralEngines({name: engines[name] for name in names})


async def answer_all(prompts: Sequence[str], router: PromptRouter, engine: Engine) -> None:
    """Print the prompts with their answers, once no expert is loading any more."""
    async for _ in settled(engine):
        pass
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


def main() -> None:
    """Run the command line; a failure that the user can mend is one sentence and exit code 1."""
    # Threads that spin while they wait starve the event loop. Before torch loads, for it reads this then.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        cli()
    except ModelGlueError as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(1)


def _local_engine(settings: Settings, folders: Mapping[str, Path]) -> Engine:
    """In a thread, for torch takes seconds to import."""
    import torch

    from service.engines.local import LocalEngine, Options

    options = Options(
        most=settings.max_batch,
        queue=settings.queue,
        kv_bytes=settings.kv_memory,
        dtype=getattr(torch, settings.dtype) if settings.dtype else None,
        kinds={name: kind.value for name, kind in settings.kinds.items()},
        memory_bytes=settings.memory_budget,
        threads=settings.threads,
        device=settings.device,
    )
    return LocalEngine(folders, options)


if __name__ == "__main__":
    main()
