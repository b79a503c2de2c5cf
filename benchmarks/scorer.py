"""What scoring costs: `python benchmarks/scorer.py FOLDER --data DIR` prints a Markdown table.

Our scorer and lm_eval's own `hf` model answer the same requests of lm_eval's task code in the same process, in turn; hf
with several batch sizes, of which the fastest counts. Timed is what each model does with its requests, tokenising
included; what lm_eval does before and after is the same for both and not timed. The speedup is that of the processor's
time: other work on the machine stretches the wall's, but not both models' alike.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

# Before lm_eval: it has all it needs.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}

import lm_eval
import torch
import typer
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import logging

from builder.proxy.harness_model import HarnessModel
from builder.proxy.scorer import Scorer

KINDS = ("loglikelihood", "generate_until")
QUESTION = "Question: {{question}}\nAnswer:"
ACCURACY = [{"metric": "acc"}]
MMLU = {
    "description": "The following are multiple choice questions (with answers) about {{subject}}.\n\n",
    "doc_to_text": "{{question.strip()}}\n{% for c in choices %}{{'ABCD'[loop.index0]}}. {{c}}\n{% endfor %}Answer:",
    "doc_to_choice": ["A", "B", "C", "D"],
    "doc_to_target": "label",
    "fewshot_config": {"sampler": "first_n"},
    "metric_list": ACCURACY,
}
ARC = {
    "doc_to_text": QUESTION,
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc_norm"}],
}
# As in lm_eval's own: the choices are the contexts, what follows them is scored.
WINOGRANDE = {
    "doc_to_text": "label",
    "doc_to_choice": "{{[question.split('_')[0] + choices[0], question.split('_')[0] + choices[1]]}}",
    "doc_to_target": "{{question.split('_')[1].strip()}}",
    "metric_list": ACCURACY,
}
GSM8K = {
    "output_type": "generate_until",
    "doc_to_text": QUESTION,
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["Question:"], "do_sample": False, "max_gen_toks": 64},
    "metric_list": [{"metric": "exact_match"}],
}


@dataclass(frozen=True, slots=True)
class Bench:
    """A task: its data, how many examples come before each question, and lm_eval's configuration.

    fixed: the same examples for every question; else, as lm_eval's default is, others for each.
    """

    name: str
    files: tuple[str, str]
    shots: int
    config: dict[str, Any]
    fixed: bool = False


BENCHES = (
    Bench("mmlu, letters", ("mmlu/dev", "mmlu/test"), 5, MMLU, fixed=True),
    Bench("arc_challenge", ("arc_challenge/train", "arc_challenge/test"), 25, ARC),
    Bench("arc_challenge, fixed examples", ("arc_challenge/train", "arc_challenge/test"), 25, ARC, fixed=True),
    Bench("winogrande", ("winogrande/test", "winogrande/test"), 5, WINOGRANDE),
    Bench("gsm8k, 64 tokens", ("gsm8k/train", "gsm8k/test"), 5, GSM8K),
    Bench("gsm8k, 64 tokens, fixed examples", ("gsm8k/train", "gsm8k/test"), 5, GSM8K, fixed=True),
)
SUBJECTS = 4
POOL = 200
"""How many documents examples are drawn from."""
COLUMNS = (
    "task",
    "docs",
    "metric ours",
    "metric hf",
    "max difference",
    "ours CPU s (wall)",
    "hf CPU s (wall, batch)",
    "speedup",
)


@dataclass(frozen=True, slots=True)
class Run:
    """One model on one task: seconds of the processor and the wall, the metric, and every answer."""

    seconds: float
    wall: float
    metric: float
    answers: tuple[Any, ...]


def main(
    folder: Path,
    data: Annotated[Path, typer.Option(help="Folder of the public sets.")],
    docs: Annotated[int, typer.Option(help="Documents a task.")] = 32,
    dtype: Annotated[str, typer.Option()] = "float32",
    device: Annotated[str, typer.Option()] = "cpu",
    batch: Annotated[list[int], typer.Option(help="Batch sizes of hf; the fastest counts.")] = [1, 8, 16],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="Runs of each; the median counts.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads of torch; one suffers least from other work.")] = None,
    only: Annotated[str, typer.Option(help="Tasks whose names contain this.")] = "",
) -> None:
    """Print the table."""
    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    ours = HarnessModel(Scorer(folder, dtype=getattr(torch, dtype), device=device))
    hf = HFLM(pretrained=str(folder), dtype=dtype, device=device, batch_size=1)
    row(*COLUMNS)
    row(*["---"] * len(COLUMNS))
    with tempfile.TemporaryDirectory() as scratch:
        for bench in (each for each in BENCHES if only in each.name):
            configs = list(tasks(bench, data, docs, Path(scratch)))
            mine, theirs = compare(ours, hf, configs, batch, repeats)
            print_row(bench, mine, theirs)


def compare(ours: Any, hf: Any, configs: list[Any], batch: list[int], repeats: int) -> tuple[Run, dict[int, Run]]:
    """Our run and hf's by batch size, each the median of its repeats; they take turns."""
    mine: list[Run] = []
    theirs: dict[int, list[Run]] = {size: [] for size in batch}
    run(ours, configs[:1], 2)  # the first call of each is slower
    run(hf, configs[:1], 2)
    for _ in range(repeats):
        mine.append(run(ours, configs))
        for size in batch:
            hf.batch_size_per_gpu = size
            theirs[size].append(run(hf, configs))
    return middle(mine), {size: middle(runs) for size, runs in theirs.items()}


