from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Run
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import composed
from builder import mixtures, pipeline
from builder.candidate import whole
from builder.checkpoints import Checkpoint
from builder.config import Mixture, Zoo, load_zoo
from builder.errors import ZooError
from builder.explore import Explored, Found
from builder.plan import plan
from builder.progress import Quiet
from builder.proxy import tasks
from builder.proxy.bench import Bench, Place
from builder.proxy.requests import Choices
from builder.proxy.scorer import Scorer
from builder.proxy.task import Spec
from builder.record import Record
from builder.report import render
from builder.search.problem import Outcome
from builder.sources import Store
from routers import bundle
from routers.bundle import Expert

NAME = "math-code-story-chat-M-L-S"


class Heard(Quiet):
    """What a build says."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def say(self, sentence: str) -> None:
        self.sentences.append(sentence)


def said(zoo_file: Path, name: str, section: str, experts: str = '"cluster"', **changes: tuple[str, str]) -> Path:
    """A zoo file like the shared one, with a mixture section."""
    text = zoo_file.read_text("utf-8").replace("experts = 3", f"experts = {experts}")
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    file = zoo_file.with_name(f"{name}.toml")
    file.write_text(f"{text}\n[mixture]\n{section}\n", "utf-8")
    return file


def build(file: Path, folder: Path, progress: Quiet | None = None) -> Path:
    zoo = load_zoo(str(file))
    pipeline.build(zoo, folder / "bundle", Store(zoo, folder / "cache"), progress or Quiet())
    return folder / "bundle"


def tree(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def record_of(path: Path) -> Record:
    return Record.model_validate_json((path / bundle.RECORD).read_text("utf-8"))


def mixture_in(path: Path) -> Expert:
    return next(expert for expert in bundle.read_manifest(path).experts if len(expert.method) == 5)


@pytest.fixture(scope="module")
def mixed_file(zoo_file: Path) -> Path:
    return said(zoo_file, "mixed", "")


@pytest.fixture(scope="module")
def mixed(mixed_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a cluster whose mixture beats its merge; no test changes it."""
    return build(mixed_file, tmp_path_factory.mktemp("mixed"))


def test_a_mixture_that_scores_no_less_takes_the_place_of_the_clusters_merge(
    mixed: Path, micro_zoo: dict[str, Path]
) -> None:
    (expert,) = bundle.read_manifest(mixed).experts
    assert (expert.name, expert.method) == (NAME, "M-L-S")
    assert [(each.model, each.coefficient) for each in expert.sources] == [
        (name, 0.25) for name in ("math", "code", "story", "chat")
    ]
    assert expert.context_window == 512
    # A token runs through one of the four, and the gate reads embeddings of its own.
    assert expert.parameters < 2 * sum(each.elements for each in Checkpoint(micro_zoo["math"]).tensors.values())
    assert expert.parameters > sum(each.elements for each in Checkpoint(micro_zoo["math"]).tensors.values())
    record = record_of(mixed)
    (of_cluster,) = record.mixtures
    assert of_cluster.name == NAME
    assert of_cluster.score is not None
    assert of_cluster.score.mean > record.clusters[0].score
    assert of_cluster.note.endswith("it takes its place")
    assert of_cluster.note[1:] in html.unescape(render(mixed))
    assert {each.name for each in record.candidates if each.reach is not None} == {NAME}


def test_a_mixture_that_scores_less_leaves_the_merge_and_says_so(zoo_file: Path, tmp_path: Path) -> None:
    heard = Heard()
    path = build(said(zoo_file, "less", 'mixture = "F-L-T"'), tmp_path, heard)
    (expert,) = bundle.read_manifest(path).experts
    assert expert.method == "linear"
    record = record_of(path)
    (of_cluster,) = record.mixtures
    assert of_cluster.score is not None
    assert of_cluster.score.mean < record.clusters[0].score
    assert of_cluster.note.endswith(f"the linear merge of {expert.name} stays")
    assert of_cluster.note in heard.sentences


