"""A zoo shaped like the paper's Which16 at toy width: its models, families, and everything that makes it hard.

Vocabularies of 160, 161, 176 and 192 rows stand for 32000, 32001, 32016 and 32032; two rotary bases under one set of
shapes; an architecture with code and tensor names of its own; safetensors and pickles, in shards and whole, in fp32,
fp16 and bf16; buffers and missing keys of old configs; tied and untied heads; a folder for every base.
"""

from __future__ import annotations

import itertools
import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from builder.config import Model, load_zoo
from builder.zoos.tiny import corpus

Array = NDArray[np.float32]
Lineage = Literal["llama2", "codellama", "llemma", "crystal"]

WHICH12 = (
    *("synthia", "evolcodealpaca", "openhermes", "pygmalion2", "llama2-chat", "beingwell"),
    *("metamath", "vicuna", "platypus2", "goat", "wikichat", "dolphin"),
)
CLUSTERS = (
    WHICH12,
    ("llemma",),
    ("codellama-instruct", "magicoder"),
    ("crystalchat",),
)
"""What clustering must find, in the order of the zoo: Which12 is one."""
FAMILIES = ((*WHICH12, "llemma"), ("codellama-instruct", "magicoder"), ("crystalchat",))
"""By architecture: Llemma has CodeLlama's weights and, but for the vocabulary, Llama-2's shapes and rotary base."""

WIDTH, INNER, LAYERS, HEADS, ROWS = 16, 40, 2, 2, 160
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} "
    "{% elif m['role'] == 'assistant' %}ASSISTANT: {{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """How one repository looks. noise: how far the model went from its base, by the base's deviation.

    old: written by an early transformers, whose configs lack keys and whose checkpoints hold rotary buffers.
    """

    lineage: Lineage
    noise: float
    dtype: Literal["F32", "F16", "BF16"] = "F16"
    pickle: bool = False
    shards: int = 1
    old: bool = False
    padded: bool = False
    chats: bool = False


KINDS = {
    "llama2": Kind("llama2", 0),
    "synthia": Kind("llama2", 0.05, pickle=True, shards=2),
    "evolcodealpaca": Kind("llama2", 0.12, "BF16"),
    "openhermes": Kind("llama2", 0.06, shards=3, chats=True),
    "pygmalion2": Kind("llama2", 0.08, "BF16", shards=2),
    "llama2-chat": Kind("llama2", 0.14, shards=2, old=True, chats=True),
    "beingwell": Kind("llama2", 0.07, "F32", pickle=True),
    "metamath": Kind("llama2", 0.19, "F32", pickle=True, shards=3, old=True, padded=True),
    "vicuna": Kind("llama2", 0.13, pickle=True, shards=2, old=True, chats=True),
    "platypus2": Kind("llama2", 0.04, pickle=True, old=True),
    "goat": Kind("llama2", 0.1, "F32"),
    "wikichat": Kind("llama2", 0.18, "F32", shards=2, padded=True),
    "dolphin": Kind("llama2", 0.2, "BF16", pickle=True, padded=True),
    "codellama": Kind("codellama", 0),
    "codellama-instruct": Kind("codellama", 0.1, "BF16", shards=2),
    "magicoder": Kind("codellama", 0.08, pickle=True),
    "llemma-base": Kind("llemma", 0),
    "llemma": Kind("llemma", 0.15),
    "crystal": Kind("crystal", 0, "BF16", pickle=True),
    "crystalchat": Kind("crystal", 0.1, "BF16", pickle=True, chats=True),
}


def make(folder: Path) -> Path:
    """Write every model of the zoo and every base below `folder`; returns the zoo's TOML file."""
    vocabularies = {lineage: _tokenizer(lineage) for lineage in ("llama2", "codellama", "llemma", "crystal")}
    for name, kind in KINDS.items():
        tokenizer = Tokenizer.from_str(vocabularies[kind.lineage])
        if kind.padded:
            tokenizer.add_special_tokens(["[PAD]"])
        _write(folder / name, name, kind, tokenizer)
    file = folder / "mini-which16.toml"
    file.write_text(_toml(), "utf-8")
    return file


