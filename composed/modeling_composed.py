"""A composed checkpoint as a transformers model: one gate a place picks which experts run.

Where the gates are: in every routed layer ("ffn": before its MLPs, "block": before its blocks), or once ("model").
With sample routing they are asked once, about the prompt, and the answer is kept for all tokens after it.

Array names: B samples, S tokens, H hidden, V vocabulary, E experts, R gates, k experts chosen for one sample or token.
`routes` is [B, R, E], the weight of every expert: over E they sum to 1, and all but k are 0.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .configuration_composed import ComposedConfig

# transformers renames what its masks ask for; its caches were `past_key_values` before 5.24.
ASKED = inspect.signature(create_causal_mask).parameters
CACHE = "cache" if "cache" in ASKED else "past_key_values"

MASKS: dict[str, Callable[..., Tensor | None]] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


class Route(NamedTuple):
    """Which experts answer a prompt, and how much each counts.

    Sample routing: weights [B, R, E], experts [B, R, k]; token routing: [B, S, R, E] and [B, S, R, k]. `experts` is
    sorted, the heaviest first. R counts the gates from the first layer to the last; at model level it is 1.
    """

    weights: Tensor
    experts: Tensor


@dataclass
class ComposedOutput(CausalLMOutputWithPast):  # type: ignore[misc]  # transformers is untyped here
    """The logits, and the routes that were pinned ([B, R, E]; None with token routing)."""

    routes: Tensor | None = None


class ComposedCache(DynamicCache):  # type: ignore[misc]
    """Keys and values, and the routes of the samples that they belong to.

    A routed layer of level "block" or "model" has k cache layers: the s-th holds what each sample's s-th expert saw.
    Sliding layers keep all tokens too: a mask hides the old ones.
    """

    def __init__(self, config: ComposedConfig) -> None:
        super().__init__()
        routed = config.inner.num_hidden_layers - config.trunk_layers
        self.layers = [DynamicLayer() for _ in range(config.trunk_layers + routed * config.slots)]
        self.routes: Tensor | None = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._each_row(lambda routes: routes.index_select(0, beam_idx.to(routes.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each_row(lambda routes: routes.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._each_row(lambda routes: routes[indices])

    def reset(self) -> None:
        super().reset()
        self.routes = None

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.routes is not None:
            self.routes = change(self.routes)


class LinearGate(nn.Linear):
    """Logits of E experts: weight (feature - mean) + bias, in fp32."""

    def __init__(self, config: ComposedConfig) -> None:
        super().__init__(config.inner.hidden_size, len(config.experts), dtype=torch.float32)
        self.mean = nn.Parameter(torch.zeros(config.inner.hidden_size, dtype=torch.float32), requires_grad=False)

    def forward(self, feature: Tensor) -> Tensor:
        return nn.functional.linear(feature.float() - self.mean.float(), self.weight.float(), self.bias.float())


class MLPGate(nn.Module):
    """Logits of E experts: down relu(up (feature - mean)), in fp32."""

    def __init__(self, config: ComposedConfig) -> None:
        super().__init__()
        hidden, width = config.inner.hidden_size, config.gate_width or 0
        self.mean = nn.Parameter(torch.zeros(hidden, dtype=torch.float32), requires_grad=False)
        self.up = nn.Linear(hidden, width, dtype=torch.float32)
        self.down = nn.Linear(width, len(config.experts), dtype=torch.float32)

    def forward(self, feature: Tensor) -> Tensor:
        up, down = self.up, self.down
        inside = nn.functional.linear(feature.float() - self.mean.float(), up.weight.float(), up.bias.float())
        return nn.functional.linear(inside.relu(), down.weight.float(), down.bias.float())


def _gate(config: ComposedConfig) -> LinearGate | MLPGate:
    return LinearGate(config) if config.gate == "linear" else MLPGate(config)


def weigh(logits: Tensor, k: int) -> Tensor:
    """The weights of all experts [..., E]: a softmax of which the k largest stay and sum to 1, the rest is 0."""
    probabilities = logits.float().softmax(-1)
    chosen = best(logits, k)
    kept = torch.zeros_like(probabilities).scatter(-1, chosen, probabilities.gather(-1, chosen))
    return kept / kept.sum(-1, keepdim=True)


def best(scores: Tensor, k: int) -> Tensor:
    """The k experts of the highest score, the highest first, on a tie the lower index (which topk doesn't promise)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


class Group(NamedTuple):
    """The samples that an expert has to run; rows None: all of the batch."""

    expert: int
    rows: Tensor | None


class Slot(NamedTuple):
    """The s-th choice of every sample: its weight, and who runs whom."""

    weights_B: Tensor
    groups: list[Group]


@dataclass(eq=False)
class Step:
    """What one forward pass knows of its batch.

    keep_BS: which of its tokens are no padding, None: all. turns: the rotary cosines and sines. masks: one for each
    kind of layer. pinned: the slots of every gate, where the routes are known. found: what the gates said in this pass.
    """

    cache: Any
    past: int
    batch: int
    k: int
    keep_BS: Tensor | None
    position_ids: Tensor
    turns: tuple[Tensor, ...]
    masks: dict[str, Tensor | None]
    pinned: list[list[Slot]] | None = None
    found: list[Tensor] = field(default_factory=list)

    def pin(self, routes_BRE: Tensor) -> None:
        """From here on these are the routes."""
        experts_BRk = best(routes_BRE, self.k)
        weights_BRk, names = routes_BRE.gather(-1, experts_BRk), experts_BRk.tolist()
        self.pinned = [
            [Slot(weights_BRk[:, gate, s], self._groups([row[gate][s] for row in names])) for s in range(self.k)]
            for gate in range(routes_BRE.shape[1])
        ]

    def ask(self, place: int, gate: nn.Module, hidden_BSH: Tensor) -> list[Slot]:
        """What gate number `place` says, or has said of the prompt."""
        if self.pinned is not None:
            return self.pinned[place]
        weights_BE = weigh(gate(_mean(hidden_BSH, self.keep_BS)), self.k)
        self.found.append(weights_BE)
        experts_Bk = best(weights_BE, self.k)
        weights_Bk, names = weights_BE.gather(-1, experts_Bk), experts_Bk.tolist()
        return [Slot(weights_Bk[:, s], self._groups([row[s] for row in names])) for s in range(self.k)]

    def arguments(self, kind: str, rows: Tensor | None, number: int) -> dict[str, Any]:
        """What a decoder layer of transformers wants to know of these rows; `number` is its layer in the cache."""
        return {
            "attention_mask": _pick(self.masks[kind], rows),
            "position_ids": _pick(self.position_ids, rows),
            "position_embeddings": tuple(_pick(turn, rows) for turn in self.turns),
            "use_cache": self.cache is not None,
            CACHE: None if self.cache is None else _Rows(self, number, rows),
        }

    def _groups(self, experts_B: list[int]) -> list[Group]:
        chosen, device = sorted(set(experts_B)), self.position_ids.device
        if len(chosen) == 1:
            return [Group(chosen[0], None)]
        rows = ([row for row, expert in enumerate(experts_B) if expert == each] for each in chosen)
        return [Group(each, torch.tensor(own, device=device)) for each, own in zip(chosen, rows, strict=True)]


# A decoder layer of transformers hands its MLP nothing but the hidden states.
_STEP: ContextVar[Step] = ContextVar("step")


class _Rows:
    """Some rows of one cache layer, as the cache that an attention writes to."""

    def __init__(self, step: Step, number: int, rows: Tensor | None) -> None:
        self._step, self._number, self._rows = step, number, rows

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add these rows' new keys and values; returns all that they have."""
        cache, past, rows = self._step.cache, self._step.past, self._rows
        if rows is None:
            whole: tuple[Tensor, Tensor] = cache.update(keys, values, self._number)
            return whole
        layer = cache.layers[self._number]
        if layer.get_seq_length() == past:  # the first group makes room for all
            room = (self._step.batch, *keys.shape[1:])
            layer.update(keys.new_zeros(room), values.new_zeros(room))
        layer.keys[rows, :, past:] = keys
        layer.values[rows, :, past:] = values
        return layer.keys[rows], layer.values[rows]


def _pick(tensor: Tensor | None, rows: Tensor | None) -> Tensor | None:
    # One row stands for all of them.
    return tensor if tensor is None or rows is None or len(tensor) == 1 else tensor[rows]


def _mean(hidden_BSH: Tensor, keep_BS: Tensor | None) -> Tensor:
    """The mean over each sample's own tokens [B, H]; one by one: padding must not change how a sum is rounded."""
    rows = hidden_BSH if keep_BS is None else [own[keep] for own, keep in zip(hidden_BSH, keep_BS, strict=True)]
    return torch.stack([own.float().sum(0) / max(len(own), 1) for own in rows])


def _together(slot: Slot, inputs: Tensor, run: Callable[[int, Tensor, Tensor | None], Tensor]) -> Tensor:
    """What each sample's expert makes of its row of `inputs`: run(expert, rows of the inputs, which rows)."""
    outputs: Tensor | None = None
    for expert, rows in slot.groups:
        if rows is None:
            return run(expert, inputs, None)
        output = run(expert, inputs[rows], rows)
        if outputs is None:
            outputs = output.new_empty(len(inputs), *output.shape[1:])
        outputs[rows] = output
    assert outputs is not None
    return outputs


def _sum(slots: list[Slot], outputs: list[Tensor]) -> Tensor:
    """The weighted sum over the slots, in fp32; of one slot no arithmetic."""
    if len(slots) == 1:
        return outputs[0]
    total = sum(slot.weights_B[:, None, None] * output.float() for slot, output in zip(slots, outputs, strict=True))
    return total.to(outputs[0].dtype)  # type: ignore[union-attr]  # sum() of tensors


def _run(layer: nn.Module, hidden_BSH: Tensor, arguments: dict[str, Any]) -> Tensor:
    output = layer(hidden_BSH, **arguments)
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


class RoutedMLP(nn.Module):
    """E MLPs in the place of one, of which each sample or each token runs k."""

    def __init__(self, config: ComposedConfig, mlp: type[nn.Module], place: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(mlp(config.inner) for _ in config.experts)
        self.gate = _gate(config)
        self.place, self.k, self.by_token = place, config.experts_per_token, config.routing == "token"

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        if self.by_token:
            return self._each_token(hidden_BSH)
        slots = _STEP.get().ask(self.place, self.gate, hidden_BSH)
        return _sum(slots, [_together(slot, hidden_BSH, self._expert) for slot in slots])

    def _expert(self, expert: int, hidden_BSH: Tensor, _rows: Tensor | None) -> Tensor:
        output: Tensor = self.experts[expert](hidden_BSH)
        return output

    def _each_token(self, hidden_BSH: Tensor) -> Tensor:
        weights_BSE = weigh(self.gate(hidden_BSH), self.k)
        _STEP.get().found.append(weights_BSE)
        tokens_TH, weights_TE = hidden_BSH.flatten(0, 1), weights_BSE.flatten(0, 1)
        total_TH = torch.zeros_like(tokens_TH, dtype=torch.float32)
        for expert in weights_TE.any(0).nonzero().flatten().tolist():
            rows = weights_TE[:, expert].nonzero().flatten()
            output = self.experts[expert](tokens_TH[rows]).float() * weights_TE[rows, expert, None]
            total_TH = total_TH.index_add(0, rows, output)
        return total_TH.to(hidden_BSH.dtype).view_as(hidden_BSH)


class RoutedBlock(nn.Module):
    """E decoder layers in the place of one, of which each sample runs k."""

    def __init__(self, config: ComposedConfig, layer: type[nn.Module], number: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(layer(config.inner, number) for _ in config.experts)
        self.gate = _gate(config)
        self.place = number - config.trunk_layers
        self.kind = config.layer_kind(number)
        self.first = config.cache_layer(number)

    def forward(self, hidden_BSH: Tensor, step: Step) -> Tensor:
        slots = step.ask(self.place, self.gate, hidden_BSH)
        outputs = []
        for number, slot in enumerate(slots, start=self.first):

            def run(expert: int, inputs: Tensor, rows: Tensor | None, number: int = number) -> Tensor:
                return _run(self.experts[expert], inputs, step.arguments(self.kind, rows, number))

            outputs.append(_together(slot, hidden_BSH, run))
        return _sum(slots, outputs)


class ModelExpert(nn.Module):
    """What a whole model has of its own: its layers after the trunk, norm and head; without a trunk also embeddings."""

    def __init__(self, config: ComposedConfig, layer: type[nn.Module], norm: type[nn.Module]) -> None:
        super().__init__()
        inner, numbers = config.inner, range(config.trunk_layers, config.inner.num_hidden_layers)
        if not config.trunk_layers:
            self.embed_tokens = nn.Embedding(inner.vocab_size, inner.hidden_size, inner.pad_token_id)
        self.layers = nn.ModuleDict({str(number): layer(inner, number) for number in numbers})
        self.norm = norm(inner.hidden_size, eps=inner.rms_norm_eps)
        self.lm_head = nn.Linear(inner.hidden_size, inner.vocab_size, bias=False)


class ComposedModel(nn.Module):
    """Embeddings and layers; at model level those of the trunk, and the experts behind it."""

    def __init__(self, config: ComposedConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.inner
        theirs = _one_layer(inner).model
        layer, norm = type(theirs.layers[0]), type(theirs.norm)
        self.embed_tokens = nn.Embedding(inner.vocab_size, inner.hidden_size, inner.pad_token_id)
        self.rotary_emb = type(theirs.rotary_emb)(config=inner)
        shared = config.trunk_layers if config.level == "model" else inner.num_hidden_layers
        self.layers = nn.ModuleList(self._layer(number, layer) for number in range(shared))
        if config.level == "model":
            self.gate = _gate(config)
            self.experts = nn.ModuleList(ModelExpert(config, layer, norm) for _ in config.experts)
        else:
            self.norm = norm(inner.hidden_size, eps=inner.rms_norm_eps)

    def _layer(self, number: int, layer: Any) -> Any:
        config = self.config
        if number >= config.trunk_layers and config.level == "block":
            return RoutedBlock(config, layer, number)
        whole = layer(config.inner, number)
        if number >= config.trunk_layers:
            whole.mlp = RoutedMLP(config, type(whole.mlp), number - config.trunk_layers)
        return whole

    def forward(self, hidden_BSH: Tensor, step: Step) -> Tensor:
        """What the layers make of the embedded tokens."""
        for number, layer in enumerate(self.layers):
            if isinstance(layer, RoutedBlock):
                hidden_BSH = layer(hidden_BSH, step)
            else:
                hidden_BSH = _run(layer, hidden_BSH, step.arguments(self.config.layer_kind(number), None, number))
        return hidden_BSH

    def answer(self, hidden_BSH: Tensor, tokens_BS: Tensor | None, step: Step, keep: slice | Tensor) -> Tensor:
        """At model level: the logits of the chosen experts; of several, the log of their mean distribution."""
        slots, outputs = step.ask(0, self.gate, hidden_BSH), []
        for number, slot in enumerate(slots):

            def run(expert: int, inputs: Tensor, rows: Tensor | None, number: int = number) -> Tensor:
                return self._expert(number, expert, inputs, rows, step, keep)

            # Without a trunk the experts read the tokens with embeddings of their own.
            outputs.append(_together(slot, hidden_BSH if tokens_BS is None else tokens_BS, run))
        if len(slots) == 1:
            return outputs[0]
        logs = [
            slot.weights_B.log()[:, None, None] + output.float().log_softmax(-1)
            for slot, output in zip(slots, outputs, strict=True)
        ]
        return torch.stack(logs).logsumexp(0)

    def _expert(
        self, slot: int, expert: int, inputs: Tensor, rows: Tensor | None, step: Step, keep: slice | Tensor
    ) -> Tensor:
        own: Any = self.experts[expert]
        hidden = inputs if self.config.trunk_layers else own.embed_tokens(inputs)
        for name, layer in own.layers.items():
            number = int(name)
            arguments = step.arguments(self.config.layer_kind(number), rows, self.config.cache_layer(number) + slot)
            hidden = _run(layer, hidden, arguments)
        logits: Tensor = own.lm_head(own.norm(hidden[:, keep]))
        return logits


class ComposedForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model composed of experts.

    Without `routes` and without a cache that holds some, the tokens of a forward pass are taken for the prompt, and it
    is routed by them. A prompt must be read in one pass, or `routes` be given: `model.route(prompt).weights`.
    """

    config_class = ComposedConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _skip_keys_device_placement = (CACHE,)
    # Searched in the names of tensors; an MLP's gate_proj is no gate.
    _keep_in_fp32_modules_strict = (r"\.gate\.",)

    def __init__(self, config: ComposedConfig) -> None:
        super().__init__(config)
        config.inner._attn_implementation = config._attn_implementation
        self.generation_config = GenerationConfig.from_model_config(config.inner)
        self.model = ComposedModel(config)
        self.vocab_size = config.vocab_size
        if config.level == "model":
            shared = "model." if config.trunk_layers else "model.experts.{}."
            self._tied_weights_keys = {
                f"model.experts.{expert}.lm_head.weight": f"{shared.format(expert)}embed_tokens.weight"
                for expert in range(len(config.experts))
            }
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        self._no_split_modules = [type(_one_layer(config.inner).model.layers[0]).__name__, RoutedBlock.__name__]
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: ComposedCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        routes: Tensor | None = None,
        past_key_values: ComposedCache | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> ComposedOutput | tuple[Any, ...]:
        """The logits, as any causal language model gives them; `past_key_values` is `cache` by its older name."""
        if output_attentions or output_hidden_states:
            raise ValueError("a composed model gives neither attentions nor hidden states: its experts have their own")
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = ComposedCache(self.config)
        embedded_BSH = self._embed(input_ids, inputs_embeds)
        step = self._step(embedded_BSH, attention_mask, position_ids, cache, routes)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        running = _STEP.set(step)
        try:
            hidden_BSH = self.model(embedded_BSH, step)
            if self.config.level == "model":
                logits = self.model.answer(hidden_BSH, self._own_tokens(input_ids), step, keep)
            else:
                logits = self.lm_head(self.model.norm(hidden_BSH[:, keep]))
        finally:
            _STEP.reset(running)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        output = ComposedOutput(loss=loss, logits=logits, routes=self._pinned(step, cache, routes), **{CACHE: cache})
        return output if return_dict is None or return_dict else output.to_tuple()

    @torch.inference_mode()
    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Route:
        """Which experts would answer these prompts, without answering."""
        embedded_BSH = self._embed(input_ids, None)
        step = self._step(embedded_BSH, attention_mask, None, None, None)
        running = _STEP.set(step)
        try:
            hidden_BSH = self.model(embedded_BSH, step)
            if self.config.level == "model":
                step.ask(0, self.model.gate, hidden_BSH)
        finally:
            _STEP.reset(running)
        weights = self._found(step)
        return Route(weights, best(weights, self.config.experts_per_token))

    def resize_token_embeddings(self, *_: Any, **__: Any) -> Any:
        """Refused: the vocabulary is the experts'."""
        raise ValueError("resize the experts' vocabularies, then compose them again")

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embedded: Tensor = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return embedded

    def _own_tokens(self, input_ids: Tensor | None) -> Tensor | None:
        if self.config.trunk_layers:
            return None
        if input_ids is None:
            raise ValueError("without a trunk every expert has embeddings of its own: give input_ids")
        return input_ids

    def _step(
        self,
        embedded_BSH: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        routes: Tensor | None,
    ) -> Step:
        config, (batch, new) = self.config, embedded_BSH.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        places_S = torch.arange(past, past + new, device=embedded_BSH.device)
        flat = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        if position_ids is None and flat is not None:
            position_ids = (flat.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        elif position_ids is None:
            position_ids = places_S[None]
        known = {
            "config": config.inner,
            "inputs_embeds": embedded_BSH,
            "input_embeds": embedded_BSH,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache_position": places_S,
            CACHE: cache,
        }
        asked = {name: value for name, value in known.items() if name in ASKED}
        kinds = {config.layer_kind(number) for number in range(config.inner.num_hidden_layers)}
        step = Step(
            cache=cache,
            past=past,
            batch=batch,
            k=config.experts_per_token,
            keep_BS=None if flat is None else flat[:, -new:].bool(),
            position_ids=position_ids,
            turns=self.model.rotary_emb(embedded_BSH, position_ids),
            masks={kind: MASKS[kind](**asked) for kind in sorted(kinds)},
        )
        self._pin(step, attention_mask, cache, routes)
        return step

    def _pin(self, step: Step, attention_mask: Tensor | None, cache: Any, routes: Tensor | None) -> None:
        """Take the routes that are known; refuse what would lose them, or could not find any."""
        config = self.config
        if config.routing == "token":
            if routes is not None:
                raise ValueError("this model routes every token by itself: it takes no routes")
            return
        if cache is not None and not isinstance(cache, ComposedCache):
            raise ValueError(f"{type(cache).__name__} holds no routes: give a ComposedCache(model.config), or none")
        routes = routes if cache is None or cache.routes is None else cache.routes
        if routes is None:
            if attention_mask is not None and attention_mask.ndim != 2:
                raise ValueError("this attention mask doesn't tell what is padding: give one of [B, S], or routes")
            return
        if routes.shape != (expected := (step.batch, config.gates, len(config.experts))):
            raise ValueError(f"routes of shape {tuple(routes.shape)}, expected {expected}")
        step.pin(routes)
        if cache is not None:
            cache.routes = routes

    def _pinned(self, step: Step, cache: Any, routes: Tensor | None) -> Tensor | None:
        """The routes of a pass that is over, from now on those of its cache."""
        if self.config.routing == "token":
            return None
        if step.pinned is None:
            routes = self._found(step)
        elif cache is not None:
            routes = cache.routes
        if cache is not None:
            cache.routes = routes
        return routes

    def _found(self, step: Step) -> Tensor:
        if not step.found:
            return torch.zeros(step.batch, 0, len(self.config.experts), device=step.position_ids.device)
        return torch.stack(step.found, dim=-2)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LinearGate | MLPGate):
            nn.init.zeros_(module.mean)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As for any model, without what only older versions of transformers ask."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("cache_position", None)
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> None:
        own = model_kwargs.get(CACHE) is None and self.config.routing == "sample"
        if self.config.routing == "sample" and model_kwargs.get("routes") is None:
            # Both show the model something else than the prompt first.
            if generation_config.prefill_chunk_size is not None:
                raise ValueError("prefill_chunk_size hides the prompt's end from its route: give routes")
            if generation_mode == GenerationMode.ASSISTED_GENERATION:
                raise ValueError("assisted generation would route by its guesses: give routes")
        if own and generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(f"a {generation_config.cache_implementation} cache holds no routes")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        if own and model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE] = ComposedCache(self.config)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.get("routes") is not None:
            updated["routes"] = outputs["routes"]
        return updated


def _one_layer(inner: Any) -> Any:
    """The experts' own model without its weights, to see which classes it is made of."""
    small = copy.deepcopy(inner)
    small.num_hidden_layers = 1
    if kinds := getattr(small, "layer_types", None):
        small.layer_types = kinds[:1]
    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(inner)](small)
