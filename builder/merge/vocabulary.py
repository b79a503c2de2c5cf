"""Whose tokens a merged model knows, and where each row of each model's embedding table comes from.

The choices are mergekit 0.1.5's. A token's id is the one that the tokenizers library gives it when it loads the folder:
added tokens are numbered in turn from the end of the vocabulary, whatever ids their file states.
"""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder import checkpoints
from builder.errors import MergeError

Rows = tuple[tuple[str, int], ...]
Settings = Mapping[str, bool]
Tables = Mapping[str, Any]

_SETTINGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_PLAIN: Settings = {name: name == "normalized" for name in _SETTINGS}
_SPECIAL: Settings = {name: name == "special" for name in _SETTINGS}
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("extra_special_tokens", "additional_special_tokens")
_TABLES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_NAMING = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, slots=True)
class TokenSource:
    """Where models that lack a token take its row from; with `force`, the models that have it too.

    model: whose row it is; None: zeros.
    token, token_id: which row of that model; without either, its row of the very token.
    """

    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The merged vocabulary and its rows.

    tokens: how many rows the tokens take: the largest id + 1.
    rows: how many rows the merged table has: `tokens`, padded to a multiple.
    own: by model, its row of each token [tokens]; -1 where it has none, or where `force` keeps it from being used.
    stand_ins: by token id, the rows whose mean stands in where `own` is -1; no rows: zeros. It has every id for which
        some model's `own` is -1, and no other.
    folder: the model whose tokenizer files are kept.
    files: what replaces or joins those files, by name; empty where they are kept as they are.
    """

    tokens: int
    rows: int
    own: Mapping[str, NDArray[np.int64]]
    stand_ins: Mapping[int, Rows]
    folder: Path
    files: Mapping[str, bytes]


def reconcile(
    folders: Mapping[str, Path],
    base: str | None,
    source: str,
    rows: Mapping[str, int],
    *,
    tokens: Mapping[str, TokenSource | None] = MappingProxyType({}),
    pad_to_multiple_of: int | None = None,
) -> Vocabulary:
    """The vocabulary of a merge of the models in `rows`, whose embedding tables have that many rows.

    folders: every model, in the recipe's order; one that `rows` leaves out is not merged and only lends its tokenizer.
    base: whose tokenizer "base" and "union" start from, and whose row is the first choice for a stand-in. None: they
        start from the first model's, and stand-ins are means.
    source: "base", "union", or the model whose tokenizer is kept.
    tokens: where single tokens' rows come from, None: as any other's; those that the vocabulary lacks are added to it.

    An id beyond its model's table is no token of that model; where its tokenizer is kept, such tokens are taken out.
    Raises MergeError.
    """
    kept = source if source not in ("base", "union") else base or next(iter(folders))
    for name in (kept, base or kept):
        if name not in folders:
            raise MergeError(f"{name} is no model of this merge: give tokenizer base, union or one of {_all(folders)}")
    texts: dict[bytes, Any] = {}
    tables = {name: _tables(folder, texts) for name, folder in folders.items()}
    known = {name: _numbered(folder, tables[name]) for name, folder in folders.items()}
    usable = {name: each.below(rows[name]) if name in rows else each for name, each in known.items()}

    merged = usable[kept].below(None)
    if not merged.ids:
        raise MergeError(f"no token of {folders[kept]} has one of its table's {rows[kept]} rows: fetch the model again")
    added = {token: settings for each in reversed(known.values()) for token, settings in each.added.items()}
    if source == "union":
        for each in usable.values():
            merged.join(each, added)
    for token in tokens:
        if token not in merged.ids:  # cut out of the text as in the model that has it
            merged.add(token, added.get(token, _PLAIN))

    own = _own({name: usable[name].ids for name in rows}, merged.ids, folders[kept])
    if kept in own:
        _keep_gaps(own[kept], merged.ids, rows[kept])
    chosen = {token: choice for token, choice in tokens.items() if choice}
    wanted = {merged.ids[token]: _wanted(token, choice, folders, usable, rows) for token, choice in chosen.items()}
    forced = [merged.ids[token] for token, choice in chosen.items() if choice.force]
    for column in own.values():
        column[forced] = -1
    count, multiple = max(merged.ids.values()) + 1, pad_to_multiple_of or 1
    unchanged = merged.ids == known[kept].ids and merged.added == known[kept].added
    return Vocabulary(
        tokens=count,
        rows=-(-count // multiple) * multiple,
        own=own,
        stand_ins={i: wanted.get(i, default) for i, default in _stand_ins(own, base)},
        folder=folders[kept],
        files={} if unchanged else _files(folders[kept], tables[kept], merged),
    )


def special_ids(folder: Path) -> dict[str, int | list[int]]:
    """bos_token_id, eos_token_id and pad_token_id of a model's config.json, where it has them."""
    config = checkpoints.read_config(folder)
    ids = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: value for name, value in ids.items() if value is not None}


