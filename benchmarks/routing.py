"""Our routers beside scikit-learn's: `python benchmarks/routing.py MATRIX.jsonl` prints a Markdown table.

Both see the same vectors and the same folds; scikit-learn's also a TF-IDF of the words, which knows no model. An
estimate is timed alone, as a service asks for it, the two taking turns.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")  # before numpy

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.neighbors import KNeighborsRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from builder.files import default_cache
from builder.routing.command import DEFAULT_FEATURES, features_of
from builder.routing.crossval import by_chance
from builder.routing.evaluation import vectors
from builder.routing.gate import fits
from builder.routing.matrix import read
from routers.kmeans import PRIOR
from routers.knn import NEIGHBOURS
from routers.mlp import HIDDEN
from routers.ridge import STRENGTHS
from routers.scorecard import scorecard

FOLDS, SEED = 5, 42
TIMED = 200
CLUSTERS = 64


def one_hot(distances: Any) -> Any:
    """Which centre is the nearest."""
    return np.eye(distances.shape[1])[distances.argmin(axis=1)]


THEIRS: dict[str, Callable[[], Any]] = {
    "knn": lambda: KNeighborsRegressor(NEIGHBOURS, metric="cosine", algorithm="brute"),
    "ridge": lambda: RidgeCV(STRENGTHS),
    "kmeans": lambda: make_pipeline(
        KMeans(CLUSTERS, n_init=3, random_state=SEED), FunctionTransformer(one_hot), Ridge(PRIOR)
    ),
    "mlp": lambda: make_pipeline(
        StandardScaler(), MLPRegressor(hidden_layer_sizes=(HIDDEN,), early_stopping=True, alpha=1.0, random_state=SEED)
    ),
}
SPARSE = {"ridge": lambda: Ridge(1.0), "knn": THEIRS["knn"]}


def main(
    matrix: Annotated[Path, typer.Argument(help="JSON lines, as builder route-eval reads them.")],
    prompt_field: Annotated[str | None, typer.Option()] = None,
    task_field: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Print both by router: mean score, gain over the best single expert, microseconds of an estimate."""
    found = read(matrix, prompt=prompt_field, task=task_field)
    space = features_of(DEFAULT_FEATURES, 0, None, found.prompts, default_cache(), None)
    vectors_ND, seconds_N = vectors(found.prompts, space)
    scores_NE, parts = found.scores_NE, by_chance(len(found.prompts), FOLDS, SEED)
    print(f"{len(found.prompts)} prompts, {len(found.experts)} experts; features {1e6 * np.median(seconds_N):.0f} us\n")
    print(
        "| router | ours | gain (95 %) | scikit-learn | gain | same choice | on TF-IDF | us, ours | us, scikit-learn |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for kind, fit in fits(found.experts, SEED).items():
        ours = np.zeros(scores_NE.shape)
        theirs, sparse = np.zeros(scores_NE.shape), np.zeros(scores_NE.shape)
        for held_N in parts:
            router = fit(vectors_ND[~held_N], scores_NE[~held_N])
            ours[held_N] = [router.estimate(vector_D).quality_E for vector_D in vectors_ND[held_N]]
            if kind in THEIRS:
                model = THEIRS[kind]().fit(vectors_ND[~held_N], scores_NE[~held_N])
                theirs[held_N] = model.predict(vectors_ND[held_N])
            if kind in SPARSE:
                sparse[held_N] = on_words(SPARSE[kind](), found.prompts, scores_NE, held_N)
        card = told(found.experts, scores_NE, ours)
        cells = [
            kind,
            f"{card.routed:.4f}",
            f"{100 * card.relative:+.1f} % ({card.gain_low:+.4f} to {card.gain_high:+.4f})",
        ]
        if kind in THEIRS:
            other = told(found.experts, scores_NE, theirs)
            same = (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()
            words = f"{told(found.experts, scores_NE, sparse).routed:.4f}" if kind in SPARSE else ""
            timed = took(
                router.estimate, lambda vector_D, known=model: known.predict(vector_D[None]), vectors_ND[:TIMED]
            )
            cells += [f"{other.routed:.4f}", f"{100 * other.relative:+.1f} %", f"{100 * same:.0f} %", words]
            cells += [f"{each:.0f}" for each in timed]
        else:
            cells += ["", "", "", "", f"{took(router.estimate, router.estimate, vectors_ND[:TIMED])[0]:.0f}", ""]
        print(f"| {' | '.join(cells)} |", flush=True)


def told(experts: Any, scores_NE: Any, quality_NE: Any) -> Any:
    """The scorecard of estimates."""
    return scorecard(experts, scores_NE, quality_NE.argmax(axis=1), SEED)


def on_words(model: Any, prompts: Any, scores_NE: Any, held_N: Any) -> Any:
    """Estimates from the words alone."""
    texts = np.array(prompts, dtype=object)
    words = TfidfVectorizer(sublinear_tf=True, min_df=2, max_features=20_000)
    return model.fit(words.fit_transform(texts[~held_N]), scores_NE[~held_N]).predict(words.transform(texts[held_N]))


def took(ours: Callable[[Any], Any], theirs: Callable[[Any], Any], vectors_ND: Any) -> tuple[float, float]:
    """Median microseconds of each."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for vector_D in vectors_ND:
        for call, kept in ((ours, seconds[0]), (theirs, seconds[1])):
            started = time.perf_counter()
            call(vector_D)
            kept.append(time.perf_counter() - started)
    return 1e6 * float(np.median(seconds[0])), 1e6 * float(np.median(seconds[1]))


if __name__ == "__main__":
    typer.run(main)
