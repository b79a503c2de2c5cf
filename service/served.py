"""The bundle that is being served: its routing can be read anew while requests run, which keep their own."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

import numpy as np

from routers import bundle as bundles
from routers.bundle import Bundle
from routers.errors import ModelGlueError
from routers.prompt import PromptRouter
from service.errors import ReloadError

TEST: Final = "Write a Python function that returns the largest even number in a list."
"""What a new router has to route before it is asked by anybody."""

logger = logging.getLogger(__name__)


class Served:
    """Holds the bundle. Whoever needs it twice for one request takes it once."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._one_at_a_time = asyncio.Lock()

    @property
    def bundle(self) -> Bundle:
        """The one that serves now."""
        return self._bundle

    @property
    def router(self) -> PromptRouter:
        """Its routing."""
        return self._bundle.router

    async def reload(self) -> str:
        """Read the bundle's folder again and take its routing; what was and is, in a sentence.

        Raises ReloadError, with the old one still serving, where it cannot be read, is for other experts, or cannot
        route.
        """
        async with self._one_at_a_time:
            old = self._bundle
            try:
                # Off the event loop: a router is megabytes to hash.
                new = await asyncio.to_thread(_successor, old)
            except ModelGlueError as exc:
                raise ReloadError(f"{exc}; the old router goes on") from exc
            self._bundle = new
        kind = new.manifest.router.kind
        told = f"the {kind} router {new.router_sha256[:12]} takes the place of {old.router_sha256[:12]}"
        logger.info(told)
        return told


def _successor(old: Bundle) -> Bundle:
    """The bundle that is in the old one's folder now, found good. Raises ModelGlueError."""
    new = bundles.read(old.path)
    _check_experts(old, new, old.path)
    route = new.router.route(TEST)
    if not np.isfinite([[each.score, each.quality, each.std] for each in route.ranking]).all():
        raise ReloadError(f"the router in {old.path} gives scores that are no numbers: build it again")
    return new


def _check_experts(old: Bundle, new: Bundle, path: Path) -> None:
    was, is_ = ({expert.name: expert.files for expert in each.manifest.experts} for each in (old, new))
    if list(was) != list(is_):
        raise ReloadError(
            f"{path} has the experts {', '.join(is_)} now, and {', '.join(was)} are served: start the service anew"
        )
    changed = [name for name in was if was[name] != is_[name]]
    if changed:
        raise ReloadError(f"{path} has other weights of {', '.join(changed)} than are served: start the service anew")