def test_the_written_mixture_answers_as_it_was_scored(
    mixed: Path, mixed_file: Path, micro_zoo: dict[str, Path]
) -> None:
    """Scores from transformers alone: every sample by the member whom the prompt's gate chooses."""
    (expert,) = bundle.read_manifest(mixed).experts
    folder = mixed / bundle.EXPERTS / expert.name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert isinstance(model, composed.ComposedForCausalLM)
    members = [
        AutoModelForCausalLM.from_pretrained(micro_zoo[name], dtype=torch.float32).eval()
        for name in model.config.experts
    ]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    choice = 1  # more than a few continuations tell no more
    for task in ("tiny/math", "tiny/chat"):
        spec = next(each for each in _specs(mixed_file) if each.name == task)
        for sample in tasks.load(spec).samples:
            request = sample.requests[0]
            assert isinstance(request, Choices)
            prompt = tokenizer.encode(request.prompt.rstrip()).ids
            text = tokenizer.encode(request.prompt + request.continuations[choice]).ids
            weights = model.route(torch.tensor([prompt])).weights
            with torch.no_grad():
                chosen = members[int(weights[0, 0].argmax())]
                expected = _nats(chosen(torch.tensor([text])).logits, text, len(prompt))
            found = Scorer(folder, dtype=torch.float32).answer([request])[0]
            assert isinstance(found, tuple)
            assert found[choice].nats == pytest.approx(expected, abs=1e-3)


def _specs(file: Path) -> Sequence[Spec]:
    zoo = load_zoo(str(file))
    return [Spec(name, "proxy", zoo.proxy.limit, zoo.seed, None, 3) for name in zoo.proxy.tasks]


def _nats(logits: torch.Tensor, tokens: list[int], start: int) -> float:
    logs = logits[0].float().log_softmax(-1)
    return float(sum(logs[place - 1, tokens[place]] for place in range(start, len(tokens))))


def test_a_score_depends_on_nothing_but_the_prompt_and_its_continuation(mixed: Path) -> None:
    """Neither on rows beside it in a batch nor on continuations that are the same with another prompt."""
    scorer = Scorer(mixed / bundle.EXPERTS / NAME, dtype=torch.float32)
    requests = [
        Choices("Question: Ann has 12", (" apples", " apples and gets 7 more")),
        Choices("def", (" add(x, y):",)),
    ]
    # As tokens these begin with the whole of a row above, which another expert may have to tell.
    requests += [Choices("Question: Ann has 12 apples and", (" gets 7 more. How many now?",))]
    together = scorer.answer(requests)
    for request, found in zip(requests, together, strict=True):
        (alone,) = scorer.answer([request])
        assert [each.nats for each in alone] == pytest.approx([each.nats for each in found], abs=1e-4)  # type: ignore[union-attr]


def test_the_score_in_the_record_is_the_written_folders(mixed: Path, mixed_file: Path) -> None:
    measured = Bench({"it": Place(mixed / bundle.EXPERTS / NAME)}).score(whole("it"), _specs(mixed_file)).metrics
    means = {task: np.mean([each["log_likelihood"] for each in rows]) for task, rows in measured.items()}
    assert mixture_in(mixed).scores == pytest.approx(means, abs=1e-9)


def test_the_code_that_loads_it_elsewhere_is_in_the_manifest(mixed: Path) -> None:
    files = mixture_in(mixed).files
    assert {"configuration_composed.py", "modeling_composed.py", "config.json", "model.safetensors"} <= set(files)
    assert {*bundle.verify(mixed), bundle.MANIFEST} == set(tree(mixed))


def test_the_same_zoo_gives_the_same_bytes(mixed: Path, mixed_file: Path, tmp_path: Path) -> None:
    assert tree(build(mixed_file, tmp_path)) == tree(mixed)


def test_the_bundle_holds_no_path_of_this_machine(mixed: Path, mixed_file: Path) -> None:
    texts = [file for file in mixed.rglob("*") if file.suffix in (".json", ".md", ".yaml", ".py")]
    assert not [file for file in texts if str(mixed_file.parent) in file.read_text("utf-8")]


def test_a_mixture_competes_with_all_others_where_experts_are_counted(zoo_file: Path, tmp_path: Path) -> None:
    heard = Heard()
    path = build(said(zoo_file, "counted", 'mixture = "B-L-S"\nhybrid_layers = 1', experts="2"), tmp_path, heard)
    record = record_of(path)
    candidates = [each.name for each in record.candidates]
    assert candidates[0] == "math-code-story-chat-B-L-S"
    assert {"math", "code", "story", "chat"} < set(candidates)
    best = max(record.candidates, key=lambda each: each.score.mean)
    assert best.reach is not None


def test_other_prompts_make_another_candidate(mixed_file: Path) -> None:
    zoo = load_zoo(str(mixed_file))
    other = zoo.model_copy(update={"subjects": {**zoo.subjects, "math": ("What is 3 plus 4?",)}})
    assert candidate(zoo).key != candidate(other).key
    assert candidate(zoo).key == candidate(zoo.model_copy(update={"seed": 8})).key  # prompts alone make these gates
    trained = Mixture(mixture="M-M-S")
    assert candidate(zoo, trained).key != candidate(zoo.model_copy(update={"seed": 8}), trained).key


