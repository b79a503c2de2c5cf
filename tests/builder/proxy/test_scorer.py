from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BloomForCausalLM,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from builder.errors import BuildError, CheckpointError
from builder.proxy.requests import Answer, Choices, Generation, Likelihood, Request, Rolling
from builder.proxy.scorer import Scorer, greedy, packed

LENGTH = 96
WORDS = ["the owl", " was afraid", " of", " the dark", "\n\n", "Question:", " 12", " größer", " 猫", "  ", ".", " ion"]
FEWSHOT = "Question: the owl was afraid. Answer: dark\n\nQuestion: the fox was not. Answer: light\n\n"
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.3,
}


def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator([FEWSHOT, *WORDS, "User Quest Question"] * 3, trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>")


def save(folder: Path, kind: Any = LlamaForCausalLM, *, seed: int = 0, bos: bool = False, **shape: Any) -> Path:
    words = tokenizer(bos)
    torch.manual_seed(seed)
    config: Any = kind.config_class
    model = kind(config(**(shape or SHAPE), vocab_size=len(words), bos_token_id=0, eos_token_id=1, pad_token_id=1))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return Scorer(folder, dtype=torch.float32, device="cpu")


def alone(scorer: Scorer, tokens: list[int], start: int) -> Likelihood:
    """The likelihood of the tokens from `start` on: one row, no padding, no cache."""
    tokens, start = tokens[-LENGTH - 1 :], max(1, start - max(0, len(tokens) - LENGTH - 1))
    with torch.no_grad():
        logprobs = scorer.model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    scored = range(start, len(tokens))
    nats = sum(float(logprobs[i - 1, tokens[i]]) for i in scored)
    return Likelihood(nats, len(scored), all(int(logprobs[i - 1].argmax()) == tokens[i] for i in scored))


def reference(scorer: Scorer, request: Request) -> Answer:
    """What transformers says, one request at a time, the way lm_eval splits it."""
    encode = scorer.tokenizer.encode
    if isinstance(request, Generation):
        prompt = torch.tensor([encode(request.prompt)[-(LENGTH - request.max_tokens) :]])
        whole = scorer.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.max_tokens, do_sample=False
        )
        text: str = scorer.tokenizer.decode(whole[0, prompt.shape[1] :], skip_special_tokens=True)
        for stop in request.until:
            text = text.split(stop)[0]
        return text
    if isinstance(request, Rolling):
        return alone(scorer, [0, *encode(request.text)], 1)
    if not request.prompt:
        rows = [[0, *encode(each, add_special_tokens=False)] for each in request.continuations]
        return tuple(alone(scorer, row, 1) for row in rows)
    start = len(encode(request.prompt.rstrip()))
    return tuple(alone(scorer, encode(request.prompt + each), start) for each in request.continuations)


def choices(rng: random.Random) -> Choices:
    def text(most: int) -> str:
        return "".join(rng.choices(WORDS, k=rng.randint(1, most)))

    prompt = rng.choice(["", FEWSHOT, FEWSHOT[:40]]) + rng.choice(["x", "Question:"]) + text(6)
    return Choices(rng.choice(["", prompt, prompt]), tuple(f" {text(3)}." for _ in range(rng.randint(1, 4))))


def same(got: Answer, expected: Answer) -> bool:
    if isinstance(got, Likelihood) and isinstance(expected, Likelihood):
        close = abs(got.nats - expected.nats) < 1e-4 * max(1, got.tokens)
        return close and (got.tokens, got.greedy) == (expected.tokens, expected.greedy)
    if isinstance(got, tuple) and isinstance(expected, tuple):
        return all(same(a, b) for a, b in zip(got, expected, strict=True))
    return got == expected


RANDOM = [choices(random.Random(seed)) for seed in range(60)]


