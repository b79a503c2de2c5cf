"""Where a mixture's tensors go, by name: the standard architectures, as published, and the composed one.

A layout answers the same few questions in either case; what a standard class cannot hold is refused here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from builder.checkpoints import Tensor
from builder.errors import MixError
from builder.merge.models import layer_of
from builder.mix.spec import Spec

STACK = "model.layers"
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Whose layers are mixed, by config.json's model_type."""
ATTENTION = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight")
BIASES = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
LAYER = (
    *ATTENTION,
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
    *("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
)
NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
MLP = "mlp."
SHARED_GATE = ".shared_expert_gate.weight"
SHARED_WIDTH = 32
"""Of a shared expert that adds nothing: what tensor parallelism and quantised blocks divide."""
KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
    *("attention_dropout", "rope_parameters"),
)
"""What a standard config keeps of the experts' own; the classes' defaults differ, so nothing is left to them."""
SLIDING = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


@dataclass(frozen=True, slots=True)
class Look:
    """What a gate looks at: the input of layer `layer`, or of its MLP; without a layer the token embeddings."""

    layer: int | None = None
    mlp: bool = False

    @property
    def raw(self) -> bool:
        """Whether no norm or table bounds what it sees."""
        return self.layer is not None and not self.mlp


class Layout(Protocol):
    """How one kind of checkpoint calls things."""

    @property
    def name(self) -> str:
        """What to call it in a sentence."""
        ...

    def own(self, name: str, expert: int) -> str | None:
        """What the dense model's tensor `name` is called as an expert's own; None for one that all experts share."""
        ...

    def common(self, name: str) -> str | None:
        """What the tensor of a shared expert's model is called, one that answers beside the chosen ones."""
        ...

    def shares(self, name: str) -> bool:
        """Whether the shared model's tensor is in the checkpoint."""
        ...

    def gates(self) -> dict[str, Look]:
        """The places that have a gate, with what it looks at."""
        ...

    def gate(self, experts: int, hidden: int, dtype: str) -> dict[str, Tensor]:
        """The parts of one gate, by what follows its place's name."""
        ...

    def zeros(self, hidden: int, dtype: str) -> dict[str, Tensor]:
        """Tensors that must be there and say nothing."""
        ...

    def config(self, dense: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """config.json, from that of the dense model."""
        ...


@dataclass(frozen=True)
class Composed:
    """The project's own layout: every level, gate and trunk (see `composed/`)."""

    spec: Spec
    layers: int
    name: str = field(default="composed", init=False)

    @property
    def trunk(self) -> int:
        """How many layers are plain."""
        return self.spec.trunk(self.layers)

    def own(self, name: str, expert: int) -> str | None:
        """By level: the MLPs, the layers, or all but what the trunk holds."""
        layer, level = layer_of(name), self.spec.level
        if layer is None:
            whole = level == "model" and not (self.trunk and "embed_tokens" in name)
            return f"model.experts.{expert}.{name.removeprefix('model.')}" if whole else None
        stack, number, rest = layer
        if number < self.trunk or (level == "ffn" and not rest.startswith(MLP)):
            return None
        if level == "ffn":
            return f"{stack}.{number}.mlp.experts.{expert}.{rest.removeprefix(MLP)}"
        if level == "block":
            return f"{stack}.{number}.experts.{expert}.{rest}"
        return f"model.experts.{expert}.layers.{number}.{rest}"

    def shares(self, name: str) -> bool:
        """What no expert has of its own; at model level the embeddings too, for the gate."""
        return self.own(name, 0) is None or (self.spec.level == "model" and "embed_tokens" in name)

    def gates(self) -> dict[str, Look]:
        """One a layer, or one."""
        routed = range(self.trunk, self.layers)
        if self.spec.level == "model":
            return {"model": Look(self.trunk or None)}
        if self.spec.level == "block":
            return {f"{STACK}.{layer}": Look(layer) for layer in routed}
        return {f"{STACK}.{layer}.mlp": Look(layer, mlp=True) for layer in routed}

    def gate(self, experts: int, hidden: int, dtype: str) -> dict[str, Tensor]:
        """In fp32, all parts always."""
        if self.spec.source != "mlp":
            shapes: dict[str, tuple[int, ...]] = {"weight": (experts, hidden), "mean": (hidden,), "bias": (experts,)}
        else:
            width = self.spec.gate_width
            shapes = {"mean": (hidden,), "up.weight": (width, hidden), "up.bias": (width,)}
            shapes |= {"down.weight": (experts, width), "down.bias": (experts,)}
        return {f".gate.{part}": Tensor("F32", shape) for part, shape in shapes.items()}

    def common(self, name: str) -> str | None:
        """None: there is no shared expert."""
        return None

    def zeros(self, hidden: int, dtype: str) -> dict[str, Tensor]:
        """None."""
        return {}

    def config(self, dense: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """The experts' own config inside of it; no setting is given twice."""
        apart = ("dtype", "torch_dtype", "transformers_version", "architectures")
        facts: dict[str, Any] = {
            "architectures": ["ComposedForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_composed.ComposedConfig",
                "AutoModelForCausalLM": "modeling_composed.ComposedForCausalLM",
            },
            "model_type": "modelglue_composed",
            "level": self.spec.level,
            "routing": self.spec.routing,
            "gate": "mlp" if self.spec.source == "mlp" else "linear",
            "experts": list(names),
            "experts_per_token": self.spec.k,
            "trunk_layers": self.trunk,
            "inner": {key: value for key, value in dense.items() if key not in apart},
        }
        if self.spec.source == "mlp":
            facts["gate_width"] = self.spec.gate_width
        if said := dense.get("dtype", dense.get("torch_dtype")):
            facts["dtype"] = said
        return facts


@dataclass(frozen=True, slots=True)
class Architecture:
    """A class of mixtures that transformers and vLLM have.

    name: mergekit's. takes: the experts' model types, with the parts of a layer that it holds. moe: what it calls the
    place of the MLP. parts: its names of an MLP's matrices where they are others. shared: whether it has a shared
    expert.
    """

    name: str
    model_type: str
    takes: Mapping[str, Collection[str]]
    moe: str = "mlp"
    parts: Mapping[str, str] = field(default_factory=dict)
    shared: bool = False


MIXTRAL = Architecture(
    "Mixtral",
    "mixtral",
    {"llama": LAYER, "mistral": LAYER},
    "block_sparse_moe",
    {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
)
QWEN2 = Architecture(
    "Qwen MoE", "qwen2_moe", {"qwen2": (*LAYER, *BIASES), "llama": LAYER, "mistral": LAYER}, shared=True
)
QWEN3 = Architecture("Qwen3 MoE", "qwen3_moe", {"qwen3": (*LAYER, *NORMS, *BIASES, "self_attn.o_proj.bias")})
STANDARD = (MIXTRAL, QWEN2, QWEN3)
"""In the order of preference."""
CLASSES = {"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
COMPOSE = "say layout: composed, which this project's code loads"


@dataclass(frozen=True)
class Standard:
    """F-L-T in every layer as a class of transformers' has it, so that other engines serve it too."""

    spec: Spec
    layers: int
    architecture: Architecture

    @property
    def name(self) -> str:
        """The architecture's."""
        return self.architecture.name

    def own(self, name: str, expert: int) -> str | None:
        """The MLPs."""
        return self._moved(name, f"experts.{expert}", self.architecture.parts)

    def common(self, name: str) -> str | None:
        """What the tensor of a shared expert's model is called, one that answers beside the chosen ones."""
        return self._moved(name, "shared_expert", {})

    def _moved(self, name: str, place: str, parts: Mapping[str, str]) -> str | None:
        layer = layer_of(name)
        if layer is None or not layer[2].startswith(MLP):
            return None
        part, _, kind = layer[2].removeprefix(MLP).partition(".")
        return f"{self._moe(layer[1])}.{place}.{parts.get(part, part)}.{kind}"

    def _moe(self, layer: int) -> str:
        return f"{STACK}.{layer}.{self.architecture.moe}"

    def shares(self, name: str) -> bool:
        """All but the MLPs."""
        return self.own(name, 0) is None

    def gates(self) -> dict[str, Look]:
        """One a layer."""
        return {self._moe(layer): Look(layer, mlp=True) for layer in range(self.layers)}

    def gate(self, experts: int, hidden: int, dtype: str) -> dict[str, Tensor]:
        """A matrix without mean or bias, in the model's dtype; the shared expert's beside it."""
        shapes = {".gate.weight": (experts, hidden)}
        if self.spec.shared_experts:
            shapes[SHARED_GATE] = (1, hidden)
        return {part: Tensor(dtype, shape) for part, shape in shapes.items()}

    def zeros(self, hidden: int, dtype: str) -> dict[str, Tensor]:
        """The shared expert that a class insists on, where the mixture has none: it adds nothing."""
        if not self.architecture.shared or self.spec.shared_experts:
            return {}
        shapes = {
            "shared_expert.gate_proj.weight": (SHARED_WIDTH, hidden),
            "shared_expert.up_proj.weight": (SHARED_WIDTH, hidden),
            "shared_expert.down_proj.weight": (hidden, SHARED_WIDTH),
            SHARED_GATE.removeprefix("."): (1, hidden),
        }
        return {
            f"{self._moe(layer)}.{part}": Tensor(dtype, shape)
            for layer in range(self.layers)
            for part, shape in shapes.items()
        }

    def config(self, dense: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Every setting of the experts that the class knows, and the mixture's."""
        full, kind = _full(dense), self.architecture.model_type
        facts: dict[str, Any] = {"architectures": [CLASSES[kind]], "model_type": kind}
        facts |= {key: full[key] for key in KEPT if key in full}
        # For readers from before rope_parameters.
        scaling = dict(full["rope_parameters"])
        facts["rope_theta"] = scaling.pop("rope_theta")
        facts["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
        if kind == "mixtral":
            facts |= {"sliding_window": full.get("sliding_window"), "num_local_experts": len(names)}
        else:
            facts |= {key: full[key] for key in SLIDING if key in full}
            facts |= {"num_experts": len(names), "moe_intermediate_size": full["intermediate_size"]}
            facts |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
        if kind == "qwen2_moe":
            width = full["intermediate_size"] if self.spec.shared_experts else SHARED_WIDTH
            facts |= {"shared_expert_intermediate_size": width, "qkv_bias": full["model_type"] == "qwen2"}
        if kind == "qwen3_moe":
            facts["attention_bias"] = full["attention_bias"]
        facts |= {"num_experts_per_tok": self.spec.k, "output_router_logits": False}
        if said := dense.get("dtype", dense.get("torch_dtype")):
            facts["torch_dtype"] = said
        return facts


def layout_of(spec: Spec, config: Mapping[str, Any], tensors: Collection[str]) -> Layout:
    """The layout of a spec's mixture of models with this config and these tensors. Raises MixError for none."""
    kind, layers = str(config.get("model_type")), int(config.get("num_hidden_layers", 0))
    if kind not in ARCHITECTURES:
        raise MixError(f"{kind} models are not mixed here, only {', '.join(ARCHITECTURES)} ones: route between them")
    if spec.mixture != "F-L-T" or spec.hybrid_layers or spec.layout == "composed":
        if spec.shared_experts:
            raise MixError(f"shared_experts: {QWEN2.name} alone has one, an F-L-T mixture in the standard layout")
        return Composed(spec, layers)
    found = _chosen(spec, kind)
    outside = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    for name in tensors:
        layer = layer_of(name)
        if (layer[2] if layer else name) not in (found.takes[kind] if layer else outside):
            raise MixError(f"{found.name} has no place for {name}: {COMPOSE}")
    if spec.bias:
        raise MixError(f"bias: {found.name} has no bias in its gates: leave it out, or {COMPOSE}")
    return Standard(spec, layers, found)


def _chosen(spec: Spec, kind: str) -> Architecture:
    """The architecture that is asked for, or the first that holds such experts."""
    named = [each for each in STANDARD if each.name.lower().startswith(spec.architecture or "")]
    if not named:
        known = ", ".join(each.name for each in STANDARD)
        raise MixError(f"architecture {spec.architecture!r} is not written here; there are: {known}")
    fitting = [each for each in named if kind in each.takes and (each.shared or not spec.shared_experts)]
    if not fitting:
        beside = " with a shared expert" if spec.shared_experts else ""
        raise MixError(f"{named[0].name} does not hold {kind} experts{beside}: leave architecture out, or {COMPOSE}")
    return fitting[0]


def _full(dense: Mapping[str, Any]) -> dict[str, Any]:
    """A config with its class's defaults in place."""
    from transformers import AutoConfig

    said = {key: value for key, value in dense.items() if key not in ("model_type", "architectures")}
    full: dict[str, Any] = AutoConfig.for_model(dense["model_type"], **said).to_dict()
    return full
