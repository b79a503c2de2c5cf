"""A trunk gives the states that the whole model has after its layers, by transformers' own account."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from builder import checkpoints
from builder.errors import BuildError
from builder.routing.trunk import export
from routers.encoder import Encoder

WORDS = ("[UNK]", "[BOS]", "solve", "count", "sum", "python", "loop", "dragon", "the", "a")
LAYERS = 3
SIZE: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
}
TEXT = "solve the sum the dragon"
IDS = [WORDS.index(word) for word in TEXT.split()]


def llama(**choices: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE, **choices))


def qwen3(**choices: Any) -> Any:
    config = transformers.Qwen3Config(**SIZE, head_dim=16, **choices)
    assert len(config.layer_types) == LAYERS
    return transformers.Qwen3ForCausalLM(config)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """A model's folder; its tokenizer likes to begin with [BOS]."""

    def saved(model: Any, **writing: Any) -> Path:
        torch.manual_seed(4)
        for weights in model.parameters():
            torch.nn.init.normal_(weights, 0.3 if weights.dim() == 1 else 0.0, 0.2)
        folder = tmp_path / "model"
        model.save_pretrained(folder, **writing)
        made = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
        made.pre_tokenizer = Whitespace()
        made.post_processor = TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="[BOS]").save_pretrained(folder)
        return folder

    return saved


def expected(folder: Path, layers: int) -> NDArray[np.float32]:
    """The states after so many layers of the whole model, root mean square one; their mean's direction."""
    kept: list[Any] = []
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hook = model.model.layers[layers - 1].register_forward_hook(lambda _module, _in, out: kept.append(out))
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([IDS]), output_hidden_states=True).hidden_states[layers]
    hook.remove()
    states: NDArray[np.float32] = (kept[0][0] if isinstance(kept[0], tuple) else kept[0])[0].numpy()
    if layers < LAYERS:  # the last ones that transformers gives are normalised
        np.testing.assert_array_equal(states, hidden[0].numpy())
    states = states / np.sqrt((states**2).mean(axis=1, keepdims=True) + model.config.rms_norm_eps)
    mean: NDArray[np.float32] = states.mean(axis=0)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("network", [llama, qwen3])
def test_the_vector_is_of_the_models_states_after_so_many_layers(
    save: Callable[..., Path], tmp_path: Path, network: Callable[[], Any], layers: int
) -> None:
    folder = save(network().bfloat16())
    export(folder, layers, tmp_path / "trunk")
    found = Encoder.centred_on(tmp_path / "trunk", []).vector(TEXT)
    np.testing.assert_allclose(found, expected(folder, layers), atol=2e-6)


def test_every_token_weighs_the_same_however_long_its_state(save: Callable[..., Path], tmp_path: Path) -> None:
    export(save(llama().bfloat16()), 2, tmp_path / "trunk")
    model = transformers.AutoModel.from_pretrained(tmp_path / "trunk", dtype=torch.float32)
    with torch.no_grad():
        lengths = model(input_ids=torch.tensor([IDS])).last_hidden_state[0].norm(dim=1)
    np.testing.assert_allclose(lengths, 64**0.5, rtol=1e-3)


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F16")])
def test_half_precision_is_kept_and_single_is_halved(
    save: Callable[..., Path], tmp_path: Path, dtype: str, stored: str
) -> None:
    model = save(llama().to(getattr(torch, dtype)))
    export(model, 2, tmp_path / "trunk")
    trunk, whole = checkpoints.Checkpoint(tmp_path / "trunk"), checkpoints.Checkpoint(model)
    assert {tensor.dtype for tensor in trunk.tensors.values()} == {stored}
    assert trunk.config["dtype"] == {"BF16": "bfloat16", "F16": "float16"}[stored]
    name = "layers.1.mlp.up_proj.weight"
    atol = 1e-3 if dtype == "float32" else 0
    np.testing.assert_allclose(trunk.read(name), whole.read(f"model.{name}"), rtol=0, atol=atol)


def test_only_the_layers_asked_for_are_written(save: Callable[..., Path], tmp_path: Path) -> None:
    export(save(qwen3()), 2, tmp_path / "trunk")
    trunk = checkpoints.Checkpoint(tmp_path / "trunk")
    assert {name.split(".")[1] for name in trunk.tensors if name.startswith("layers.")} == {"0", "1"}
    assert not [name for name in trunk.tensors if "lm_head" in name]
    assert trunk.config["num_hidden_layers"] == len(trunk.config["layer_types"]) == 2
    assert trunk.config["architectures"] == ["Qwen3Model"]


def test_a_model_in_shards_gives_the_same_bytes(save: Callable[..., Path], tmp_path: Path) -> None:
    model = llama().bfloat16()
    export(save(model), 2, tmp_path / "one")
    export(save(model, max_shard_size="50KB"), 2, tmp_path / "many")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    one, many = (checkpoints.Checkpoint(tmp_path / name) for name in ("one", "many"))
    assert one.tensors.keys() == many.tensors.keys()
    for name in one.tensors:
        np.testing.assert_array_equal(one.read(name), many.read(name))


@pytest.mark.parametrize("layers", [0, -1, LAYERS + 1])
def test_layers_that_are_not_there_are_refused(save: Callable[..., Path], tmp_path: Path, layers: int) -> None:
    with pytest.raises(BuildError, match=f"1 to {LAYERS} of them, not {layers}"):
        export(save(llama()), layers, tmp_path / "trunk")
    assert not (tmp_path / "trunk").exists()


def test_other_models_are_refused(save: Callable[..., Path], tmp_path: Path) -> None:
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    folder = save(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=len(WORDS), **size)))
    with pytest.raises(BuildError, match=r"no model\.embed_tokens\.weight"):
        export(folder, 1, tmp_path / "trunk")


def test_a_model_without_a_tokenizer_is_refused(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save(llama())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(BuildError, match="no tokenizer"):
        export(folder, 1, tmp_path / "trunk")


def test_an_export_that_dies_leaves_nothing(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save(llama())
    weights = folder / "model.safetensors"
    tensors = {name: checkpoints.Checkpoint(folder).read(name) for name in checkpoints.Checkpoint(folder).tensors}
    tensors["model.layers.0.mlp.up_proj.weight"][:] = 1e30  # beyond float16
    layout = {name: checkpoints.Tensor("F32", values.shape) for name, values in tensors.items()}
    weights.unlink()
    checkpoints.write(folder, layout, iter(tensors.items()))
    with pytest.raises(checkpoints.CheckpointError, match="F16"):
        export(folder, 2, tmp_path / "trunk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_folder_that_is_there_is_left_alone(save: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "trunk").mkdir()
    (tmp_path / "trunk" / "mine").write_text("")
    with pytest.raises(BuildError, match="there already"):
        export(save(llama()), 1, tmp_path / "trunk")
    assert [path.name for path in (tmp_path / "trunk").iterdir()] == ["mine"]


def test_special_tokens_are_left_out_and_said_so(save: Callable[..., Path], tmp_path: Path) -> None:
    export(save(llama()), 1, tmp_path / "trunk")
    said = json.loads((tmp_path / "trunk" / "sentence_bert_config.json").read_text())
    assert said["processing_kwargs"] == {"text": {"add_special_tokens": False}}
    assert said["max_seq_length"] == SIZE["max_position_embeddings"]