class _Tokens:
    """Tokens and their ids, numbered as the tokenizers library does.

    pieces: what the tokenizer's model makes of text.
    added: what is cut out of the text before, with the settings for that.
    ids: both.
    """

    def __init__(self, pieces: Mapping[str, int]) -> None:
        self.pieces = pieces
        self.added: dict[str, Settings] = {}
        self.ids = dict(pieces)
        self._next = len(pieces)

    def add(self, token: str, settings: Settings) -> None:
        """Make `token` an added token; one without an id gets the next."""
        if token and token not in self.added:
            self.added[token] = settings
            self._next = max(self._next, self.ids.setdefault(token, self._next) + 1)

    def below(self, limit: int | None) -> _Tokens:
        """A copy, of the tokens whose ids are below `limit`."""
        if limit is None or limit > max(self.ids.values()):
            limit, pieces = None, self.pieces
        else:
            pieces = {token: i for token, i in self.pieces.items() if i < limit}
        copy = _Tokens(pieces)
        for token, settings in self.added.items():
            if limit is None or self.ids[token] < limit:
                copy.add(token, settings)
        return copy

    def join(self, other: _Tokens, added: Mapping[str, Settings]) -> None:
        """Add what `other` knows beyond this, in its order; `added` has the settings."""
        for token in sorted(other.ids.keys() - self.ids.keys(), key=other.ids.__getitem__):
            self.add(token, added.get(token, _PLAIN))
        # What is cut out of the text for one model is for all, whether or not the base has a piece of that name.
        for token in other.added:
            self.add(token, added[token])


def _tables(folder: Path, texts: dict[bytes, Any]) -> dict[str, Any]:
    """The JSON files of a folder's tokenizer, by name; equal ones of several folders are parsed once."""
    tables = {}
    for name in _TABLES:
        path = folder / name
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as exc:
            raise MergeError(f"{path} cannot be read ({exc.strerror}): fetch the model again") from exc
        if text not in texts:
            texts[text] = _table(path, _without_merges(text) if name == "tokenizer.json" else text)
        tables[name] = texts[text]
    return tables


def _table(path: Path, text: bytes) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise MergeError(f"{path} is not readable JSON: fetch the model again") from exc
    if not isinstance(table, dict):
        raise MergeError(f"{path} is no table of settings: fetch the model again")
    return table


def _without_merges(text: bytes) -> bytes:
    """A tokenizer.json without its merges, where they end it: most of the time to parse, and nothing about ids."""
    begin = re.search(rb'"merges"\s*:\s*\[', text)
    if begin and re.fullmatch(rb"\s*\}\s*\}\s*", text[text.rfind(b"]") + 1 :]):
        return text[: begin.end()] + b"]}}"
    return text


