"""MLP gates, trained with everything else frozen: on the marginal likelihood of texts under the experts.

An expert chosen by top-1 weighs 1 whatever its logit, so the answer's own loss has no gradient for the gate. The loss
here is -log sum_e p(e|x) p_e(y|x); the experts' likelihoods p_e(y|x) are computed once, and kept in the journal.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from builder import kernels
from builder.errors import MixError
from builder.journal import Journal, digest
from builder.merge import card, simple
from builder.merge.models import Model
from builder.merge.stream import Executor
from builder.mix import features
from builder.mix.plan import Plan
from builder.progress import Progress, Quiet
from routers.mlp import train

Doubles = NDArray[np.float64]


class Text(BaseModel):
    """What a gate learns from: who continues the prompt best; without a prompt, who writes the text best."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: str = ""
    completion: str = ""
    text: str = ""

    @model_validator(mode="after")
    def _one_form(self) -> Text:
        if bool(self.text) == bool(self.prompt and self.completion):
            raise ValueError("give either text, or prompt and completion")
        return self

    @property
    def seen(self) -> str:
        """What the gate looks at."""
        return self.prompt or self.text


@dataclass(frozen=True)
class MLP:
    """Logits down relu(up (h - mean) + b) + c: H features, M inside, E experts."""

    mean_H: Doubles
    up_MH: Doubles
    up_M: Doubles
    down_EM: Doubles
    down_E: Doubles

    def logits(self, vectors_NH: Doubles) -> Doubles:
        """[N, E]."""
        inside = np.maximum((vectors_NH - self.mean_H) @ self.up_MH.T + self.up_M, 0)
        found: Doubles = inside @ self.down_EM.T + self.down_E
        return found

    def parts(self) -> dict[str, Doubles]:
        """By what a layout calls them."""
        return {
            ".gate.mean": self.mean_H,
            ".gate.up.weight": self.up_MH,
            ".gate.up.bias": self.up_M,
            ".gate.down.weight": self.down_EM,
            ".gate.down.bias": self.down_E,
        }


def read(path: Path, limit: int | None = None) -> list[Text]:
    """The first texts of a .jsonl file, each line an object with text, or with prompt and completion."""
    try:
        lines = [(number, line) for number, line in enumerate(path.read_text("utf-8").split("\n"), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as exc:
        raise MixError(f"{path} cannot be read as text: {exc}") from exc
    if not lines:
        raise MixError(f"{path} holds no text")
    return [_text(path, number, line) for number, line in lines[:limit]]


def _text(path: Path, number: int, line: str) -> Text:
    try:
        return Text.model_validate_json(line)
    except ValidationError as exc:
        said = exc.errors()[0]["msg"].removeprefix("Value error, ")
        form = "each line is an object with text, or with prompt and completion"
        raise MixError(f"{path}, line {number}: {said}; {form}") from exc


def texts_of(plan: Plan) -> list[Text]:
    """The spec's own prompts as texts. Raises MixError where it has none."""
    prompts = dict.fromkeys(prompt for expert in plan.spec.experts for prompt in expert.positive_prompts)
    if not prompts:
        raise MixError("MLP gates are trained on texts: give the experts positive_prompts, or --data FILE.jsonl")
    return [Text(text=prompt) for prompt in prompts]


def gates(
    plan: Plan, texts: Sequence[Text], journal: Journal | None, progress: Progress | None
) -> dict[str, dict[str, Doubles]]:
    """Every place's gate, trained on what it sees of the texts, averaged over their tokens."""
    progress = progress or Quiet()
    scores_NE = likelihoods(plan, texts, journal, progress)
    seen = features.pooled(plan.shared, [text.seen for text in texts], list(plan.looks.values()))
    spec, found = plan.spec, {}
    with progress.step("train the gates", len(plan.looks)) as advance:
        for (place, look), each in zip(plan.looks.items(), seen, strict=True):
            off = [each.first_H] if spec.centred and look.raw else []
            options: dict[str, Any] = {"width": spec.gate_width, "seed": spec.seed, "centred": spec.centred}
            found[place] = fit(each.means_NH, scores_NE, off=off, **options).parts()
            advance(1)
    return found


def likelihoods(plan: Plan, texts: Sequence[Text], journal: Journal | None, progress: Progress) -> Doubles:
    """log p_e(y|x) of every text under every expert, in nats, [N, E]; each model is loaded once, one at a time."""
    from builder.proxy.scorer import fast_dtype

    hashes = Executor(plan.weights, kernels, 1).digests(card.weight_files(plan.weights), journal)
    asked = digest(json.dumps([text.model_dump() for text in texts]))
    columns: dict[str, list[float]] = {}
    names = list(dict.fromkeys(expert.source_model for expert in plan.spec.experts))
    with progress.step("likelihoods of the texts", len(names)) as advance:
        for name in names:
            model = plan.weights.models[name]
            files = [path for path in hashes if path.parent in (model.checkpoint.folder, _adapter(model))]
            inputs = {"files": [hashes[path] for path in files], "texts": asked, "dtype": str(fast_dtype())}

            def compute(model: Model = model) -> list[float]:
                return _likelihoods(model, texts)

            columns[name] = journal.once("gate_likelihoods", inputs, compute) if journal else compute()
            advance(1)
    return np.array([columns[expert.source_model] for expert in plan.spec.experts]).T


def _adapter(model: Model) -> Path | None:
    return model.adapter.folder if model.adapter else None


def _likelihoods(model: Model, texts: Sequence[Text]) -> list[float]:
    from builder.proxy.requests import Choices, Rolling
    from builder.proxy.scorer import Scorer

    with tempfile.TemporaryDirectory() as temporary:
        folder = model.checkpoint.folder
        if model.adapter:
            simple.apply(model.adapter.folder, folder, Path(temporary) / "model")
            folder = Path(temporary) / "model"
        asked = [Choices(t.prompt, (t.completion,)) if t.prompt else Rolling(t.text) for t in texts]
        answers: list[Any] = Scorer(folder).answer(asked)
    return [float((answer[0] if isinstance(answer, tuple) else answer).nats) for answer in answers]


def fit(
    vectors_NH: Doubles,
    scores_NE: Doubles,
    *,
    width: int,
    seed: int,
    centred: bool = True,
    off: Sequence[Doubles] = (),
) -> MLP:
    """The gate that maximises the mean over texts of log sum_e p(e|x) exp(score_e).

    The features are freed of the directions `off` and scaled to unit variance; both are folded into the first layer.
    """
    mean_H = vectors_NH.mean(axis=0) if centred else np.zeros(vectors_NH.shape[1])
    free_NH = without(vectors_NH - mean_H, off)
    # What the trainer expects: vectors about one long.
    scale_H = np.maximum(free_NH.std(axis=0), 1e-3 * max(float(free_NH.std()), 1e-12)) * np.sqrt(len(mean_H))
    inputs = (free_NH / scale_H).astype(np.float32)
    weights = train(inputs, scores_NE - scores_NE.max(axis=1, keepdims=True), seed, loss="likelihood", hidden=width)
    up_MH, up_M, down_EM, down_E = (each.astype(np.float64) for each in weights)
    return MLP(mean_H, without(up_MH / scale_H, off), up_M, down_EM, down_E)


def without(vectors: Doubles, off: Sequence[Doubles]) -> Doubles:
    """Vectors, the last axis, less what of them lies along the vectors `off`."""
    along = [each for each in off if each.any()]
    if not along:
        return vectors
    basis, _ = np.linalg.qr(np.stack(along, axis=1))
    found: Doubles = vectors - vectors @ basis @ basis.T
    return found
