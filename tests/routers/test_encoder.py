"""Compared with transformers' states and numpy, on random networks of a few kilobytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from routers.encoder import Encoder
from routers.errors import BundleError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
save_file = pytest.importorskip("safetensors.torch").save_file

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = ("solve", "count", "sum", "python", "code", "loop", "dragon", "castle", "the", "a")
PACKAGE = "sentence_transformers.models"
HIDDEN, LONGEST = 32, 9
SIZE = {"vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": HIDDEN, "intermediate_size": 48}
DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
TEXTS = ("solve the sum", "a loop", "the dragon the castle a dragon")
Vector = NDArray[np.float32]
Make = Callable[..., Path]


def write_json(path: Path, said: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(said), "utf-8")


def save_tokenizer(folder: Path) -> None:
    """Words, with [CLS] before them and [SEP] after."""
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]").save_pretrained(folder)


def bert() -> Any:
    torch.manual_seed(5)
    return transformers.BertModel(transformers.BertConfig(**SIZE, **DEPTH, initializer_range=0.5)).eval()


def llama() -> Any:
    torch.manual_seed(6)
    return transformers.LlamaModel(transformers.LlamaConfig(**SIZE, **DEPTH, initializer_range=0.5)).eval()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def folder(
        model: Any,
        pooling: Any = "mean",
        *,
        inside: str = "",
        dense: bool = False,
        normalise: bool = False,
        said: dict[str, Any] | None = None,
    ) -> Path:
        out = tmp_path / "sentences"
        (out / inside).mkdir(parents=True)
        model.save_pretrained(out / inside)
        save_tokenizer(out / inside)
        write_json(out / inside / "sentence_bert_config.json", {"max_seq_length": LONGEST, **(said or {})})
        write_json(out / "1_Pooling" / "config.json", {"word_embedding_dimension": HIDDEN, "pooling_mode": pooling})
        kinds = [("Transformer", inside), ("Pooling", "1_Pooling")]
        if dense:
            kinds.append(("Dense", "2_Dense"))
            sizes = {"in_features": HIDDEN, "out_features": 8, "bias": True}
            write_json(
                out / "2_Dense" / "config.json", sizes | {"activation_function": "torch.nn.modules.activation.Tanh"}
            )
            weights = {"linear.weight": torch.randn(8, HIDDEN), "linear.bias": torch.randn(8)}
            save_file(weights, out / "2_Dense" / "model.safetensors")
        if normalise:
            kinds.append(("Normalize", "3_Normalize"))
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"{PACKAGE}.{kind}"}
            for i, (kind, path) in enumerate(kinds)
        ]
        write_json(out / "modules.json", modules)
        return out

    return folder


def ids(text: str, *, special: bool = True) -> list[int]:
    """Of a text of known words, cut at its end; [CLS] and [SEP] count."""
    words = [(SPECIAL + WORDS).index(word) for word in text.split()]
    return [2, *words[: LONGEST - 2], 3] if special else words[:LONGEST]


def states(model: Any, tokens: list[int]) -> Vector:
    with torch.no_grad():
        found: Vector = model(input_ids=torch.tensor([tokens])).last_hidden_state[0].numpy()
    return found


def unit(vector: Vector) -> Vector:
    scaled: Vector = vector / np.linalg.norm(vector)
    return scaled


POOLS: dict[str, Callable[[Vector], Vector]] = {
    "mean": lambda states: states.mean(axis=0),
    "cls": lambda states: states[0],
    "lasttoken": lambda states: states[-1],
    "max": lambda states: states.max(axis=0),
}


@pytest.mark.parametrize("pooling", POOLS)
@pytest.mark.parametrize("network", [bert, llama])
def test_a_vector_is_the_pooled_states_less_the_mean_at_unit_length(
    make: Make, network: Callable[[], Any], pooling: str
) -> None:
    model = network()
    encoder = Encoder.centred_on(make(model, pooling), TEXTS)
    pooled = [POOLS[pooling](states(model, ids(text))) for text in TEXTS]
    for text, own in zip(TEXTS, pooled, strict=True):
        np.testing.assert_allclose(encoder.vector(text), unit(own - np.mean(pooled, axis=0)), atol=2e-6)
    assert encoder.dimension == HIDDEN
    assert encoder.vector(TEXTS[0]).dtype == np.float32


def test_older_folders_name_their_poolings_and_put_several_in_a_row(make: Make) -> None:
    model = bert()
    folder = make(model, inside="0_Transformer")
    old = {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    write_json(folder / "1_Pooling" / "config.json", old)
    encoder = Encoder.centred_on(folder, [])
    found = states(model, ids("solve the sum"))
    np.testing.assert_allclose(
        encoder.vector("solve the sum"), unit(np.concatenate([found[0], found.mean(axis=0)])), atol=2e-6
    )


def test_a_dense_layer_and_a_normalisation_come_in_their_order(make: Make) -> None:
    model = bert()
    folder = make(model, dense=True, normalise=True)
    encoder = Encoder.centred_on(folder, TEXTS)
    from safetensors.numpy import load_file

    weights = load_file(folder / "2_Dense" / "model.safetensors")
    made = [
        unit(np.tanh(weights["linear.weight"] @ states(model, ids(text)).mean(axis=0) + weights["linear.bias"]))
        for text in TEXTS
    ]
    assert encoder.dimension == 8
    for text, own in zip(TEXTS, made, strict=True):
        np.testing.assert_allclose(encoder.vector(text), unit(own - np.mean(made, axis=0)), atol=5e-6)


def test_the_beginning_of_a_long_prompt_counts(make: Make) -> None:
    model = bert()
    encoder = Encoder.centred_on(make(model), [])
    text = " ".join(WORDS) + " castle" * 30
    assert len(ids(text)) == LONGEST
    np.testing.assert_allclose(encoder.vector(text), unit(states(model, ids(text)).mean(axis=0)), atol=2e-6)


def test_special_tokens_are_left_out_where_the_folder_says_so(make: Make) -> None:
    model = llama()
    said = {"processing_kwargs": {"text": {"add_special_tokens": False}}}
    encoder = Encoder.centred_on(make(model, said=said), [])
    for text in ("solve the sum", " ".join(WORDS)):
        own = states(model, ids(text, special=False)).mean(axis=0)
        np.testing.assert_allclose(encoder.vector(text), unit(own), atol=2e-6)


def test_weights_of_half_the_precision_are_computed_in_float32(make: Make) -> None:
    folder = make(llama().bfloat16())
    encoder = Encoder.centred_on(folder, [])
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    own = states(model, ids("solve the sum")).mean(axis=0)
    np.testing.assert_allclose(encoder.vector("solve the sum"), unit(own), atol=2e-6)


def test_spelling_of_white_space_and_case_does_not_matter(make: Make) -> None:
    encoder = Encoder.centred_on(make(bert()), TEXTS)
    np.testing.assert_array_equal(encoder.vector("  SOLVE\n the   Sum "), encoder.vector("solve the sum"))


@pytest.mark.parametrize("text", ["", " \n ", "<|im_start|>"])
def test_an_empty_prompt_is_zeros(make: Make, text: str) -> None:
    encoder = Encoder.centred_on(make(bert()), [*TEXTS, text])
    assert not encoder.vector(text).any()
    assert encoder.without_each(text) == []


def test_words_are_left_out_one_by_one(make: Make) -> None:
    encoder = Encoder.centred_on(make(bert()), TEXTS)
    left_out = dict(encoder.without_each("the dragon the castle"))
    assert list(left_out) == ["the", "dragon", "castle"]
    np.testing.assert_array_equal(left_out["the"], encoder.vector("dragon castle"))
    np.testing.assert_array_equal(left_out["castle"], encoder.vector("the dragon the"))
    [(_, alone)] = encoder.without_each("castle")
    assert not alone.any()


def test_no_more_than_64_words_are_left_out(make: Make) -> None:
    encoder = Encoder.centred_on(make(bert()), [])
    words = [f"w{i}" for i in range(70)]
    assert [word for word, _ in encoder.without_each(" ".join(words))] == words[:64]


def test_arrays_bring_the_same_features_back(make: Make) -> None:
    folder = make(bert())
    encoder = Encoder.centred_on(folder, TEXTS)
    again = Encoder.from_arrays(folder, encoder.arrays())
    for text in TEXTS:
        np.testing.assert_array_equal(again.vector(text), encoder.vector(text))
    with pytest.raises(BundleError, match="shape"):
        Encoder.from_arrays(folder, {"mean": np.zeros(HIDDEN + 1, np.float32)})
    with pytest.raises(BundleError, match="shape"):
        Encoder.from_arrays(folder, {})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def change(path: Path, **said: Any) -> None:
    write_json(path, json.loads(path.read_text()) | said)


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "no modules": ("modules.json", Path.unlink),
    "half of modules": ("modules.json", cut),
    "modules of another kind": ("modules.json", lambda path: write_json(path, {"a": 1})),
    "a module without a type": ("modules.json", lambda path: write_json(path, [{"path": ""}])),
    "no pooling": ("1_Pooling/config.json", Path.unlink),
    "pooling of another width": ("1_Pooling/config.json", lambda path: write_json(path, {"embedding_dimension": 7})),
    "no config": ("config.json", Path.unlink),
    "half a config": ("config.json", cut),
    "an unknown model": ("config.json", lambda path: write_json(path, {"model_type": "nothing"})),
    "a config of other types": ("config.json", lambda path: change(path, hidden_size="wide")),
    "a config of other weights": ("config.json", lambda path: change(path, intermediate_size=7)),
    "no weights": ("model.safetensors", Path.unlink),
    "half of the weights": ("model.safetensors", cut),
    "a length that is none": ("sentence_bert_config.json", lambda path: write_json(path, {"max_seq_length": -1})),
    "half a dense layer": ("2_Dense/model.safetensors", cut),
    "no dense layer": ("2_Dense/model.safetensors", Path.unlink),
    "half of a tokenizer": ("tokenizer.json", cut),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_by_file(make: Make, damage: str) -> None:
    name, spoil = DAMAGE[damage]
    folder = make(bert(), dense=True)
    spoil(folder / name)
    said = "tokenizer in" if name == "tokenizer.json" else Path(name).name
    with pytest.raises(BundleError, match=said):
        Encoder.centred_on(folder, TEXTS)


def test_weights_that_lack_a_tensor_are_refused(make: Make) -> None:
    from safetensors.torch import load_file

    folder = make(bert())
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if name.endswith("query.weight"))
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BundleError, match=lost):
        Encoder.centred_on(folder, TEXTS)


def test_a_folder_without_the_unused_pooler_is_taken(make: Make) -> None:
    from safetensors.torch import load_file

    folder = make(bert())
    whole = Encoder.centred_on(folder, []).vector(TEXTS[0])
    weights = {name: each for name, each in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(Encoder.centred_on(folder, []).vector(TEXTS[0]), whole)


@pytest.mark.parametrize(
    ("file", "said", "name"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "weightedmean"),
        ("1_Pooling/config.json", {"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len_tokens"),
        ("2_Dense/config.json", {"activation_function": "os.system"}, "os.system"),
        ("2_Dense/config.json", {"activation_function": "elsewhere.Tanh"}, "elsewhere.Tanh"),
        ("2_Dense/config.json", {"in_features": HIDDEN, "out_features": 8, "use_residual": True}, "use_residual"),
        ("2_Dense/config.json", {"in_features": 7, "out_features": 8}, "does not hold"),
        ("modules.json", [{"type": f"{PACKAGE}.Transformer", "path": "../other"}], "other"),
        ("modules.json", [{"type": f"{PACKAGE}.CNN", "path": ""}], "CNN"),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"stride": 2}}}, "stride"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "query"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(make: Make, file: str, said: Any, name: str) -> None:
    folder = make(bert(), dense=True)
    write_json(folder / file, said)
    with pytest.raises(BundleError, match=name):
        Encoder.centred_on(folder, TEXTS)


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, routers.encoder; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_torch_it_says_what_to_install(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(bert())
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BundleError, match="pip install 'modelglue\\[service\\]'"):
        Encoder.centred_on(folder, TEXTS)
