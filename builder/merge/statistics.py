"""What fisher and regmean merging know of a model beside its weights: measured on text, kept in one safetensors file.

fisher: the diagonal Fisher information of every parameter (Matena & Raffel 2022, arXiv 2111.09832).
regmean: the mean outer product of every linear layer's inputs (Jin et al. 2023, arXiv 2212.09849).
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from builder.architecture import context_window
from builder.checkpoints import Array, Checkpoint, Safetensors, Tensor
from builder.errors import CheckpointError, MergeError
from builder.progress import Advance, Progress, Quiet

if TYPE_CHECKING:
    import torch

Kind = Literal["fisher", "regmean"]
KINDS: tuple[Kind, ...] = get_args(Kind)
KEY = "modelglue-statistics"
"""The one key of the file's metadata. safetensors writes several in an order that differs from process to process."""


class About(BaseModel):
    """How statistics came about: the file's metadata.

    model: Checkpoint.sha256 of what was measured.
    aliases: tensors whose statistics are those of another, by whose name they are stored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["modelglue-statistics"] = "modelglue-statistics"
    version: Literal[1] = 1
    kind: Kind
    model: str
    texts: PositiveInt
    texts_sha256: str
    tokens: PositiveInt
    max_tokens: PositiveInt
    seed: int
    filter: str
    torch: str
    transformers: str
    aliases: dict[str, str]


class Statistics:
    """A file of statistics, read one tensor at a time. Raises CheckpointError for what it cannot read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = Safetensors(path)
        except OSError as exc:
            raise CheckpointError(f"{path} cannot be opened: measure it with `builder stats`") from exc
        self.about = _about(path)
        self._stored = {name: name for name in self._file.tensors} | self.about.aliases
        lost = [name for name, stored in self._stored.items() if stored not in self._file.tensors]
        if lost:
            raise CheckpointError(f"{path} lacks {self._stored[lost[0]]}, which stands for {lost[0]}: measure it again")
        self.tensors: Mapping[str, Tensor] = {name: self._file.tensors[stored] for name, stored in self._stored.items()}
        """By the name of the weight tensor that they belong to, aliases too."""

    @property
    def kind(self) -> Kind:
        """What was measured."""
        return self.about.kind

    def locate(self, name: str) -> str:
        """The name under which the statistics of a weight tensor are stored: equal for equal statistics."""
        if name not in self._stored:
            only = f", measured with the filter {self.about.filter!r}" if self.about.filter else ""
            raise CheckpointError(f"{self.path} knows nothing of {name}{only}: measure that tensor too")
        return self._stored[name]

    def check(self, kind: str) -> None:
        """Raises MergeError for statistics of another kind than a method needs."""
        if kind != self.kind:
            raise MergeError(f"{self.path} holds {self.kind} statistics: measure with `builder stats --kind {kind}`")

    def check_model(self, name: str, weights: str) -> None:
        """Raises MergeError where they were measured on other weights, by Checkpoint.sha256."""
        if weights != self.about.model:
            raise MergeError(f"{self.path} was measured on other weights than those of {name}: measure it again")

    def stored(self, name: str) -> NDArray[Any]:
        """As `read`, flat, read when it is looked at."""
        return self._file.stored(self.locate(name))

    def read(self, name: str) -> Array:
        """Of a weight tensor W [out, in], float32, a copy of its own: fisher W's shape, regmean [in, in]."""
        return self._file.read(self.locate(name))


def _about(path: Path) -> About:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    if KEY not in metadata:
        raise CheckpointError(f"{path} holds no statistics of a model: measure them with `builder stats`")
    try:
        return About.model_validate_json(metadata[KEY])
    except ValidationError as exc:
        error = exc.errors()[0]
        where = ".".join(map(str, error["loc"])) or "metadata"
        raise CheckpointError(
            f"{path} was written by another version ({where}: {error['msg']}): measure it again"
        ) from exc


