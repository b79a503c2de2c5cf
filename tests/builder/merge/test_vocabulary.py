"""Vocabularies: ids are those that transformers gives, each row is its token's, and the files written load again."""

from __future__ import annotations

import json
import shutil
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from builder.errors import MergeError
from builder.merge.vocabulary import TokenSource, Vocabulary, reconcile, special_ids

FOX = ["the quick brown fox jumps over the lazy dog", "once upon a time there was a fox"]
SUMS = ["Ann has twelve apples and gets seven more", "the sum of twelve and seven is nineteen"]
IM_START = {"content": "<|im_start|>", "special": True, "normalized": False}


def write(
    folder: Path,
    pieces: Sequence[str] | Mapping[str, int],
    added: Sequence[str | Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
    **files: Any,
) -> Path:
    """A model folder with a tokenizer of whole words; ids are the places where `pieces` is a list.

    added: the added tokens of tokenizer.json, numbered from the end; config: tokenizer_config.json; files: others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = dict(pieces) if isinstance(pieces, Mapping) else {piece: i for i, piece in enumerate(pieces)}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    entries = [{"content": entry} if isinstance(entry, str) else entry for entry in added]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": len(vocabulary) + i, **plain, **entry} for i, entry in enumerate(entries)],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"},
    }
    tables = {
        "tokenizer": tokenizer,
        "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})},
        "config": {"model_type": "llama"},
        **files,
    }
    for name, table in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(table), "utf-8")
    return folder


def train(
    folder: Path, lines: Sequence[str], added: Sequence[AddedToken] = (), *, kind: str = "PreTrainedTokenizerFast"
) -> Path:
    """A model folder with a small BPE tokenizer: bytes as in Llama 3, or Metaspace as in Llama 2 for LlamaTokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "LlamaTokenizer":
        tokenizer.pre_tokenizer, tokenizer.decoder, alphabet = pre_tokenizers.Metaspace(), decoders.Metaspace(), []
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*lines, string.printable], trainer)
    tokenizer.add_tokens(list(added))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    entries = json.loads(tokenizer.to_str())["added_tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": kind,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(entry.pop("id")): entry for entry in entries},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), "utf-8")
    return folder


def loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def laid_out(vocabulary: Vocabulary, out: Path) -> Path:
    """What a merge would write: the kept folder with its changed files."""
    shutil.copytree(vocabulary.folder, out)
    for name, content in vocabulary.files.items():
        (out / name).write_bytes(content)
    return out


def ids(vocabulary: Vocabulary) -> dict[str, int]:
    """The ids of the tokenizers library, by its own loader."""
    text = vocabulary.files.get("tokenizer.json") or (vocabulary.folder / "tokenizer.json").read_bytes()
    found: dict[str, int] = Tokenizer.from_str(text.decode()).get_vocab()
    return found


