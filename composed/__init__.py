"""Composed checkpoints: several experts and their gates as one model that transformers loads.

Importing it makes AutoConfig and AutoModelForCausalLM know them; elsewhere a checkpoint brings its own code, FILES.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from composed.configuration_composed import ComposedConfig
from composed.modeling_composed import ComposedCache, ComposedForCausalLM, Route

__all__ = ["FILES", "ComposedCache", "ComposedConfig", "ComposedForCausalLM", "Route"]

FILES = tuple(Path(__file__).with_name(f"{name}_composed.py") for name in ("configuration", "modeling"))
"""The code that every composed checkpoint ships."""

AutoConfig.register(ComposedConfig.model_type, ComposedConfig)
AutoModelForCausalLM.register(ComposedConfig, ComposedForCausalLM)
# So that save_pretrained copies FILES.
ComposedConfig.register_for_auto_class()
ComposedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
