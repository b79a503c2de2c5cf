"""Tasks of lm-evaluation-harness, by name or as YAML with local files: its prompts, filters and metrics, our scoring.

The harness runs what models write in the builder's own process; here such programs meet the sandbox instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from builder.config import is_task_file
from builder.errors import ZooError
from builder.proxy import programs
from builder.proxy.requests import Answer, Choices, Generation, Likelihood, Request, Rolling
from builder.proxy.task import Sample, Spec, Task
from routers.errors import ModelGlueError

MAX_TOKENS = 256
"""How long an answer may be where the task does not say."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the longest answer; the first counts."""
KNOWN = {"until", "do_sample", "temperature", *LIMITS}
NEUTRAL = {"top_p", "top_k", "min_p", "typical_p"}
"""Settings of sampling, of no effect on a greedy answer."""


def knows(name: str) -> bool:
    """Whether a name is a task, group or tag of the harness, one that ships with us, or a YAML file."""
    return _file(name) is not None or (not is_task_file(name) and _is_named(name) and name in _manager().all_tasks)


def load(spec: Spec) -> Task:
    """The samples of a task, or of all tasks of a group. Raises ZooError where its data cannot be had."""
    parts = _tasks(spec.name)
    samples: list[Sample] = []
    facts: list[Any] = []
    for part in parts:
        _check(part)
        if spec.fewshot is not None:
            part.set_config(key="num_fewshot", value=spec.fewshot)
        part.set_fewshot_seed(spec.seed)
        for number, doc in spec.share(_documents(part))[: spec.limit]:
            made, said = _sample(part, number, doc)
            samples.append(made)
            facts.append(said)
    first = parts[0]
    digest = hashlib.sha256(json.dumps([spec.name, facts], default=str, sort_keys=True).encode()).hexdigest()
    runs_code = any(part.config.unsafe_code for part in parts)
    name = first.config.task if is_task_file(spec.name) else spec.name
    return Task(name, tuple(samples), _primary(first), digest, runs_code)


def sources(name: str) -> tuple[tuple[str, ...], ...]:
    """Which files and splits a task's samples are of. Raises ZooError where they cannot be had."""
    return tuple(dict.fromkeys(_source(part) for part in _tasks(name)))


def _source(part: Any) -> tuple[str, ...]:
    config = part.config
    split = config.test_split if part.has_test_docs() else config.validation_split
    data = json.dumps((config.dataset_kwargs or {}).get("data_files"), sort_keys=True)
    return (str(config.dataset_path), str(config.dataset_name), data, str(split))


@cache
def _manager() -> Any:
    """The harness's index of everything; it parses thousands of files, so tasks are looked for without it first."""
    from lm_eval.tasks import TaskManager

    _hush()
    return TaskManager()


@cache
def _loader() -> Any:
    """A manager without an index, which loads what it is given."""
    from lm_eval.tasks import TaskManager

    _hush()
    return TaskManager(include_defaults=False)