def candidate(zoo: Zoo, mixture: Mixture | None = None) -> Any:
    return mixtures.candidate_of(zoo, mixture or Mixture(), ("math", "code"), mixed=False)


def test_a_mixture_never_takes_the_name_of_another_candidate(mixed_file: Path) -> None:
    made = candidate(load_zoo(str(mixed_file)))
    found = {0: mixtures.Mixed(made.members, made, None, False, "")}
    assert mixtures.named(found, ["math-code"]) == {"math-code-M-L-S": made}
    assert mixtures.named(found, ["math-code-M-L-S"]) == {"math-code-M-L-S-mixed": made}


def test_models_of_one_subject_are_told_to_share_a_gate(zoo_file: Path, tmp_path: Path) -> None:
    chat = ('source = "./chat", subject = "chat"', 'source = "./chat", subject = "story"')
    heard = Heard()
    build(said(zoo_file, "shared", "", chat=chat), tmp_path, heard)
    assert any(
        "story, chat have the subject story and so the same gate: the first one is preferred" in each
        for each in heard.sentences
    )


def test_a_cluster_that_does_not_mix_keeps_its_merge_and_says_why(zoo_file: Path, tmp_path: Path) -> None:
    heard = Heard()
    path = build(said(zoo_file, "deep", "hybrid_layers = 2"), tmp_path, heard)
    assert bundle.read_manifest(path).experts[0].method == "linear"
    (of_cluster,) = record_of(path).mixtures
    assert (of_cluster.name, of_cluster.score) == (None, None)
    assert "is left out: hybrid_layers 2: the models have 2 layers" in of_cluster.note
    assert of_cluster.note in heard.sentences


def test_a_lone_model_has_no_mixture(mixed_file: Path) -> None:
    zoo = load_zoo(str(mixed_file))
    alone = Explored((), (Found(("math",), Outcome(whole("math"), np.zeros(1)), (), None),))
    assert mixtures.mix(zoo, {}, None, alone) == {}  # type: ignore[arg-type]  # asked nothing


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ("hybrid_layer = 1", r"unknown key mixture\.hybrid_layer \(did you mean 'hybrid_layers'\?\)"),
        ('mixture = "M-L-T"', r"mixture\.mixture: Input should be 'F-L-T'"),
        ('gate = "mlp"', "M-L-S has linear gates: mlp belongs to M-M-S"),
        ('mixture = "B-M-S"\ngate = "random"', "B-M-S has MLP gates, which are trained: leave gate out"),
        ("experts_per_token = 0", r"mixture\.experts_per_token"),
    ],
)
def test_a_wrong_choice_is_refused_with_a_sentence(zoo_file: Path, section: str, sentence: str) -> None:
    file = said(zoo_file, "wrong", section)
    with pytest.raises(ZooError, match=sentence):
        load_zoo(str(file))


def test_the_plan_has_the_step_and_room_for_it(zoo_file: Path, mixed_file: Path, tmp_path: Path, run: Run) -> None:
    without, zoo = load_zoo(str(zoo_file)), load_zoo(str(mixed_file))
    planned = plan(zoo, Store(zoo, tmp_path))
    step = next(step for step in planned.steps if "M-L-S" in step)
    assert step.startswith("mix every cluster's models as M-L-S and score the mixtures")
    plain = plan(without.model_copy(update={"experts": "cluster"}), Store(without, tmp_path))
    sizes = [model.bytes or 0 for model in planned.models]
    assert planned.disk == (plain.disk or 0) + sum(sizes) + max(sizes)
    assert (planned.memory or 0) > (plain.memory or 0)
    assert not any("M-L-S" in each for each in plain.steps)
    shown = run("build", "--zoo", mixed_file, "--plan")
    assert step in " ".join(shown.out.split())


def test_the_plan_is_no_less_than_what_is_written(mixed: Path, mixed_file: Path, tmp_path: Path) -> None:
    zoo = load_zoo(str(mixed_file))
    written = mixture_in(mixed).files["model.safetensors"].bytes
    assert (plan(zoo, Store(zoo, tmp_path)).disk or 0) > written
    assert json.loads((mixed / bundle.EXPERTS / NAME / "config.json").read_text("utf-8"))["level"] == "model"
