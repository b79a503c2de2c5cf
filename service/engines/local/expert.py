"""From an expert's folder to what can run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.logging import disable_progress_bar

import composed  # noqa: F401 - transformers then loads such checkpoints without running code of theirs
from service.engines.base import EngineError
from service.engines.local import decoder, hosted, loss
from service.engines.local.bits import Bits
from service.engines.local.decoder import Decoder
from service.engines.local.forward import Model, Segment
from service.engines.local.guides import Guides
from service.engines.local.hosted import ATTENTION, Hosted
from service.engines.local.linear import Kind
from service.engines.local.ops import Shape
from service.engines.local.text import Alphabet
from service.engines.local.weights import Shared, Weights, has_safetensors, parameters

BITS: Mapping[str, float] = {"int8": 8, "int4": 5, "bnb-int8": 8, "bnb-nf4": 4.5}
"""Of a weight in fewer bits, scales and all."""


@dataclass(frozen=True)
class Loading:
    """How experts are loaded. kinds: of the linear layers of those that are named; shared: what several have."""

    dtype: torch.dtype
    device: torch.device
    kinds: Mapping[str, Kind | Bits] = field(default_factory=dict)
    shared: Shared[Any] = field(default_factory=Shared)


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """All that is known of an expert without its weights, and how to load them.

    bytes: of its weights in memory. window: how many tokens it can hold. eos: which of them end an answer. alphabet:
    its tokens as bytes. guides: for answers of a given form. facts: what /v1/models tells.
    """

    name: str
    folder: Path
    how: Loading
    config: Any
    shape: Shape
    vocabulary: int
    bytes: int
    tokenizer: Any
    window: int
    eos: frozenset[int]
    alphabet: Alphabet
    guides: Guides
    facts: dict[str, object] = field(default_factory=dict)

    def load(self, progress: Callable[[float], None] = lambda share: None) -> Model:
        """Its model. Raises EngineError, or what transformers raises, where it is not whole."""
        how, kind = self.how, self.how.kinds.get(self.name)
        if decoder.is_ours(self.config) and has_safetensors(self.folder):
            model: Model = self._decoder(kind, progress)
            if kind is not None and "perplexity" not in self.facts:
                self._measure(model)
            _try(model, how)
        else:
            model = self._hosted(kind)
        if model.shape != self.shape or model.vocabulary != self.vocabulary:
            raise EngineError(f"the weights in {self.folder} are not those that its config.json describes")
        return model

    def _decoder(self, kind: Kind | Bits | None, progress: Callable[[float], None] = lambda share: None) -> Decoder:
        with Weights(self.folder, self.how.dtype, self.how.device, kind, self.how.shared, progress) as weights:
            return Decoder(self.config, weights)

    def _hosted(self, kind: Kind | Bits | None) -> Hosted:
        folder, how = self.folder, self.how
        if kind is not None:
            raise EngineError(f"{folder} is not of the Llama family: it cannot be served in {kind}; leave that out")
        disable_progress_bar()  # a log is no terminal
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=how.dtype, local_files_only=True, output_loading_info=True, attn_implementation=ATTENTION
        )
        # transformers fills such tensors with random numbers and only warns.
        if lost := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
            raise EngineError(f"{len(lost)} tensors are missing in {folder} or have another shape, first {lost[0]}")
        loaded = loaded.eval().to(how.device)  # what fails here is no matter of attention
        with _exchanging(folder, type(loaded)):
            model = Hosted(loaded)
            model.check(self._text(), how.dtype)
        return model

    def _text(self) -> list[int]:
        """A text of ours in its vocabulary."""
        tokens: list[int] = self.tokenizer(loss.TEXT, add_special_tokens=True)["input_ids"]
        return tokens

    def _measure(self, model: Model) -> None:
        """Tell what fewer bits cost, once."""
        found = loss.measure(model, self._decoder(None), self._text(), self.how.dtype, self.how.device)
        self.facts.update(asdict(found))


def read(name: str, folder: Path, how: Loading) -> Expert:
    """The expert in `folder`, its weights untouched. Raises EngineError, or what transformers raises."""
    config = config_of(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    window, eos, kind = window_of(config, folder), _eos(config, folder, tokenizer), how.kinds.get(name)
    vocabulary = int(config.get_text_config(decoder=True).vocab_size)
    guides = Guides(tokenizer, vocabulary, sorted(eos))
    facts = {"dtype": kind or str(how.dtype).removeprefix("torch."), "architecture": config.model_type}
    size = round(parameters(folder) * BITS.get(kind or "", 8 * how.dtype.itemsize) / 8)
    return Expert(
        name, folder, how, config, shape_of(config), vocabulary, size, tokenizer, window, eos, Alphabet(tokenizer),
        guides, facts,
    )  # fmt: skip


def config_of(folder: Path) -> Any:
    """The model's config. Raises EngineError where there is none, or such a model cannot be served."""
    if not (folder / "config.json").is_file():
        raise EngineError(f"no config.json in {folder}: is the bundle complete?")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not decoder.is_ours(config):
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), type(config))
        with _exchanging(folder, model_class):
            hosted.admit(model_class, config)
    return config


def shape_of(config: Any) -> Shape:
    """What a token of such a model leaves in the key-value memory."""
    return decoder.shape_of(config) if decoder.is_ours(config) else hosted.shape_of(config)


def window_of(config: Any, folder: Path) -> int:
    """How many tokens a model with this config can hold. Raises EngineError where it does not say so."""
    window = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if window is None:
        raise EngineError(f"no max_position_embeddings in {folder / 'config.json'}: the window is unknown")
    return int(window)


def best_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device computes in it natively, else fp32."""
    return torch.bfloat16 if device.type == "cuda" or _native_bf16() else torch.float32


@contextmanager
def _exchanging(folder: Path, model: type[Any]) -> Iterator[None]:
    """Whatever is raised while a model's attention is exchanged says that it cannot be."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as exc:  # modules stumble in all ways over a cache that is not theirs
        why = str(exc) if isinstance(exc, EngineError) else repr(exc)
        raise EngineError(
            f"{folder} is a {model.__name__}, whose attention cannot be exchanged: serve it elsewhere, "
            f"with --expert NAME=URL ({why})"
        ) from exc


def _try(model: Model, how: Loading) -> None:
    """One token, in a memory of its own: what does not fit together fails here and not in an answer."""
    memory = torch.zeros(model.shape.page, dtype=how.dtype, device=how.device)
    model.forward([Segment([0], 0, [0], route=model.route([0]))], memory)


def _native_bf16() -> bool:
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return False
    return "avx512_bf16" in processor or "amx_bf16" in processor


def _eos(config: Any, folder: Path, tokenizer: Any) -> frozenset[int]:
    stated = getattr(config, "eos_token_id", getattr(config.get_text_config(decoder=True), "eos_token_id", None))
    if (folder / "generation_config.json").exists():
        stated = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    ids = stated if isinstance(stated, list) else [stated]
    # Chat models often name the end of a turn in the tokenizer alone.
    return frozenset(id_ for id_ in [*ids, tokenizer.eos_token_id] if id_ is not None)
