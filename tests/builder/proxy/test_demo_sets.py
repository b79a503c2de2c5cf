"""The demo's four sets: well formed, right where they say so, and the same in every process."""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from builder.proxy.demo import DOMAINS, code, story
from builder.proxy.items import Item

SHAPES = {
    "math": (r"Question: \S.*\S\nAnswer:", r" \S.*\. The answer is \d+\."),
    "code": (r'""".+"""\ndef \w+\(.+\):\n', r"    \S(.|\n)*\S"),
    "story": (r"[A-Z].*[.?!]", r" [A-Z].*[.!]"),
    "chat": (r"User: [A-Z].*[.?]\nAssistant:", r" [A-Z].*[.!]"),
}
SEEDS = range(20)


def draw(domain: str, seed: int) -> list[Item]:
    return DOMAINS[domain].items(range(DOMAINS[domain].count), random.Random(seed))


def digest() -> str:
    return hashlib.sha256(repr([draw(domain, 7) for domain in DOMAINS]).encode()).hexdigest()


def passes(function: code.Function, body: str) -> bool:
    """Whether the body of an item, indented as it is, meets every check of its function."""
    scope: dict[str, object] = {}
    try:
        exec(f"def {function.signature}:\n{body}", scope)
        return all(eval(check, scope) for check in function.checks)
    except Exception:
        return False


def sums(solution: str) -> list[bool]:
    """Whether each sum written out in `solution` is true."""
    return [eval(left) == int(result) for left, result in re.findall(r"(\d[\d */+-]*) = (\d+)", solution)]


def answer(solution: str) -> int:
    return int(solution.rstrip(".").split()[-1])


@pytest.mark.parametrize("domain", DOMAINS)
class TestEverySet:
    def test_is_large_enough_to_split(self, domain: str) -> None:
        assert DOMAINS[domain].count >= 60

    def test_asks_one_question_a_unit_with_four_choices(self, domain: str) -> None:
        for seed in SEEDS:
            found = draw(domain, seed)
            assert len(found) == DOMAINS[domain].count
            assert all(len(set(item.choices)) == len(item.choices) == 4 for item in found)

    def test_never_asks_the_same_twice(self, domain: str) -> None:
        prompts = [item.prompt for item in draw(domain, 0)]
        assert len(set(prompts)) == len(prompts)

    def test_puts_the_right_choice_anywhere(self, domain: str) -> None:
        assert {item.label for item in draw(domain, 0)} == {0, 1, 2, 3}

    def test_is_written_as_the_models_were_trained(self, domain: str) -> None:
        prompt, choice = SHAPES[domain]
        for item in draw(domain, 0):
            assert re.fullmatch(prompt, item.prompt)
            assert all(re.fullmatch(choice, text) for text in item.choices)
            assert (item.prompt + "".join(item.choices)).isascii()

    def test_is_short(self, domain: str) -> None:
        for item in draw(domain, 0):
            assert len(item.prompt.split()) < 50
            assert all(len(text.split()) <= 35 for text in item.choices)

    def test_depends_on_the_seed_alone(self, domain: str) -> None:
        assert draw(domain, 3) == draw(domain, 3)
        assert draw(domain, 3) != draw(domain, 4)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_is_the_same_in_another_process(hash_seed: str) -> None:
    script = "import test_demo_sets; print(test_demo_sets.digest())"
    path = os.pathsep.join(map(str, [Path(__file__).parent, *sys.path]))
    env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
    printed = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == digest()


@pytest.mark.parametrize("domain", ["code", "story", "chat"])
def test_units_are_asked_in_the_order_given(domain: str) -> None:
    every = draw(domain, 0)
    found = DOMAINS[domain].items([9, 4, 30, 0], random.Random(1))
    assert [item.prompt for item in found] == [every[unit].prompt for unit in [9, 4, 30, 0]]
    assert [item.choices[item.label] for item in found] == [
        every[unit].choices[every[unit].label] for unit in [9, 4, 30, 0]
    ]


@pytest.mark.parametrize("domain", ["story", "chat"])
def test_distractors_are_right_elsewhere_in_the_same_call(domain: str) -> None:
    found = DOMAINS[domain].items(range(10, 30), random.Random(0))
    right = {item.choices[item.label] for item in found}
    assert all(choice in right for item in found for choice in item.choices)


def test_only_the_right_body_passes_its_checks() -> None:
    for function, item in zip(code.FUNCTIONS, draw("code", 0), strict=True):
        passed = [passes(function, body) for body in item.choices]
        assert passed == [place == item.label for place in range(4)], function.signature


def test_only_one_solution_is_misreckoned_and_never_the_right_one() -> None:
    for seed in SEEDS:
        for item in draw("math", seed):
            reckoned = [all(sums(solution)) for solution in item.choices]
            assert reckoned[item.label]
            assert sums(item.choices[item.label])
            assert reckoned.count(False) == 1, item


def test_solutions_end_in_four_different_answers_to_their_last_sum() -> None:
    for seed in SEEDS:
        for item in draw("math", seed):
            assert len({answer(solution) for solution in item.choices}) == 4
            assert all(answer(solution) > 0 and "- -" not in solution for solution in item.choices)
            right = item.choices[item.label]
            assert answer(right) == int(re.findall(r"= (\d+)", right)[-1])


def test_most_endings_do_not_name_the_hero() -> None:
    heroes = [re.search(r"(?:named|called) (?:Sir )?(\w+)", opening) for opening, _ in story.STORIES]
    named = [hero is not None and hero[1] in ending for hero, (_, ending) in zip(heroes, story.STORIES, strict=True)]
    assert all(heroes)
    assert named.count(True) <= len(named) / 2
