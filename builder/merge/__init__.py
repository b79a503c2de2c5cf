"""Merges models: recipe -> plan -> stream, tensor by tensor; one pure function a method, all in METHODS."""

from __future__ import annotations

from builder.merge.methods import METHODS

__all__ = ["METHODS"]
