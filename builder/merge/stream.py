"""Runs a plan: threads take tensors, the largest first, and write them piece by piece in place.

Headers are written before any weight is read, so every piece has its place in the output; what is in memory is the
pieces in flight.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from builder import architecture, checkpoints, files, kernels
from builder.checkpoints import Array, Tensor, Writer
from builder.errors import MergeError
from builder.journal import Journal
from builder.merge import card, folder
from builder.merge.inputs import PIECE, Arrays, Inputs, Source, run
from builder.merge.methods import METHODS
from builder.merge.models import Model
from builder.merge.plan import Origin, Output, Plan
from builder.merge.sources import Adapted, Permuted, Rows, Stored
from builder.merge.vocabulary import Vocabulary

if TYPE_CHECKING:
    from builder.progress import Progress

T = TypeVar("T")
Axes = Mapping[str, Sequence[Any]]

PIECE_ARRAYS = 8
"""Arrays of a piece's size that a method holds beside the inputs' values and task vectors, at most."""
OVERHEAD = 300 * 10**6
"""Anonymous bytes of the process itself: interpreter, numpy, tokenizers, headers."""
GPU_PIECE = 1 << 24
NOTHING: Mapping[str, tuple[Tensor, Array]] = MappingProxyType({})


class _Stopped(Exception):
    """Another tensor failed."""


@dataclass(frozen=True, slots=True)
class Result:
    """A finished merge: bytes read at least once and written, wall seconds, threads."""

    tensors: int
    read: int
    written: int
    seconds: float
    threads: int


def write(
    plan: Plan,
    out: Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    shard_bytes: int | None = None,
    max_memory: int | None = None,
    overwrite: bool = False,
    journal: Journal | None = None,
    progress: Progress | None = None,
    more: Mapping[str, tuple[Tensor, Array]] = NOTHING,
    describe: Callable[[Plan, Mapping[Path, str], Path], None] = card.write,
) -> Result:
    """Write the merged model folder; it appears whole, or not at all.

    journal: knows the digests of weight files that were hashed before.
    more: tensors that come of no model. describe: adds the card, given the weight files' digests.
    max_memory: bytes of anonymous memory; fewer threads run where their pieces would not fit.

    Raises MergeError: what is in the way says what to do.
    """
    started = time.monotonic()
    check_place(plan, out, overwrite)
    executor = Executor(plan, arrays_of(device), threads_of(plan, device, threads, max_memory))
    if plan.statistics:
        executor.check_statistics(journal)
    with room(plan, out), files.whole(out, overwrite=overwrite) as partial:
        layout = {**plan.layout, **{name: tensor for name, (tensor, _) in more.items()}}
        writer = Writer(partial, layout, shard_bytes)
        try:
            step = progress.step(f"merge to {out.name}", plan.written) if progress else nullcontext(lambda _: None)
            with step as advance:
                executor.run(lambda output: executor.write(output, writer), plan.outputs, advance)
            for name, (tensor, values) in more.items():
                writer.put(name, 0, checkpoints.stored(name, values, tensor.dtype))
            writer.close()
        finally:
            writer.abandon()
        folder.write(plan, partial)
        describe(plan, executor.digests(card.weight_files(plan), journal), partial)
    return Result(len(layout), plan.read, plan.written, time.monotonic() - started, executor.threads)


def tensors(plan: Plan) -> Iterator[tuple[str, Array]]:
    """The merged tensors in memory, float32, one after another."""
    executor = Executor(plan, kernels, 1)
    for output in plan.outputs:
        pieces = list(executor.pieces(output))
        yield output.name, np.concatenate(pieces or [np.zeros(0, np.float32)]).reshape(output.tensor.shape)


def check_place(plan: Plan, out: Path, overwrite: bool) -> None:
    """Raises MergeError where `out` is in use, is an input, or its disk has too little room."""
    if out.name in ("", "..") or (out.exists() and not out.is_dir()):
        raise MergeError(f"{out} cannot be the merged model's folder: choose another name")
    if out.exists() and not overwrite:
        raise MergeError(f"{out} exists: choose another folder, or replace it with --overwrite")
    inputs = [(name, model.checkpoint.folder) for name, model in plan.models.items()]
    inputs += [(name, model.adapter.folder) for name, model in plan.models.items() if model.adapter]
    for name, path in [*inputs, *((name, each.path) for name, each in plan.statistics.items())]:
        if path.resolve().is_relative_to(out.resolve()):
            raise MergeError(f"{out} holds the input {name}: choose another folder")
    if _needed(plan) > files.free(out):
        raise MergeError(_too_large(plan, out))


@contextmanager
def room(plan: Plan, out: Path) -> Iterator[None]:
    """Raises MergeError for a disk that fills up, maybe by others' files."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MergeError(_too_large(plan, out)) from exc


