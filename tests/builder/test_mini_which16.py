"""The toy Which16 holds every trap of the real one, and transformers loads all of it."""

from __future__ import annotations

import json
from pathlib import Path

import mini_which16
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from builder.checkpoints import Checkpoint
from builder.config import load_zoo


def test_it_has_the_models_of_which16_and_all_that_makes_them_hard(mini_which16_zoo: Path) -> None:
    zoo, folder = load_zoo(str(mini_which16_zoo)), mini_which16_zoo.parent
    configs = {model.id: json.loads((folder / model.id / "config.json").read_text()) for model in zoo.models}
    checkpoints = {model.id: Checkpoint(folder / model.id) for model in zoo.models}

    assert [model.id for model in zoo.models] == [model.id for model in load_zoo("which16").models]
    assert tuple(name for cluster in mini_which16.CLUSTERS for name in cluster) == tuple(configs)
    assert {config["vocab_size"] for config in configs.values()} == {160, 161, 176, 192}
    assert {config.get("rope_theta") for config in configs.values()} == {1e4, 1e6, None}
    assert configs["llemma"]["rope_theta"] != configs["magicoder"]["rope_theta"]
    assert {n: t.shape for n, t in checkpoints["llemma"].tensors.items()} == {
        n: t.shape for n, t in checkpoints["magicoder"].tensors.items()
    }
    assert {config["tie_word_embeddings"] for config in configs.values()} == {True, False}
    files = {name: checkpoint.files for name, checkpoint in checkpoints.items()}
    assert {(file[0].suffix, len(file) > 1) for file in files.values()} == {
        (suffix, sharded) for suffix in (".bin", ".safetensors") for sharded in (True, False)
    }
    assert {t.dtype for each in checkpoints.values() for t in each.tensors.values()} == {"F32", "F16", "BF16"}
    for name in ("llama2-chat", "vicuna"):
        assert b"rotary_emb.inv_freq" in b"".join(file.read_bytes() for file in files[name])
    assert not any("inv_freq" in name for each in checkpoints.values() for name in each.tensors)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 1_000_000


def test_the_same_bytes_every_time(mini_which16_zoo: Path, tmp_path: Path) -> None:
    again = mini_which16.make(tmp_path / "again")

    for file in sorted(path for path in mini_which16_zoo.parent.rglob("*.*") if path.is_file()):
        assert (again.parent / file.relative_to(mini_which16_zoo.parent)).read_bytes() == file.read_bytes(), file


@pytest.mark.parametrize("name", mini_which16.KINDS)
def test_transformers_loads_it_with_its_tokenizer(mini_which16_zoo: Path, own_code: None, name: str) -> None:
    folder = mini_which16_zoo.parent / name
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model, loaded = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    text = "def add(x, y):\n    return x + y"

    assert not loaded["missing_keys"]
    assert not loaded["mismatched_keys"]
    state, checkpoint = model.state_dict(), Checkpoint(folder)
    for tensor in checkpoint.tensors:
        assert np.array_equal(state[tensor].numpy(), checkpoint.read(tensor))
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    assert model(ids).logits.isfinite().all()


def test_the_foreign_models_cache_changes_no_answer(mini_which16_zoo: Path, own_code: None) -> None:
    folder = mini_which16_zoo.parent / "crystalchat"
    options = {"local_files_only": True, "trust_remote_code": True, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    ids = torch.tensor([[1, 5, 9, 17, 40]])
    padded, mask = torch.tensor([[2, 2, 1, 5, 9, 17, 40]]), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])

    plain = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)
    cached = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True)
    left = model.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False)

    assert torch.equal(plain, cached)
    assert torch.equal(plain[0, 5:], left[0, 7:])
