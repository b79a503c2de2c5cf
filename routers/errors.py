"""The failures that a user can mend; every one names the thing and says what to do next.

ModelGlueError
 +- BundleError      a bundle that is missing, damaged or of another format
 +- RoutingError     a request that no expert can be chosen for

`builder` and `service` add their own below the same root; their command lines print the sentence and exit with 1.
"""

from __future__ import annotations


class ModelGlueError(Exception):
    """Any failure of ours that is the input's or the machine's doing, not a bug."""


class BundleError(ModelGlueError):
    """A bundle cannot be read as it is."""


class RoutingError(ModelGlueError):
    """A route was asked for that does not exist."""
