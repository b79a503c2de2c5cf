from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import byte_level_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from service.engines.base import Message, PromptError
from service.engines.local.expert import Expert
from service.engines.local.text import Alphabet, Detokenizer, encode

TEXTS = ["the owl  was\n\n afraid.", " naïve — 日本語 👍🏽👩‍👩‍👧 ok", "é", "👍", "  ", ""]


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama 2's: words begin with ▁, what is not in the vocabulary is spelt in bytes."""
    words = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.—"]
    tokenizer = Tokenizer(
        models.BPE({word: id_ for id_, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def expert_with(tokenizer: Any, window: int = 64) -> Expert:
    return Expert(
        "owl",
        Path(),
        None,
        None,
        None,
        300,
        0,
        tokenizer,
        window,
        frozenset(),
        Alphabet(tokenizer),
        None,  # type: ignore[arg-type]
    )


def pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    text = Detokenizer(tokenizer)
    return [*map(text.add, tokens), text.rest()]


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(), byte_fallback_tokenizer()], ids=["bytes", "fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_decoded_whole_and_never_half_a_character(tokenizer: Any, text: str) -> None:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    got = pieces(tokenizer, tokens)
    assert "".join(got) == tokenizer.decode(tokens, skip_special_tokens=True) == text
    assert not any("\ufffd" in piece for piece in got)


def test_a_character_is_out_as_soon_as_it_is_whole() -> None:
    tokenizer = byte_level_tokenizer()
    tokens = tokenizer("a👍b")["input_ids"]
    assert pieces(tokenizer, tokens) == ["a", "", "", "", "👍", "b", ""]


@pytest.mark.parametrize("seed", range(5))
def test_any_tokens_give_the_decoded_whole(seed: int) -> None:
    tokenizer = byte_level_tokenizer()
    tokens = random.Random(seed).choices(range(len(tokenizer)), k=300)
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_half_a_character_at_the_end_is_shown_as_decode_shows_it() -> None:
    tokenizer = byte_level_tokenizer()
    tokens = tokenizer("a👍")["input_ids"][:-1]
    assert pieces(tokenizer, tokens) == ["a", "", "", "", "\ufffd"]


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(), byte_fallback_tokenizer()], ids=["bytes", "fallback"])
def test_special_tokens_are_never_text(tokenizer: Any) -> None:
    words = tokenizer(" a b c", add_special_tokens=False)["input_ids"]
    tokens = [
        word
        for pair in zip(words, [tokenizer.bos_token_id, tokenizer.eos_token_id] * 99, strict=False)
        for word in pair
    ]
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_text_is_tokenised_as_the_tokenizer_does_it() -> None:
    tokenizer = byte_level_tokenizer()
    assert encode(expert_with(tokenizer), "the owl") == tuple(tokenizer("the owl")["input_ids"])


def test_a_chat_is_written_in_the_template() -> None:
    tokenizer = byte_level_tokenizer()
    tokens = encode(expert_with(tokenizer), (Message("user", "hi"), Message("assistant", "yo")))
    assert tokenizer.decode(tokens) == "<|user|>hi<|assistant|>yo<|a|>"


def test_a_chat_without_a_template_is_refused() -> None:
    with pytest.raises(PromptError, match="owl has no chat template"):
        encode(expert_with(byte_level_tokenizer(template=None)), (Message("user", "hi"),))


def test_a_chat_that_the_template_refuses_is_refused_in_its_words() -> None:
    picky = byte_level_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PromptError, match="roles must alternate"):
        encode(expert_with(picky), (Message("user", "hi"),))


def test_an_empty_prompt_begins_with_a_token_of_the_model() -> None:
    tokenizer = byte_level_tokenizer()
    expert = expert_with(tokenizer)
    assert encode(expert, "") == (tokenizer.bos_token_id,)
    tokenizer.bos_token = None
    assert encode(expert, "") == (tokenizer.eos_token_id,)
    tokenizer.eos_token = None
    with pytest.raises(PromptError, match="empty"):
        encode(expert, "")


def test_a_text_far_over_the_window_is_refused_by_its_head() -> None:
    class Counting:
        characters = 0

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            self.characters += len(text)
            return {"input_ids": list(range(len(text)))}

    expert = replace(expert_with(byte_level_tokenizer()), tokenizer=Counting())
    with pytest.raises(PromptError, match=r"1000000 characters .* window of 64 tokens"):
        encode(expert, "x" * 1_000_000, within=64)
    assert expert.tokenizer.characters < 1000
