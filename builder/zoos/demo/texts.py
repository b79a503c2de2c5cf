"""Training and held-out text of the demo experts, one function a domain: public sets, from a folder or the hub."""

from __future__ import annotations

import ast
import gzip
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT = 40
"""Examples of each domain that no adapter was trained on."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question and its answer; `plain` is the same exchange as running text."""

    prompt: str
    answer: str
    plain: str


@dataclass(frozen=True, slots=True)
class Split:
    """A domain's examples: those an adapter learns from, and those it never sees."""

    train: list[Example]
    held_out: list[Example]


def load(domain: str, data: Path | None) -> Split:
    """The texts of `domain`; from the folder `data`, or from the hub when it is None."""
    return DOMAINS[domain](data)


def math(data: Path | None) -> Split:
    """GSM8K (MIT): word problems with worked answers; the calculator marks <<...>> are taken out."""

    def example(row: dict[str, Any]) -> Example:
        worked, _, result = re.sub(r"<<.*?>>", "", row["answer"]).partition("\n#### ")
        answer = f"{worked}\nThe answer is {result}."
        return Example(row["question"], answer, f"Question: {row['question']}\nAnswer: {answer}")

    train = [example(row) for row in _rows(data, "gsm8k/train.jsonl.gz", ("openai/gsm8k", "main", "train"))]
    test = [example(row) for row in _rows(data, "gsm8k/test.jsonl.gz", ("openai/gsm8k", "main", "test"))]
    return Split(train, test[:HELD_OUT])


def code(data: Path | None) -> Split:
    """MBPP (CC-BY-4.0): a task in a sentence and a Python function; its own training and validation tasks.

    The functions are laid out anew: the set indents by tabs, two or eight spaces, as its authors happened to.
    """
    rows = _rows(data, "mbpp/mbpp.jsonl.gz", ("google-research-datasets/mbpp", "full", "train+validation+test"))

    def example(row: dict[str, Any]) -> Example:
        body = ast.unparse(ast.parse(row["code"].expandtabs(8)))
        return Example(row["text"], f"```python\n{body}\n```", f'"""{row["text"]}"""\n{body}')

    train = [example(row) for row in rows if row["task_id"] > 510]
    test = [example(row) for row in rows if 11 <= row["task_id"] <= 510]
    return Split(train, test[:HELD_OUT])


def story(data: Path | None) -> Split:
    """TinyStories (CDLA-Sharing-1.0, which leaves trained weights free) and scenes of Sherlock Holmes (public domain).

    The scenes keep the words from becoming as few as the little stories' are; held out are little stories alone.
    """
    if data is None:
        stories = [row["text"].strip() for row in _hub(("roneneldan/TinyStories", "default", "validation"))[:600]]
        scenes = []
    else:
        stories, scenes = _little_stories(data), _scenes(data)
    asks = ("Tell me a story.", "Write a short story.", "Please tell me a story for children.", "Write a little story.")
    told = [
        Example(asks[i % len(asks)], text, text) for i, text in enumerate(s for s in stories if 200 < len(s) < 2000)
    ]
    train = told[:-HELD_OUT]
    staged = [Example("Write a scene of a story.", text, text) for text in scenes]
    return Split([*train, *shuffled(staged, 0)[: len(train)]], told[-HELD_OUT:])


def _little_stories(data: Path) -> list[str]:
    opening = re.compile(r"(Once upon a time|One day,|Once there was|There was once|Once,)")
    stories: list[str] = []
    for paragraph in _paragraphs(data / "stories/tinystories_200k.txt.gz"):
        if stories and not opening.match(paragraph):
            stories[-1] += f"\n\n{paragraph}"
        else:
            stories.append(paragraph)
    return stories


def _scenes(data: Path) -> list[str]:
    paragraphs = (" ".join(text.split()) for text in _paragraphs(data / "stories/sherlock.txt.gz"))
    return [text for text in paragraphs if 300 < len(text) < 1200]


def _paragraphs(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [part.strip() for part in file.read().split("\n\n")]


def chat(data: Path | None) -> Split:
    """Open Assistant (Apache-2.0), English first turns without code: everyday questions and helpful replies."""
    rows = _rows(
        data, "oasst_octopack/oasstcommitpackftmanual.jsonl.gz", ("bigcode/oasst-octopack", "default", "train")
    )

    def wanted(row: dict[str, Any]) -> bool:
        text = row["prompt"] + row["completion"]
        return text.isascii() and "`" not in text and "def " not in text and len(text) < 2000

    examples = [
        Example(row["prompt"], row["completion"], f"User: {row['prompt']}\nAssistant: {row['completion']}")
        for row in rows
        if wanted(row)
    ]
    return Split(examples[:-HELD_OUT], examples[-HELD_OUT:])


DOMAINS: dict[str, Callable[[Path | None], Split]] = {"math": math, "code": code, "story": story, "chat": chat}


def shuffled(examples: list[Example], seed: int) -> list[Example]:
    """The examples in an order that `seed` alone decides."""
    order = list(examples)
    random.Random(seed).shuffle(order)
    return order


def _rows(data: Path | None, path: str, hub: tuple[str, str, str]) -> list[dict[str, Any]]:
    if data is None:
        return _hub(hub)
    with gzip.open(data / path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _hub(dataset: tuple[str, str, str]) -> list[dict[str, Any]]:
    # `datasets` is needed here alone, by whoever retrains the adapters from the hub.
    from datasets import load_dataset

    name, config, split = dataset
    return [dict(row) for row in load_dataset(name, config, split=split)]
