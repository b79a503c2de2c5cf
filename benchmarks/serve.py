"""Our service beside other servers, over HTTP: `python benchmarks/serve.py BUNDLE --peer vllm` prints Markdown tables.

One expert's weights in every server, one server at a time, streamed greedy completions of the same random prompts, no
two alike. With --bundle-mix all experts at once: our one service beside as many servers of a peer, asked in turn.
A peer is one of PEERS, whose programs are on PATH, or NAME=COMMAND: a shell command with {model}, {port}, {threads}.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import httpx
import numpy as np
import psutil
import typer
from tokenizers import Tokenizer

from routers import bundle
from routers.fixed import FixedRouter
from routers.prompt import AUTO

PROMPT, NEW, WARM_UP, FIRST = 128, 64, 8, 4
WAVES, LEAST = 2, 4
"""Requests of a round by its concurrency, and at least."""
ENOUGH = 60.0
"""Seconds of a round after which nothing new is asked for."""
STARTING, STOPPING, POLL = 900.0, 20.0, 0.05
SAID = 1500
"""Characters of what a server said that go with its failure."""
BUSY = 0.1
"""The share of a core that others may take before a figure is marked."""
OURS = "ours"


class ServerError(Exception):
    """A server cannot be measured, and why."""


@dataclass(frozen=True, slots=True)
class Peer:
    """How a server is started, as shell templates.

    {made} is the model in the peer's own form, which `convert` writes. {cores} are as many as threads, from 0.
    programs: which have to be on PATH. endless: it has no ignore_eos, so its model is one without an end.
    """

    serve: str
    programs: tuple[str, ...] = ()
    convert: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    endless: bool = False


PEERS = {
    "vllm": Peer(
        "vllm serve {model} --port {port} --dtype bfloat16 --max-model-len 2048",
        ("vllm",),
        environment={"VLLM_CPU_OMP_THREADS_BIND": "{cores}", "VLLM_CPU_KVCACHE_SPACE": "1"},
    ),
    "llama.cpp": Peer(
        "llama-server -m {made} --port {port} -t {threads} -tb {threads} -np 64 -c 16384 --kv-unified",
        ("llama-server", "convert_hf_to_gguf.py"),
        convert="convert_hf_to_gguf.py {model} --outtype bf16 --outfile {made}",
    ),
    # OpenVINO GenAI has no server of its own: any program that answers /v1/completions from an IR.
    "openvino": Peer(
        "openvino-server {made} --port {port} --threads {threads}",
        ("openvino-server", "optimum-cli"),
        convert="optimum-cli export openvino --model {model} --task text-generation-with-past"
        " --weight-format fp16 {made}",
    ),
    "transformers": Peer(
        "transformers serve {model} --port {port} --continuous-batching --dtype bfloat16 --cb-max-memory-percent 0.05",
        ("transformers",),
        endless=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Command:
    """One server to start; `convert` is run before where `made` is not there yet."""

    line: str
    port: int
    environment: dict[str, str]
    convert: str | None = None
    made: Path | None = None


class Words:
    """Prompts of `size` random words, each a token of its own, the same for the same seed.

    texts: whose words they are; any of the tokenizer's if there are none.
    """

    def __init__(self, folder: Path, texts: Sequence[str] = (), size: int = PROMPT) -> None:
        self._size = size
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        known = {id_ for text in texts for id_ in self._tokenizer.encode(text, add_special_tokens=False).ids}
        self._ids = sorted(
            id_
            for token, id_ in self._tokenizer.get_vocab().items()
            # A word begins with a blank, which tokenizers write so.
            if token[0] in "Ġ▁" and token[1:].isascii() and token[1:].isalpha() and (not texts or id_ in known)
        )

    def prompt(self, seed: str, as_ids: bool) -> list[int] | str:
        """Raises ServerError where a text of such words has other tokens."""
        ids = random.Random(seed).choices(self._ids, k=self._size)
        if as_ids:
            return ids
        text: str = self._tokenizer.decode(ids)
        if len(self._tokenizer.encode(text, add_special_tokens=False).ids) != self._size:
            raise ServerError(f"words of this tokenizer are no prompt of {self._size} tokens as a text")
        return text


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, under which model's name, and of which words."""

    port: int
    model: str
    words: Words