def by_content(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Added tokens without their ids."""
    return {entry["content"]: {key: each for key, each in entry.items() if key != "id"} for entry in entries}


def by_token(vocabulary: Vocabulary, model: str) -> dict[str, int]:
    """A model's rows by token."""
    return {token: int(vocabulary.own[model][i]) for token, i in ids(vocabulary).items()}


def test_the_bases_tokenizer_is_kept_as_it_is(tmp_path: Path) -> None:
    folders = {"a": write(tmp_path / "a", "abc"), "b": write(tmp_path / "b", "abcd")}
    found = reconcile(folders, "a", "base", {"a": 3, "b": 4})

    assert (found.tokens, found.rows, found.folder, found.files) == (3, 3, tmp_path / "a", {})
    assert found.own["a"].tolist() == found.own["b"].tolist() == [0, 1, 2]
    assert found.stand_ins == {}


def test_rows_follow_tokens_not_ids(tmp_path: Path) -> None:
    folders = {"a": write(tmp_path / "a", "abc", ["<x>"]), "b": write(tmp_path / "b", "cbxa", ["<y>", "<x>"])}
    found = reconcile(folders, "a", "base", {"a": 4, "b": 6})

    assert found.own["a"].tolist() == [0, 1, 2, 3]
    assert found.own["b"].tolist() == [3, 1, 0, 5]


def test_any_models_tokenizer_may_be_kept(tmp_path: Path) -> None:
    folders = {"a": write(tmp_path / "a", "abc"), "b": write(tmp_path / "b", "cba", ["<x>"])}
    found = reconcile(folders, "a", "b", {"a": 3, "b": 4})

    assert (found.folder, found.files, found.tokens) == (tmp_path / "b", {}, 4)
    assert found.own["a"].tolist() == [2, 1, 0, -1]
    assert found.stand_ins == {3: (("b", 3),)}


def test_a_model_that_is_not_merged_may_lend_its_tokenizer(tmp_path: Path) -> None:
    folders = {"a": write(tmp_path / "a", "abc"), "b": write(tmp_path / "b", "bcd"), "t": write(tmp_path / "t", "dx")}
    found = reconcile(folders, "a", "t", {"a": 3, "b": 3})

    assert list(found.own) == ["a", "b"]
    assert found.own["b"].tolist() == [2, -1]
    assert found.stand_ins == {0: (("b", 2),), 1: ()}


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("a", {3: (("b", 3),), 4: (("a", 4),), 5: (("a", 5),)}),
        ("b", {3: (("b", 3),), 4: (("b", 4),), 5: (("a", 5), ("c", 3))}),
        (None, {3: (("b", 3),), 4: (("a", 4), ("b", 4)), 5: (("a", 5), ("c", 3))}),
    ],
)
def test_a_stand_in_is_the_only_models_row_else_the_bases_else_the_mean(
    tmp_path: Path, base: str | None, expected: dict[int, Any]
) -> None:
    words = {"a": "mno2ab", "b": "mno1a", "c": "mnob", "t": "mno1ab"}
    folders = {name: write(tmp_path / name, letters) for name, letters in words.items()}
    found = reconcile(folders, base, "t", {"a": 6, "b": 5, "c": 4})

    assert found.stand_ins == expected


def test_a_union_appends_what_the_others_know_in_their_order(tmp_path: Path) -> None:
    folders = {
        "a": write(tmp_path / "a", "abc", ["<a>"]),
        "b": write(tmp_path / "b", {"z": 1, "a": 2, "y": 0}, ["<b>", "<a>"]),
        "c": write(tmp_path / "c", "wz"),
    }
    found = reconcile(folders, "a", "union", {"a": 4, "b": 5, "c": 2})

    assert ids(found) == {"a": 0, "b": 1, "c": 2, "<a>": 3, "y": 4, "z": 5, "<b>": 6, "w": 7}
    assert found.tokens == found.rows == 8
    assert found.own["b"].tolist() == [2, -1, -1, 4, 0, 1, 3, -1]
    assert found.stand_ins[5] == (("b", 1), ("c", 1))
    assert list(found.files) == ["tokenizer.json"]


def test_a_union_that_adds_nothing_keeps_the_files(tmp_path: Path) -> None:
    folders = {"a": write(tmp_path / "a", "abc", ["<a>"]), "b": write(tmp_path / "b", "cb", ["<a>"])}

    assert reconcile(folders, "a", "union", {"a": 4, "b": 3}).files == {}


def test_a_union_takes_the_settings_of_the_first_model_that_adds_a_token(tmp_path: Path) -> None:
    folders = {
        "a": write(tmp_path / "a", ["a", "<|im_start|>"]),
        "b": write(tmp_path / "b", ["w", "<tool>"], [IM_START]),
        "c": write(tmp_path / "c", "a", ["<|im_start|>", {"content": "<tool>", "lstrip": True}]),
    }
    found = reconcile(folders, "a", "union", {"a": 2, "b": 3, "c": 3})

    added = {entry["content"]: entry for entry in json.loads(found.files["tokenizer.json"])["added_tokens"]}
    # A piece of the base is cut out of the text too where another model relies on that; its id stays.
    assert (added["<|im_start|>"]["id"], added["<|im_start|>"]["special"]) == (1, True)
    assert (added["<tool>"]["lstrip"], added["<tool>"]["special"]) == (True, False)
    assert (added["w"]["normalized"], added["w"]["special"]) == (True, False)


def test_a_union_leaves_the_bases_own_settings(tmp_path: Path) -> None:
    folders = {
        "b": write(tmp_path / "b", "ab", [{"content": "<x>", "lstrip": True}, "<y>"]),
        "a": write(tmp_path / "a", "ab", ["<x>"]),
    }
    found = reconcile(folders, "a", "union", {"a": 3, "b": 4})

    added = by_content(json.loads(found.files["tokenizer.json"])["added_tokens"])
    assert (list(added), added["<x>"]["lstrip"]) == (["<x>", "<y>"], False)


