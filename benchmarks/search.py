"""Trials of a search an hour: ours against the same loop done the usual way, on the same candidates.

    python benchmarks/search.py [--trials 2] [--limit 8] [--sets zero-shot,...]

The usual way is that of the paper's released scripts: every trial loads all members, averages them in fp32, saves the
merge, loads it again and has lm_eval's `hf` model score it, task by task with batches of one; the second column is the
same with batches of eight. All score the demo's questions, written out as YAML tasks of lm-evaluation-harness, in bf16
on the same machine, one after the other: without examples, with five examples that all questions share (as in MMLU) or
that each question draws (as in ARC, WinoGrande and GSM8K), and with answers that are written out, not chosen.
"""

from __future__ import annotations

import argparse
import json
import logging
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
from builder.proxy.requests import Choices, Likelihood
from builder.proxy.scorer import fast_dtype
from builder.proxy.task import Sample, Spec
from builder.sources import Store

BATCHES = (1, 8)
CHOSEN: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
WRITTEN: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[label]}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 48},
}
EXAMPLES: dict[str, Any] = {"num_fewshot": 5, "fewshot_split": "train"}
SETS: dict[str, dict[str, Any]] = {
    "zero-shot": CHOSEN,
    "five shared examples": {**CHOSEN, **EXAMPLES, "fewshot_config": {"sampler": "first_n"}},
    "five drawn examples": {**CHOSEN, **EXAMPLES},
    "written answers with five drawn examples": {**WRITTEN, **EXAMPLES},
}
"""What the tasks of each set say beside their data."""
Scores = dict[str, float]


