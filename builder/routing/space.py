"""From a model on disk to the features of a router."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from builder import files
from builder.checkpoints import Checkpoint
from builder.errors import BuildError
from routers import bundle
from routers.bundle import Bundle
from routers.features import Features, TokenEmbeddings, spread

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embeddings.weight")


def prepare(out: Path, model: Path, texts: Sequence[str], *, trunk: int = 0, encoder: Path | None = None) -> Features:
    """The features, centred on `texts`, with their files in the folder `out`.

    model's token embeddings; with `trunk` its states after so many layers; with `encoder` a folder in
    sentence-transformers' layout instead of the model. Raises ModelGlueError.
    """
    if trunk or encoder:
        from builder.routing import trunk as trunks
        from routers.encoder import Encoder

        target = out / bundle.ENCODER
        files.remove(target)
        if encoder:
            _copy(encoder, target)
        else:
            trunks.export(model, trunk, target)
        return Encoder.centred_on(target, texts)
    _write_tokenizer(model, out / bundle.TOKENIZER)
    return embeddings(model, Tokenizer.from_file(str(out / bundle.TOKENIZER)), texts)


def embeddings(model: Path, tokenizer: Tokenizer, texts: Sequence[str]) -> TokenEmbeddings:
    """A model's token embeddings, spread and centred on `texts`. Raises BuildError when it has none by a known name."""
    checkpoint = Checkpoint(model)
    names = [name for name in checkpoint.tensors if name.endswith(_EMBEDDINGS)]
    if not names:
        raise BuildError(f"{model} has no token embeddings by a known name: set router.features to another model")
    return TokenEmbeddings.centred_on(tokenizer, spread(checkpoint.read(names[0]).astype(np.float32)), texts)


def carry(read: Bundle, out: Path) -> Features:
    """A bundle's features, with their files in the folder `out` too."""
    for name in bundle.feature_files(read.path, read.router.features.kind):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        files.copy(read.path / name, out / name)
    return read.router.features


def _copy(source: Path, target: Path) -> None:
    if not (source / "modules.json").is_file():
        raise BuildError(f"no modules.json in {source}: an encoder is a folder in sentence-transformers' layout")
    with files.whole(target) as partial:
        for path in sorted(source.rglob("*")):
            if path.is_file() and path.suffix in (".json", ".txt", ".model", ".safetensors"):
                (partial / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
                files.copy(path, partial / path.relative_to(source))


def _write_tokenizer(model: Path, out: Path) -> None:
    """The features' tokenizer as one file; converted where the model has only an older format."""
    if (model / "tokenizer.json").exists():
        files.copy(model / "tokenizer.json", out)
        return
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(model, local_files_only=True).backend_tokenizer.save(str(out))