LLAMA = {"tokenizer_class": "LlamaTokenizer", "unk_token": "?", "bos_token": "a", "eos_token": "b"}
SAVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "added": {"added": ["<x>", IM_START]},
    "misstated": {"added": [{"content": "<x>", "id": 20}, {"content": "<y>", "id": 3}, {"content": "b", "id": 9}]},
    "decoder": {"added": ["<x>"], "config": {"added_tokens_decoder": {"4": {"content": "<x>"}, "5": IM_START}}},
    "decoder alone": {
        "config": {"added_tokens_decoder": {"5": {"content": "<x>", "special": True}, "4": {"content": "<y>"}}}
    },
    "decoder against added": {
        "added": [{"content": "<x>", "lstrip": True}],
        "config": {"added_tokens_decoder": {"4": {"content": "<x>", "rstrip": True, "special": True}}},
    },
    "named": {
        "config": {"pad_token": "<pad>", "bos_token": "a", "image_token": "<img>", "extra_special_tokens": ["<e>"]}
    },
    "named in a table": {"config": {"extra_special_tokens": {"audio_token": "<audio>"}}},
    "old": {
        "added": ["<x>"],
        "special_tokens_map": {"pad_token": {"content": "<pad>", "lstrip": True}, "cls_token": "<cls>"},
        "added_tokens": {"<cls>": 6, "<x>": 4, "<z>": 5},
    },
    "gaps": {"pieces": {"a": 0, "b": 9, "?": 8}, "added": ["<x>", "<y>"]},
    "llama": {"added": ["<x>"], "config": LLAMA},
    "llama with a decoder": {"added": ["<x>"], "config": {**LLAMA, "added_tokens_decoder": {"4": {"content": "<x>"}}}},
}


@pytest.mark.parametrize("saved", SAVED.values(), ids=SAVED)
def test_ids_are_those_of_transformers(tmp_path: Path, saved: dict[str, Any]) -> None:
    folder = write(tmp_path / "model", **{"pieces": ["?", "a", "b", "c"], **saved})
    expected = loaded(folder).get_vocab()
    other = write(tmp_path / "other", list(expected))
    found = reconcile({"model": folder, "other": other}, "model", "other", {"model": 100, "other": len(expected)})

    assert dict(zip(expected, found.own["model"].tolist(), strict=True)) == expected


@pytest.mark.parametrize("saved", SAVED.values(), ids=SAVED)
def test_settings_of_added_tokens_are_those_of_transformers(tmp_path: Path, saved: dict[str, Any]) -> None:
    folder = write(tmp_path / "model", **{"pieces": ["?", "a", "b", "c"], **saved})
    expected = {each.content: each.__getstate__() for each in loaded(folder).added_tokens_decoder.values()}
    base = write(tmp_path / "base", ["?", "a", "b"])
    found = reconcile({"base": base, "model": folder}, "base", "union", {"base": 3, "model": 100})

    entries = json.loads(found.files["tokenizer.json"])["added_tokens"]
    assert {token: each for token, each in by_content(entries).items() if token in expected} == expected


@pytest.mark.parametrize("saved", SAVED.values(), ids=SAVED)
def test_a_union_loads_with_the_ids_that_its_rows_have(tmp_path: Path, saved: dict[str, Any]) -> None:
    folder = write(tmp_path / "model", **{"pieces": ["?", "a", "b", "c"], **saved})
    other = write(tmp_path / "other", ["n", "a"], [IM_START, "<new>"])
    found = reconcile({"model": folder, "other": other}, "model", "union", {"model": 100, "other": 4})
    before, after = loaded(folder).get_vocab(), loaded(laid_out(found, tmp_path / "out")).get_vocab()

    assert after.keys() == before.keys() | {"n", "a", "<|im_start|>", "<new>"}
    assert before.items() <= after.items()
    assert found.tokens == max(after.values()) + 1
    assert {token: found.own["model"][i] for token, i in after.items() if token in before} == before
    assert {token: found.own["other"][i] for token, i in after.items()} == {
        token: {"n": 0, "a": 1, "<|im_start|>": 2, "<new>": 3}.get(token, -1) for token in after
    }


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_a_unions_text_comes_back_and_the_bases_ids_stay(tmp_path: Path, kind: str) -> None:
    tools = [AddedToken("<|im_start|>", special=True, normalized=False), AddedToken("<tool>", normalized=False)]
    folders = {"a": train(tmp_path / "a", FOX, kind=kind), "b": train(tmp_path / "b", SUMS, tools, kind=kind)}
    before = {name: loaded(folder) for name, folder in folders.items()}
    rows = {name: len(tokenizer) for name, tokenizer in before.items()}
    found = reconcile(folders, "a", "union", rows)
    union = loaded(laid_out(found, tmp_path / "out"))

    assert len(union) == found.tokens > rows["a"]
    for text in [*FOX, *SUMS]:
        assert union.decode(union(text, add_special_tokens=False).input_ids) == text
    assert before["a"].get_vocab().items() <= union.get_vocab().items()
    assert union.get_vocab().keys() == before["a"].get_vocab().keys() | before["b"].get_vocab().keys()
    assert union.tokenize("<tool><|im_start|>") == ["<tool>", "<|im_start|>"]
    assert union.decode(union.convert_tokens_to_ids(["<|im_start|>", "<tool>"]), skip_special_tokens=True) == "<tool>"


