"""What mixtures of the demo zoo's experts are worth: `python benchmarks/mix.py` prints a Markdown table.

Each is written by `builder mix` in a process of its own, seen from outside, and then asked held-out questions of
every domain: which expert it chooses, and how likely it finds the right answer, in nats a token.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import composed
from builder.files import default_cache
from builder.proxy.demo import DOMAINS
from builder.proxy.items import Item

MIXTURES: dict[str, dict[str, Any]] = {
    "F-L-T (Mixtral)": {},
    "F-L-T, top-2": {"experts_per_token": 2},
    "F-L-T, half": {"hybrid_layers": "half"},
    "F-L-S": {"mixture": "F-L-S"},
    "B-L-S": {"mixture": "B-L-S"},
    "B-L-S, not centred": {"mixture": "B-L-S", "centre": False},
    "B-L-S, half": {"mixture": "B-L-S", "hybrid_layers": "half"},
    "M-L-S": {"mixture": "M-L-S"},
    "M-L-S, half": {"mixture": "M-L-S", "hybrid_layers": "half"},
    "M-L-S, half, not centred": {"mixture": "M-L-S", "hybrid_layers": "half", "centre": False},
    "M-L-S, half, top-2": {"mixture": "M-L-S", "hybrid_layers": "half", "experts_per_token": 2},
    "M-M-S": {"mixture": "M-M-S"},
    "M-M-S, half": {"mixture": "M-M-S", "hybrid_layers": "half"},
}
Answers = Mapping[str, Sequence[Item]]


def main(
    questions: Annotated[int, typer.Option(help="Of every domain.")] = 24,
    only: Annotated[str, typer.Option(help="Mixtures whose name holds this.")] = "",
) -> None:
    """Write every mixture, and ask it."""
    torch.set_grad_enabled(False)
    zoo = tomllib.loads((resources.files("builder.zoos") / "demo.toml").read_text("utf-8"))
    folders = {name: next((default_cache() / "models").glob(f"{name}-*")) for name in ("smollm2", *DOMAINS)}
    asked = {name: list(_items(name, questions)) for name in DOMAINS}
    print(f"| model | GB | written in s | anonymous MB | right expert | {' | '.join(DOMAINS)} | mean |")
    print("| --- " * (6 + len(DOMAINS)) + "|")
    if not only:
        for name, folder in folders.items():
            _row(name, ["", "", ""], _asked(folder, asked))
    with tempfile.TemporaryDirectory() as temporary:
        if not only:
            _row("their linear merge", ["", "", ""], _asked(_merged(folders, Path(temporary)), asked))
        for name in (name for name in MIXTURES if only in name):
            experts = [
                {"source_model": str(folders[each]), "name": each, "positive_prompts": zoo["subjects"][each]}
                for each in DOMAINS
            ]
            spec, out = Path(temporary) / "spec.yaml", Path(temporary) / "out"
            spec.write_text(yaml.safe_dump({**MIXTURES[name], "experts": experts}), "utf-8")
            seconds, anonymous = _run(["mix", str(spec), str(out), "--overwrite"])
            size = sum(path.stat().st_size for path in out.iterdir())
            _row(name, [f"{size / 1e9:.2f}", f"{seconds:.1f}", f"{anonymous:.0f}"], _asked(out, asked))


def _items(domain: str, count: int) -> Iterator[Item]:
    found = DOMAINS[domain]
    numbers = random.Random(7).sample(range(found.count), count)
    yield from found.items(numbers, random.Random(7))


def _merged(folders: Mapping[str, Path], temporary: Path) -> Path:
    listed = [{"model": str(folders[name]), "parameters": {"weight": 1}} for name in DOMAINS]
    (temporary / "recipe.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": listed}), "utf-8")
    _run(["merge", str(temporary / "recipe.yaml"), str(temporary / "merged")])
    return temporary / "merged"


def _run(words: Sequence[str]) -> tuple[float, float]:
    """Wall seconds of a command, and the peak of its anonymous memory in MB."""
    started, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, "-m", "builder", *words], stdout=subprocess.DEVNULL, stderr=sys.stderr)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text("utf-8")
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.02)
    if process.returncode:
        sys.exit(process.returncode)
    return time.monotonic() - started, peak / 1024


def _asked(folder: Path, asked: Answers) -> tuple[str, list[float]]:
    """The part of questions whose domain's expert was the most chosen; nats a token of right answers, by domain."""
    kind = AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    routed = isinstance(model, composed.ComposedForCausalLM)
    right, nats = [], []
    for domain, items in asked.items():
        of_domain = []
        for item in items:
            prompt = tokenizer(item.prompt, return_tensors="pt").input_ids
            whole = tokenizer(item.prompt + item.choices[item.label], return_tensors="pt").input_ids
            more = {}
            if routed:
                weights = model.route(prompt).weights
                chosen = weights.reshape(-1, weights.shape[-1]).mean(0).argmax()
                right.append(model.config.experts[int(chosen)] == domain)
                if model.config.routing == "sample":
                    more["routes"] = weights.clone()
            logits = model(input_ids=whole, **more).logits.log_softmax(-1)
            start = prompt.shape[1]
            of_domain.append(float(logits[0, start - 1 : -1].gather(1, whole[0, start:, None]).mean()))
        nats.append(float(np.mean(of_domain)))
    return f"{100 * np.mean(right):.0f} %" if right else "", nats


def _row(name: str, facts: Sequence[str], found: tuple[str, list[float]]) -> None:
    right, nats = found
    print(
        f"| {name} | {' | '.join([*facts, right, *(f'{each:.3f}' for each in [*nats, np.mean(nats)])])} |", flush=True
    )


if __name__ == "__main__":
    typer.run(main)