def measure(
    model: Path,
    texts: Sequence[str],
    out: Path,
    *,
    kind: Kind,
    seed: int = 0,
    max_tokens: int = 512,
    filter: str = "",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> None:
    """Measure a model folder on texts, each cut after `max_tokens`, and write `out`, which appears whole.

    seed: draws fisher's labels. filter: only tensors whose name holds it are measured. Raises MergeError for what
    cannot be measured so, CheckpointError for a model that cannot be loaded.
    """
    checkpoint = Checkpoint(model)
    _check(checkpoint, texts, out, kind, max_tokens)
    _require(_held(checkpoint, kind, filter), f"{kind} of {model.name}")
    network, tokenizer = _load(checkpoint, trust_remote_code)
    rows = _tokens(texts, tokenizer, max_tokens, network.get_input_embeddings().weight.shape[0])
    with (progress or Quiet()).step(f"measure {kind}", len(rows)) as advance:
        if kind == "fisher":
            values, aliases = _fisher(network, checkpoint, filter, rows, seed, advance)
        else:
            values, aliases = _regmean(network, checkpoint, filter, rows, advance)
    about = About(
        kind=kind,
        model=checkpoint.sha256,
        texts=len(texts),
        texts_sha256=hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest(),
        tokens=sum(map(len, rows)),
        max_tokens=max_tokens,
        seed=seed,
        filter=filter,
        torch=version("torch"),
        transformers=version("transformers"),
        aliases=aliases,
    )
    _write(out, values, about)


def _check(checkpoint: Checkpoint, texts: Sequence[str], out: Path, kind: str, max_tokens: int) -> None:
    """What can be refused before anything is loaded."""
    if kind not in KINDS:
        raise MergeError(f"there are no {kind!r} statistics; there are: {', '.join(KINDS)}")
    if not texts:
        raise MergeError("there is no text to measure the model on: give at least one")
    if out.is_dir():
        raise MergeError(f"{out} is a folder: name a file for the statistics")
    window = context_window(checkpoint.config)
    if not 1 <= max_tokens <= window:
        raise MergeError(f"max_tokens is {max_tokens}, and {checkpoint.folder.name} sees 1 to {window} tokens at once")


def _fisher(
    network: Any, checkpoint: Checkpoint, filter: str, rows: Sequence[Sequence[int]], seed: int, advance: Advance
) -> tuple[dict[str, Array], dict[str, str]]:
    """F = E_x E_{y ~ p(y|x)} [(d log p(y|x) / d theta)^2], x every prefix of every text, labels from the model itself.

    One backward a text: the gradient of sum_t log p(y_t|x_<t), squared, over the number of tokens in all. That is no
    approximation: a label is drawn given the text, never fed back, so labels are independent and every gradient has
    the mean zero; the cross terms of the square of the sum vanish in expectation and the sum of the squares is left.
    (With the text's own tokens as labels, the "empirical" Fisher, they would not.)
    """
    import torch

    parameters, aliases = _parameters(network, checkpoint, filter)
    network.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    draws = torch.Generator().manual_seed(seed)
    for row in rows:
        logits = network(input_ids=torch.tensor([row], device=network.device), use_cache=False).logits[0]
        log_likelihoods = logits.log_softmax(dim=-1)
        # On the CPU, so that a seed draws alike on every device.
        labels = torch.multinomial(log_likelihoods.detach().exp().cpu(), 1, generator=draws)
        log_likelihoods.gather(1, labels.to(network.device)).sum().backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                sums[name].addcmul_(parameter.grad, parameter.grad)
                parameter.grad.zero_()
        advance(1)
    tokens = sum(map(len, rows))
    return {name: _array(name, sums.pop(name) / tokens) for name in parameters}, aliases


def _parameters(network: Any, checkpoint: Checkpoint, filter: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The parameters to measure by their tensor's name; tensors that are tied to one of them, by name to its name."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    chosen: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    for name in _named(checkpoint, filter):
        if name not in parameters:
            raise CheckpointError(f"{name} is no parameter of {type(network).__name__}: leave it out by a filter")
        first = next((other for other, value in chosen.items() if value is parameters[name]), None)
        if first is None:
            chosen[name] = parameters[name]
        else:
            aliases[name] = first
    return chosen, aliases


def _regmean(
    network: Any, checkpoint: Checkpoint, filter: str, rows: Sequence[Sequence[int]], advance: Advance
) -> tuple[dict[str, Array], dict[str, str]]:
    """G = X^T X / n of every linear layer, X [n, in] its inputs over all tokens of all texts.

    One text a batch, so nothing is padding. A text's product is float32, the sum over texts float64.
    """
    import torch

    layers = _linear_layers(network, checkpoint, filter)
    aliases = _shared(network, layers, rows[0][:1])
    layers = {name: layer for name, layer in layers.items() if name not in aliases}
    _require(8 * sum(layer.in_features**2 for layer in layers.values()), f"regmean of {checkpoint.folder.name}")
    sums = {
        name: torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=network.device)
        for name, layer in layers.items()
    }
    tokens = dict.fromkeys(layers, 0)

    def add(name: str, inputs: torch.Tensor) -> None:
        x = inputs.reshape(-1, inputs.shape[-1])
        tokens[name] += len(x)
        sums[name] += x.T @ x

    for _ in _passes(network, layers, rows, add):
        advance(1)
    silent = [name for name, count in tokens.items() if count == 0]
    if silent:
        raise MergeError(f"no text reached {silent[0]}: give more texts, or leave it out by a filter")
    return {name: _array(name, sums.pop(name) / tokens[name]) for name in layers}, aliases


def _linear_layers(network: Any, checkpoint: Checkpoint, filter: str) -> dict[str, Any]:
    """The linear layers by their weight's name; a head tied to the embedding is the embedding's, no layer's."""
    from torch import nn

    names = set(_named(checkpoint, filter))
    own = {name for name, _ in network.named_parameters()}
    layers = {
        f"{path}.weight": module
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear) and f"{path}.weight" in names & own
    }
    if not layers:
        raise MergeError(f"no weight of {checkpoint.folder.name} is a linear layer's: regmean has nothing to measure")
    return layers