TOKENS = st.text("abcd", min_size=1, max_size=2)


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """Pieces and added tokens, which may share some."""
    # An added token without any letters is none.
    return draw(st.lists(TOKENS, min_size=1, unique=True)), draw(st.lists(TOKENS | st.just(""), unique=True))


@settings(max_examples=60)
@given(models=st.lists(vocabularies(), min_size=1, max_size=4), cut=st.integers(0, 3), source=st.integers(-2, 3))
def test_every_row_is_its_tokens_row(
    tmp_path_factory: pytest.TempPathFactory, models: list[tuple[list[str], list[str]]], cut: int, source: int
) -> None:
    root = tmp_path_factory.mktemp("models")
    folders = {f"m{i}": write(root / f"m{i}", pieces, added) for i, (pieces, added) in enumerate(models)}
    numbered = {
        name: Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab() for name, folder in folders.items()
    }
    rows = {name: max(1, len(vocabulary) - cut) for name, vocabulary in numbered.items()}
    usable = {name: {t: i for t, i in each.items() if i < rows[name]} for name, each in numbered.items()}
    wanted = {-2: "union", -1: "base"}.get(source, f"m{source % len(models)}")
    found = reconcile(folders, "m0", wanted, rows)

    merged = ids(found)
    kept = "m0" if source < 0 else wanted
    assert usable[kept].items() <= merged.items()
    every = [token for each in usable.values() for token in each] if wanted == "union" else usable[kept]
    assert merged.keys() == set(every)
    assert found.tokens == max(merged.values()) + 1
    for name, own in found.own.items():
        assert {token: own[i] for token, i in merged.items()} == {t: usable[name].get(t, -1) for t in merged}
    lacking = {i for i in range(found.tokens) if any(own[i] < 0 for own in found.own.values())}
    assert found.stand_ins.keys() == lacking
    token_of = {i: token for token, i in merged.items()}
    for i, stand_in in found.stand_ins.items():
        assert stand_in
        assert all(usable[name][token_of[i]] == row for name, row in stand_in)


def test_an_id_beyond_another_models_table_is_no_token_of_it(tmp_path: Path) -> None:
    folders = {"a": write(tmp_path / "a", "abc", ["<x>"]), "b": write(tmp_path / "b", "abc", ["<x>", "<y>"])}
    found = reconcile(folders, "a", "union", {"a": 4, "b": 3})

    assert by_token(found, "b") == {"a": 0, "b": 1, "c": 2, "<x>": -1}
    assert found.stand_ins == {3: (("a", 3),)}


def test_tokens_of_the_kept_tokenizer_without_a_row_are_taken_out(tmp_path: Path) -> None:
    base = train(tmp_path / "a", FOX, [AddedToken("<x>", special=True), AddedToken("[PAD]", special=True)])
    config = json.loads((base / "tokenizer_config.json").read_text("utf-8"))
    config |= {"pad_token": "[PAD]", "extra_special_tokens": ["<x>", "[PAD]"], "mask_token": "<mask>"}
    (base / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (base / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "[PAD]"}}), "utf-8")
    rows = len(loaded(base)) - 2
    found = reconcile({"a": base}, "a", "base", {"a": rows})
    after = loaded(laid_out(found, tmp_path / "out"))

    assert found.tokens == found.rows == len(after) == rows
    assert (after.pad_token, after.mask_token, after.eos_token) == (None, None, "</s>")
    assert after("once upon<x>").input_ids == loaded(base)("once upon<x>").input_ids
    assert json.loads(found.files["special_tokens_map.json"]) == {}