@dataclass(frozen=True, slots=True)
class Setup:
    """What is measured as one: servers that are started together, and targets that are asked in turn."""

    name: str
    commands: tuple[Command, ...]
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a server takes: a prompt as token ids or as text, and ignore_eos or not."""

    ids: bool
    ignore_eos: bool


DIALECTS = (Dialect(True, True), Dialect(False, True), Dialect(False, False))


@dataclass(frozen=True, slots=True)
class Answer:
    """One stream: when it was asked for, when its pieces of text came, its tokens by its usage, and whose it is."""

    asked: float
    pieces: tuple[float, ...]
    tokens: int
    model: str

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Round:
    """What a round of requests took; others: cores that neither the server nor this client used."""

    answers: tuple[Answer, ...]
    seconds: float
    others: float

    def figures(self) -> dict[str, float]:
        """Tokens a second; milliseconds for the rest."""
        first = [1e3 * (answer.pieces[0] - answer.asked) for answer in self.answers]
        gaps = [1e3 * gap for answer in self.answers for gap in answer.gaps]
        return {
            "tok/s": sum(answer.tokens for answer in self.answers) / self.seconds,
            "TTFT p50": float(np.percentile(first, 50)),
            "TTFT p95": float(np.percentile(first, 95)),
            "inter-token p50": float(np.percentile(gaps, 50)),
            "inter-token p95": float(np.percentile(gaps, 95)),
            "longest gap": max(gaps),
        }


@dataclass(frozen=True, slots=True)
class Measured:
    """A setup's rounds by concurrency, its highest resident memory, and the seconds to its first answers."""

    rounds: dict[int, list[Round]]
    resident: int
    start: float

    def median(self, figure: str, concurrency: int) -> float:
        return float(np.median([each.figures()[figure] for each in self.rounds[concurrency]]))

    def remarks(self) -> list[str]:
        """What a reader has to know before he compares."""
        answers = [answer for rounds in self.rounds.values() for each in rounds for answer in each.answers]
        tokens = sum(answer.tokens for answer in answers)
        found = []
        if tokens < NEW * len(answers):
            found.append(f"{tokens / len(answers):.1f} tokens an answer instead of {NEW}")
        apiece = tokens / sum(len(answer.pieces) for answer in answers)
        if apiece > 1.05:
            found.append(f"{apiece:.2f} tokens a piece: its gaps are between pieces")
        return found

    def answered_by(self) -> str:
        """How many answers are each model's."""
        models = Counter(answer.model for rounds in self.rounds.values() for each in rounds for answer in each.answers)
        return "answered by " + ", ".join(f"{model} ({count})" for model, count in sorted(models.items()))