def _numbered(folder: Path, tables: Tables) -> _Tokens:
    """A folder's tokens as transformers numbers them: the pieces, then what each file adds. Raises MergeError."""
    try:
        tokens = _Tokens(_pieces(folder, tables))
        for token, settings in _added(tables):
            tokens.add(token, settings)
        "".join(tokens.ids).encode()  # half a surrogate pair: JSON may hold it, and no tokenizer reads it
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise MergeError(f"the tokenizer of {folder} is damaged ({exc!r}): fetch the model again") from exc
    if not tokens.ids:
        raise MergeError(f"the tokenizer of {folder} knows no token: fetch the model again")
    return tokens


def _pieces(folder: Path, tables: Tables) -> dict[str, int]:
    """The vocabulary of a tokenizer without its added tokens, from tokenizer.json, tokenizer.model or vocab.json."""
    pieces: dict[str, int]
    if "tokenizer.json" in tables:
        listed = tables["tokenizer.json"]["model"]["vocab"]
        # Unigram lists its pieces with their scores.
        pieces = {piece: i for i, (piece, _) in enumerate(listed)} if isinstance(listed, list) else listed
    elif (folder / "tokenizer.model").exists():
        pieces = _sentencepiece(folder / "tokenizer.model")
    elif (folder / "vocab.json").exists():
        pieces = _table(folder / "vocab.json", (folder / "vocab.json").read_bytes())
    else:
        raise MergeError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json): give tokenizer a model that "
            "has one, and leave this one's tokens out"
        )
    if not set(map(type, pieces.values())) <= {int} or min(pieces.values(), default=0) < 0:
        raise ValueError("an id that is no whole number")
    return pieces