def test_a_table_of_names_loses_those_of_tokens_that_are_taken_out(tmp_path: Path) -> None:
    names = {"audio_token": "<audio>", "image_token": "a"}
    base = write(tmp_path / "a", "abc", config={"extra_special_tokens": names})
    found = reconcile({"a": base}, "a", "base", {"a": 3})
    after = loaded(laid_out(found, tmp_path / "out"))

    assert (len(after), after.image_token) == (3, "a")


def test_a_union_gives_a_token_without_a_row_the_row_of_another_model(tmp_path: Path) -> None:
    base = write(tmp_path / "a", "abc", config={"pad_token": "[PAD]"})
    other = write(tmp_path / "b", "abc", ["<x>", {"content": "[PAD]", "special": True, "normalized": False}])
    found = reconcile({"a": base, "b": other}, "a", "union", {"a": 3, "b": 5})
    after = loaded(laid_out(found, tmp_path / "out"))

    assert (after.pad_token, after.pad_token_id, after.get_vocab()["<x>"]) == ("[PAD]", 4, 3)
    assert found.stand_ins == {3: (("b", 3),), 4: (("b", 4),)}


@pytest.mark.parametrize("as_text", [False, True])
def test_pieces_without_a_row_leave_with_their_merges(tmp_path: Path, as_text: bool) -> None:
    base = train(tmp_path / "a", FOX)
    table = json.loads((base / "tokenizer.json").read_text("utf-8"))
    if as_text:  # as older files have them
        table["model"]["merges"] = [" ".join(pair) for pair in table["model"]["merges"]]
        (base / "tokenizer.json").write_text(json.dumps(table), "utf-8")
    rows = len(table["model"]["vocab"]) - 10
    found = reconcile({"a": base}, "a", "base", {"a": rows})
    after = loaded(laid_out(found, tmp_path / "out"))

    assert len(after) == found.tokens == rows
    tokenized = after(FOX[0]).input_ids
    assert max(tokenized) < rows
    assert after.decode(tokenized) == FOX[0]


