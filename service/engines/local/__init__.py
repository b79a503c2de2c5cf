"""Experts on this machine: torch and transformers, all requests of an expert decoded together."""

from service.engines.local.engine import LocalEngine, Options

__all__ = ["LocalEngine", "Options"]
