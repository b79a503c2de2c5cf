"""The builder's failures, below routers.errors.ModelGlueError."""

from __future__ import annotations

from routers.errors import ModelGlueError


class ZooError(ModelGlueError):
    """A zoo file that cannot be followed: an unknown key, a missing model, a value out of range."""


class SourceError(ModelGlueError):
    """Models that are not here and cannot be had, or are not what they should be."""


class CheckpointError(ModelGlueError):
    """Weights that cannot be read: truncated, of an unknown type, not finite, not there."""


class MergeError(ModelGlueError):
    """Models that cannot be merged as asked."""


class MixError(ModelGlueError):
    """A mixture that cannot be made as asked: of its spec, its models, its gates or its layout."""


class BuildError(ModelGlueError):
    """A build that cannot go on or must not start."""


class SearchError(ModelGlueError):
    """A search that cannot go on: too many trials failed, or a model cannot be scored."""


class SandboxError(ModelGlueError):
    """Programs that cannot be run: no safe way to do it here, or their language is not installed."""