def test_merges_of_pieces_without_a_row_leave_whatever_the_order_of_ids(tmp_path: Path) -> None:
    base = write(tmp_path / "a", "")
    table = json.loads((base / "tokenizer.json").read_text("utf-8"))
    vocabulary = {"a": 0, "c": 1, "ac": 2, "ab": 3, "b": 4}
    table["model"] = {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"], ["a", "c"]]}
    (base / "tokenizer.json").write_text(json.dumps(table), "utf-8")
    found = reconcile({"a": base}, "a", "base", {"a": 4})

    assert ids(found) == {"a": 0, "c": 1, "ac": 2, "ab": 3}
    assert Tokenizer.from_str(found.files["tokenizer.json"].decode()).encode("ac").ids == [2]


def test_pieces_of_a_unigram_model_without_a_row_leave_too(tmp_path: Path) -> None:
    base = write(tmp_path / "a", "")
    table = json.loads((base / "tokenizer.json").read_text("utf-8"))
    table["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["?", 0.0], ["a", -1.0], ["b", -2.0], ["ab", -3.0]]}
    (base / "tokenizer.json").write_text(json.dumps(table), "utf-8")
    found = reconcile({"a": base}, "a", "base", {"a": 3})

    assert ids(found) == {"?": 0, "a": 1, "b": 2}


def test_an_id_without_a_token_keeps_its_row_of_the_kept_model(tmp_path: Path) -> None:
    folders = {"a": write(tmp_path / "a", {"a": 0, "b": 4}), "b": write(tmp_path / "b", "ba")}
    found = reconcile(folders, "a", "base", {"a": 5, "b": 2})

    assert found.tokens == 5
    assert found.own["a"].tolist() == [0, 1, 2, 3, 4]
    assert found.own["b"].tolist() == [1, -1, -1, -1, 0]
    assert found.stand_ins == {i: (("a", i),) for i in (1, 2, 3)}


def test_tokens_that_would_share_an_id_are_refused(tmp_path: Path) -> None:
    folders = {"a": write(tmp_path / "a", {"a": 0, "b": 3}), "b": write(tmp_path / "b", "xy")}

    with pytest.raises(
        MergeError, match=r"ids of the tokenizer of .*/a have gaps, so that 'b' and 'y' would both be 3"
    ):
        reconcile(folders, "a", "union", {"a": 4, "b": 2})


@pytest.mark.parametrize(("multiple", "rows"), [(None, 5), (1, 5), (5, 5), (4, 8), (64, 64)])
def test_rows_are_padded_to_a_multiple(tmp_path: Path, multiple: int | None, rows: int) -> None:
    folders = {"a": write(tmp_path / "a", "abcde")}
    found = reconcile(folders, "a", "base", {"a": 32}, pad_to_multiple_of=multiple)

    assert (found.tokens, found.rows, len(found.own["a"])) == (5, rows, 5)


class TestTokenSources:
    """Rows that a recipe chooses."""

    @pytest.fixture
    def folders(self, tmp_path: Path) -> dict[str, Path]:
        return {"a": write(tmp_path / "a", "abc"), "b": write(tmp_path / "b", "cba", [IM_START])}

    def chosen(self, folders: dict[str, Path], **sources: TokenSource | None) -> Vocabulary:
        tokens = {{"im_start": "<|im_start|>", "new": "<new>"}.get(name, name): each for name, each in sources.items()}
        return reconcile(folders, "a", "base", {"a": 3, "b": 4}, tokens=tokens)

    def test_a_token_that_is_not_known_is_added(self, folders: dict[str, Path], tmp_path: Path) -> None:
        found = self.chosen(folders, new=TokenSource(), im_start=TokenSource("b"))

        assert ids(found) == {"a": 0, "b": 1, "c": 2, "<new>": 3, "<|im_start|>": 4}
        assert found.stand_ins == {3: (), 4: (("b", 3),)}
        assert found.own["a"].tolist() == [0, 1, 2, -1, -1]
        assert found.own["b"].tolist() == [2, 1, 0, -1, 3]
        after = loaded(laid_out(found, tmp_path / "out"))
        assert after.tokenize("<new><|im_start|>") == ["<new>", "<|im_start|>"]
        assert after.decode([3, 4], skip_special_tokens=True) == "<new>"

    @pytest.mark.parametrize(
        ("choice", "rows"),
        [
            (TokenSource(), ()),
            (TokenSource("b"), (("b", 3),)),
            (TokenSource("b", token="a"), (("b", 2),)),
            (TokenSource("b", token_id=1), (("b", 1),)),
            (TokenSource("a", token_id=0), (("a", 0),)),
            (None, (("b", 3),)),
        ],
    )
    def test_models_that_lack_a_token_take_the_chosen_row(
        self, folders: dict[str, Path], choice: TokenSource | None, rows: Any
    ) -> None:
        found = self.chosen(folders, im_start=choice)

        assert found.stand_ins == {3: rows}
        assert (found.own["a"][3], found.own["b"][3]) == (-1, 3)

    def test_what_every_model_has_is_left_alone(self, folders: dict[str, Path]) -> None:
        found = self.chosen(folders, a=TokenSource("b", token="c"))

        assert (found.stand_ins, found.own["a"][0], found.own["b"][0], found.files) == ({}, 0, 2, {})

    def test_force_takes_the_row_for_every_model(self, folders: dict[str, Path]) -> None:
        found = self.chosen(folders, a=TokenSource("b", force=True), b=TokenSource(force=True))

        assert found.own["a"].tolist() == [-1, -1, 2]
        assert found.own["b"].tolist() == [-1, -1, 0]
        assert found.stand_ins == {0: (("b", 2),), 1: ()}

    @pytest.mark.parametrize(
        ("choice", "sentence"),
        [
            (
                TokenSource("a"),
                r"row of '<new>' is to be that of '<new>' in .*/a, which has no such token: name a token",
            ),
            (TokenSource("b", token="z"), r"is to be that of 'z' in .*/b, which has no such token: name a token"),
            (TokenSource("b", token_id=4), r"is to be row 4 of .*/b, which has 4: give a token_id from 0 to 3"),
            (TokenSource("b", token_id=-1), r"is to be row -1 of .*/b"),
            (TokenSource("c"), r"is to come from c, which is not merged: name one of a, b"),
        ],
    )
    def test_a_row_that_there_is_not_is_refused(
        self, folders: dict[str, Path], choice: TokenSource, sentence: str
    ) -> None:
        with pytest.raises(MergeError, match=sentence):
            self.chosen(folders, new=choice)


@pytest.mark.parametrize(("base", "source"), [("a", "c"), ("c", "a"), ("c", "base")])
def test_an_unknown_model_is_refused_with_the_known_ones(tmp_path: Path, base: str, source: str) -> None:
    folders = {"a": write(tmp_path / "a", "a"), "b": write(tmp_path / "b", "a")}

    with pytest.raises(MergeError, match="c is no model of this merge: give tokenizer base, union or one of a, b"):
        reconcile(folders, base, source, {"a": 1, "b": 1})


def test_a_model_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    folders = {"a": write(tmp_path / "a", "a"), "bare": tmp_path / "bare"}

    with pytest.raises(MergeError, match=r"/bare has no tokenizer .*: give tokenizer a model that has one"):
        reconcile(folders, "a", "base", {"a": 1, "bare": 1})


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("tokenizer.json", "{", r"/a/tokenizer\.json is not readable JSON: fetch the model again"),
        ("tokenizer.json", "[" * 100_000, r"/a/tokenizer\.json is not readable JSON"),
        ("tokenizer.json", "\x80", r"/a/tokenizer\.json is not readable JSON"),
        ("tokenizer_config.json", "[]", r"/a/tokenizer_config\.json is no table of settings"),
        ("tokenizer.json", "{}", r"the tokenizer of .*/a is damaged .*'model'.*: fetch the model again"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "0"}}}', "is damaged .*no whole number"),
        ("tokenizer.json", '{"model": {"vocab": {"a": -1}}}', "is damaged .*no whole number"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0.5}}}', "is damaged .*no whole number"),
        ("tokenizer.json", '{"model": {"vocab": [0, 1]}}', "is damaged"),
        ("tokenizer.json", '{"model": {"vocab": {"\\ud800": 0}}}', "is damaged .*surrogates"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}}, "added_tokens": [{}]}', "is damaged .*'content'"),
        ("tokenizer.json", '{"model": {"vocab": {}}}', "knows no token"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 7}}}', r"no token of .*/a has one of its table's 1 rows"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "b"}}}', "is damaged"),
    ],
)
def test_a_damaged_tokenizer_is_named(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    folder = write(tmp_path / "a", "a")
    (folder / name).write_bytes(text.encode("latin-1"))

    with pytest.raises(MergeError, match=sentence):
        reconcile({"a": folder}, "a", "base", {"a": 1})


def test_merges_that_are_damaged_are_named_where_they_are_written_again(tmp_path: Path) -> None:
    base = train(tmp_path / "a", FOX)
    file = base / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace('"merges": [', '"merges": [,'), "utf-8")

    with pytest.raises(MergeError, match=r"/a/tokenizer\.json is not readable JSON"):
        reconcile({"a": base, "b": write(tmp_path / "b", ["<new>"])}, "a", "union", {"a": 300, "b": 1})


