"""A prompt becomes a vector by a neural network: a folder in the layout of sentence-transformers, run by torch.

    modules.json                  the steps in order: Transformer, Pooling, then any of Dense and Normalize
    sentence_bert_config.json     max_seq_length, and whether special tokens are added (below), beside the Transformer
    config.json, *.safetensors    the Transformer, in the folder itself or in 0_Transformer, with its tokenizer
    1_Pooling/config.json         mean, cls, lasttoken, max, or several of them in a row
    2_Dense/                      config.json and model.safetensors of a layer on the pooled vector

Special tokens are added as the tokenizer likes them, unless sentence_bert_config.json says
`{"processing_kwargs": {"text": {"add_special_tokens": false}}}`, as builder/routing/trunk.py writes it and
sentence-transformers reads it. What would change a vector and is not understood here is refused by name; weights are
.safetensors, no pickle, and no code of the folder's own is run.

An extra: torch and transformers are imported when an encoder is loaded, not before. D features, T tokens, H hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from routers.base import Vector, unit
from routers.errors import BundleError
from routers.features import CHARACTERS
from routers.normalise import normalise

if TYPE_CHECKING:
    import torch

    Step = Callable[[torch.Tensor], torch.Tensor]

WORDS: Final = 64
"""Words of a prompt that `without_each` leaves out: each is another run of the network."""

POOLINGS: Final[dict[str, Step]] = {
    "cls": lambda states_TH: states_TH[0],
    "max": lambda states_TH: states_TH.amax(dim=0),
    "mean": lambda states_TH: states_TH.mean(dim=0),
    "lasttoken": lambda states_TH: states_TH[-1],
}
"""In the order in which sentence-transformers puts several of them in a row."""

OLD_POOLINGS: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS: Final = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")
"""Of torch.nn, on a Dense layer."""


class Encoder:
    """Features of a sentence-embedding folder, or of the first layers of a decoder (builder/routing/trunk.py).

    A text is encoded alone and without padding, so its vector never depends on a batch. The common mean `mean_D` is
    taken off and the length made one, as with token embeddings.
    """

    kind: ClassVar[str] = "encoder"

    def __init__(self, network: Network, mean_D: Vector) -> None:
        self._network = network
        self._mean_D = mean_D

    @classmethod
    def centred_on(cls, folder: Path, texts: Sequence[str]) -> Self:
        """Features whose common mean is that of `texts`. Raises BundleError for a folder that cannot be run."""
        network = load(folder)
        vectors = [vector_D for text in texts if (vector_D := network.encode(normalise(text))) is not None]
        mean_D = np.stack(vectors).mean(axis=0) if vectors else np.zeros(network.dimension, np.float32)
        return cls(network, mean_D)

    @classmethod
    def from_arrays(cls, folder: Path, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The features that `arrays()` came from. Raises BundleError for another folder's."""
        network = load(folder)
        mean_D = arrays.get("mean")
        if mean_D is None or mean_D.shape != (network.dimension,):
            shape = None if mean_D is None else list(mean_D.shape)
            raise BundleError(
                f"the features' mean has shape {shape}, but {folder} makes vectors of {network.dimension}"
            )
        return cls(network, mean_D.astype(np.float32))

    @property
    def dimension(self) -> int:
        return self._network.dimension

    def vector(self, text: str) -> Vector:
        """Unit vector [D] of a prompt; zeros for an empty one."""
        return self._of(normalise(text))

    def without_each(self, text: str) -> list[tuple[str, Vector]]:
        """Every distinct word of the first 64, with the vector of the text without it: a run of the network a word."""
        words = normalise(text).split()
        return [
            (word, self._of(" ".join(other for other in words if other != word)))
            for word in dict.fromkeys(words[:WORDS])
        ]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The network is a folder of its own."""
        return {"mean": self._mean_D}

    def _of(self, normalised: str) -> Vector:
        vector_D = self._network.encode(normalised)
        return np.zeros(self.dimension, np.float32) if vector_D is None else unit(vector_D - self._mean_D)


@dataclass(frozen=True, slots=True)
class Network:
    """A text's tokens, their hidden states, and what is made of these; in float32, whatever is stored."""

    tokens: Callable[[str], list[int]]
    model: Any
    steps: tuple[Step, ...]
    dimension: int

    def encode(self, text: str) -> Vector | None:
        """Vector [D] of a text as it stands; None for one without words or tokens."""
        import torch

        ids = self.tokens(text) if text else []
        if not ids:
            return None
        with torch.inference_mode():
            ids_1T = torch.tensor([ids])
            found = self.model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).last_hidden_state[0]
            for step in self.steps:
                found = step(found)
            vector_D: Vector = found.numpy()
            return vector_D


