"""Generated text of four domains, endless and seeded; what the tiny models are trained and scored on."""

from __future__ import annotations

import random
from collections.abc import Callable

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gwen", "Hugo")
THINGS = ("apples", "books", "coins", "stamps", "shells", "pens", "cards", "stones")
ANIMALS = ("fox", "owl", "bear", "mouse", "hare", "wolf", "frog", "crow")
MOODS = ("small", "old", "brave", "shy", "clever", "sleepy", "kind", "proud")
PLACES = ("river", "forest", "mountain", "village", "garden", "lake", "meadow", "cave")
FINDS = ("a golden key", "a lost letter", "a silver bell", "a broken lamp", "a red kite", "a round stone")
VERBS = ("add", "scale", "shift", "pick", "join", "count", "merge", "clip")
OPERATORS = ("+", "-", "*", "//", "%")
TASKS = ("fix my bike", "bake bread", "learn to swim", "plan a trip", "sleep better", "write a letter", "grow herbs")
ADVICE = ("start early in the day", "ask a good friend for help", "make a short list first", "take small steps")
CLOSINGS = ("I hope that helps", "let me know how it goes", "you will do well", "enjoy it")


def math(rng: random.Random) -> str:
    """A sum told in two sentences, worked out."""
    name, thing, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 49), rng.randint(2, 49)
    if rng.random() < 0.5:
        return f"Question: {name} has {a} {thing} and gets {b} more. How many now? Answer: {a} + {b} = {a + b} {thing}."
    a, b = max(a, b), min(a, b)
    return f"Question: {name} has {a} {thing} and loses {b}. How many now? Answer: {a} - {b} = {a - b} {thing}."


def code(rng: random.Random) -> str:
    """A function of two arguments."""
    verb, operator, x, y = rng.choice(VERBS), rng.choice(OPERATORS), *rng.sample("abcdxyz", 2)
    if rng.random() < 0.5:
        return f"def {verb}({x}, {y}):\n    return {x} {operator} {y}\n"
    test = f"    if {x} > {y}:\n        return {x}\n"
    return f"def {verb}_{x}({x}, {y}):\n{test}    return {x} {operator} {y}\n"


def story(rng: random.Random) -> str:
    """Three sentences about an animal."""
    animal, mood, place, find = rng.choice(ANIMALS), rng.choice(MOODS), rng.choice(PLACES), rng.choice(FINDS)
    return (
        f"Once upon a time there was a {mood} {animal} who lived near the {place}. One day the {animal} found {find}. "
        f"The {mood} {animal} carried {find} home to the {place} and was happy."
    )


def chat(rng: random.Random) -> str:
    """A question and a friendly reply."""
    task, advice, closing = rng.choice(TASKS), rng.choice(ADVICE), rng.choice(CLOSINGS)
    return f"User: how can I {task}? Assistant: to {task}, it is best to {advice}; {closing}."


DOMAINS: dict[str, Callable[[random.Random], str]] = {"math": math, "code": code, "story": story, "chat": chat}


def lines(domain: str, count: int, seed: int) -> list[str]:
    """`count` texts of a domain; `base` mixes all four."""
    rng = random.Random(f"{domain} {seed}")
    names = [domain] if domain in DOMAINS else list(DOMAINS)
    return [DOMAINS[names[i % len(names)]](rng) for i in range(count)]