def _shared(network: Any, layers: Mapping[str, Any], row: Sequence[int]) -> dict[str, str]:
    """Layers that are handed the very tensor of the layer before them, by name to its name: k and v that of q."""
    aliases: dict[str, str] = {}
    before: list[tuple[str, torch.Tensor]] = []

    def compare(name: str, inputs: torch.Tensor) -> None:
        if before and before[0][1] is inputs:
            aliases[name] = before[0][0]
        else:
            before[:] = [(name, inputs)]

    for _ in _passes(network, layers, [row], compare):
        pass
    return aliases


def _passes(
    network: Any, layers: Mapping[str, Any], rows: Sequence[Sequence[int]], seen: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Run the rows one by one; `seen` hears every layer's input."""
    import torch

    def hook(name: str) -> Callable[[Any, Any], None]:
        return lambda _, inputs: seen(name, inputs[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        for row in rows:
            with torch.no_grad():
                network(input_ids=torch.tensor([row], device=network.device), use_cache=False)
            yield
    finally:
        for handle in handles:
            handle.remove()


def _load(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[Any, Any]:
    """The model, float32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()  # our own bars tell more
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, **options)
        network, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as exc:
        raise CheckpointError(f"{checkpoint.folder} cannot be loaded: {exc}") from exc
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{checkpoint.folder} lacks {missing[0]}: a random one would be measured in its place")
    return network.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _tokens(texts: Sequence[str], tokenizer: Any, max_tokens: int, vocabulary: int) -> list[list[int]]:
    rows = [list(tokenizer(text, truncation=True, max_length=max_tokens).input_ids) for text in texts]
    empty = [i for i, row in enumerate(rows, 1) if not row]
    if empty:
        raise MergeError(f"text {empty[0]} is no token to this model's tokenizer: leave it out")
    largest = max(max(row) for row in rows)
    if largest >= vocabulary:
        raise MergeError(
            f"the tokenizer gives token {largest} and the embedding has {vocabulary} rows: do they belong?"
        )
    return rows


def _named(checkpoint: Checkpoint, filter: str) -> list[str]:
    """The tensors whose name holds the filter."""
    names = [name for name in checkpoint.tensors if filter in name]
    if not names:
        raise MergeError(f"no tensor of {checkpoint.folder.name} has {filter!r} in its name: look at the filter")
    return names


def _held(checkpoint: Checkpoint, kind: Kind, filter: str) -> int:
    """Bytes that the float32 model takes; with fisher, a gradient and a sum of each measured parameter too."""
    sizes = {name: math.prod(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    extra = 2 * sum(sizes[name] for name in _named(checkpoint, filter)) if kind == "fisher" else 0
    return 4 * (sum(sizes.values()) + extra)


def _require(size: int, what: str) -> None:
    """Raises MergeError when `size` bytes are not to be had where the model runs."""
    free = _free()
    if size > free:
        raise MergeError(
            f"{what} takes {size / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: measure a part, by a "
            "filter such as 'layers.0.' or 'mlp'"
        )


def _free() -> int:
    """Bytes of memory that can be had; of the accelerator where there is one."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    try:
        # sysconf's "available" pages leave out the page cache, which a model just read has filled.
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _array(name: str, values: torch.Tensor) -> Array:
    array: Array = values.float().cpu().numpy()
    if not np.isfinite(array).all():
        raise MergeError(f"the statistics of {name} are NaN or inf: does the model answer at all in float32?")
    return array


def _write(out: Path, values: Mapping[str, Array], about: About) -> None:
    """Write the file beside, synced, and give it its name by a rename; its mode is the umask's."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = partial.stat().st_mode
    try:
        save_file(dict(values), partial, {KEY: about.model_dump_json()})
        partial.chmod(mode)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(out)
    except SafetensorError as exc:
        raise MergeError(f"{out} cannot be written: {exc}") from exc
    finally:
        partial.unlink(missing_ok=True)


def read_texts(path: Path, limit: int | None = None) -> list[str]:
    """The first `limit` texts of a file, all of them by default. Raises MergeError.

    .jsonl, .json (plain or .gz): an object a line with `text`; or `prompt` and `completion`, which follows it as it
    is, or `response`, which follows on a line of its own; or `messages`, a list of {role, content}.
    .txt, any other .gz: paragraphs, parted by blank lines.
    """
    if limit is not None and limit < 1:
        raise MergeError(f"{limit} texts are none: ask for at least one")
    read = _reader(path)
    try:
        with _opened(path) as file:
            texts = list(itertools.islice(read(path, file), limit))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as exc:
        raise MergeError(f"{path} cannot be read as text: {exc}") from exc
    if not texts:
        raise MergeError(f"{path} holds no text")
    return texts


def _reader(path: Path) -> Callable[[Path, TextIO], Iterator[str]]:
    suffixes = path.suffixes[-2:]
    kind = path.suffix if path.suffix != ".gz" else "".join(suffixes).removesuffix(".gz")
    if kind in (".jsonl", ".json"):
        return _lines
    if kind == ".txt" or path.suffix == ".gz":
        return _paragraphs
    raise MergeError(f"{path} is no .jsonl, .json or .txt, nor one of these with .gz: texts are read from those")


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _paragraphs(_: Path, file: TextIO) -> Iterator[str]:
    for blank, lines in itertools.groupby(file, key=lambda line: not line.strip()):
        if not blank:
            yield "".join(lines).strip("\n")


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise MergeError(f"{path}, line {number} is no JSON: each line is an object of its own") from exc
        text = _text(row) if isinstance(row, dict) else None
        if text is None or not text.strip():
            raise MergeError(
                f"{path}, line {number} has no text: it wants `text`, `prompt` and `completion` or `response`, or "
                "`messages` of role and content"
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise MergeError(f"{path}, line {number} has half a character, a lone surrogate: mend or drop the line")
        yield text


def _text(row: Mapping[str, Any]) -> str | None:
    """One example as running text; None where there is none."""
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row.get("prompt"), str):
        if isinstance(row.get("completion"), str):
            return f"{row['prompt']}{row['completion']}"
        return f"{row['prompt']}\n{row['response']}" if isinstance(row.get("response"), str) else None
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        return None
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
