"""Trials of a search an hour: ours against the same loop done the usual way, on the same candidates.

    python benchmarks/search.py [--trials 4] [--limit 12] [--models DIR]

The usual way is that of the paper's released scripts: every trial loads all members, averages them in fp32, saves the
merge, and lm_eval's `hf` model loads it again and scores it. Both score the demo's questions, written out as YAML tasks
of lm-evaluation-harness, in bf16 on the same machine, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from builder.candidate import Candidate, Kin
from builder.checkpoints import Checkpoint
from builder.config import PRESETS, load_zoo
from builder.files import default_cache
from builder.progress import Terminal
from builder.proxy import tasks
from builder.proxy.bench import Bench, Place
from builder.proxy.requests import Choices
from builder.proxy.scorer import fast_dtype
from builder.proxy.task import Spec
from builder.sources import Store

BATCH = 8


def write_tasks(folder: Path, limit: int) -> list[Path]:
    """The demo's questions as the harness's YAML, with their answers."""
    files = []
    for name in PRESETS["demo"]:
        task, own = tasks.load(Spec(name, "proxy", limit, 42)), name.replace("/", "_")
        lines = []
        for sample in task.samples:
            (request,) = sample.requests
            assert isinstance(request, Choices)
            right = [
                i
                for i in range(len(request.continuations))
                if sample.score([_favouring(request, i)])["accuracy"] == 1.0
            ]
            lines.append(json.dumps({"prompt": request.prompt, "choices": request.continuations, "label": right[0]}))
        (folder / f"{own}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        said = {
            "task": own,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{own}.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{label}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        files.append(folder / f"{own}.yaml")
        files[-1].write_text(yaml.safe_dump(said), "utf-8")
    return files


def _favouring(request: Choices, choice: int) -> Any:
    from builder.proxy.requests import Likelihood

    return tuple(Likelihood(float(i == choice), 1, greedy=False) for i in range(len(request.continuations)))


def ours(bench: Bench, candidate: Candidate, files: Sequence[Path]) -> tuple[dict[str, float], float, float]:
    """Accuracy by task, seconds, and the share of them that making the model took."""
    started = time.monotonic()
    found = bench.score(candidate, [Spec(str(file), None, None, 42) for file in files])
    scores = {name: float(np.mean([row["acc"] for row in rows])) for name, rows in found.metrics.items()}
    return scores, time.monotonic() - started, found.making / (found.making + found.scoring)


def usual(candidate: Candidate, folders: Mapping[str, Path], files: Sequence[Path]) -> tuple[dict[str, float], float]:
    """The same by way of the disk and lm_eval's hf."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        merged = AutoModelForCausalLM.from_pretrained(folders[candidate.members[0]], dtype=torch.float32)
        sums = {name: torch.zeros_like(value) for name, value in merged.state_dict().items()}
        for member, weight in candidate.weights.items():
            model = AutoModelForCausalLM.from_pretrained(folders[member], dtype=torch.float32)
            for name, value in model.state_dict().items():
                sums[name] += weight * value
        merged.load_state_dict(sums)
        merged.to(torch.bfloat16).save_pretrained(scratch)
        AutoTokenizer.from_pretrained(folders[candidate.members[0]]).save_pretrained(scratch)
        del merged, sums, model
        model = HFLM(pretrained=scratch, dtype=fast_dtype(), device="cpu", batch_size=BATCH)
        manager = TaskManager(include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=model, tasks=list(map(str, files)), task_manager=manager, bootstrap_iters=0, log_samples=False
        )
    return {name: facts["acc,none"] for name, facts in found["results"].items()}, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--cache", type=Path, default=default_cache())
    options = parser.parse_args()
    zoo = load_zoo("demo")
    fetched = Store(zoo, options.cache).fetch(Terminal())
    folders = {model.id: fetched[model.id].folder for model in zoo.models}
    kin = Kin.of({name: Checkpoint(folder) for name, folder in folders.items()}, None, None)
    draws = np.random.default_rng(42).dirichlet(np.ones(len(folders)), options.trials)
    candidates = [kin.linear(dict(zip(folders, map(float, weights), strict=True))) for weights in draws]
    bench = Bench({name: Place(folder) for name, folder in folders.items()})
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        files = write_tasks(Path(scratch), options.limit)
        ours(bench, candidates[-1], files)  # loads the live model, once a search
        for candidate in candidates:
            mine, seconds, share = ours(bench, candidate, files)
            theirs, usual_seconds = usual(candidate, folders, files)
            rows.append((seconds, usual_seconds, share, max(abs(mine[name] - theirs[name]) for name in mine)))
    report(rows, options)


def report(rows: Sequence[tuple[float, float, float, float]], options: argparse.Namespace) -> None:
    seconds, usual_seconds, shares, gaps = map(np.array, zip(*rows, strict=True))
    questions = options.limit * len(PRESETS["demo"])
    print(f"\n{options.trials} trials, {questions} questions of four choices each, medians; batch size of hf {BATCH}\n")
    print("| | s a trial | trials/h | merge's share |")
    print("| --- | --- | --- | --- |")
    print(f"| ours | {np.median(seconds):.2f} | {3600 / np.median(seconds):.0f} | {np.median(shares):.1%} |")
    print(f"| the usual way | {np.median(usual_seconds):.2f} | {3600 / np.median(usual_seconds):.0f} | - |")
    print(f"\nratio {np.median(usual_seconds / seconds):.1f} (target: at least 5)")
    print(f"largest difference of a task's accuracy: {gaps.max():.3f} ({round(gaps.max() * options.limit)} questions)")


if __name__ == "__main__":
    main()