@pytest.mark.parametrize("chunk", [5, 64, 4096])
def test_likelihoods_are_those_of_one_row_at_a_time(
    scorer: Scorer, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(packed.CHUNK, "cpu", chunk)
    for request, answer in zip(RANDOM, scorer.answer(RANDOM), strict=True):
        assert same(answer, reference(scorer, request)), request


@pytest.mark.parametrize(
    "request_",
    [
        Choices("Question: the owl ", ("dark", "light", "dark")),
        Choices("Question: the owl\n", (" dark",)),
        Choices("the owl was afraid of the dark " * 12, (" dark", " light and dark")),
        Choices("the owl", (" was afraid of the dark" * 25, " dark")),
        Rolling("größer 猫 the owl"),
    ],
    ids=["trailing space", "trailing line", "long prompt", "long continuation", "rolling"],
)
def test_borders_are_those_of_one_row_at_a_time(scorer: Scorer, request_: Request) -> None:
    assert same(scorer.answer([request_])[0], reference(scorer, request_))


def test_a_bos_token_of_the_tokenizer_is_there_once(tmp_path: Path) -> None:
    scorer = Scorer(save(tmp_path, bos=True), dtype=torch.float32, device="cpu")
    asked = [RANDOM[0], Choices("", (" dark", " light")), Choices("the owl", (" dark",))]
    for request, answer in zip(asked, scorer.answer(asked), strict=True):
        assert same(answer, reference(scorer, request))
    twice, once = scorer.answer([Choices("<bos>the owl", (" dark",)), Choices("the owl", (" dark",))])
    assert twice == once


def test_greedy_says_whether_the_model_would_write_it(scorer: Scorer) -> None:
    written = scorer.answer([Generation("the owl was", (), 1)])[0]
    assert isinstance(written, str)
    right, wrong = scorer.answer([Choices("the owl was", (written,)), Choices("the owl was", ("zzz",))])
    assert isinstance(right, tuple)
    assert isinstance(wrong, tuple)
    assert right[0].greedy
    assert not wrong[0].greedy


def test_a_rolling_text_is_scored_in_windows_each_token_once(scorer: Scorer) -> None:
    text = "".join(random.Random(3).choices(WORDS, k=150))
    tokens = [0, *scorer.tokenizer.encode(text)]
    full, rest = divmod(len(tokens) - 1, LENGTH)
    assert full > 1
    assert rest
    rows = [(tokens[i * LENGTH : (i + 1) * LENGTH + 1], 1) for i in range(full)]
    rows.append((tokens[-LENGTH - 1 :], LENGTH + 1 - rest))
    parts = [alone(scorer, row, start) for row, start in rows]
    answer = scorer.answer([Rolling(text)])[0]
    assert isinstance(answer, Likelihood)
    assert answer.tokens == len(tokens) - 1
    assert answer.nats == pytest.approx(sum(part.nats for part in parts), rel=1e-5)


def test_a_continuation_that_merges_into_the_prompts_last_token_is_scored(scorer: Scorer) -> None:
    encode = scorer.tokenizer.encode
    assert len(encode("Quest")) == len(encode("Question"))
    answer = scorer.answer([Choices("Quest", ("ion",))])[0]
    assert isinstance(answer, tuple)
    assert answer[0].tokens == 1
    assert scorer.answer([Choices("Quest", ("",))]) == [(Likelihood(0.0, 0, True),)]


def test_the_order_of_requests_changes_nothing(scorer: Scorer) -> None:
    answers = scorer.answer(RANDOM)
    assert scorer.answer(RANDOM[::-1]) == answers[::-1]
    assert scorer.answer(RANDOM) == answers


def test_what_requests_share_is_read_once(scorer: Scorer) -> None:
    asked = [Choices(FEWSHOT + f"Question: {name}", (" dark", " light", " light and")) for name in ("owl", "fox")]
    scorer.answer(asked[:1])  # the model has been tried
    read: list[int] = []
    embedding = scorer.model.get_input_embeddings()
    with embedding.register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0].numel())):
        scorer.answer(asked)
    paths = {
        tuple(tokens[:end])
        for request in asked
        for each in request.continuations
        for tokens in [scorer.tokenizer.encode(request.prompt + each)]
        for end in range(1, len(tokens))
    }
    assert sum(read) == len(paths)


