"""Training and held-out text of the demo experts, one function a domain: public sets, from a folder or the hub."""

from __future__ import annotations

import ast
import gzip
import itertools
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT = 40
"""Public examples of each domain that no adapter was trained on."""

WRITTEN = Path(__file__).parent / "written"
"""Text of the project's own, none of it in the demo's proxy, routing or test sets."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question and its answer; `plain` is the same exchange as running text."""

    prompt: str
    answer: str
    plain: str


@dataclass(frozen=True, slots=True)
class Split:
    """A domain's examples: public ones and our own to learn from, and public ones that no adapter sees."""

    public: list[Example]
    written: list[Example]
    held_out: list[Example]

    def epoch(self, number: int, seed: int) -> list[Example]:
        """Our own examples and about as much public text, another part of it each time; `seed` decides the order."""
        start = number * len(self.written) % len(self.public)
        room = sum(len(example.plain) for example in self.written)
        part = []
        for example in itertools.islice(itertools.cycle(shuffled(self.public, seed)), start, None):
            if room <= 0:
                break
            part.append(example)
            room -= len(example.plain)
        return shuffled([*self.written, *part], seed + number)


def load(domain: str, data: Path | None) -> Split:
    """The texts of `domain`; the public ones from the folder `data`, or from the hub when it is None."""
    return DOMAINS[domain](data)


def math(data: Path | None) -> Split:
    """GSM8K (MIT): word problems with worked answers; the calculator marks <<...>> are taken out."""

    def example(row: dict[str, Any]) -> Example:
        worked, _, result = re.sub(r"<<.*?>>", "", row["answer"]).partition("\n#### ")
        return problem(row["question"], f"{worked}\nThe answer is {result}.")

    def problem(question: str, answer: str) -> Example:
        return Example(question, answer, f"Question: {question}\nAnswer: {answer}")

    train = [example(row) for row in _rows(data, "gsm8k/train.jsonl.gz", ("openai/gsm8k", "main", "train"))]
    test = [example(row) for row in _rows(data, "gsm8k/test.jsonl.gz", ("openai/gsm8k", "main", "test"))]
    return Split(train, [problem(*pair) for pair in _written("math")], test[:HELD_OUT])


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
    own = []
    for prompt, body in _written("code"):
        task, function = prompt.removeprefix('"""').split('"""\n')
        own.append(Example(task, f"```python\n{function}{body}\n```", prompt + body))
    return Split(train, own, test[:HELD_OUT])


def story(data: Path | None) -> Split:
    """TinyStories (CDLA-Sharing-1.0, which leaves trained weights free): short stories in simple words."""
    if data is None:
        stories = [row["text"].strip() for row in _hub(("roneneldan/TinyStories", "default", "validation"))[:600]]
    else:
        stories = _little_stories(data / "stories/tinystories_200k.txt.gz")
    asks = ("Tell me a story.", "Write a short story.", "Please tell me a story for children.", "Write a little story.")

    def told(texts: list[str]) -> list[Example]:
        return [Example(asks[i % len(asks)], text, text) for i, text in enumerate(texts)]

    public = told([text for text in stories if 200 < len(text) < 2000])
    own = told([f"{opening} {ending}" for opening, ending in _written("story")])
    return Split(public[:-HELD_OUT], own, public[-HELD_OUT:])


def _little_stories(path: Path) -> list[str]:
    """The stories of an extract that parts paragraphs and stories alike by an empty line."""
    opening = re.compile(r"(Once upon a time|One day,|Once there was|There was once|Once,)")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        paragraphs = [part.strip() for part in file.read().split("\n\n")]
    stories: list[str] = []
    for paragraph in paragraphs:
        if stories and not opening.match(paragraph):
            stories[-1] += f"\n\n{paragraph}"
        else:
            stories.append(paragraph)
    return stories


def chat(data: Path | None) -> Split:
    """Open Assistant (Apache-2.0), English first turns without code: everyday questions and helpful replies."""
    rows = _rows(
        data, "oasst_octopack/oasstcommitpackftmanual.jsonl.gz", ("bigcode/oasst-octopack", "default", "train")
    )

    def wanted(row: dict[str, Any]) -> bool:
        text = row["prompt"] + row["completion"]
        return text.isascii() and "`" not in text and "def " not in text and len(text) < 2000

    def exchange(prompt: str, reply: str) -> Example:
        return Example(prompt, reply, f"User: {prompt}\nAssistant: {reply}")

    examples = [exchange(row["prompt"], row["completion"]) for row in rows if wanted(row)]
    return Split(examples[:-HELD_OUT], [exchange(*pair) for pair in _written("chat")], examples[-HELD_OUT:])


DOMAINS: dict[str, Callable[[Path | None], Split]] = {"math": math, "code": code, "story": story, "chat": chat}


def shuffled(examples: list[Example], seed: int) -> list[Example]:
    """The examples in an order that `seed` alone decides."""
    order = list(examples)
    random.Random(seed).shuffle(order)
    return order


def _written(domain: str) -> list[tuple[str, str]]:
    lines = (WRITTEN / f"{domain}.jsonl").read_text("utf-8").splitlines()
    return [(row["prompt"], row["answer"]) for row in map(json.loads, lines)]


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