def _needed(plan: Plan) -> int:
    beside = sum(path.stat().st_size for path in folder.companions(plan.donor.checkpoint.folder))
    return plan.written + beside


def _too_large(plan: Plan, out: Path) -> str:
    return (
        f"the merge needs {_needed(plan) / 1e9:.2f} GB and {out.parent} has {files.free(out) / 1e9:.2f} GB free: make "
        "room, or choose another folder"
    )


def arrays_of(device: str) -> Arrays:
    """The inner loops for a device. Raises MergeError for one that is not there."""
    if device == "cpu":
        return kernels
    from builder.merge.torch_arrays import TorchArrays

    return TorchArrays(device)


def threads_of(plan: Plan, device: str, asked: int | None, max_memory: int | None) -> int:
    """How many run. Raises MergeError where not even one fits into `max_memory`."""
    wanted = asked or (len(os.sched_getaffinity(0)) if device == "cpu" else 2)
    if max_memory is None or device != "cpu":
        return wanted
    each = max(_memory(output) for output in plan.outputs)
    fitting = (max_memory - OVERHEAD) // each
    if fitting < 1:
        raise MergeError(
            f"one thread needs {(OVERHEAD + each) / 1e9:.2f} GB, more than --max-memory: raise it"
            + (", or leave the largest layers out of the statistics" if plan.recipe.merge_method == "regmean" else "")
        )
    return int(min(wanted, fitting))


def _memory(output: Output) -> int:
    """Anonymous bytes that merging one tensor takes, about."""
    columns = output.tensor.shape[-1] if output.tensor.shape else 1
    if output.method == "regmean" and len(output.tensor.shape) == 2:
        return 8 * columns * columns + 4 * 256 * columns * 8
    masks = output.tensor.elements // 8 * len(output.inputs) if output.parameters.get("rescale") else 0
    return 4 * max(PIECE, columns) * (2 * len(output.origins) + PIECE_ARRAYS) + masks