KINDS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    # how the model attends, its shape, and whether the tokens of many rows may be packed
    "window beyond the rows": (MistralForCausalLM, {**SHAPE, "sliding_window": LENGTH}, True),
    "window within the rows": (MistralForCausalLM, {**SHAPE, "sliding_window": 8}, False),
    "capped logits": (Gemma2ForCausalLM, {**SHAPE, "head_dim": 8, "sliding_window": LENGTH}, True),
    "learned positions": (GPT2LMHeadModel, {"n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 4}, True),
    "biases for positions": (BloomForCausalLM, {"hidden_size": 32, "n_layer": 2, "n_head": 4}, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_architectures_answer_as_they_do_alone(kind: str, tmp_path: Path) -> None:
    family, shape, packs = KINDS[kind]
    scorer = Scorer(save(tmp_path, family, **shape), dtype=torch.float32, device="cpu")
    assert (packed.fits(scorer.model) >= LENGTH) is packs
    asked: list[Request] = [*RANDOM[:20], *(Generation(f"the owl{word}", (".",), 12) for word in WORDS)]
    for request, answer in zip(asked, scorer.answer(asked), strict=True):
        assert same(answer, reference(scorer, request)), request


@pytest.mark.parametrize(("places", "keys"), [(1, 3000), (3, 3000), (64, 3000), (64, 0)])
def test_answers_are_what_transformers_writes(
    scorer: Scorer, places: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(greedy.ANSWERS, "cpu", places)
    monkeypatch.setitem(greedy.KEYS, "cpu", keys)
    monkeypatch.setitem(packed.CHUNK, "cpu", 24)
    starts = ["", FEWSHOT] if keys else ["the owl"]
    words = ["", *WORDS, *WORDS[:3]]
    asked = [Generation(f"{start}Q{word * 4}", (), 3 + n) for start in starts for n, word in enumerate(words)]
    assert scorer.answer(asked) == [reference(scorer, request) for request in asked]


def test_an_answer_ends_at_its_first_stop_string_or_at_eos(
    scorer: Scorer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scorer.answer([Generation("the owl", (), 30)])[0]
    assert isinstance(whole, str)
    stop = whole[7:9]
    asked = [Generation("the owl", ("never said", stop), 30), Generation("a fox" * 20, (stop,), 4)]
    assert scorer.answer(asked)[0] == whole.split(stop)[0]
    monkeypatch.setitem(greedy.KEYS, "cpu", 0)
    assert scorer.answer(asked)[0] == whole.split(stop)[0]
    ending = Scorer(folder, dtype=torch.float32, device="cpu")
    prompt = torch.tensor([scorer.tokenizer.encode("the owl")])
    ids = scorer.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False)
    ending.model.generation_config.eos_token_id = ids[0, prompt.shape[1] + 8 :][:1].tolist()
    assert ending.answer([Generation("the owl", (), 30)]) == [reference(ending, Generation("the owl", (), 30))]
    assert ending.answer([Generation("the owl", (), 30)]) != [whole]


def test_a_models_own_repetition_penalty_counts(folder: Path) -> None:
    scorer = Scorer(folder, dtype=torch.float32, device="cpu")
    asked = [Generation(f"the owl{word}", (), 20) for word in WORDS]
    plain = scorer.answer(asked)
    scorer.model.generation_config.repetition_penalty = 1.3
    assert scorer.answer(asked) == [reference(scorer, request) for request in asked]
    assert scorer.answer(asked) != plain


def test_a_prompt_that_leaves_no_room_for_its_answer_loses_its_beginning(scorer: Scorer) -> None:
    request = Generation(" größer" + FEWSHOT * 6, (), 20)
    assert len(scorer.tokenizer.encode(request.prompt)) > LENGTH
    assert scorer.answer([request]) == [reference(scorer, request)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_takes_our_mask_for_something_else_is_not_packed(folder: Path, dtype: torch.dtype) -> None:
    class Deaf(LlamaForCausalLM):  # type: ignore[misc] # transformers is untyped to us
        def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **rest: Any) -> Any:
            return super().forward(input_ids, position_ids=position_ids, **rest)

    assert packed.fits(LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()) > 0
    assert packed.fits(Deaf.from_pretrained(folder, dtype=dtype).eval()) == 0


def test_an_answer_that_leaves_no_room_for_its_prompt_is_refused(scorer: Scorer) -> None:
    with pytest.raises(BuildError, match="ask for fewer"):
        scorer.answer([Generation("the owl", (), LENGTH)])


def test_weights_rewritten_in_place_count_from_the_next_call_on(folder: Path, tmp_path: Path) -> None:
    asked: list[Request] = [*RANDOM[:10], Generation(FEWSHOT, (), 12)]
    scorer = Scorer(folder, dtype=torch.float32, device="cpu")
    before = scorer.answer(asked)
    other = Scorer(save(tmp_path, seed=1), dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for name, tensor in scorer.model.state_dict().items():
            tensor.copy_(other.model.state_dict()[name])
    assert scorer.answer(asked) == other.answer(asked)
    assert scorer.answer(asked) != before


def test_progress_counts_every_request(scorer: Scorer) -> None:
    done: list[int] = []
    scorer.answer([*RANDOM, Rolling("the owl"), Rolling(""), Generation("the owl", (), 3)], done.append)
    assert sum(done) == len(RANDOM) + 3
    assert scorer.answer([]) == []


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Scorer(tmp_path)


def test_the_tokenizer_may_be_another_folders(folder: Path, tmp_path: Path) -> None:
    save(tmp_path, bos=True)
    assert Scorer(folder, tokenizer=tmp_path).tokenizer.encode("the owl")[0] == 0
