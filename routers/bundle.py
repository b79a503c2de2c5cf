"""THE artifact: the folder that the builder writes and the service reads.

    manifest.json        Manifest below, written last; a folder without one is not a bundle
    router.safetensors   `router.*`: the router's arrays; `features.*`: embeddings (f16, [V, D]) and mean (f32, [D]);
                         its metadata name the experts, the kinds and the tokenizer that it was fitted for
    tokenizer.json       the features' tokenizer
    encoder/             instead of embeddings and tokenizer: a model in sentence-transformers' layout, e.g. a trunk
    routing.jsonl        the prompts that the router was fitted on, with every expert's score: an estimate's evidence,
                         and what a newcomer is measured by
    build.json           how the bundle came about: similarities, clusters, every merge tried (builder/record.py)
    experts/<name>/      one whole model each, in the layout that transformers, vLLM and llama.cpp's converter load

No pickle, no absolute path, no time stamp. Unknown fields and other format numbers are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tokenizers import Tokenizer

from routers.base import Router
from routers.errors import BundleError
from routers.estimators import ROUTERS
from routers.features import Features, TokenEmbeddings
from routers.policy import Calibration, Policy
from routers.prompt import PromptRouter
from routers.scorecard import Scorecard

FORMAT: Final = 2
MANIFEST = "manifest.json"
ROUTER = "router.safetensors"
TOKENIZER = "tokenizer.json"
ENCODER = "encoder"
ROUTING = "routing.jsonl"
RECORD = "build.json"
EXPERTS = "experts"


class Strict(BaseModel):
    """Data that is written once and refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or PurePosixPath(path).is_absolute() or ".." in parts or "\\" in path:
        raise ValueError(f"{path!r} is not a path inside the bundle")
    return path


Inside = Annotated[str, AfterValidator(_inside)]
ExpertName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Digest(Strict):
    """A file's size and hash."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Source(Strict):
    """A model that an expert was made of; `weights` is the digest of its weight files."""

    model: str
    source: str
    revision: str | None
    weights: str
    coefficient: float


class Expert(Strict):
    """One whole model of the bundle; `parameters` are those that a token runs through."""

    name: ExpertName
    method: str
    sources: tuple[Source, ...] = Field(min_length=1)
    subjects: tuple[str, ...] = ()
    scores: dict[str, float] = {}
    context_window: int = Field(gt=0)
    parameters: int = Field(default=0, ge=0)
    files: dict[Inside, Digest]


class RouterEntry(Strict):
    """Which router, and its policy (routers/policy.py); its arrays are in router.safetensors."""

    kind: str
    k: int = Field(ge=1)
    cost_weight: float = Field(default=0.0, ge=0)
    calibration: tuple[float, float] | None = None
    threshold: float = Field(default=0.0, ge=0, le=1)


class FeaturesEntry(Strict):
    """What turns a prompt into a vector: a model's token embeddings, or an encoder's states.

    layers: of the model, that an encoder which is its trunk has; 0 is an encoder of its own.
    """

    kind: Literal["token-embeddings", "encoder"] = "token-embeddings"
    model: str
    dimension: int = Field(gt=0)
    layers: int = Field(default=0, ge=0)


class RoutingRow(Strict):
    """A prompt that the router was fitted on, its task, and every expert's score."""

    task: str
    prompt: str
    scores: dict[str, float]


class Manifest(Strict):
    """All that a reader needs to know of a bundle before it opens anything else.

    inputs_sha256: of the zoo's choices and the weights of its models; a build with the same is free.
    scorecard: of the router that is published; scorecards: of every router, cross-validated on the routing set.
    """

    format: Literal[2] = FORMAT
    zoo: str
    inputs_sha256: str
    seed: int
    default: ExpertName
    experts: tuple[Expert, ...] = Field(min_length=1)
    router: RouterEntry
    features: FeaturesEntry
    scorecard: Scorecard | None = None
    scorecards: dict[str, Scorecard] = {}
    files: dict[Inside, Digest]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts, in order."""
        return tuple(expert.name for expert in self.experts)


@dataclass(frozen=True)
class Bundle:
    """A bundle as read: its manifest, and its routing ready to use."""

    path: Path
    manifest: Manifest
    router: PromptRouter

    def folder(self, expert: str) -> Path:
        """Where an expert's model is."""
        return self.path / EXPERTS / expert

    @cached_property
    def routing(self) -> list[RoutingRow]:
        """The prompts that the router was fitted on, by the numbers that its evidence has. Raises BundleError."""
        _check(self.path, ROUTING, self.manifest.files.get(ROUTING), hashed=True)
        lines = (self.path / ROUTING).read_text("utf-8").splitlines()
        return [RoutingRow.model_validate_json(line) for line in lines]


