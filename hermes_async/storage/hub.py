"""Checkpoints on the Hugging Face hub: which files are wanted, and what can go wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hermes_async.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_WANTED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("*.model", "preprocessor_config.json", "processor_config.json"),
    *("modules.json", "*_Pooling/config.json", "*_Dense/config.json", "*_Normalize/config.json"),
    *("sentence_*_config.json", "config_sentence_transformers.json", "*_Transformer/*"),
)
# "tokenizer*" also fits code and pickles; "consolidated" is a second copy of the weights, by other names.
_UNWANTED = (
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.py", "*.h5", "*.msgpack", "*.gguf"),
    "consolidated*.safetensors",
)


def is_hub_id(source: str) -> bool:
    """Whether this could be a model on the hub: "name" or "organization/name"."""
    return _HUB_ID.fullmatch(source) is not None


def download(repo_id: str, revision: str | None, **options: Any) -> Path:
    """Bring a model's safetensors, config and tokenizer files into the hub's cache; return its snapshot.

    Raises:
        CheckpointError: It is not there, not to be had, or the hub is out of reach.
    """
    # Imported here: a checkpoint on disk needs no HTTP client.
    from huggingface_hub import errors, snapshot_download

    wanted, unwanted = list(_WANTED), list(_UNWANTED)
    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted, **options)
        )
    # Every kind, since the hub's client lets the errors of its HTTP library through, and that has changed.
    except Exception as error:
        match error:
            case errors.GatedRepoError():
                reason = "is gated: accept its terms on the hub, then log in (`hf auth login`) or pass token="
            case errors.RepositoryNotFoundError():
                reason = "is neither a directory here nor a model on the hub; if it is private, pass token="
            case errors.RevisionNotFoundError():
                reason = "is not on the hub, though the model is"
            case errors.LocalEntryNotFoundError():
                reason = (
                    "is no directory here and not complete in the hub's cache, and the hub is out of reach; "
                    "go online (local_files_only=False, HF_HUB_OFFLINE unset) or give a directory"
                )
            case errors.HFValidationError():
                reason = "is neither a directory here nor a hub id"
            case _:
                reason = f"could not be downloaded from the hub ({type(error).__name__}: {error})"
        asked = f"{repo_id!r}" + (f" at revision {revision!r}" if revision else "")
        raise CheckpointError(f"{asked} {reason}") from error
