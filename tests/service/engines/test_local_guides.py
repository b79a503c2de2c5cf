from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import pytest
import torch
from tiny import byte_level_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from service.engines.base import EngineError, Guide, Sampling, UnsupportedError
from service.engines.local.guides import Guides, Matcher
from service.engines.local.sampler import Pick, Row, pick

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b c", "dé"]}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/home"}]},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
    "$defs": {
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}
TOKENIZER = byte_level_tokenizer()
IDS: dict[str, int] = TOKENIZER.get_vocab()
EOS = IDS["<eos>"]
LOGITS = len(IDS) + 20  # a model's rows may be padded
MOST = 400


@pytest.fixture(scope="module")
def guides() -> Guides:
    return Guides(TOKENIZER, LOGITS, [EOS])


def schema(value: object) -> Guide:
    return Guide("json_schema", json.dumps(value))


def regex(text: str) -> Guide:
    return Guide("regex", text)


def follow(matcher: Matcher, text: str) -> None:
    for id_ in TOKENIZER.encode(text, add_special_tokens=False):
        matcher.accept(id_)


def takes(guides: Guides, guide: Guide, text: str) -> bool:
    """Whether a whole answer may be this text."""
    matcher = guides.matcher(guide)
    try:
        follow(matcher, text)
    except EngineError:
        return False
    return EOS in allowed(matcher)