@pytest.mark.parametrize("last", ["merges", "vocab"])
@pytest.mark.parametrize("indent", [None, 2])
def test_whatever_tokens_look_like_every_one_is_read(tmp_path: Path, last: str, indent: int | None) -> None:
    base = write(tmp_path / "a", "")
    tokens = ['"merges": [', '"merges":[', "merges", "]", "]}}", "}}", '"', "\\", "[", "\n"]
    model: dict[str, Any] = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []}
    model[last] = model.pop(last)
    table = json.loads((base / "tokenizer.json").read_text("utf-8")) | {"model": model}
    (base / "tokenizer.json").write_text(json.dumps(table, indent=indent), "utf-8")
    found = reconcile({"a": base, "b": write(tmp_path / "b", tokens)}, "a", "b", {"a": 20, "b": len(tokens)})

    assert found.own["a"].tolist() == list(range(len(tokens)))


def sentencepiece(pieces: Sequence[str]) -> bytes:
    """A tokenizer.model as sentencepiece writes it: pieces with their scores, then the trainer's settings."""
    blocks = []
    for piece in pieces:
        text = piece.encode()
        block = b"\x0a" + bytes([len(text)]) + text + b"\x15" + np.float32(-1).tobytes() + b"\x18\x01"
        blocks.append(b"\x0a" + bytes([len(block) & 0x7F | 0x80, len(block) >> 7]) + block)
    return b"".join(blocks) + b"\x12\x03abc"


