"""What the gates look at: a text's hidden states in the shared model, averaged over its tokens, layer by layer.

The shared model is never whole in memory: a layer's weights are merged when the texts come to it, and let go after it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from builder import checkpoints, kernels
from builder.checkpoints import Array
from builder.errors import MixError
from builder.merge import folder
from builder.merge.plan import Plan
from builder.merge.stream import Executor
from builder.mix.layouts import STACK, Look

if TYPE_CHECKING:
    import torch

Doubles = NDArray[np.float64]
BATCH_TOKENS = 1 << 14
"""Of texts that go through the layers together, padding included; each batch merges the layers anew."""
EMBEDDINGS = "model.embed_tokens"


class _Seen(Exception):
    """Every look was taken; the layers that follow are not needed."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look saw of N texts: the mean over each one's tokens, and the mean of all texts' first tokens."""

    means_NH: Doubles
    first_H: Doubles


def pooled(shared: Plan, texts: Sequence[str], looks: Sequence[Look], *, max_tokens: int = 512) -> list[Seen]:
    """What every look sees, averaged over each text's tokens.

    The tokens are those that a user's call of the tokenizer gives, special ones too. Raises MixError for a text without
    any.
    """
    with _loaded(shared) as (network, tokenizer, weights):
        rows = [tokenizer(text, truncation=True, max_length=max_tokens).input_ids for text in texts]
        if not all(rows):
            raise MixError(f"{texts[[*map(bool, rows)].index(False)]!r} has no token: leave it out of the prompts")
        shape = (len(texts), int(network.config.hidden_size))
        found = {look: (np.empty(shape), np.empty(shape)) for look in looks}
        for batch in _batches(rows):
            for look, seen in _run(network, weights, [rows[i] for i in batch], [*found]).items():
                for all_texts, of_batch in zip(found[look], seen, strict=True):
                    all_texts[batch] = of_batch
    return [Seen(means, firsts.mean(axis=0)) for means, firsts in (found[look] for look in looks)]


@contextmanager
def _loaded(shared: Plan) -> Iterator[tuple[Any, Any, _Weights]]:
    """The shared model without its weights, its tokenizer, and where the weights come from."""
    import torch
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        folder.write(shared, Path(temporary))
        try:
            tokenizer = AutoTokenizer.from_pretrained(temporary, local_files_only=True)
        except (OSError, ValueError) as exc:
            raise MixError(f"{shared.donor.name} has no tokenizer that can be loaded, and prompts need one") from exc
        config = AutoConfig.from_pretrained(temporary, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    yield network.eval(), tokenizer, _Weights(shared)


class _Weights:
    """The shared model's tensors as they will be stored, in float32."""

    def __init__(self, shared: Plan) -> None:
        self._executor = Executor(shared, kernels, 1)
        self._outputs = {output.name: output for output in shared.outputs}

    def of(self, module: str) -> dict[str, torch.Tensor]:
        """A module's, by their names in it."""
        import torch

        names = [name for name in self._outputs if name.startswith(f"{module}.")]
        return {name.removeprefix(f"{module}."): torch.from_numpy(self._read(name)) for name in names}

    def _read(self, name: str) -> Array:
        output = self._outputs[name]
        pieces = self._executor.pieces(output)
        stored = [checkpoints.stored(name, values, output.tensor.dtype) for values in pieces]
        return np.concatenate([kernels.load(each)[0] for each in stored]).reshape(output.tensor.shape)


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Texts of about the same length together."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if batch and (len(batch) + 1) * len(rows[i]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _run(
    network: Any, weights: _Weights, rows: Sequence[Sequence[int]], looks: Sequence[Look]
) -> Mapping[Look, tuple[Doubles, Doubles]]:
    """What each look sees of each row, the mean over its tokens and its first; padding, on the right, never counts."""
    import torch

    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    seen: dict[Look, tuple[Doubles, Doubles]] = {}

    def look(what: Look, states: torch.Tensor) -> None:
        total = (states.double() * mask[:, :, None]).sum(1)
        seen[what] = ((total / mask.sum(1, keepdim=True)).numpy(), states[:, 0].double().numpy())
        if len(seen) == len(looks):
            raise _Seen

    hooks = [*_lend(network, weights), *_watch(network, looks, look)]
    try:
        with torch.no_grad():
            network.model(input_ids=tokens, attention_mask=mask, use_cache=False)
    except _Seen:
        pass
    finally:
        for hook in hooks:
            hook.remove()
        for _, module in _parts(network):
            _give_back(module)
    return seen


def _parts(network: Any) -> Iterator[tuple[str, Any]]:
    """What gets its weights together."""
    yield EMBEDDINGS, network.model.embed_tokens
    yield from ((f"{STACK}.{i}", layer) for i, layer in enumerate(network.model.layers))
    yield "model.norm", network.model.norm


def _lend(network: Any, weights: _Weights) -> Iterator[Any]:
    """Hooks that give a part its weights before it runs, and take them away after it."""
    for name, module in _parts(network):

        def fill(module: Any, *_: Any, name: str = name) -> None:
            module.load_state_dict(weights.of(name), assign=True)

        yield module.register_forward_pre_hook(fill, with_kwargs=True)
        yield module.register_forward_hook(lambda module, *_: _give_back(module))


def _give_back(module: Any) -> None:
    import torch

    empty = {name: torch.empty_like(each, device="meta") for name, each in module.state_dict().items()}
    module.load_state_dict(empty, assign=True)


def _watch(network: Any, looks: Sequence[Look], look: Any) -> Iterator[Any]:
    """Hooks that look."""
    for what in looks:
        if what.layer is None:
            yield network.model.embed_tokens.register_forward_hook(lambda _, __, out, what=what: look(what, out))
            continue
        layer = network.model.layers[what.layer]
        module = layer.mlp if what.mlp else layer
        hook = _first(look, what)
        # Before the layer gets its weights: they may not be needed any more.
        yield module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


def _first(look: Any, what: Look) -> Any:
    def hook(_: Any, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        look(what, positional[0] if positional else named["hidden_states"])

    return hook
