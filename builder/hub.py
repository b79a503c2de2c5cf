"""Downloads from the Hugging Face hub: what is there is looked up for every model before the first byte is fetched."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from builder.config import Base
from builder.errors import SourceError
from builder.progress import Progress

COMPANIONS = ("*.json", "tokenizer.model", "*.txt", "*.jinja")
CODE = ("*.py",)


@dataclass(frozen=True, slots=True)
class Download:
    """What a model's download will be: the commit that its revision names, the files needed, their bytes."""

    id: str
    repo: str
    commit: str
    files: tuple[str, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Downloaded:
    """A finished download."""

    folder: Path
    revision: str


def look_up(entries: Sequence[Base]) -> tuple[list[Download], list[str]]:
    """The downloads of hub models, and a line for every model that cannot be had, saying why."""
    if not entries:
        return [], []
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi()
    plans: list[Download] = []
    refused: list[str] = []
    for entry in entries:
        try:
            info = api.model_info(entry.source, revision=entry.revision, files_metadata=True)
        except GatedRepoError:
            refused.append(f"  {entry.source}: gated; accept its terms on the hub and set HF_TOKEN")
        except RevisionNotFoundError:
            refused.append(f"  {entry.source}: has no revision {entry.revision!r}")
        except RepositoryNotFoundError:
            refused.append(f"  {entry.source}: not on the hub, or private; check the id, or set HF_TOKEN")
        except (OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError, OSError) as exc:
            refused.append(f"  {entry.source}: the hub cannot be reached ({type(exc).__name__}){_note(entry)}")
        else:
            sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
            wanted = needed_files(list(sizes), code=entry.trust_remote_code)
            total = sum(sizes[name] for name in wanted)
            plans.append(Download(entry.id, entry.source, str(info.sha), tuple(wanted), total))
    return plans, refused


def needed_files(names: Sequence[str], *, code: bool) -> list[str]:
    """The files of a repository that a build reads: safetensors, or .bin where there are none, config and tokenizer.

    Folders (original/, onnx/), other formats and second copies (consolidated.safetensors, .gguf) are left out.
    """
    top = [name for name in sorted(names) if "/" not in name]
    weights = [name for name in top if fnmatch(name, "model*.safetensors")]
    weights = weights or [name for name in top if fnmatch(name, "pytorch_model*.bin")]
    patterns = COMPANIONS + (CODE if code else ())
    foreign = "*.bin.index.json" if any(name.endswith(".safetensors") for name in weights) else ""
    rest = [name for name in top if any(fnmatch(name, pattern) for pattern in patterns) and not fnmatch(name, foreign)]
    return sorted({*weights, *rest})


def check_space(cache: Path, plans: Sequence[Download]) -> None:
    """Raises SourceError when the downloads would not fit on the disk."""
    need = sum(plan.bytes for plan in plans)
    place = cache
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if need > free:
        raise SourceError(
            f"the models need {need / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB free: "
            "set MODELGLUE_CACHE to a larger disk"
        )


def download(plan: Download, cache: Path, progress: Progress) -> Downloaded:
    """Fetch the planned files of the planned commit; what an interrupted download left is not fetched again."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    with progress.step(f"fetch {plan.repo} ({plan.bytes / 1e9:.1f} GB)", len(plan.files)) as advance:
        for name in plan.files:
            try:
                path = Path(hf_hub_download(plan.repo, name, revision=plan.commit, cache_dir=cache))
            except (HfHubHTTPError, OSError) as exc:
                raise SourceError(
                    f"{plan.repo}: {name} could not be downloaded ({exc}): run it again to go on"
                ) from exc
            advance(1)
    return Downloaded(path.parent, plan.commit)


def _note(entry: Base) -> str:
    return f"; {entry.note}" if entry.note else ""
