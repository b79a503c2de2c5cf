"""Downloads from the Hugging Face hub: what is there is looked up for every model before the first byte is fetched."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from builder import files
from builder.config import Base
from builder.errors import SourceError
from builder.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMPANIONS = ("*.json", "tokenizer.model", "*.txt", "*.jinja")
CODE = ("*.py",)


@dataclass(frozen=True, slots=True)
class Download:
    """What a model's download will be: the commit that its revision names, the files needed and their sizes."""

    id: str
    repo: str
    commit: str
    files: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())


@dataclass(frozen=True, slots=True)
class Downloaded:
    """A finished download."""

    folder: Path
    revision: str


def look_up(entries: Sequence[Base]) -> tuple[list[Download], list[str]]:
    """The downloads of hub models, and a line for every model that cannot be had, saying why."""
    if not entries:
        return [], []
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api, connection_errors = _api(), _connection_errors()
    plans: list[Download] = []
    refused: list[str] = []
    for entry in entries:
        try:
            info = api.model_info(entry.source, revision=entry.revision, files_metadata=True)
        except GatedRepoError:
            refused.append(f"  {entry.source}: gated; accept its terms on the hub and set HF_TOKEN")
        except RevisionNotFoundError:
            refused.append(f"  {entry.source}: has no revision {entry.revision or 'main'}")
        except RepositoryNotFoundError:
            refused.append(f"  {entry.source}: not on the hub, or private; check the id, or set HF_TOKEN")
        except HFValidationError:
            refused.append(f"  {entry.source}: is no hub id; give ORG/NAME, or a folder as ./NAME")
        except HfHubHTTPError as exc:
            refused.append(f"  {entry.source}: the hub answered {exc.response.status_code}; try later, check HF_TOKEN")
        except connection_errors as exc:
            refused.append(f"  {entry.source}: the hub cannot be reached ({type(exc).__name__}){_note(entry)}")
        else:
            sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
            wanted = needed_files(list(sizes), code=entry.trust_remote_code)
            if wanted:
                plans.append(Download(entry.id, entry.source, str(info.sha), {name: sizes[name] for name in wanted}))
            else:
                refused.append(f"  {entry.source}: holds no model*.safetensors and no pytorch_model*.bin")
    return plans, refused


def needed_files(names: Sequence[str], *, code: bool) -> list[str]:
    """The files of a repository that a build reads: safetensors, or .bin where there are none, config and tokenizer.

    Folders (original/, onnx/), other formats and second copies (consolidated.safetensors, .gguf) are left out. Without
    weights there is nothing to read.
    """
    top = [name for name in sorted(names) if "/" not in name]
    weights = [name for name in top if fnmatch(name, "model*.safetensors")]
    weights = weights or [name for name in top if fnmatch(name, "pytorch_model*.bin")]
    if not weights:
        return []
    patterns = COMPANIONS + (CODE if code else ())
    # An index of weights that are left out would send the reader to them.
    foreign = "*.bin.index.json" if weights[0].endswith(".safetensors") else "*.safetensors.index.json"
    rest = [name for name in top if any(fnmatch(name, pattern) for pattern in patterns) and not fnmatch(name, foreign)]
    return sorted({*weights, *rest})


def check_space(cache: Path, plans: Sequence[Download]) -> None:
    """Raises SourceError when the downloads, less what is here already, would not fit on the disk."""
    need = sum(size for plan in plans for name, size in plan.files.items() if not _is_here(plan, name, cache))
    free = files.free(cache)
    if need > free:
        raise SourceError(
            f"the models need {need / 1e9:.1f} GB and {cache} has {free / 1e9:.1f} GB free: "
            "set MODELGLUE_CACHE to a larger disk"
        )


def download(plan: Download, cache: Path, progress: Progress) -> Downloaded:
    """Fetch the planned files of the planned commit; those that an interrupted download finished are kept."""
    api, connection_errors = _api(), _connection_errors()
    with progress.step(f"fetch {plan.repo} ({plan.bytes / 1e9:.1f} GB)", len(plan.files)) as advance:
        for name in plan.files:
            try:
                path = Path(api.hf_hub_download(plan.repo, name, revision=plan.commit, cache_dir=cache))
            except connection_errors as exc:
                raise SourceError(
                    f"{plan.repo}: {name} could not be downloaded ({exc}): run it again to go on"
                ) from exc
            advance(1)
    return Downloaded(path.parent, plan.commit)


def _api() -> HfApi:
    from huggingface_hub import HfApi

    # Read now: huggingface_hub reads HF_ENDPOINT once, when it is imported.
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None)


def _connection_errors() -> tuple[type[Exception], ...]:
    """What a hub that does not answer, or answers with something else, raises."""
    # HTTPError is httpx's or httpx2's, by the version of huggingface_hub; RuntimeError is hf_xet's; ValueError is an
    # answer that is not JSON.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return (HTTPError, OSError, RuntimeError, ValueError)


def _is_here(plan: Download, name: str, cache: Path) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(plan.repo, name, cache, plan.commit), str)


def _note(entry: Base) -> str:
    return f"; {entry.note}" if entry.note else ""