def weights(name: str) -> dict[str, Array]:
    """The model's tensors before they are rounded to its dtype, without the added [PAD]."""
    kind = KINDS[name]
    tensors = _lineage(kind.lineage)
    return {
        tensor: values if values.ndim == 1 else values + kind.noise * values.std() * _normal(values.shape, name, tensor)
        for tensor, values in tensors.items()
    }


def _lineage(lineage: Lineage) -> dict[str, Array]:
    """The base: CodeLlama went far from Llama-2, and Llemma not far from CodeLlama."""
    if lineage == "crystal":
        return _fresh(_crystal_shapes(), lineage)
    if lineage == "llama2":
        return _fresh(_llama_shapes(ROWS), lineage)
    if lineage == "codellama":
        own, llama = _fresh(_llama_shapes(ROWS + 16), lineage), _lineage("llama2")
        return {
            name: values if name not in llama or values.ndim == 1 else _turned(llama[name], values)
            for name, values in own.items()
        }
    code = _lineage("codellama")
    return {
        name: values if values.ndim == 1 else values + 0.1 * values.std() * _normal(values.shape, lineage, name)
        for name, values in code.items()
    }


def _turned(old: Array, new: Array) -> Array:
    """A cosine of about 0.6 with what was there; added tokens are all new."""
    found = new.copy()
    found[: len(old)] = 0.6 * old + 0.8 * new[: len(old)]
    return found


def _fresh(shapes: Mapping[str, tuple[int, ...]], seed: str) -> dict[str, Array]:
    return {
        name: 0.25 * _normal(shape, seed, name)
        if len(shape) == 2
        else np.full(shape, 1.0 if name.endswith("weight") else 0.0, np.float32)
        for name, shape in shapes.items()
    }


def _normal(shape: tuple[int, ...], *seed: str) -> Array:
    rng = np.random.default_rng([zlib.crc32(word.encode()) for word in seed])
    return rng.standard_normal(shape).astype(np.float32)


def _llama_shapes(rows: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, WIDTH)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.self_attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkvo"}
        shapes |= {f"model.layers.{i}.mlp.{part}_proj.weight": (INNER, WIDTH) for part in ("gate", "up")}
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (WIDTH, INNER)
        shapes |= {f"model.layers.{i}.{part}_layernorm.weight": (WIDTH,) for part in ("input", "post_attention")}
    return {**shapes, "model.norm.weight": (WIDTH,), "lm_head.weight": (rows, WIDTH)}


def _crystal_shapes() -> dict[str, tuple[int, ...]]:
    """The head is the embeddings'."""
    linear = {"attn.c_attn": (3 * WIDTH, WIDTH), "attn.c_proj": (WIDTH, WIDTH), "mlp.c_fc": (INNER, WIDTH)}
    linear |= {"mlp.c_fc2": (INNER, WIDTH), "mlp.c_proj": (WIDTH, INNER)}
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (ROWS + 32, WIDTH)}
    for i in range(LAYERS):
        for name, shape in linear.items():
            shapes |= {f"transformer.h.{i}.{name}.weight": shape, f"transformer.h.{i}.{name}.bias": shape[:1]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"transformer.h.{i}.{name}.{part}": (WIDTH,) for part in ("weight", "bias")}
    return {**shapes, "transformer.ln_f.weight": (WIDTH,), "transformer.ln_f.bias": (WIDTH,)}


def _write(folder: Path, name: str, kind: Kind, tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True)
    tensors = {tensor: torch.from_numpy(values) for tensor, values in _padded(weights(name), kind).items()}
    tensors = {tensor: values.to(DTYPES[kind.dtype]) for tensor, values in tensors.items()}
    if kind.old:
        frequencies = 10000.0 ** (-torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
        tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": frequencies.clone() for i in range(LAYERS)}
    _save(folder, tensors, kind)
    config = _config(kind, tokenizer.get_vocab_size())
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    said |= {"pad_token": "[PAD]"} if kind.padded else {}
    said |= {"chat_template": TEMPLATE} if kind.chats else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2) + "\n", "utf-8")
    if kind.lineage == "crystal":
        shutil.copy(Path(__file__).with_name("modeling_crystal.py"), folder / "modeling_crystal.py")


