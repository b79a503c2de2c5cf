from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer

from routers.features import CHARACTERS, MAX_TOKENS, TokenEmbeddings, normalise, spread
from routers.prompt import PromptRouter


def test_a_vector_is_the_centred_unit_mean_of_the_prompts_own_embeddings(tokenizer: Tokenizer) -> None:
    embeddings_VD = np.random.default_rng(0).normal(size=(11, 6)).astype(np.float16)
    mean_D = np.random.default_rng(1).normal(size=6).astype(np.float32)
    vector_D = TokenEmbeddings(tokenizer, embeddings_VD, mean_D).vector("solve the sum")
    rows = embeddings_VD[[1, 9, 3]].astype(np.float64)
    expected = rows.mean(axis=0) - mean_D
    assert vector_D == pytest.approx(expected / np.linalg.norm(expected), abs=1e-6)


def test_padding_in_the_tokenizers_file_does_not_reach_a_vector(
    features: TokenEmbeddings, tokenizer: Tokenizer
) -> None:
    before = features.vector("solve the sum")
    tokenizer.enable_padding(length=32, pad_id=4)
    tokenizer.enable_truncation(1)
    again = TokenEmbeddings(tokenizer, features.arrays()["embeddings"], features.arrays()["mean"])
    assert np.array_equal(again.vector("solve the sum"), before)


@pytest.mark.parametrize("text", ["  solve \n\t the   sum ", "solve the sum", "ｓｏｌｖｅ the sum"])
def test_white_space_and_unicode_forms_do_not_change_a_vector(features: TokenEmbeddings, text: str) -> None:
    assert normalise(text) == "solve the sum"
    assert np.array_equal(features.vector(text), features.vector("solve the sum"))


def test_no_tokens_give_zeros(features: TokenEmbeddings) -> None:
    assert not features.vector(" \n ").any()


def test_only_the_end_of_a_long_prompt_counts(features: TokenEmbeddings) -> None:
    long = "dragon " * 2000 + "solve " * MAX_TOKENS
    assert features.vector(long) == pytest.approx(features.vector("solve"), abs=1e-6)


def test_of_a_very_long_prompt_only_its_end_is_read(features: TokenEmbeddings) -> None:
    end = "solve the sum " * (CHARACTERS * MAX_TOKENS // 14 + 1)
    assert np.array_equal(features.vector("castle " * 10 + "-" * len(end) + end), features.vector(end))


def test_leaving_out_a_token_equals_the_prompt_without_it(features: TokenEmbeddings) -> None:
    ids = features.tokens("solve the sum the castle")
    for word, vector_D in features.without_each("solve the sum the castle"):
        rest = [i for i, token in zip(ids, ["solve", "the", "sum", "the", "castle"], strict=True) if token != word]
        assert vector_D == pytest.approx(features.of_tokens(rest), abs=1e-5)


def test_the_words_that_pulled_are_those_of_the_subject(prompt_router: PromptRouter) -> None:
    pulls = prompt_router.explain("the python code in the castle")
    assert prompt_router.route("the python code in the castle").expert == "code"
    assert {pull.word for pull in pulls[:2]} == {"python", "code"}
    assert "castle" not in {pull.word for pull in pulls}


def test_a_prompt_without_words_goes_to_the_default(prompt_router: PromptRouter) -> None:
    route = prompt_router.route("")
    assert (route.expert, route.reason) == ("story", "no_evidence")
    assert prompt_router.explain("") == []


def test_an_added_token_without_an_embedding_does_not_count(features: TokenEmbeddings, tokenizer: Tokenizer) -> None:
    before = features.vector("solve the sum")
    tokenizer.add_tokens(["[pad]"])
    assert tokenizer.token_to_id("[pad]") == 11
    assert np.array_equal(features.vector("solve the [pad] sum"), before)


@pytest.mark.parametrize(
    "text",
    [
        "SOLVE THE SUM",
        "<|im_start|>user\nsolve the sum<|im_end|>\n<|im_start|>assistant\n",
        "[INST] solve the sum [/INST]",
        "### Instruction:\nsolve the sum\n\n### Response:",
        "Question: solve the sum\nAnswer:",
        "USER: solve the sum ASSISTANT:".replace(" ASSISTANT", "\nASSISTANT"),
        "solve\u00a0the \u200bsum",
    ],
)
def test_case_and_what_is_left_of_a_template_do_not_change_the_text(text: str) -> None:
    assert normalise(text) == "solve the sum"


@pytest.mark.parametrize("text", ["a question: why?", "the answer: none of them", "write <s", "assistant"])
def test_words_that_only_look_like_a_template_stay(text: str) -> None:
    assert normalise(text) == text


def test_spreading_is_half_a_whitening_of_the_table() -> None:
    table_VD = (np.random.default_rng(0).normal(size=(500, 6)) * [9, 3, 1, 1, 1, 0.3]).astype(np.float32)
    turned_VD = spread(table_VD).astype(np.float64)
    before, after = (np.linalg.eigvalsh(np.cov(each.T)) for each in (table_VD, turned_VD))
    ratio = after / np.sqrt(before)
    assert ratio == pytest.approx(np.full(6, ratio[0]), rel=0.01)