class Executor:
    """Runs tensors of a plan on threads; `arrays` says on which device."""

    def __init__(self, plan: Plan, arrays: Arrays, threads: int) -> None:
        self.plan, self.threads, self._arrays = plan, threads, arrays
        self._stop = threading.Event()
        _reuse_freed_memory()
        self._axes = _alignment(plan)
        self._extra = self._survey()

    def run(
        self, function: Callable[[Output], None], outputs: Sequence[Output], advance: Callable[[int], None]
    ) -> None:
        """The function on every tensor, the largest first, so that no thread is left alone with one at the end."""
        ordered = sorted(outputs, key=lambda output: -output.tensor.bytes)

        def job(place: int) -> int:
            for ahead in ordered[place + 1 : place + 1 + self.threads]:
                self._fetch(ahead)
            function(ordered[place])
            return ordered[place].tensor.bytes

        for done in self._over(job, range(len(ordered))):
            advance(done)

    def write(self, output: Output, writer: Writer) -> None:
        """Merge one tensor into its place."""
        at = 0
        for values in self.pieces(output):
            stored, finite = self._arrays.store(values, output.tensor.dtype)
            if not finite:
                raise MergeError(f"{output.name} would hold NaN or inf in {output.tensor.dtype}: look at its sources")
            writer.put(output.name, at, stored)
            at += stored.size

    def pieces(self, output: Output) -> Iterator[Any]:
        """The merged tensor's pieces, on the device."""
        parameters = {**output.parameters, **self._extra.get(output.name, {})}
        parameters = {key: value for key, value in parameters.items() if key != "statistics"}
        for values in run(METHODS[output.method], self.inputs(output), parameters):
            if self._stop.is_set():
                raise _Stopped
            yield values

    def inputs(self, output: Output) -> Inputs:
        """What the method of a tensor sees."""
        sources = {origin: self._source(origin) for origin in output.origins}
        if self.plan.vocabulary and architecture.is_vocabulary(output.name):
            sources = self._rows(output.name, sources, self.plan.vocabulary)
        return Inputs(
            output.name,
            [sources[origin] for origin in output.inputs],
            None if output.base is None else sources[output.base],
            self._statistics(output),
            self.plan.recipe.seed,
            self._arrays,
            PIECE if self._arrays is kernels else GPU_PIECE,
        )

    def check_statistics(self, journal: Journal | None) -> None:
        """Raises MergeError for statistics of other weights than those that are merged."""
        hashes = self.digests(card.weight_files(self.plan), journal)
        for path, name in self.plan.measured:
            model = self.plan.models[name]
            if model.adapter:
                raise MergeError(f"{path} cannot be of {name}: merge the adapter into a folder, and measure that")
            self.plan.statistics[path].check_model(name, model.checkpoint.sha256_of(hashes))

    def digests(self, paths: Sequence[Path], journal: Journal | None) -> dict[Path, str]:
        """The sha256 of files; a file is hashed again only when its size or time changed."""
        stamps = {path: checkpoints.stamp(path) for path in paths}
        found = {path: journal.known("sha256", stamp) if journal else None for path, stamp in stamps.items()}
        missing = [path for path, digest in found.items() if digest is None]
        for path, digest in zip(missing, self._over(checkpoints.sha256, missing), strict=True):
            found[path] = digest
            if journal:
                journal.keep("sha256", stamps[path], digest, 0)
        return {path: str(digest) for path, digest in found.items()}

    def _rows(self, name: str, sources: Mapping[Origin, Source], vocabulary: Vocabulary) -> dict[Origin, Source]:
        """The tables of a tensor with a row a token, by the merged vocabulary."""
        tables = {origin.model: source for origin, source in sources.items()}
        for other in vocabulary.own:
            # Rows of models that this tensor is not merged of may stand in, as with slices.
            model = self.plan.models[other]
            own = name if name in model.tensors else _table(model, name)
            if other not in tables and own:
                tables[other] = self._source(Origin(other, own))
        return {
            origin: Rows(source, vocabulary.own[origin.model], vocabulary.stand_ins, tables, vocabulary.rows)
            for origin, source in sources.items()
        }

    def _source(self, origin: Origin) -> Source:
        model = self.plan.models[origin.model]
        label = f"{model.checkpoint.folder}: {origin.tensor}"
        adapter = model.adapter
        source: Source
        if adapter and origin.tensor in adapter.whole:
            source = Stored(adapter.file, adapter.whole[origin.tensor], f"{adapter.folder}: {origin.tensor}")
        else:
            source = Stored(model.checkpoint, origin.tensor, label)
        if adapter and (update := adapter.update(origin.tensor)):
            source = Adapted(source, update)
        if origin.model in self._axes:
            source = Permuted(source, self._axes[origin.model][origin.tensor])
        return source

    def _statistics(self, output: Output) -> list[Source | None]:
        """Of every input, or of none: those of tensors that nobody measured are None."""
        paths = output.parameters.get("statistics")
        if paths is None:
            return [None] * len(output.inputs)
        stores = [self.plan.statistics[path] for path in paths]
        having = [origin.tensor in store.tensors for store, origin in zip(stores, output.inputs, strict=True)]
        if any(having) and not all(having):
            raise MergeError(
                f"{output.name} is in {paths[having.index(True)]} and not in {paths[having.index(False)]}: measure "
                "both on the same tensors"
            )
        if not all(having):
            return [None] * len(output.inputs)
        found: list[Source | None] = []
        vocabulary = self.plan.vocabulary
        for store, origin in zip(stores, output.inputs, strict=True):
            source: Source = Stored(store, origin.tensor, f"{store.path}: {origin.tensor}")
            if vocabulary and store.kind == "fisher" and architecture.is_vocabulary(output.name):
                # On a token that it does not know a model does not depend.
                nothing = dict.fromkeys(vocabulary.stand_ins, ())
                source = Rows(source, vocabulary.own[origin.model], nothing, {}, vocabulary.rows)
            found.append(source)
        return found

    def _survey(self) -> dict[str, Mapping[str, Any]]:
        """What methods that look at the whole model first learnt of each tensor."""
        found: dict[str, Mapping[str, Any]] = {}
        for name in dict.fromkeys(output.method for output in self.plan.outputs):
            if survey := METHODS[name].survey:
                outputs = [output for output in self.plan.outputs if output.method == name]
                learnt = survey([(self.inputs(output), output.parameters) for output in outputs], self._over)
                found |= {output.name: each for output, each in zip(outputs, learnt, strict=True)}
        return found

    def _fetch(self, output: Output) -> None:
        for origin in output.origins:
            model = self.plan.models[origin.model]
            if origin.tensor in model.checkpoint.tensors:
                model.checkpoint.fetch(origin.tensor)

    def _over(self, function: Callable[[Any], T], items: Sequence[Any]) -> Iterator[T]:
        """A map on all threads, results in order; the first failure, or Ctrl-C, ends what the others do."""
        with ThreadPoolExecutor(self.threads) as pool:
            futures = [pool.submit(self._guarded, function, item) for item in items]
            try:
                yield from (future.result() for future in futures)
            except BaseException as exc:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                if isinstance(exc, GeneratorExit):  # the reader failed
                    raise
                raise _cause(futures) from None

    def _guarded(self, function: Callable[[Any], T], item: Any) -> T:
        if self._stop.is_set():
            raise _Stopped
        try:
            return function(item)
        except BaseException:
            self._stop.set()
            raise


