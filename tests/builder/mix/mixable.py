"""Small models of the kinds that are mixed, by transformers' own classes, and what a mixture of them should do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from builder.merge.models import folder_of
from builder.mix import spec as specs
from builder.mix.plan import Plan, plan

WORDS = [
    "<unk>",
    *["sum", "count", "solve", "number", "plus", "minus", "three", "seven"],
    *["python", "code", "loop", "function", "return", "print", "list", "bug"],
    *["once", "upon", "time", "fox", "lake", "forest", "king", "dream"],
    *["the", "a", "of", "to", "and", "what", "how"],
]
PROMPTS = {
    "math": ["sum three plus seven", "count the number to solve", "what of minus three"],
    "code": ["python code loop", "a function to return the list and print a bug"],
    "story": ["once upon a time the fox", "the king of the forest and a dream"],
}
LAYERS, HIDDEN = 3, 32
KINDS = ("llama", "qwen2", "qwen3")


def write(folder: Path, kind: str = "llama", *, seed: int = 0, spread: float = 0.3, **config: Any) -> Path:
    """A model folder with random weights, float32, large enough to make a difference."""
    facts = {
        "vocab_size": len(WORDS),
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **config,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **facts), dtype=torch.float32)
    with torch.no_grad():
        for name, values in model.named_parameters():
            values.copy_(torch.randn_like(values) * spread + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(folder)
    write_letters(folder) if kind == "qwen2" else write_tokenizer(folder, WORDS)
    return folder


def write_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """A tokenizer of whole words; the first one stands for all that it does not know."""
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": words[0]}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    config = {"tokenizer_class": "TokenizersBackend", "clean_up_tokenization_spaces": False, "eos_token": words[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def write_letters(folder: Path) -> None:
    """A tokenizer of letters, as transformers insists on bytes for Qwen2."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", "\u0120"]
    model = {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(letters)}, "merges": []}
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}), "utf-8")


def experts(folder: Path, kind: str = "llama", **config: Any) -> dict[str, Path]:
    """Three models, one a subject."""
    return {name: write(folder / name, kind, seed=i, **config) for i, name in enumerate(PROMPTS, 1)}


def said(members: dict[str, Path], **more: Any) -> str:
    """A spec of these experts with their prompts."""
    listed = [{"source_model": str(path), "positive_prompts": PROMPTS[name]} for name, path in members.items()]
    return yaml.safe_dump({"experts": listed, "layout": None, **more}, sort_keys=False)


def parse(members: dict[str, Path], **more: Any) -> specs.Spec:
    return specs.parse(said(members, **more), "spec.yaml", Path())


def planned(members: dict[str, Path], **more: Any) -> Plan:
    return plan(parse(members, **more), lambda name: folder_of(Path(name)))


def load(folder: Path) -> Any:
    """The model, which must find every tensor that it knows in the folder, and know every tensor there."""
    model, facts = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(facts.values()), facts
    return model.eval()


def tokens(seed: int = 0, rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(1, len(WORDS), (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


class Mixed(nn.Module):
    """The reference: an MLP's place taken by experts' MLPs, each token by itself."""

    def __init__(self, mlps: Sequence[nn.Module], gate: torch.Tensor, k: int) -> None:
        super().__init__()
        self.mlps, self.gate, self.k = nn.ModuleList(mlps), gate, k

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        rows = [self._token(row) for row in states.reshape(-1, states.shape[-1])]
        return torch.stack(rows).reshape(states.shape)

    def _token(self, state: torch.Tensor) -> torch.Tensor:
        scores = (self.gate @ state).softmax(0)
        chosen = scores.argsort(descending=True, stable=True)[: self.k]
        weights = scores[chosen] / scores[chosen].sum()
        return sum(w * self.mlps[e](state) for w, e in zip(weights, chosen, strict=True))


def reference(base: Any, members: Sequence[Any], gates: Sequence[torch.Tensor], k: int) -> Any:
    """A dense model with mixed MLPs in every layer."""
    for i, layer in enumerate(base.model.layers):
        layer.mlp = Mixed([member.model.layers[i].mlp for member in members], gates[i], k)
    return base


def mean_of(members: Sequence[Any]) -> Any:
    """The uniform mean of models, by torch."""
    states = [member.state_dict() for member in members]
    merged = AutoModelForCausalLM.from_config(members[0].config, dtype=torch.float32).eval()
    merged.load_state_dict({n: torch.stack([s[n].double() for s in states]).mean(0).float() for n in states[0]})
    return merged


def seen(model: Any, text: str, hook_on: Callable[[Any], Sequence[Any]]) -> list[NDArray[np.float64]]:
    """What modules get of a text, the mean over its tokens, in float64; the text alone, nothing padded."""
    found: list[NDArray[np.float64]] = []

    def look(_: Any, positional: Any, named: Any) -> None:
        states = positional[0] if positional else named["hidden_states"]
        found.append(states[0].double().mean(0).numpy())

    hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in hook_on(model)]
    ids = torch.tensor([[WORDS.index(word) for word in text.split()]])
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return found