def test_a_tokenizer_without_tokenizer_json_is_read_from_its_sentencepiece_model(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "\u2581the", "\u2581" * 42]
    base = write(tmp_path / "a", "", added_tokens={"<pad>": 4})
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.model").write_bytes(sentencepiece(pieces))
    other = write(tmp_path / "b", [*pieces[::-1], "<pad>"])
    found = reconcile({"a": base, "b": other}, "a", "base", {"a": 5, "b": 5})

    assert (found.tokens, found.files) == (5, {})
    assert found.own["b"].tolist() == [3, 2, 1, 0, 4]


@pytest.mark.parametrize(
    "content", [b"IQ== 0\nIg== 1\n", sentencepiece(["a", "b"])[:-4], b"\x0a\x03\x12\x01a", b"\xff"]
)
def test_another_kind_of_tokenizer_model_is_refused(tmp_path: Path, content: bytes) -> None:
    base = write(tmp_path / "a", "")
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.model").write_bytes(content)

    with pytest.raises(MergeError, match=r"/a/tokenizer\.model is no sentencepiece model: save the tokenizer as"):
        reconcile({"a": base}, "a", "base", {"a": 2})


def gpt2(folder: Path) -> Path:
    """A model folder with vocab.json and merges.txt, as GPT-2's has, and an added token."""
    train(folder, FOX, kind="GPT2Tokenizer")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), "utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": tokenizer.get_vocab_size()}), "utf-8")
    return folder


def test_a_tokenizer_without_tokenizer_json_gets_one_when_tokens_are_added(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "a")
    before = loaded(base).get_vocab()
    found = reconcile({"a": base}, "a", "base", {"a": len(before)}, tokens={"<new>": TokenSource()})
    after = loaded(laid_out(found, tmp_path / "out"))

    assert after.get_vocab() == {**before, "<new>": len(before)}
    assert after.decode(after(FOX[0]).input_ids) == FOX[0]
    assert json.loads(found.files["added_tokens.json"]) == {"<x>": len(before) - 1, "<new>": len(before)}


def test_a_tokenizer_that_transformers_cannot_convert_is_named(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "a")
    (base / "merges.txt").write_text("no merge", "utf-8")

    with pytest.raises(MergeError, match=r"/a has no tokenizer\.json, and transformers cannot make one .*: install"):
        reconcile({"a": base}, "a", "base", {"a": 400}, tokens={"<new>": TokenSource()})


def test_a_sentencepiece_model_that_is_kept_has_the_new_tokens_beside_it(tmp_path: Path) -> None:
    base = write(tmp_path / "a", "ab", ["<x>"])
    (base / "tokenizer.model").write_bytes(sentencepiece("ab"))
    found = reconcile({"a": base}, "a", "base", {"a": 3}, tokens={"<new>": TokenSource()})

    assert json.loads(found.files["added_tokens.json"]) == {"<x>": 2, "<new>": 3}
    assert loaded(laid_out(found, tmp_path / "out")).get_vocab() == ids(found)


def test_the_same_folders_give_the_same_bytes(tmp_path: Path) -> None:
    folders = {"a": train(tmp_path / "a", FOX), "b": train(tmp_path / "b", SUMS, [AddedToken("<x>")])}
    program = (
        "import hashlib, sys; from pathlib import Path; from builder.merge.vocabulary import reconcile;"
        f"v = reconcile({{n: Path({str(tmp_path)!r}) / n for n in 'ab'}}, 'a', 'union', {{'a': 300, 'b': 301}});"
        "print(hashlib.sha256(repr((sorted(v.files.items()), v.own, v.stand_ins)).encode()).hexdigest());"
        "print(*sorted({'torch', 'transformers', 'tokenizers', 'peft'} & set(sys.modules)))"
    )
    assert reconcile(folders, "a", "union", {"a": 300, "b": 301}).files
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]

    assert runs[0] == runs[1]
    # A merge starts within half a second: none of these may be loaded.
    assert runs[0].split("\n")[1] == ""


def test_special_ids_are_those_of_the_config(tmp_path: Path) -> None:
    config = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": None, "sep_token_id": 3}
    folder = write(tmp_path / "a", "a", config=None)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")

    assert special_ids(folder) == {"bos_token_id": 1, "eos_token_id": [2, 7]}