def _padded(tensors: Mapping[str, Array], kind: Kind) -> dict[str, Array]:
    """With a row for [PAD], the mean of the others, as people add it."""
    if not kind.padded:
        return dict(tensors)
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    return {
        name: np.vstack([values, values.mean(axis=0)]) if name in tables else values for name, values in tensors.items()
    }


def _save(folder: Path, tensors: Mapping[str, torch.Tensor], kind: Kind) -> None:
    stem, suffix = ("pytorch_model", ".bin") if kind.pickle else ("model", ".safetensors")
    names = list(tensors)
    bounds = [round(i * len(names) / kind.shards) for i in range(kind.shards + 1)]
    parts = [names[a:b] for a, b in itertools.pairwise(bounds)]
    files = [f"{stem}-{i:05}-of-{kind.shards:05}{suffix}" for i in range(1, kind.shards + 1)]
    if kind.shards == 1:
        files = [f"{stem}{suffix}"]
    for file, part in zip(files, parts, strict=True):
        content = {name: tensors[name] for name in part}
        if kind.pickle:
            torch.save(content, folder / file)
        else:
            save_file(content, folder / file, metadata={"format": "pt"})
    if kind.shards > 1:
        places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _config(kind: Kind, rows: int) -> dict[str, Any]:
    shared = {"vocab_size": rows, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": NAMES[kind.dtype]}
    if kind.lineage == "crystal":
        return shared | {
            "architectures": ["CrystalForCausalLM"],
            "model_type": "mini_crystal",
            "auto_map": {
                "AutoConfig": "modeling_crystal.CrystalConfig",
                "AutoModelForCausalLM": "modeling_crystal.CrystalForCausalLM",
            },
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": INNER,
            "n_positions": 256,
            "rotary_dim": 4,
            "layer_norm_epsilon": 1e-5,
            "mup_embeddings_scale": 14.6,
            "mup_output_alpha": 2.22,
            "mup_width_scale": 0.0625,
            "tie_word_embeddings": True,
        }
    config = shared | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 512 if kind.lineage == "llama2" else 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    if kind.padded:
        config["pad_token_id"] = rows - 1
    if not kind.old:
        config |= {
            "num_key_value_heads": HEADS,
            "rope_theta": 1e6 if kind.lineage == "codellama" else 1e4,
            "rope_scaling": None,
        }
    return config


def _tokenizer(lineage: Lineage) -> str:
    """As JSON: pieces of words as Llama's, ROWS of them; CodeLlama and Crystal add tokens of their own."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["\n"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.lines("code" if lineage == "crystal" else "base", 200, 16), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    if lineage == "crystal":
        tokenizer.add_special_tokens([f"<|sys_{i}|>" for i in range(32)])
    elif lineage != "llama2":
        tokenizer.add_tokens([AddedToken(f"▁<CODE{i}>", normalized=False) for i in range(16)])
    return str(tokenizer.to_str())


def _toml() -> str:
    real = load_zoo("which16")
    subjects = "\n".join(f"{name} = {json.dumps(words)}" for name, words in real.subjects.items())
    entries: Sequence[str] = [_entry(model) for model in real.models]
    bases = [name for name in KINDS if name not in {model.id for model in real.models}]
    return f"""
name = "mini-which16"
note = "Which16 of the paper at toy width."

models = [
{"".join(f"  {entry},{chr(10)}" for entry in entries)}]
bases = [
{"".join(f"  {_entry(name)},{chr(10)}" for name in bases)}]

[subjects]
{subjects}

[cluster]
threshold = 0.95

[proxy]
tasks = ["tiny/math", "tiny/code", "tiny/story", "tiny/chat"]
metric = "log_likelihood"
limit = 4

[router]
features = "synthia"
"""


def _entry(model: Model | str) -> str:
    name = model if isinstance(model, str) else model.id
    lineage = KINDS[name].lineage
    facts = [f'id = "{name}"', f'source = "./{name}"']
    if isinstance(model, Model):
        facts += [f'base = "{"llemma-base" if lineage == "llemma" else lineage}"', f'subject = "{model.subject}"']
    facts += ["trust_remote_code = true"] if lineage == "crystal" else []
    return f"{{ {', '.join(facts)} }}"
