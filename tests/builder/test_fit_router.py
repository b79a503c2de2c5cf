from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from builder.config import Zoo
from builder.errors import BuildError
from builder.fit_router import subjects
from builder.routing import gate
from builder.routing.matrix import Matrix
from builder.routing.space import embeddings
from builder.zoos.tiny import corpus
from routers.features import TokenEmbeddings
from routers.policy import Policy
from routers.prompt import PromptRouter

ZOO = Zoo.model_validate(
    {
        "name": "z",
        "models": [
            {"id": "a", "source": "o/a", "subject": "math"},
            {"id": "b", "source": "o/b", "subject": "code"},
            {"id": "c", "source": "o/c", "subject": "code"},
            {"id": "d", "source": "o/d", "subject": "chat"},
        ],
        "subjects": {
            "math": ["Question: Ann has 12 apples and gets 7 more. How many now? Answer:"],
            "code": ["def add(x, y):\n    return x + y", "def clip(a, b):\n    if a > b:\n        return a"],
            "chat": ["User: how can I bake bread? Assistant: to bake bread, it is best to"],
        },
        "proxy": {"tasks": ["tiny/math"]},
        "router": {"features": "a"},
    }
)
HALF = {"a": 0.5, "b": 0.5}


@pytest.fixture(scope="module")
def space(micro_zoo: dict[str, Path]) -> TokenEmbeddings:
    folder = micro_zoo["base"]
    texts = [prompt for prompts in ZOO.subjects.values() for prompt in prompts]
    return embeddings(folder, Tokenizer.from_file(str(folder / "tokenizer.json")), texts)


def test_a_subject_goes_where_its_models_weigh_most() -> None:
    experts = {"a-b": HALF, "b": {"b": 1.0}, "c-d": {"c": 0.5, "d": 0.5}}
    assert subjects(ZOO, experts, "b") == {"a-b": ("math",), "b": ("code",), "c-d": ("chat",)}


def test_a_subject_without_a_model_in_any_expert_goes_to_the_default() -> None:
    assert subjects(ZOO, {"a": {"a": 1.0}, "b": {"b": 1.0}}, "b") == {"a": ("math",), "b": ("code", "chat")}


def test_an_expert_that_wins_no_subject_shares_its_models_own() -> None:
    experts = {"b": {"b": 1.0}, "c": {"c": 1.0}, "a-d": {"a": 0.5, "d": 0.5}}
    assert subjects(ZOO, experts, "b") == {"b": ("code",), "c": ("code",), "a-d": ("math", "chat")}


def test_gates_find_the_domain_of_texts_they_never_saw(space: TokenEmbeddings) -> None:
    owned = {"x": ("math",), "y": ("code",), "z": ("chat",)}
    router = PromptRouter(space, gate.gates(owned, ZOO.subjects, space), Policy("x"))
    texts = {name: corpus.lines(domain, 30, 99) for name, domain in (("x", "math"), ("y", "code"), ("z", "chat"))}
    hits = [router.route(text).expert == name for name, lines in texts.items() for text in lines]
    assert np.mean(hits) > 0.9


def two_domains(right: bool) -> Matrix:
    """Twenty prompts of each; an expert solves its own domain, or the other one."""
    prompts = (*corpus.lines("math", 20, 99), *corpus.lines("code", 20, 99))
    scores_NE = np.repeat(np.eye(2), 20, axis=0)
    return Matrix(prompts, ("math",) * 20 + ("code",) * 20, ("x", "y"), scores_NE if right else scores_NE * 0 + 0.5)


@pytest.mark.parametrize("kind", ["auto", "linear", "ridge", "kmeans", "knn", "mlp"])
def test_a_proven_router_is_published(space: TokenEmbeddings, kind: str) -> None:
    found = gate.publish(two_domains(right=True), space, 0, kind=kind)
    assert kind in ("auto", found.router.kind)
    assert found.proven is not None
    assert found.proven.card.proven
    assert "is proven: +0.5" in found.note
    assert set(found.scorecards) == {"linear", "ridge", "kmeans", "knn", "mlp", "fixed"}
    assert found.picks == ("x",) * 20 + ("y",) * 20


def test_an_unproven_router_gives_way_to_the_fixed_one_and_it_is_said(space: TokenEmbeddings) -> None:
    found = gate.publish(two_domains(right=False), space, 0)
    assert found.router.kind == "fixed"
    assert "is not proven" in found.note


def test_gates_of_the_wrong_prompts_are_found_out(space: TokenEmbeddings) -> None:
    crossed = gate.gates({"x": ("code",), "y": ("math",)}, ZOO.subjects, space)
    found = gate.publish(two_domains(right=True), space, 0, kind="linear", prompts=crossed)
    assert found.router.kind == "fixed"


def test_the_fixed_router_can_be_asked_for(space: TokenEmbeddings) -> None:
    found = gate.publish(two_domains(right=True), space, 0, kind="fixed")
    assert (found.router.kind, found.note.startswith("the fixed router was asked for")) == ("fixed", True)


def test_a_lone_expert_has_nothing_to_prove(space: TokenEmbeddings) -> None:
    found = gate.publish(two_domains(right=True).only(["x"]), space, 0)
    assert (found.proven, found.note) == (None, "one expert: nothing to route")


def test_a_model_without_embeddings_by_a_known_name_is_refused(tmp_path: Path) -> None:
    from builder import checkpoints
    from builder.checkpoints import Tensor

    layout = {"strange.weight": Tensor("F32", (2, 2))}
    checkpoints.write(tmp_path, layout, iter([("strange.weight", np.ones((2, 2), np.float32))]))
    with pytest.raises(BuildError, match=r"no token embeddings by a known name: set router\.features"):
        embeddings(
            tmp_path,
            Tokenizer.from_str('{"version":"1.0","model":{"type":"WordLevel","vocab":{},"unk_token":"u"}}'),
            [],
        )