def write(path: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder whose other files are already there; the last step of a build."""
    partial = path / f"{MANIFEST}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path / MANIFEST)


def save_router(path: Path, router: Router, features: Features) -> None:
    """Write router.safetensors into the folder `path`, where the features' other files are already."""
    arrays: dict[str, np.ndarray] = {f"router.{name}": array for name, array in router.arrays().items()}
    arrays |= {f"features.{name}": array for name, array in features.arrays().items()}
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    told = _fitted_for(path, router.kind, router.experts, features.kind)
    # One key: safetensors writes several in an order of its own, another in every process.
    (path / ROUTER).write_bytes(save(whole, {"fitted_for": json.dumps(told)}))


def save_routing(path: Path, rows: Iterable[RoutingRow]) -> None:
    """Write routing.jsonl into the folder `path`."""
    lines = [json.dumps(row.model_dump(), ensure_ascii=False) for row in rows]
    (path / ROUTING).write_text("".join(f"{line}\n" for line in lines), "utf-8")


def feature_files(path: Path, kind: str) -> list[str]:
    """The features' files beside the router's, as the manifest names them."""
    if kind == "token-embeddings":
        return [TOKENIZER]
    return sorted(str(file.relative_to(path)) for file in (path / ENCODER).rglob("*") if file.is_file())


def read(path: Path) -> Bundle:
    """The bundle in the folder `path`.

    The manifest, the router's files by hash, and the experts' files by size are checked; `verify` hashes everything.
    Raises BundleError.
    """
    manifest = read_manifest(path)
    for name in (ROUTER, *_own_files(manifest)):
        _check(path, name, manifest.files.get(name), hashed=True)
    for name, digest in _expert_files(manifest):
        _check(path, name, digest, hashed=False)
    return Bundle(path, manifest, _prompt_router(path, manifest))


def read_manifest(path: Path) -> Manifest:
    """The manifest alone. Raises BundleError for a missing, malformed or foreign one."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        number = json.loads(text).get("format")
        if number != FORMAT:
            raise BundleError(f"{path} is a bundle of format {number!r}, this release reads {FORMAT}: build it again")
        manifest = Manifest.model_validate_json(text)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise BundleError(f"no {MANIFEST} in {path}: did the build finish? (builder build --out {path})") from exc
    except OSError as exc:
        raise BundleError(
            f"{path / MANIFEST} cannot be read ({exc.strerror}): is it a file, and yours to read?"
        ) from exc
    except (ValidationError, ValueError, AttributeError) as exc:
        raise BundleError(f"{path / MANIFEST} is not a manifest: {_first_line(exc)}") from exc
    if manifest.router.kind not in ROUTERS:
        raise BundleError(f"{path} has a router of kind {manifest.router.kind!r}; known: {', '.join(ROUTERS)}")
    if manifest.default not in manifest.names:
        raise BundleError(f"{path} has no expert {manifest.default!r}, its default; it has {', '.join(manifest.names)}")
    if manifest.router.k > len(manifest.experts):
        raise BundleError(f"{path} routes to {manifest.router.k} experts and has {len(manifest.experts)}")
    return manifest


def verify(path: Path) -> Iterator[str]:
    """Hash every file that the manifest names; yields each path once it is found good. Raises BundleError."""
    manifest = read_manifest(path)
    for name, digest in [*manifest.files.items(), *_expert_files(manifest)]:
        _check(path, name, digest, hashed=True)
        yield name


def digest(path: Path) -> Digest:
    """Size and hash of a file."""
    with path.open("rb") as file:
        return Digest(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _expert_files(manifest: Manifest) -> list[tuple[str, Digest]]:
    return [
        (f"{EXPERTS}/{expert.name}/{name}", digest)
        for expert in manifest.experts
        for name, digest in expert.files.items()
    ]


def _check(path: Path, name: str, expected: Digest | None, *, hashed: bool) -> None:
    if expected is None:
        raise BundleError(f"the manifest of {path} does not list {name}: build it again")
    file = path / name
    try:
        size = file.stat().st_size
        if size != expected.bytes:
            raise BundleError(f"{file} has {size} bytes, not {expected.bytes}: truncated? Copy the bundle again")
        if hashed and digest(file).sha256 != expected.sha256:
            raise BundleError(f"{file} is not the file that was built (sha256 differs): copy the bundle again")
    except FileNotFoundError as exc:
        raise BundleError(f"{file} is missing: copy the bundle again, or build it again") from exc
    except OSError as exc:
        raise BundleError(f"{file} cannot be read ({exc.strerror}): is it a file, and yours to read?") from exc


def _own_files(manifest: Manifest) -> list[str]:
    if manifest.features.kind == "token-embeddings":
        return [TOKENIZER]
    return [name for name in manifest.files if name.startswith(f"{ENCODER}/")]


def _fitted_for(path: Path, kind: str, experts: Sequence[str], features: str) -> dict[str, str]:
    """What a router's file says of itself, so that another bundle's is known by it."""
    told = {"kind": kind, "experts": json.dumps(list(experts)), "features": features}
    if features == "token-embeddings":
        told["tokenizer"] = digest(path / TOKENIZER).sha256
    return told


def _prompt_router(path: Path, manifest: Manifest) -> PromptRouter:
    file_name = path / ROUTER
    try:
        with safe_open(file_name, framework="numpy") as file:
            told = json.loads((file.metadata() or {}).get("fitted_for", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safe_open is no dict
    except (SafetensorError, OSError) as exc:
        raise BundleError(f"{file_name} is not a router's file ({exc}): build it again") from exc
    for what, value in _fitted_for(path, manifest.router.kind, manifest.names, manifest.features.kind).items():
        if told.get(what) != value:
            raise BundleError(
                f"{file_name} was fitted for the {what} {told.get(what)}, this bundle has {value}: build it again"
            )
    stored = {name.removeprefix("router."): array for name, array in arrays.items() if name.startswith("router.")}
    router = ROUTERS[manifest.router.kind].from_arrays(manifest.names, stored)
    features = _features(path, manifest, arrays)
    for owner, dimension in (("features", features.dimension), ("a router", router.dimension)):
        if dimension not in (None, manifest.features.dimension):
            raise BundleError(
                f"{file_name} has {owner} of {dimension} dimensions, the manifest says "
                f"{manifest.features.dimension}: build it again"
            )
    return PromptRouter(features, router, policy(manifest))


def _features(path: Path, manifest: Manifest, arrays: Mapping[str, NDArray[Any]]) -> Features:
    own = {name.removeprefix("features."): array for name, array in arrays.items() if name.startswith("features.")}
    try:
        if manifest.features.kind == "encoder":
            from routers.encoder import Encoder  # torch, which token embeddings do without

            return Encoder.from_arrays(path / ENCODER, own)
        tokenizer = Tokenizer.from_file(str(path / TOKENIZER))
        return TokenEmbeddings(tokenizer, own["embeddings"], own["mean"])
    except KeyError as exc:
        raise BundleError(
            f"{path / ROUTER} is not a router's file (no features.{exc.args[0]}): build it again"
        ) from exc


def policy(manifest: Manifest) -> Policy:
    """How the manifest's estimates become decisions; an expert's cost is its share of the most active parameters."""
    most = max(expert.parameters for expert in manifest.experts)
    entry = manifest.router
    return Policy(
        manifest.default,
        entry.k,
        entry.cost_weight,
        {expert.name: expert.parameters / most for expert in manifest.experts} if most else {},
        {expert.name: expert.context_window for expert in manifest.experts},
        None if entry.calibration is None else Calibration(*entry.calibration),
        entry.threshold,
    )


def _first_line(exc: Exception) -> str:
    if isinstance(exc, ValidationError):
        error = exc.errors()[0]
        return f"{'.'.join(str(part) for part in error['loc'])}: {error['msg']}"
    return str(exc)