def load(folder: Path) -> Network:
    """The network of a folder. Raises BundleError, which names the file that is at fault."""
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as exc:
        raise BundleError(f"{folder} needs torch to make features: pip install 'modelglue[service]'") from exc
    names, paths = zip(*_modules(folder), strict=True)
    tokens, model = _transformer(paths[0])
    pool, width = _pooling(paths[1], int(model.config.hidden_size))
    steps = [pool]
    for name, path in zip(names[2:], paths[2:], strict=True):
        if name == "Normalize":
            steps.append(lambda vector_D: torch.nn.functional.normalize(vector_D, dim=0))
        else:
            step, width = _dense(path, width)
            steps.append(step)
    return Network(tokens, model, tuple(steps), width)


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """The modules' names and folders, in order: Transformer, Pooling, then Dense and Normalize."""
    file = folder / "modules.json"
    modules = []
    for entry in _read(file, list):
        try:
            name, path = str(entry["type"]).rsplit(".", 1)[-1], PurePosixPath(entry["path"])
        except (KeyError, TypeError) as exc:
            raise BundleError(f"{file} has a module without type or path: fetch the model again") from exc
        if path.is_absolute() or ".." in path.parts:
            raise BundleError(f"{file}: {path} is not inside the folder")
        modules.append((name, folder / path))
    names = [name for name, _ in modules]
    if names[:2] != ["Transformer", "Pooling"] or set(names[2:]) - {"Dense", "Normalize"}:
        raise BundleError(
            f"{file} has the modules {', '.join(names) or 'none'}; "
            "only Transformer, Pooling, and then Dense and Normalize make features"
        )
    said = folder / "config_sentence_transformers.json"
    if said.exists() and (prompt := _read(said, dict).get("default_prompt_name")):
        raise BundleError(f"{said} puts the prompt {prompt!r} before every text, which features do not: remove the key")
    return modules


def _transformer(folder: Path) -> tuple[Callable[[str], list[int]], Any]:
    """What turns a text into tokens, and the model that reads them."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a log is no terminal
    longest, special = _reading(folder)
    _read(folder / "config.json", dict)
    _check_weights(folder)
    here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        AutoConfig.from_pretrained(folder, **here)  # the tokenizer's loader reads it too, and would be blamed
    except Exception as exc:
        raise BundleError(f"the model of {folder / 'config.json'} cannot be loaded: {_first(exc)}") from exc
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **here)
    except Exception as exc:
        # The tokenizers library raises bare Exceptions for a damaged file.
        raise BundleError(f"the tokenizer in {folder} cannot be read: {_first(exc)}") from exc
    try:
        model, loaded = AutoModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **here
        )
    except Exception as exc:
        # Every model's config is checked by a class of its own, with errors of many kinds.
        raise BundleError(f"the model of {folder / 'config.json'} cannot be loaded: {_first(exc)}") from exc
    # transformers fills what is missing with random numbers; the pooler is not looked at.
    missing = sorted(name for name in loaded["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise BundleError(
            f"the weights in {folder} lack {missing[0]}, which config.json asks for: fetch the model again"
        )
    if model.config.is_encoder_decoder:
        raise BundleError(
            f"{folder / 'config.json'} is of an encoder with a decoder: only one of them alone can be run"
        )
    model.eval()
    model.config.use_cache = False
    limits = (longest, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
    length = min(limit for limit in limits if limit)

    def tokens(text: str) -> list[int]:
        text = text[: CHARACTERS * length]
        ids = tokenizer(text, truncation=True, max_length=length, add_special_tokens=special)["input_ids"]
        return [int(i) for i in ids]

    return tokens, model


def _reading(folder: Path) -> tuple[int | None, bool]:
    """The most tokens of a text, and whether special ones are added."""
    # sentence_bert_config.json; old folders name it after their model, as in sentence_roberta_config.json.
    for file in sorted(folder.glob("sentence_*_config.json")):
        said = _read(file, dict)
        longest, processing = said.get("max_seq_length"), said.get("processing_kwargs") or {}
        if not (longest is None or (isinstance(longest, int) and longest > 0)):
            raise BundleError(f"{file}: max_seq_length {longest!r} is no number of tokens")
        match processing:
            case {} if not processing:
                return longest, True
            case {"text": {"add_special_tokens": bool(special), **rest}, **others} if not rest and not others:
                return longest, special
        raise BundleError(f"{file}: of processing_kwargs only text.add_special_tokens is understood, not {processing}")
    return None, True


def _check_weights(folder: Path) -> None:
    """Open every weight file's header: transformers' own error for a damaged one names no file."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BundleError(f"{folder} has no model.safetensors: features take no pickled weights")
    for file in files:
        _tensors(file, read=False)


