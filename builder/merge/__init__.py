"""Merge methods, one pure function a file: tensors of the members and their weights in, one tensor out."""

from __future__ import annotations

from builder.merge.linear import linear
from builder.merge.method import Method

METHODS: dict[str, Method] = {"linear": linear}