def write_tasks(folder: Path, limit: int, said: Mapping[str, Any]) -> list[Path]:
    """The demo's questions as the harness's YAML, and questions of another split as examples."""
    files = []
    for name in PRESETS["demo"]:
        own = name.replace("/", "_")
        for split, count in (("proxy", limit), ("routing", 20)):
            lines = [json.dumps(document(sample)) for sample in tasks.load(Spec(name, split, count, 42)).samples]
            (folder / f"{own}.{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        data = {"test": str(folder / f"{own}.proxy.jsonl"), "train": str(folder / f"{own}.routing.jsonl")}
        task = {
            "task": own,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": data},
            "test_split": "test",
            "training_split": "train",
            "doc_to_text": "{{prompt}}",
            "target_delimiter": "",
            **said,
        }
        files.append(folder / f"{own}.yaml")
        files[-1].write_text(yaml.safe_dump(task), "utf-8")
    return files


def document(sample: Sample) -> dict[str, Any]:
    """A question with its right answer, which is the one that scores."""
    (request,) = sample.requests
    assert isinstance(request, Choices)
    several = range(len(request.continuations))
    favoured = [tuple(Likelihood(float(i == each), 1, greedy=False) for i in several) for each in several]
    label = next(i for i in several if sample.score([favoured[i]])["accuracy"] == 1.0)
    return {"prompt": request.prompt, "choices": request.continuations, "label": label}


def ours(bench: Bench, candidate: Candidate, files: Sequence[Path]) -> tuple[Scores, float, float]:
    """The mean metric by task, seconds, and the share of them that making the model took."""
    started = time.monotonic()
    asked = [Spec(str(file), None, None, 42) for file in files]
    found = bench.score(candidate, asked)
    metrics = {tasks.load(spec).name: tasks.load(spec).metric for spec in asked}
    scores = {name: float(np.mean([row[metrics[name]] for row in rows])) for name, rows in found.metrics.items()}
    return scores, time.monotonic() - started, found.making / (found.making + found.scoring)


def usual(
    candidate: Candidate, folders: Mapping[str, Path], files: Sequence[Path], batches: Sequence[int]
) -> tuple[Scores, float, list[float]]:
    """The scores by way of the disk and lm_eval's hf; seconds of the way there, and of the scoring by batch size."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        merge_to_disk(candidate, folders, scratch)
        model = HFLM(pretrained=scratch, dtype=fast_dtype(), device="cpu", batch_size=batches[0])
        making, seconds, scores = time.monotonic() - started, [], Scores()
        for batch in batches:
            model.batch_size_per_gpu = batch
            started = time.monotonic()
            for file in files:  # the released scripts score task by task
                found = lm_eval.simple_evaluate(
                    model=model,
                    tasks=[str(file)],
                    task_manager=TaskManager(include_defaults=False),
                    bootstrap_iters=0,
                    log_samples=False,
                    fewshot_random_seed=42,
                )
                for name, facts in found["results"].items():
                    scores[name] = next(value for key, value in facts.items() if key.endswith(",none"))
            seconds.append(time.monotonic() - started)
    return scores, making, seconds


def merge_to_disk(candidate: Candidate, folders: Mapping[str, Path], out: str) -> None:
    """All members loaded and averaged in fp32, and saved in bf16."""
    merged = AutoModelForCausalLM.from_pretrained(folders[candidate.members[0]], dtype=torch.float32)
    sums = {name: torch.zeros_like(value) for name, value in merged.state_dict().items()}
    for member, weight in candidate.weights.items():
        model = AutoModelForCausalLM.from_pretrained(folders[member], dtype=torch.float32)
        for name, value in model.state_dict().items():
            sums[name] += weight * value
    merged.load_state_dict(sums)
    merged.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(folders[candidate.members[0]]).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--limit", type=int, default=8, help="questions of each of the four tasks")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--cache", type=Path, default=default_cache())
    options = parser.parse_args()
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    zoo = load_zoo("demo")
    fetched = Store(zoo, options.cache).fetch(Terminal())
    folders = {model.id: fetched[model.id].folder for model in zoo.models}
    kin = Kin.of({name: Checkpoint(folder) for name, folder in folders.items()}, None, None)
    draws = np.random.default_rng(42).dirichlet(np.ones(len(folders)), options.trials)
    candidates = [kin.linear(dict(zip(folders, map(float, weights), strict=True))) for weights in draws]
    bench = Bench({name: Place(folder) for name, folder in folders.items()})
    print(f"{options.trials} trials of four members, {4 * options.limit} questions, medians\n")
    print(
        f"| questions | ours: s a trial | trials/h | merge's share | usual way: s, batch {BATCHES[0]} | ratio ", end=""
    )
    print(f"| s, batch {BATCHES[1]} | ratio | largest difference of F |\n|{' --- |' * 9}")
    for name in options.sets.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            report(name, measure(bench, candidates, folders, write_tasks(Path(scratch), options.limit, SETS[name])))


Row = tuple[float, float, list[float], float]
"""Seconds of ours, the merge's share, seconds of the usual way by batch size, the difference of the mean scores."""


def measure(
    bench: Bench, candidates: Sequence[Candidate], folders: Mapping[str, Path], files: Sequence[Path]
) -> list[Row]:
    """Every candidate, ours and theirs in turn."""
    rows = []
    ours(bench, candidates[-1], files)  # loads the live model and the tasks, once a search
    for candidate in candidates:
        mine, seconds, share = ours(bench, candidate, files)
        theirs, making, scoring = usual(candidate, folders, files, BATCHES)
        gap = abs(float(np.mean(list(mine.values()))) - float(np.mean(list(theirs.values()))))
        rows.append((seconds, share, [making + each for each in scoring], gap))
    return rows


def report(name: str, rows: Sequence[Row]) -> None:
    mine, share, gap = (np.array([row[column] for row in rows]) for column in (0, 1, 3))
    cells = [name, f"{np.median(mine):.2f}", f"{3600 / np.median(mine):.0f}", f"{np.median(share):.1%}"]
    for place in range(len(BATCHES)):
        theirs = np.array([row[2][place] for row in rows])
        cells += [f"{np.median(theirs):.1f}", f"{np.median(theirs / mine):.1f}"]
    print(f"| {' | '.join([*cells, f'{gap.max():.3f}'])} |", flush=True)


if __name__ == "__main__":
    main()
