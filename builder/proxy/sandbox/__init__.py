"""Runs programs that a model wrote, where they can do no harm; all three mechanisms end in inside.py."""

from __future__ import annotations

from builder.proxy.sandbox.box import Language, Limits, Outcome, Sandbox
from builder.proxy.sandbox.mechanisms import Mechanism

__all__ = ["Language", "Limits", "Mechanism", "Outcome", "Sandbox"]
