"""From the zoo's prompts to a router, and from the experts' scores to its scorecard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from builder import files
from builder.candidate import Candidate, Weights
from builder.checkpoints import Checkpoint
from builder.config import Zoo
from builder.errors import BuildError
from builder.evaluate import Evaluator
from builder.members import Members
from builder.record import RoutedRecord
from routers import bundle
from routers.base import Policy, Router
from routers.features import TokenEmbeddings
from routers.fixed import FixedRouter
from routers.linear import LinearRouter
from routers.prompt import PromptRouter
from routers.scorecard import Scorecard, scorecard


@dataclass(frozen=True, slots=True)
class Routing:
    """A published router, and what its build found."""

    router: Router
    features: TokenEmbeddings
    default: str
    subjects: dict[str, tuple[str, ...]]
    scorecard: Scorecard | None
    note: str
    items: tuple[RoutedRecord, ...]


_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embeddings.weight")


def subjects(zoo: Zoo, experts: Mapping[str, Weights], default: str) -> dict[str, tuple[str, ...]]:
    """Each subject's expert: where the subject's models weigh most, the default when they are in none.

    `experts` gives the weights of the models in each expert. An expert that wins no subject shares its models' own.
    """
    won: dict[str, list[str]] = {expert: [] for expert in experts}
    for subject in zoo.subjects:
        models = [model.id for model in zoo.models if model.subject == subject]
        shares = {expert: sum(weights.get(model, 0.0) for model in models) for expert, weights in experts.items()}
        best = max(shares, key=lambda expert: shares[expert])
        won[best if shares[best] > 0 else default].append(subject)
    own = {model.id: model.subject for model in zoo.models}
    return {
        expert: tuple(names or dict.fromkeys(own[model] for model in experts[expert])) for expert, names in won.items()
    }


def features(model: Path, tokenizer: Tokenizer, texts: Sequence[str]) -> TokenEmbeddings:
    """A model's token embeddings, centred on `texts`. Raises BuildError when it has none by a known name."""
    checkpoint = Checkpoint(model)
    names = [name for name in checkpoint.tensors if name.endswith(_EMBEDDINGS)]
    if not names:
        raise BuildError(f"{model} has no token embeddings by a known name: set router.features to another model")
    return TokenEmbeddings.centred_on(tokenizer, checkpoint.read(names[0]).astype(np.float16), texts)


def fit(zoo: Zoo, by_expert: Mapping[str, Sequence[str]], space: TokenEmbeddings) -> LinearRouter:
    """The paper's gates: a subject's prompts against those of all others."""
    vectors = {name: [space.vector(prompt) for prompt in prompts] for name, prompts in zoo.subjects.items()}
    return LinearRouter.from_vectors(by_expert, vectors)


def publish(zoo: Zoo, experts: Mapping[str, Candidate], members: Members, evaluator: Evaluator, out: Path) -> Routing:
    """Fit the zoo's router for `experts`, prove it on the routing split, and write its files into `out`."""
    default = max(experts, key=lambda name: evaluator.mean(experts[name]))
    by_expert = subjects(zoo, {name: each.weights for name, each in experts.items()}, default)
    model = members[zoo.router.features].folder
    _write_tokenizer(model, out / bundle.TOKENIZER)
    texts = [prompt for prompts in zoo.subjects.values() for prompt in prompts]
    space = features(model, Tokenizer.from_file(str(out / bundle.TOKENIZER)), texts)
    fitted = PromptRouter(space, fit(zoo, by_expert, space), Policy(default, min(zoo.router.k, len(experts))))
    items = evaluator.items("routing")
    scores_NE = np.stack([evaluator.scores(each, "routing") for each in experts.values()], axis=1)
    router, card, note = prove(fitted, [item.prompt for _, item in items], scores_NE, zoo.seed)
    bundle.save_router(out, router, space)
    published = PromptRouter(space, router, fitted.policy)
    routed = tuple(
        RoutedRecord(
            task=task,
            prompt=item.prompt,
            picked=published.route(item.prompt).expert,
            scores=dict(zip(experts, map(float, scores_E), strict=True)),
        )
        for (task, item), scores_E in zip(items, scores_NE, strict=True)
    )
    return Routing(router, space, default, by_expert, card, note, routed)


def prove(
    fitted: PromptRouter, prompts: Sequence[str], scores_NE: NDArray[np.float64], seed: int
) -> tuple[Router, Scorecard | None, str]:
    """The router to publish, its scorecard on prompts it was not fitted on, and a sentence that says why.

    A router whose gain over the best single expert is not above zero with 95 % confidence gives way to that expert.
    """
    names, kind = fitted.experts, fitted.router.kind
    if len(names) == 1:
        return FixedRouter.always(names, names[0]), None, "one expert: nothing to route"
    picks_N = np.array([names.index(fitted.route(prompt).expert) for prompt in prompts])
    card = scorecard(names, scores_NE, picks_N, seed)
    gain = f"{card.gain:+.4f} ({card.gain_low:+.4f} to {card.gain_high:+.4f}) over {card.best_single_expert} alone"
    if card.proven:
        return fitted.router, card, f"the {kind} router is proven: {gain}, on {card.prompts} prompts"
    fixed = FixedRouter.always(names, card.best_single_expert)
    return fixed, card, f"the {kind} router is not proven: {gain}; every prompt goes to {card.best_single_expert}"


def _write_tokenizer(model: Path, out: Path) -> None:
    """The features' tokenizer as one file; converted where the model has only an older format."""
    if (model / "tokenizer.json").exists():
        files.copy(model / "tokenizer.json", out)
        return
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(model, local_files_only=True).backend_tokenizer.save(str(out))