def allowed(matcher: Matcher) -> set[int]:
    row = Row(Sampling(temperature=0, logprobs=0), (), [EOS], LOGITS, matcher)
    masks = torch.zeros(1, -(-LOGITS // 32), dtype=torch.int32).numpy()
    assert row.matcher is not None
    row.matcher.allow(masks, 0)
    return {id_ for id_ in range(LOGITS) if masks[0, id_ // 32] >> (id_ % 32) & 1}


def answers(guides: Guides, guide: Guide, count: int, bias: dict[str, float] | None = None) -> Iterator[str]:
    """The texts that random logits come to under a guide, each whole."""
    for seed in range(count):
        source = torch.Generator().manual_seed(seed)
        named = tuple((IDS[each], value) for each, value in (bias or {}).items())
        row = Row(Sampling(seed=seed, logit_bias=named), (), [EOS], LOGITS, guides.matcher(guide))
        tokens: list[int] = []
        while not tokens or tokens[-1] != EOS:
            assert len(tokens) < MOST
            (found,) = pick([row], 3 * torch.randn(1, LOGITS, generator=source))
            assert isinstance(found, Pick)
            tokens.append(found.id)
        yield TOKENIZER.decode(tokens[:-1])


class TestRandomAnswers:
    def test_are_valid_by_their_schema(self, guides: Guides) -> None:
        texts = list(answers(guides, schema(PERSON), 20))
        assert len(set(texts)) == 20
        for text in texts:
            jsonschema.validate(json.loads(text), PERSON)

    def test_of_an_empty_schema_are_objects(self, guides: Guides) -> None:
        closing = {'"': 4.0, "}": 4.0, "]": 4.0, ",": -4.0, "{": -4.0, "[": -4.0}
        values = [json.loads(text) for text in answers(guides, Guide("json_schema", "{}"), 20, closing)]
        assert all(isinstance(value, dict) for value in values)
        assert any(values)

    def test_match_their_expression(self, guides: Guides) -> None:
        expression = r"(yes|no|maybe), [a-f]{2,5}é?[0-9]+\."
        texts = list(answers(guides, regex(expression), 20))
        assert all(re.fullmatch(expression, text) for text in texts)
        assert len({text.partition(",")[0] for text in texts}) == 3


class TestMatchers:
    def test_allow_what_may_come_next_and_nothing_else(self, guides: Guides) -> None:
        matcher = guides.matcher(regex("a(b|c)*d?"))
        assert allowed(matcher) == {IDS["a"]}
        follow(matcher, "ab")
        assert allowed(matcher) == {IDS["b"], IDS["c"], IDS["d"], EOS}
        assert not matcher.finished
        follow(matcher, "d")
        assert allowed(matcher) == {EOS}
        assert matcher.finished

    def test_an_end_of_sequence_token_finishes(self, guides: Guides) -> None:
        matcher = guides.matcher(regex("a*"))
        matcher.accept(EOS)
        assert matcher.finished
        matcher.accept(EOS)
        assert allowed(matcher) == {EOS}

    def test_refuse_a_token_that_is_ruled_out(self, guides: Guides) -> None:
        matcher = guides.matcher(regex("ab"))
        with pytest.raises(EngineError, match="cannot follow its guide"):
            matcher.accept(IDS["q"])
        with pytest.raises(EngineError, match="cannot follow its guide"):
            allowed(matcher)

    def test_refuse_an_end_before_the_text_is_whole(self, guides: Guides) -> None:
        with pytest.raises(EngineError, match="cannot follow its guide"):
            guides.matcher(regex("ab")).accept(EOS)

    def test_of_one_guide_do_not_share_where_they_stand(self, guides: Guides) -> None:
        first, second = guides.matcher(regex("ab")), guides.matcher(regex("ab"))
        follow(first, "a")
        assert (allowed(first), allowed(second)) == ({IDS["b"]}, {IDS["a"]})

    def test_any_of_several_end_tokens_ends(self) -> None:
        matcher = Guides(TOKENIZER, LOGITS, [EOS, IDS["<bos>"]]).matcher(regex("a"))
        follow(matcher, "a")
        assert allowed(matcher) == {EOS, IDS["<bos>"]}

    def test_special_tokens_are_no_text(self, guides: Guides) -> None:
        assert allowed(guides.matcher(regex("(?s:.)<bos>"))).isdisjoint({IDS["<bos>"], EOS, *range(len(IDS), LOGITS)})

    def test_tokens_of_another_kind_of_tokenizer_work_too(self) -> None:
        vocabulary = {
            each: id_ for id_, each in enumerate(["<s>", "</s>", "<unk>", "▁", "a", "▁b", "<0xC3>", "<0xA9>"])
        }
        merges = [("▁", "b")]
        tokenizer = Tokenizer(models.BPE(vocabulary | {"b": 8}, merges, unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
        matcher = Guides(fast, 9, [1]).matcher(regex("a bé"))
        for id_ in (4, 5, 6, 7):
            masks = torch.zeros(1, 1, dtype=torch.int32).numpy()
            matcher.allow(masks, 0)
            assert masks[0, 0] >> id_ & 1
            matcher.accept(id_)
        assert matcher.finished


class TestTexts:
    @pytest.mark.parametrize("indent", [None, 1, 2, 4, 8])
    def test_json_may_be_printed_as_people_print_it(self, guides: Guides, indent: int | None) -> None:
        value = {"a": [1, {"b": None, "c": [[True, -1.5e3]]}], "d": "é\\n"}
        assert takes(guides, schema({"type": "object"}), json.dumps(value, indent=indent, ensure_ascii=False))
        assert takes(guides, schema({"type": "object"}), json.dumps(value, separators=(",", ":"), ensure_ascii=False))

    def test_json_cannot_drown_in_space(self, guides: Guides) -> None:
        assert not takes(guides, schema({"type": "object"}), '{"a":\n\n1}')
        assert not takes(guides, schema({"type": "object"}), '{"a":' + "\n" + " " * 60 + "1}")

    @pytest.mark.parametrize("text", ["[]", '"a"', "1", "null"])
    def test_an_empty_schema_takes_objects_only(self, guides: Guides, text: str) -> None:
        assert takes(guides, Guide("json_schema", "{ }"), "{}")
        assert not takes(guides, Guide("json_schema", "{ }"), text)

    def test_a_schema_that_says_something_takes_what_it_says(self, guides: Guides) -> None:
        assert takes(guides, schema({"type": "array", "items": {"type": "integer"}}), "[1, 2]")

    def test_an_expression_has_to_match_the_whole_answer(self, guides: Guides) -> None:
        assert takes(guides, regex("^[0-9]{3}$"), "123")
        assert not takes(guides, regex("[0-9]{3}"), "1234")
        assert not takes(guides, regex("[0-9]{3}"), "12")


class TestRefusals:
    @pytest.mark.parametrize(
        ("guide", "reason"),
        [
            (regex("(a"), "the regular expression cannot guide an answer: unclosed group"),
            (regex(r"(a)\1"), "backreferences are not supported"),
            (regex(r"a(?=b)"), "look-around"),
            (regex("[a&&b]"), "nothing matches it"),
            (Guide("json_schema", "{"), "the JSON schema cannot guide an answer: it is no JSON"),
            (Guide("json_schema", "[" * 100_000), "it is no JSON"),
            (schema([]), "it is no JSON object"),
            (schema(False), "it is no JSON object"),
            (schema({"type": "owl"}), "Invalid type: owl"),
            (schema({"not": {"type": "string"}}), 'Unimplemented keys: ["not"]'),
            (schema({"type": "integer", "minimum": 5, "maximum": 1}), "Unsatisfiable schema"),
            (schema({"$ref": "http://example.com/schema"}), "is not present in a registry"),
            (schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "nothing matches it"),
        ],
    )
    def test_say_what_is_wrong_in_a_sentence(self, guides: Guides, guide: Guide, reason: str) -> None:
        with pytest.raises(UnsupportedError, match=re.escape(reason)) as caught:
            guides.matcher(guide)
        assert caught.value.param == "response_format"
        assert "\n" not in str(caught.value)

    def test_a_guide_that_is_too_much_is_refused(self, guides: Guides) -> None:
        with pytest.raises(UnsupportedError):
            guides.matcher(regex("|".join(f"{word:x}.{{0,50}}" for word in range(200_000))))

    def test_a_tokenizer_without_a_fast_backend_cannot_be_guided(self) -> None:
        with pytest.raises(UnsupportedError, match="tokenizer cannot be guided"):
            Guides(object(), LOGITS, [EOS]).matcher(regex("a"))

    def test_a_vocabulary_that_is_less_than_the_tokenizers_cannot_be_guided(self) -> None:
        with pytest.raises(UnsupportedError, match="tokenizer cannot be guided"):
            Guides(TOKENIZER, 10, [EOS]).matcher(regex("a"))


class TestCompiling:
    def test_happens_once_for_each_guide(self, guides: Guides) -> None:
        first = guides._compiled(schema(PERSON))
        assert guides._compiled(schema(PERSON)) is first
        assert guides._compiled(schema({"type": "object"})) is not first

    def test_works_from_many_threads_while_answers_are_written(self, guides: Guides) -> None:
        def write(number: int) -> str:
            (text,) = answers(guides, regex(f"[a-z]{{{number % 5 + 1}}}-{number}"), 1)
            return text

        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(write, range(40)))
        assert all(re.fullmatch(f"[a-z]{{{number % 5 + 1}}}-{number}", text) for number, text in enumerate(texts))


def test_an_experts_own_tokenizer_is_read_from_its_folder(llama: Path) -> None:
    fast = PreTrainedTokenizerFast.from_pretrained(llama)
    matcher = Guides(fast, LOGITS, [fast.eos_token_id]).matcher(regex("owl"))
    assert IDS["o"] in allowed(matcher)
