"""Mixtures of experts in one checkpoint: spec -> plan -> gates -> files."""