def _hush() -> None:
    for name in ("lm_eval", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


@cache
def _file(name: str) -> Path | None:
    """The YAML file of a task: of the user's, of ours, or of the harness."""
    if is_task_file(name):
        path = Path(name).expanduser()
        return path if path.is_file() else None
    says = re.compile(rf"^task:\s*[\"']?{re.escape(name)}[\"']?\s*$".encode(), re.MULTILINE)
    return next((path for path, text in _files() if says.search(text)), None)


def _is_named(name: str) -> bool:
    """Whether any file of the harness says the name, as a group's or a tag's."""
    return any(name.encode() in text for _, text in _files())


def _files() -> Iterator[tuple[Path, bytes]]:
    """Every task file, ours first."""
    import lm_eval

    roots = [Path(str(resources.files("builder.proxy"))) / "harness_tasks", Path(lm_eval.__file__).parent / "tasks"]
    return ((path, path.read_bytes()) for root in roots for path in sorted(root.rglob("*.yaml")))


@cache
def _tasks(name: str) -> list[Any]:
    """The harness's task objects behind a name, their data loaded."""
    import datasets

    with _quiet(), _our_code_eval():
        try:
            path = _file(name)
            found = (_loader().load(_said(path)) if path else _manager().load(name))["tasks"]
        except (OSError, ValueError, KeyError, ImportError, datasets.exceptions.DatasetsError) as exc:
            reason = " ".join(str(exc).split())[:300]
            raise ZooError(
                f"the task {name} cannot be loaded ({type(exc).__name__}: {reason}): its data set must be in the "
                "Hugging Face cache or within reach; a YAML file of your own may name local files (dataset_path: json)"
            ) from exc
    return list(found.values())


def _said(path: Path) -> dict[str, Any]:
    """A YAML task whose relative data files count from its own folder."""
    from lm_eval.tasks._yaml_loader import load_yaml

    said: dict[str, Any] = load_yaml(path)
    files = (said.get("dataset_kwargs") or {}).get("data_files")
    if files is not None:
        said["dataset_kwargs"] = {**said["dataset_kwargs"], "data_files": _placed(files, path.parent.resolve())}
    return said


def _placed(files: Any, folder: Path) -> Any:
    if isinstance(files, Mapping):
        return {split: _placed(each, folder) for split, each in files.items()}
    if isinstance(files, list):
        return [_placed(each, folder) for each in files]
    return files if "://" in files else str(folder / Path(files).expanduser())


def _check(part: Any) -> None:
    """Raises ZooError for what cannot be scored sample by sample, or not greedily."""
    if getattr(part, "MULTIMODAL", False):
        raise ZooError(f"{part.task_name} shows pictures or plays sounds: it cannot score language models of text")
    if part.OUTPUT_TYPE == "generate_until":
        try:
            generation("", part.config.generation_kwargs or {})
        except ModelGlueError as exc:
            raise ZooError(f"{part.task_name}: {exc}") from exc


def _documents(part: Any) -> list[tuple[int, Any]]:
    """Every document with its number; of equal ones the first."""
    seen: dict[str, tuple[int, Any]] = {}
    for number, doc in enumerate(part.eval_docs):
        seen.setdefault(json.dumps(doc, default=str, sort_keys=True), (number, doc))
    return list(seen.values())


def _sample(part: Any, number: int, doc: Any) -> tuple[Sample, Any]:
    """A document as a sample, and what decides its score."""
    context = part.fewshot_context(doc, num_fewshot=part.config.num_fewshot or 0, gen_prefix=part.doc_to_prefix(doc))
    made = part.construct_requests(doc=doc, ctx=context, metadata=(part.task_name, number, 1))
    instances = made if isinstance(made, list) else [made]
    requests = tuple(_requests(instances))

    def score(answers: Sequence[Answer]) -> dict[str, float]:
        return _metrics(part, doc, instances, answers)

    prompt = str(part.doc_to_text(doc))
    target = part.doc_to_target(doc)
    return Sample(prompt, requests, score), [repr(requests), str(target)]


def _requests(instances: Sequence[Any]) -> Iterator[Request]:
    """The harness's requests as ours: continuations of one context belong together."""
    kind = instances[0].request_type
    if kind == "loglikelihood":
        for context, group in groupby(instances, key=lambda each: each.args[0]):
            yield Choices(context, tuple(each.args[1] for each in group))
    elif kind == "loglikelihood_rolling":
        yield from (Rolling(each.args[0]) for each in instances)
    else:
        yield from (generation(*each.args) for each in instances)


def generation(prompt: str, options: dict[str, Any]) -> Generation:
    """The request of a task's generation_kwargs. Raises ModelGlueError for what is not greedy decoding."""
    sampled = options.get("do_sample")
    if sampled is not False and float(options.get("temperature", 1.0 if sampled else 0.0)) > 0:
        raise ModelGlueError("a task wants sampled answers, and ours are greedy: set do_sample: false in its YAML file")
    neutral = NEUTRAL | {"num_beams"} if options.get("num_beams") == 1 else NEUTRAL
    unknown = sorted(set(options) - KNOWN - neutral)
    if unknown:
        raise ModelGlueError(f"a task sets generation_kwargs.{unknown[0]}, which our scorer does not know")
    until = options.get("until") or ()
    limit = next((options[name] for name in LIMITS if options.get(name) is not None), MAX_TOKENS)
    return Generation(prompt, (until,) if isinstance(until, str) else tuple(until), int(limit))


def _metrics(part: Any, doc: Any, instances: Sequence[Any], answers: Sequence[Answer]) -> dict[str, float]:
    flat: list[Any] = []
    for answer in answers:
        flat += answer if isinstance(answer, tuple) else [answer]
    responses = [_response(part, answer) for answer in flat]
    found: dict[str, float] = {}
    for filtering in part._filters:
        for instance, response in zip(instances, responses, strict=True):
            instance.resps = [response]
        filtering.apply(list(instances))
        results = [instance.filtered_resps[filtering.name] for instance in instances]
        for metric, value in part.process_results(doc, results).items():
            if isinstance(value, int | float):
                found[_named(part, metric, filtering.name)] = float(value)
    if part.OUTPUT_TYPE == "multiple_choice" and isinstance(gold := part.doc_to_target(doc), int):
        right = flat[gold]
        found["log_likelihood"] = right.nats / max(right.tokens, 1)
    return found


def _response(part: Any, answer: Likelihood | str) -> Any:
    if isinstance(answer, str):
        return answer
    return answer.nats if part.OUTPUT_TYPE == "loglikelihood_rolling" else (answer.nats, answer.greedy)


def _named(part: Any, metric: str, filtering: str) -> str:
    return metric if len(part._filters) == 1 else f"{metric},{filtering}"


def _primary(part: Any) -> str:
    """The first metric of the task's list, by its first filter; pass@1 of one that counts several."""
    for metric in part._metric_fn_list:
        name = getattr(metric, "__name__", metric)
        if name == "pass_at_k":
            name = "pass@1"
        if part._higher_is_better.get(metric, True):
            return _named(part, str(name), part._filters[0].name)
    raise ZooError(f"{part.task_name} has no metric of which more is better: it cannot rank models")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import datasets

    was = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            datasets.utils.logging.enable_progress_bar()


@contextlib.contextmanager
def _our_code_eval() -> Iterator[None]:
    """While tasks are loaded, `evaluate.load("code_eval")` is ours, and tinyBenchmarks' aggregates may be missing.

    Task files ask for both at import. We never aggregate by item response theory, so its package is not needed.
    """
    import evaluate

    theirs = evaluate.load

    def load(path: str, *args: Any, **more: Any) -> Any:
        return programs.CodeEval() if path == "code_eval" else theirs(path, *args, **more)

    stands_in = importlib.util.find_spec("tinyBenchmarks") is None
    evaluate.load = load
    if stands_in:
        sys.modules["tinyBenchmarks"] = types.ModuleType("tinyBenchmarks")
    try:
        yield
    finally:
        evaluate.load = theirs
        if stands_in:
            del sys.modules["tinyBenchmarks"]