def middle(runs: list[Run]) -> Run:
    """The run of median time."""
    return sorted(runs, key=lambda each: each.seconds)[len(runs) // 2]


def run(model: Any, configs: list[Any], limit: int | None = None) -> Run:
    """Let lm_eval evaluate a model."""
    clock = Clock(model)
    found = lm_eval.simple_evaluate(
        model=clock.model,
        tasks=configs,
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
    )
    clock.stop()
    names = [config["task"] for config in configs]
    metric = configs[0]["metric_list"][0]["metric"]
    values = [found["results"][name][f"{metric},none"] for name in names]
    samples = [sample for name in names for sample in sorted(found["samples"][name], key=lambda each: each["doc_id"])]
    return Run(clock.seconds, clock.wall, sum(values) / len(values), tuple(sample["resps"] for sample in samples))


class Clock:
    """Sums the time that a model takes for its answers."""

    def __init__(self, model: Any) -> None:
        self.model, self.seconds, self.wall = model, 0.0, 0.0
        for kind in KINDS:
            setattr(model, kind, self._timed(getattr(model, kind)))

    def stop(self) -> None:
        """Leave the model as it was."""
        for kind in KINDS:
            delattr(self.model, kind)

    def _timed(self, method: Any) -> Any:
        def timed(*arguments: Any, **options: Any) -> Any:
            start, wall = time.process_time(), time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                self.seconds += time.process_time() - start
                self.wall += time.perf_counter() - wall

        return timed


def tasks(bench: Bench, data: Path, docs: int, scratch: Path) -> Iterator[dict[str, Any]]:
    """lm_eval's configurations of a task, one a subject where it has subjects; the data lie in `scratch`."""
    examples, asked = (read(data / f"{file}.jsonl.gz") for file in bench.files)
    subjects = sorted({doc["subject"] for doc in asked if "subject" in doc})[:SUBJECTS] or [None]
    for number, subject in enumerate(subjects):
        name = f"{bench.name}-{number}".replace(" ", "_").replace(",", "")
        mine = [[doc for doc in part if doc.get("subject") == subject] for part in (asked, examples)]
        files = {"test": mine[0][: docs // len(subjects)], "train": mine[1][-POOL:]}
        for split, part in files.items():
            lines = "".join(json.dumps(doc) + "\n" for doc in part)
            (scratch / f"{name}-{split}.jsonl").write_text(lines, "utf-8")
        yield {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {split: str(scratch / f"{name}-{split}.jsonl") for split in files}},
            "test_split": "test",
            "fewshot_split": "train",
            "num_fewshot": bench.shots,
            "output_type": "multiple_choice",
            **({"fewshot_config": {"sampler": "first_n"}} if bench.fixed else {}),
            **bench.config,
        }


def read(file: Path) -> list[dict[str, Any]]:
    """The documents of a file."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def print_row(bench: Bench, mine: Run, theirs: dict[int, Run]) -> None:
    """A task's row."""
    size, best = min(theirs.items(), key=lambda each: each[1].seconds)
    row(
        bench.name,
        str(len(mine.answers)),
        f"{mine.metric:.4f}",
        f"{best.metric:.4f}",
        difference(mine, best),
        f"{mine.seconds:.1f} ({mine.wall:.1f})",
        f"{best.seconds:.1f} ({best.wall:.1f}, {size})",
        f"{best.seconds / mine.seconds:.1f}",
    )


def difference(mine: Run, theirs: Run) -> str:
    """How far apart the log-likelihoods are at most, or how many texts are equal."""
    pairs = list(zip(flat(mine.answers), flat(theirs.answers), strict=True))
    if isinstance(pairs[0][0], str):
        return f"{sum(a == b for a, b in pairs)}/{len(pairs)} texts equal"
    return f"{max(abs(a[0] - b[0]) for a, b in pairs):.1e}"


def flat(answers: Any) -> list[Any]:
    """The answers out of lm_eval's nested lists."""
    if isinstance(answers, list | tuple) and answers and isinstance(answers[0], list):
        return [each for part in answers for each in flat(part)]
    return list(answers)


def row(*cells: str) -> None:
    print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    typer.run(main)