def _table(model: Model, name: str) -> str | None:
    """The table of a model for an output of a name that it has not: an expert of a mixture, a head that is tied."""
    if architecture.is_head(name):
        return model.head if model.head in model.tensors else model.embeddings
    return model.embeddings if architecture.is_embedding(name) else None


def _reuse_freed_memory() -> None:
    """Keep what a piece gives back for the next: glibc returns it to the system, which clears every page anew."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        for parameter, size in ((trim_threshold, 1 << 28), (top_pad, 1 << 24), (mmap_threshold, 1 << 25)):
            mallopt(parameter, size)


def _cause(futures: Sequence[Future[Any]]) -> BaseException:
    """The failure that stopped the others; Ctrl-C when none did."""
    failures = [future.exception() for future in futures if future.done() and not future.cancelled()]
    return next((each for each in failures if each is not None and not isinstance(each, _Stopped)), KeyboardInterrupt())


def _alignment(plan: Plan) -> dict[str, Axes]:
    """For every model but the base, or the first, the order of its units that meets that one's."""
    if not plan.recipe.align:
        return {}
    from builder.merge import align

    if plan.statistics:
        raise MergeError("align: statistics are of units in their own order: write the aligned models, measure those")
    reference = plan.models[plan.recipe.base_model or plan.recipe.references()[0]]
    merged = {origin.model for output in plan.outputs for origin in output.origins}
    others = [model for name, model in plan.models.items() if name in merged and model is not reference]
    if any(model.adapter for model in [reference, *others]):
        raise MergeError("align: a model with an adapter cannot be aligned; merge the adapter into a folder first")
    return {model.name: align.match(model.checkpoint, reference.checkpoint, seed=plan.recipe.seed) for model in others}