def _pooling(folder: Path, hidden: int) -> tuple[Step, int]:
    """Hidden states [T, H] to one vector, and its width."""
    import torch

    file = folder / "config.json"
    said = _read(file, dict)
    modes = said.get("pooling_mode") or [mode for key, mode in OLD_POOLINGS.items() if said.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    for mode in modes:
        if mode not in POOLINGS:
            raise BundleError(f"{file}: pooling {mode!r} is not among {', '.join(POOLINGS)}")
    width = said.get("embedding_dimension", said.get("word_embedding_dimension", hidden))
    if width != hidden:
        raise BundleError(f"{file} is for hidden states of {width}, but the model's have {hidden}")
    pools = [POOLINGS[mode] for mode in modes]
    return lambda states_TH: torch.cat([pool(states_TH) for pool in pools]), hidden * len(pools)


def _dense(folder: Path, width: int) -> tuple[Step, int]:
    """A linear layer with its activation, and how wide it makes the vector."""
    import torch

    file = folder / "config.json"
    said = _read(file, dict)
    package, _, activation = str(said.get("activation_function", "torch.nn.Tanh")).rpartition(".")
    if package.split(".")[0] != "torch" or activation not in ACTIVATIONS:
        raise BundleError(f"{file}: activation {said['activation_function']} is not among {', '.join(ACTIVATIONS)}")
    inputs = (said.get("module_input_name"), said.get("module_output_name"))
    if set(inputs) - {None, "sentence_embedding"} or said.get("use_residual"):
        raise BundleError(
            f"{file}: only a layer from sentence_embedding to itself, without use_residual, is understood"
        )
    tensors = _tensors(folder / "model.safetensors")
    shapes: dict[str, tuple[Any, ...]] = {"linear.weight": (said.get("out_features"), said.get("in_features"))}
    if said.get("bias", True):
        shapes["linear.bias"] = shapes["linear.weight"][:1]
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
        raise BundleError(f"{folder / 'model.safetensors'} does not hold what {file} says: fetch the model again")
    weight, bias = tensors["linear.weight"].float(), tensors.get("linear.bias")
    if weight.shape[1] != width:
        raise BundleError(f"{file} takes vectors of {weight.shape[1]}, but {width} come before it")
    act = getattr(torch.nn, activation)()
    bias = None if bias is None else bias.float()
    return lambda vector_D: act(torch.nn.functional.linear(vector_D, weight, bias)), int(weight.shape[0])


def _tensors(file: Path, *, read: bool = True) -> dict[str, Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()} if read else {}  # noqa: SIM118
    except (OSError, SafetensorError) as exc:
        raise BundleError(f"{file} cannot be read: {_first(exc)}; fetch the model again") from exc


def _read(file: Path, kind: type[Any]) -> Any:
    try:
        said = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise BundleError(f"{file} cannot be read: is it a folder of sentence-transformers, and whole?") from exc
    if not isinstance(said, kind):
        raise BundleError(f"{file} is not what sentence-transformers writes: fetch the model again")
    return said


def _first(exc: Exception) -> str:
    return str(exc).strip().split("\n")[0]