def _sentencepiece(path: Path) -> dict[str, int]:
    """The pieces of a sentencepiece model, a protobuf: field 1, repeated; in each the piece is field 1, and first."""
    data, at = path.read_bytes(), 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError(f"no number at byte {at}")

    pieces: dict[str, int] = {}
    try:
        while at < len(data):
            field, length = number(), number()
            end = at + length
            if field & 7 != 2 or end > len(data):
                raise ValueError(f"field {field} at byte {at}")
            if field == 0x0A:
                if number() != 0x0A or (length := number()) > end - at:
                    raise ValueError(f"no piece at byte {at}")
                pieces[data[at : at + length].decode("utf-8")] = len(pieces)
            at = end
    except (IndexError, ValueError) as exc:
        raise MergeError(
            f"{path} is no sentencepiece model: save the tokenizer as tokenizer.json, "
            "with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        ) from exc
    return pieces


def _added(tables: Tables) -> Iterator[tuple[str, Settings]]:
    """What a folder's files add to the pieces, in transformers' order; a token may come more than once."""
    config = tables.get("tokenizer_config.json", {})
    # What it says of a token goes before what tokenizer.json says.
    decoder = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    decided = {entry["content"]: _settings(entry) for _, entry in decoder}
    for entry in tables.get("tokenizer.json", {}).get("added_tokens", []):
        yield entry["content"], decided.get(entry["content"], _settings(entry))
    yield from decided.items()
    if "added_tokens_decoder" not in config:
        # Files from before added_tokens_decoder are read where it is missing.
        config = {**config, **tables.get("special_tokens_map.json", {})}
        special = {token for token, _ in _names(config)}
        for token, _ in sorted(tables.get("added_tokens.json", {}).items(), key=lambda item: int(item[1])):
            yield token, _SPECIAL if token in special else _PLAIN
    yield from _names(config)


def _names(config: Mapping[str, Any]) -> Iterator[tuple[str, Settings]]:
    """The special tokens that a tokenizer_config.json or special_tokens_map.json gives a role."""
    others = [key for key in config if key.endswith("_token") and key not in _NAMED]
    entries = [config.get(key) for key in (*_NAMED, *others)]
    listed = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    entries += listed.values() if isinstance(listed, dict) else listed
    for entry in entries:
        if isinstance(entry, str):
            yield entry, _SPECIAL
        elif isinstance(entry, dict):
            yield entry["content"], _settings({**entry, "special": True})


def _settings(entry: Mapping[str, Any]) -> Settings:
    default = {"normalized": not entry.get("special", False)}
    return {name: bool(entry.get(name, default.get(name, False))) for name in _SETTINGS}


def _own(
    models: Mapping[str, Mapping[str, int]], merged: Mapping[str, int], folder: Path
) -> dict[str, NDArray[np.int64]]:
    """By model, its id of each merged id's token; -1 where it has none."""
    ids = np.fromiter(merged.values(), np.int64, len(merged))
    counts = np.bincount(ids)
    if counts.max() > 1:
        number = int(counts.argmax())
        first, second, *_ = (token for token, i in merged.items() if i == number)
        raise MergeError(
            f"the ids of the tokenizer of {folder} have gaps, so that {first!r} and {second!r} would both be {number}: "
            "give its unused ids tokens of their own"
        )
    own = {}
    for name, theirs in models.items():
        own[name] = np.full(len(counts), -1, np.int64)
        own[name][ids] = np.fromiter(map(theirs.get, merged, itertools.repeat(-1)), np.int64, len(merged))
    return own


def _keep_gaps(own: NDArray[np.int64], merged: Mapping[str, int], rows: int) -> None:
    """An id without a token keeps its row of the model whose tokenizer is kept."""
    if len(merged) < len(own):
        gaps = np.setdiff1d(np.arange(min(len(own), rows)), np.fromiter(merged.values(), np.int64, len(merged)))
        own[gaps] = gaps


def _wanted(
    token: str,
    choice: TokenSource,
    folders: Mapping[str, Path],
    usable: Mapping[str, _Tokens],
    rows: Mapping[str, int],
) -> Rows:
    """The row that a recipe gives a token. Raises MergeError where there is no such row."""
    if choice.model is None:
        return ()
    if choice.model not in rows:
        raise MergeError(
            f"tokenizer: the row of {token!r} is to come from {choice.model}, which is not merged: "
            f"name one of {_all(rows)}"
        )
    row = choice.token_id
    if row is None:
        source = token if choice.token is None else choice.token
        row = usable[choice.model].ids.get(source)
        if row is None:
            raise MergeError(
                f"tokenizer: the row of {token!r} is to be that of {source!r} in {folders[choice.model]}, which has no "
                "such token: name a token or a token_id that it has"
            )
    if not 0 <= row < rows[choice.model]:
        raise MergeError(
            f"tokenizer: the row of {token!r} is to be row {row} of {folders[choice.model]}, which has "
            f"{rows[choice.model]}: give a token_id from 0 to {rows[choice.model] - 1}"
        )
    return ((choice.model, row),)


def _stand_ins(own: Mapping[str, NDArray[np.int64]], base: str | None) -> Iterator[tuple[int, Rows]]:
    """For each id that some model lacks, the rows of the base, or of all models that have it."""
    if not own:
        return
    table = np.stack(list(own.values()))
    lacking = np.flatnonzero((table < 0).any(axis=0))
    for i, column in zip(lacking.tolist(), table[:, lacking].T.tolist(), strict=True):
        having = {name: row for name, row in zip(own, column, strict=True) if row >= 0}
        yield i, ((base, having[base]),) if base in having else tuple(having.items())


def _files(folder: Path, tables: Tables, merged: _Tokens) -> dict[str, bytes]:
    """The tokenizer files of `folder` for these tokens: those that differ from its own."""
    converted: dict[str, bytes] = {}
    if "tokenizer.json" in tables:
        path = folder / "tokenizer.json"
        tables = {**tables, path.name: _table(path, path.read_bytes())}
    else:
        converted = _converted(folder)
        tables = {name: json.loads(converted[name]) for name in _TABLES if name in converted}
    edited = _edited(folder, tables, merged)
    if _numbered(folder, edited).ids != merged.ids:
        raise MergeError(
            f"transformers numbers the tokens of {folder} otherwise than its files do: save it with a tokenizer.json, "
            "and check its ids"
        )
    return converted | {name: _written(table) for name, table in edited.items() if table != tables.get(name)}


def _edited(folder: Path, tables: Tables, merged: _Tokens) -> dict[str, Any]:
    """The JSON files with these tokens and no others, wherever they list them: readers differ in which they look at."""
    added = sorted(merged.added, key=merged.ids.__getitem__)
    entries = {token: {"content": token, **merged.added[token]} for token in added}
    edited = {name: _without_lost_names(table, merged.ids) for name, table in tables.items() if name in _NAMING}
    edited["tokenizer.json"] = {
        **tables["tokenizer.json"],
        "added_tokens": [{"id": merged.ids[token], **entries[token]} for token in added],
        "model": _model(tables["tokenizer.json"]["model"], merged.pieces),
    }
    config = edited.get("tokenizer_config.json", {})
    if "added_tokens_decoder" in config:
        entries |= {entry["content"]: entry for entry in config["added_tokens_decoder"].values()}
        config["added_tokens_decoder"] = {str(merged.ids[token]): entries[token] for token in added}
    beyond = {token: merged.ids[token] for token in added if token not in merged.pieces}
    # llama.cpp's converter reads tokenizer.model, and beside it one of these two.
    if (folder / "added_tokens.json").exists() or (
        (folder / "tokenizer.model").exists() and "added_tokens_decoder" not in config
    ):
        edited["added_tokens.json"] = beyond
    return edited


def _model(model: Mapping[str, Any], pieces: Mapping[str, int]) -> Mapping[str, Any]:
    """The tokenizer's model with these pieces alone."""
    vocabulary = model["vocab"]
    if len(vocabulary) == len(pieces):
        return model
    if isinstance(vocabulary, list):
        return {**model, "vocab": [entry for entry in vocabulary if entry[0] in pieces]}
    kept = {**model, "vocab": {token: i for token, i in vocabulary.items() if token in pieces}}
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
        kept["merges"] = [
            merge
            for merge, (left, right) in pairs
            if left in pieces and right in pieces and left + right.removeprefix(prefix) in pieces
        ]
    return kept


def _without_lost_names(config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """The settings without roles for tokens that are gone, which transformers would add again."""

    def known(entry: Any) -> bool:
        return (entry["content"] if isinstance(entry, dict) else entry) in ids

    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key in _LISTS and isinstance(value, list):
            kept[key] = [entry for entry in value if known(entry)]
        elif key in _LISTS and isinstance(value, dict):
            kept[key] = {name: entry for name, entry in value.items() if known(entry)}
        elif not (key.endswith("_token") and isinstance(value, str | dict)) or known(value):
            kept[key] = value
    return kept


def _converted(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files as transformers saves them, with a tokenizer.json."""
    from transformers import AutoTokenizer

    try:
        with tempfile.TemporaryDirectory() as name:
            AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(name)
            return {path.name: path.read_bytes() for path in sorted(Path(name).iterdir()) if path.is_file()}
    except Exception as exc:
        # transformers raises ImportError, ValueError, OSError and others, by the kind of tokenizer.
        raise MergeError(
            f"{folder} has no tokenizer.json, and transformers cannot make one ({_first(exc)}): install sentencepiece "
            "and protobuf, or save the tokenizer with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        ) from exc


def _written(table: Mapping[str, Any]) -> bytes:
    # Indented, a large vocabulary takes four times as long.
    return (json.dumps(table, ensure_ascii=False, indent=None if "model" in table else 2) + "\n").encode()


def _all(names: Mapping[str, Any]) -> str:
    return ", ".join(names)


def _first(exc: Exception) -> str:
    return str(exc).strip().split("\n")[0]