class Client:
    """Asks a setup's targets in turn."""

    def __init__(self, http: httpx.AsyncClient, targets: Sequence[Target]) -> None:
        self._http, self._targets = http, targets
        self._dialects = [DIALECTS[0]] * len(targets)

    async def first_answers(self, processes: Sequence[psutil.Popen]) -> None:
        """Waits until every target answers, and learns what it takes. Raises ServerError."""
        await asyncio.gather(*(self._first_answer(i, processes) for i in range(len(self._targets))))

    async def round(self, concurrency: int, seed: str, processes: Sequence[psutil.Popen], tokens: int = NEW) -> Round:
        """So many requests at a time until all are answered, or ENOUGH is asked for."""
        count = max(WAVES * concurrency, LEAST)
        bodies = iter([self._body(i % len(self._targets), f"{seed}/{i}", tokens) for i in range(count)])
        answers: list[Answer] = []

        async def work() -> None:
            for target, body in bodies:
                answers.append(await self._stream(target, body))
                if time.perf_counter() - started > ENOUGH:
                    return

        own = [psutil.Process(), *tree(processes)]
        all_before, own_before, started = busy(), used(own), time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        seconds = time.perf_counter() - started
        others = busy() - all_before - (used(own) - own_before)
        return Round(tuple(answers), seconds, max(others, 0) / seconds)

    async def _first_answer(self, i: int, processes: Sequence[psutil.Popen]) -> None:
        until = time.perf_counter() + STARTING
        refused = ""
        while time.perf_counter() < until:
            for dialect in DIALECTS:
                self._dialects[i] = dialect
                try:
                    await self._stream(*self._body(i, "first", FIRST))
                    return
                except httpx.HTTPStatusError as exc:
                    refused = f": {exc.response.status_code} {exc.response.text[:200]}"
                    if exc.response.status_code >= 500:
                        break
                except httpx.TransportError:
                    break
            if any(process.poll() is not None for process in processes):
                raise ServerError("it stopped before it answered")
            await asyncio.sleep(POLL)
        raise ServerError(f"no answer in {STARTING:.0f} s{refused}")

    def _body(self, i: int, seed: str, tokens: int) -> tuple[Target, dict[str, Any]]:
        target, dialect = self._targets[i], self._dialects[i]
        body: dict[str, Any] = {"ignore_eos": True} if dialect.ignore_eos else {}
        body |= {"model": target.model, "prompt": target.words.prompt(seed, dialect.ids)}
        body |= {"max_tokens": tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        return target, body

    async def _stream(self, target: Target, body: dict[str, Any]) -> Answer:
        asked, frames = time.perf_counter(), []
        url = f"http://127.0.0.1:{target.port}/v1/completions"
        async with self._http.stream("POST", url, json=body) as response:
            if response.is_error:
                await response.aread()
                response.raise_for_status()
            # Frames are read after the last: what this process does takes time from the server.
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    frames.append((time.perf_counter(), line.removeprefix("data:").strip()))
        return answer(asked, frames)


def answer(asked: float, frames: Iterable[tuple[float, str]]) -> Answer:
    """What a stream's frames say. Raises ServerError for an error in mid-stream, and where usage or text is missing."""
    pieces, tokens, model = [], 0, ""
    for at, frame in frames:
        if frame.startswith("[DONE]"):
            continue
        chunk = json.loads(frame)
        if "error" in chunk:
            raise ServerError(f"a stream failed: {chunk['error']}")
        if any(choice.get("text") for choice in chunk.get("choices", ())):
            pieces.append(at)
        model = chunk.get("model") or model
        tokens = (chunk.get("usage") or {}).get("completion_tokens") or tokens
    if not tokens or not pieces:
        raise ServerError(f"an answer has {tokens} tokens by its usage, in {len(pieces)} pieces of text")
    return Answer(asked, tuple(pieces), tokens, model)


def main(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE")],
    peer: Annotated[list[str] | None, typer.Option(help=f"{', '.join(PEERS)}, or NAME=COMMAND.")] = None,
    expert: Annotated[str | None, typer.Option(help="The one that is served; else the bundle's default.")] = None,
    bundle_mix: Annotated[bool, typer.Option(help="All experts at once instead.")] = False,
    threads: Annotated[list[int] | None, typer.Option(help="Of a server; 1 and 2 if none is said.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="1, 4, 16 and 64 if none is said.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = PROMPT,
    passes: Annotated[int, typer.Option(min=1, help="Over the concurrencies; figures are medians.")] = 2,
) -> None:
    """Print a table by number of threads."""
    # Servers are ended with this process, however it is told to end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    read = bundle.read(path)
    peers = {name: command for name, command in map(known, peer or ()) if found(name, command)}
    levels = concurrency or [1, 4, 16, 64]
    with TemporaryDirectory() as work:
        for each in threads or [1, 2]:
            print(f"\n### {each} thread{'s' * (each > 1)}, concurrency {' / '.join(map(str, levels))}\n")
            setups = setups_of(read, peers, each, expert or read.manifest.default, bundle_mix, prompt, Path(work))
            table(setups, levels, passes)


def known(peer: str) -> tuple[str, Peer]:
    """A peer by its name, or as it is given. Raises typer.BadParameter."""
    name, given, line = peer.partition("=")
    if not given and name not in PEERS:
        raise typer.BadParameter(f"no peer {name!r}; there are: {', '.join(PEERS)}, and NAME=COMMAND")
    return name, Peer(line) if given else PEERS[name]


def found(name: str, peer: Peer) -> bool:
    """Whether its programs are there; says which are not."""
    missing = [program for program in peer.programs if shutil.which(program) is None]
    if missing:
        print(f"{name} is left out: no {', '.join(missing)} on PATH", flush=True)
    return not missing


def setups_of(
    read: bundle.Bundle, peers: dict[str, Peer], threads: int, expert: str, mix: bool, prompt: int, work: Path
) -> Iterator[Setup]:
    """Ours first, then each peer with the same experts."""
    experts = read.manifest.names if mix else (expert,)
    words = {each: Words(read.folder(each), own_prompts(read, each) if mix else (), prompt) for each in experts}
    port = free_port()
    served = read.path.resolve() if mix else alone(read, expert, work / "alone")
    line = f"{sys.executable} -m service --bundle {served} --port {port} --log-level warning"
    ours = Command(line, port, {"OMP_NUM_THREADS": str(threads)})
    yield Setup(OURS, (ours,), tuple(Target(port, each, words[each]) for each in experts))
    if mix:
        yield Setup(f"{OURS}, routed", (ours,), tuple(Target(port, AUTO, words[each]) for each in experts))
    for name, peer in peers.items():
        commands, targets = [], []
        for each in experts:
            folder = read.folder(each).resolve()
            folder = endless(folder, work / f"{each}-endless") if peer.endless else folder
            commands.append(command(peer, folder, threads, work / f"{each}-{name}"))
            targets.append(Target(commands[-1].port, str(folder), words[each]))
        yield Setup(name, tuple(commands), tuple(targets))


def own_prompts(read: bundle.Bundle, expert: str) -> list[str]:
    """Those of the routing set that it scored best on."""
    return [row.prompt for row in read.routing if max(row.scores, key=lambda name: row.scores[name]) == expert]


def command(peer: Peer, folder: Path, threads: int, made: Path) -> Command:
    """A peer's for a model."""
    port = free_port()
    values = {"model": folder, "made": made, "port": port, "threads": threads}
    values["cores"] = ",".join(map(str, range(threads)))
    environment = {"OMP_NUM_THREADS": str(threads)}
    environment |= {key: value.format(**values) for key, value in peer.environment.items()}
    convert = peer.convert and peer.convert.format(**values)
    return Command(peer.serve.format(**values), port, environment, convert, made)


def table(setups: Iterable[Setup], levels: Sequence[int], passes: int) -> None:
    """A row by setup as soon as it is measured; the first is what the others are compared with."""
    figures = ("TTFT p50", "TTFT p95", "inter-token p50", "inter-token p95", "longest gap")
    row("server", "tok/s", "ours ÷ it", *(f"{figure} ms" for figure in figures), "resident MB", "start s")
    row(*["---"] * (len(figures) + 5))
    ours: Measured | None = None
    remarks = []
    for setup in setups:
        try:
            measured = asyncio.run(measure(setup, levels, passes))
        except (ServerError, httpx.HTTPError) as exc:
            remarks.append(f"{setup.name} is left out: {exc or type(exc).__name__}")
            continue
        ours = measured if setup.name == OURS else ours
        speeds = {level: measured.median("tok/s", level) for level in levels}
        row(
            setup.name,
            " / ".join(f"{speed:.0f}{marked(measured.rounds[level])}" for level, speed in speeds.items()),
            " / ".join(f"{ours.median('tok/s', level) / speed:.2f}" for level, speed in speeds.items()) if ours else "",
            *(" / ".join(f"{measured.median(figure, level):.0f}" for level in levels) for figure in figures),
            f"{measured.resident / 1e6:.0f}",
            f"{measured.start:.1f}",
        )
        remarks += [f"{setup.name}: {remark}" for remark in measured.remarks()]
        if any(target.model == AUTO for target in setup.targets):
            remarks.append(f"{setup.name}: {measured.answered_by()}")
    print(f"\n\\* other processes took more than {BUSY:.0%} of a core.")
    print("".join(f"\n{remark}." for remark in remarks), flush=True)


def marked(rounds: Sequence[Round]) -> str:
    """A star where the machine was not the server's alone."""
    return "\\*" * any(each.others > BUSY for each in rounds)


async def measure(setup: Setup, levels: Sequence[int], passes: int) -> Measured:
    """Start it, warm it up, ask, and end it. Raises ServerError, httpx.HTTPError."""
    for command in setup.commands:
        convert(command)
    started = time.perf_counter()
    async with http() as connection, running(setup.commands) as processes:
        client = Client(connection, setup.targets)
        await client.first_answers(processes)
        start = time.perf_counter() - started
        await client.round(max(levels), "warm-up", processes, tokens=WARM_UP)
        rounds: dict[int, list[Round]] = {level: [] for level in levels}
        resident = 0
        for number in range(passes):
            for level in levels:
                rounds[level].append(await client.round(level, f"{number}/{level}", processes))
                resident = max(resident, sum(each.memory_info().rss for each in tree(processes)))
    return Measured(rounds, resident, start)


def convert(command: Command) -> None:
    """Raises ServerError."""
    if command.convert is None or command.made is None or command.made.exists():
        return
    done = subprocess.run(command.convert, shell=True, capture_output=True, text=True)
    if done.returncode:
        raise ServerError(f"its model cannot be made:\n{done.stderr[-SAID:]}")


@asynccontextmanager
async def http() -> AsyncGenerator[httpx.AsyncClient, None]:
    """Any number of connections, and no proxy."""
    # A connection that is kept may be one that the server has closed by now.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=STARTING, limits=limits, trust_env=False) as client:
        yield client


@asynccontextmanager
async def running(commands: Sequence[Command]) -> AsyncGenerator[list[psutil.Popen], None]:
    """The servers' processes, each the head of a group that ends with the block; what they said goes with an error."""
    with TemporaryDirectory() as folder:
        logs = [Path(folder, str(command.port)) for command in commands]
        processes = [spawn(command, log) for command, log in zip(commands, logs, strict=True)]
        try:
            yield processes
        except ServerError as exc:
            said = "\n".join(log.read_text("utf-8", "replace")[-SAID:] for log in logs)
            raise ServerError(f"{exc}; it said:\n{said}") from exc
        finally:
            stop(processes)


def spawn(command: Command, log: Path) -> psutil.Popen:
    """Start a server; what it says goes to the file."""
    with log.open("wb") as file:
        return psutil.Popen(
            command.line,
            shell=True,
            env=os.environ | command.environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def stop(processes: Sequence[psutil.Popen]) -> None:
    """End them and all that they started."""
    every = tree(processes)
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for process in every:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(sign)
        psutil.wait_procs(every, timeout=STOPPING)


def tree(processes: Sequence[psutil.Popen]) -> list[psutil.Process]:
    """The servers' processes and those that these have started."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found += [psutil.Process(process.pid), *process.children(recursive=True)]
    return found


def used(processes: Iterable[psutil.Process]) -> float:
    """Seconds of cores that they have taken."""
    total = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def busy() -> float:
    """Seconds of cores that all processes have taken."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def alone(read: bundle.Bundle, expert: str, out: Path) -> Path:
    """A bundle of one expert of another's, by links: what a server of one model is fairly compared with."""
    if out.exists():
        return out
    (out / bundle.EXPERTS).mkdir(parents=True)
    for name in (f"{bundle.EXPERTS}/{expert}", bundle.TOKENIZER, bundle.ENCODER, bundle.ROUTING):
        if (read.path / name).exists():
            (out / name).symlink_to((read.path / name).resolve())
    bundle.save_router(out, FixedRouter.always((expert,), expert), read.router.features)
    files = [bundle.ROUTER, bundle.ROUTING, *bundle.feature_files(out, read.manifest.features.kind)]
    changes = {
        "default": expert,
        "experts": tuple(entry for entry in read.manifest.experts if entry.name == expert),
        "router": bundle.RouterEntry(kind="fixed", k=1),
        "scorecard": None,
        "scorecards": {},
        "files": {name: bundle.digest(out / name) for name in files},
    }
    bundle.write(out, read.manifest.model_copy(update=changes))
    return out


def endless(folder: Path, out: Path) -> Path:
    """The same model without a token that ends an answer, by links."""
    if out.exists():
        return out
    out.mkdir()
    for file in folder.iterdir():
        if file.name in ("config.json", "generation_config.json"):
            known = json.loads(file.read_text("utf-8"))
            (out / file.name).write_text(json.dumps(known | {"eos_token_id": None}), "utf-8")
        else:
            (out / file.name).symlink_to(file)
    return out


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def row(*cells: str) -> None:
    """One row of a Markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
