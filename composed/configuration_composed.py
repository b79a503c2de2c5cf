"""The config of a composed checkpoint: the experts' own config, and how they are put together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LEVELS = ("ffn", "block", "model")
ROUTINGS = ("sample", "token")
GATES = ("linear", "mlp")
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Whose layers may be composed. Others may scale embeddings or logits outside their layers, which would be lost."""


class ComposedConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is untyped here
    """What a composed checkpoint is; the names of the experts' own config (hidden_size ...) are read from `inner`.

    level: what is an expert: "ffn", every MLP; "block", every decoder layer; "model", all layers, norm and head.
    routing: "sample", once for a prompt and then kept; "token" (ffn only), for every token by itself.
    gate: "linear" or "mlp", of `gate_width`. experts: their names, in the order of the tensors.
    experts_per_token: k of the top-k. trunk_layers: so many layers from the first are plain, not routed.
    """

    model_type = "modelglue_composed"
    sub_configs = {"inner": AutoConfig}  # noqa: RUF012 - as transformers declares it
    has_no_defaults_at_init = True

    def __init__(
        self,
        inner: dict[str, Any] | PretrainedConfig | None = None,
        level: str = "model",
        routing: str = "sample",
        gate: str = "linear",
        experts: Sequence[str] = (),
        experts_per_token: int = 1,
        trunk_layers: int = 0,
        gate_width: int | None = None,
        **kwargs: Any,
    ) -> None:
        attention = kwargs.pop("attn_implementation", None)
        kwargs.setdefault("architectures", ["ComposedForCausalLM"])
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_composed.ComposedConfig",
                "AutoModelForCausalLM": "modeling_composed.ComposedForCausalLM",
            },
        )
        # Before there is an inner config to read from: transformers writes what it can read into this one.
        super().__init__(**kwargs)
        self.level = level
        self.routing = routing
        self.gate = gate
        self.experts = list(experts)
        self.experts_per_token = experts_per_token
        self.trunk_layers = trunk_layers
        self.gate_width = gate_width
        self.inner = _inner(inner)
        self._check()
        if attention is not None:
            self._attn_implementation = attention

    def __getattr__(self, name: str) -> Any:
        """What this config doesn't say, the experts' own does."""
        inner = self.__dict__.get("inner")
        if inner is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(inner, name)

    @property
    def short_name(self) -> str:
        """Level, gate and routing as in the paper: F-L-T, B-M-S, M-L-S ..."""
        return "-".join(word[0].upper() for word in (self.level, self.gate, self.routing))

    @property
    def gates(self) -> int:
        """How many gates there are."""
        return 1 if self.level == "model" else self.inner.num_hidden_layers - self.trunk_layers

    @property
    def slots(self) -> int:
        """How many experts' keys and values a routed layer keeps for a sample."""
        return 1 if self.level == "ffn" else self.experts_per_token

    def cache_layer(self, layer: int) -> int:
        """The first of the cache's layers that belong to layer number `layer`."""
        routed = max(0, layer - self.trunk_layers)
        return layer + routed * (self.slots - 1)

    def layer_kind(self, layer: int) -> str:
        """Whether layer number `layer` attends to all that was ("full_attention") or to its end."""
        if kinds := getattr(self.inner, "layer_types", None):
            return str(kinds[layer])
        window = getattr(self.inner, "sliding_window", None)
        return "full_attention" if window is None else "sliding_attention"

    def _check(self) -> None:
        """Raises ValueError for what cannot be."""
        for name, known in (("level", LEVELS), ("routing", ROUTINGS), ("gate", GATES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        if self.routing == "token" and self.level != "ffn":
            raise ValueError(f"level {self.level!r} cannot be routed by token, only by sample")
        if not 1 <= self.experts_per_token <= len(self.experts):
            raise ValueError(f"experts_per_token is {self.experts_per_token}, with {len(self.experts)} experts")
        layers = self.inner.num_hidden_layers
        if not 0 <= self.trunk_layers <= layers:
            raise ValueError(f"trunk_layers is {self.trunk_layers}, the experts have {layers} layers")
        if self.gate == "mlp" and (self.gate_width is None or self.gate_width < 1):
            raise ValueError(f"gate_width is {self.gate_width}: an mlp gate needs its width")
        if odd := {self.layer_kind(layer) for layer in range(layers)} - {"full_attention", "sliding_attention"}:
            raise ValueError(f"layers of kind {', '.join(sorted(odd))} cannot be composed")


def _inner(config: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
    if config is None:
        raise ValueError("a composed config needs `inner`, the experts' own config")
    if isinstance(config, dict):
        settings = {name: value for name, value in config.items() if name != "model_type"}
        kind = config.get("model_type")
        config = CONFIG_MAPPING[kind](**settings) if kind in ARCHITECTURES else kind
    kind = config.model_type if isinstance(config, PretrainedConfig) else config
    if kind not in ARCHITECTURES:
        raise ValueError(f"experts of architecture {kind!r} cannot be composed, only of {', '.join(ARCHITECTURES)}")
    return copy.deepcopy(config)
