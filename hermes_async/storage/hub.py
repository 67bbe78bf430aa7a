"""Downloads checkpoints from the Hugging Face hub, and explains its errors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from hermes_async.errors import CheckpointError, HermesError
from hermes_async.storage.headers import MAX_HEADER_BYTES
from hermes_async.storage.other_formats import check_repository

_FIRST_BYTES = 100_000  # of a shard on the hub; nearly all headers are shorter
_TIMEOUT_S = 30.0
_TOKEN = "a token (token=, or --token)"  # noqa: S105 - a word of messages

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_WANTED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("*.model", "preprocessor_config.json", "processor_config.json"),
    *("adapter_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"),
    *("modules.json", "*_Pooling/config.json", "*_Dense/config.json", "*_Normalize/config.json"),
    *("sentence_*_config.json", "config_sentence_transformers.json", "*_Transformer/*"),
)
# "tokenizer*" also matches code and pickles; "consolidated" is a second copy of the weights, with other names.
_UNWANTED = (
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.py", "*.h5", "*.msgpack", "*.gguf"),
    "consolidated*.safetensors",
)


def is_hub_id(source: str) -> bool:
    """Whether this could be a model on the hub: "name" or "organization/name"."""
    return _HUB_ID.fullmatch(source) is not None


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How a model on the hub is found.

    Attributes:
        revision: A branch, tag or commit; None is the main branch.
        token: A token instead of the one that is logged in; False sends none.
        cache_dir: The directory for downloads, instead of the hub's default cache.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None


def download(repo_id: str, hub: HubOptions, *, local_files_only: bool = False, weights: bool = True) -> Path:
    """Downloads a model's safetensors, configuration and tokenizer into the hub's cache; returns its snapshot.

    The weights are not downloaded if the file names show that the model cannot run.

    Args:
        local_files_only: Use the files in the cache, without asking the hub.
        weights: Download safetensors too.

    Raises:
        CheckpointError: The model does not exist or is not accessible, or the hub cannot be reached.
        UnsupportedModelError: The model is on the hub, but not in safetensors.
    """
    # Imported here: a checkpoint on disk needs no HTTP client.
    from huggingface_hub import snapshot_download

    def fetch(unwanted: tuple[str, ...]) -> Path:
        return Path(
            snapshot_download(
                repo_id,
                revision=hub.revision,
                token=hub.token,
                cache_dir=None if hub.cache_dir is None else Path(hub.cache_dir),
                local_files_only=local_files_only,
                allow_patterns=list(_WANTED),
                ignore_patterns=list(unwanted),
            )
        )

    with _hub_errors(repo_id, hub):
        if local_files_only:
            return fetch(_UNWANTED)
        snapshot = fetch((*_UNWANTED, "*.safetensors"))
        if not any(snapshot.rglob("*.safetensors")):  # weights in the cache were checked when they were downloaded
            check_repository(repo_id, _sizes(repo_id, snapshot.name, hub))
        return fetch(_UNWANTED) if weights else snapshot


def _sizes(repo_id: str, commit: str, hub: HubOptions) -> dict[str, int]:
    """The sizes of a repository's files, by their paths."""
    from huggingface_hub import HfApi, RepoFile

    tree = HfApi().list_repo_tree(repo_id, recursive=True, revision=commit, token=hub.token)
    return {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}


@contextmanager
def without_weights(source: str, hub: HubOptions) -> Iterator[str | Path]:
    """Yields a directory for planning: for a model on the hub, shards with headers and without weights.

    A local directory is yielded as it is. For a model on the hub, configuration and tokenizer come into the hub's
    cache, and the headers of its shards into a temporary directory. Each shard there is a sparse file as long as the
    hub's. The directory is deleted when the block is left.

    Raises:
        CheckpointError: As `download`.
        UnsupportedModelError: The model is on the hub, but not in safetensors.
    """
    if Path(source).exists() or not is_hub_id(source):
        yield source
        return
    snapshot = download(source, hub, weights=False)
    if _is_complete(snapshot):
        yield snapshot
        return
    with TemporaryDirectory(prefix="hermes-async-") as folder:
        directory = Path(folder, source.rpartition("/")[2])
        with _hub_errors(source, hub):
            _put_headers(source, snapshot, hub, directory)
        yield directory


def _put_headers(repo_id: str, snapshot: Path, hub: HubOptions, directory: Path) -> None:
    commit = snapshot.name  # one commit for all files
    sizes = _sizes(repo_id, commit, hub)
    for file in snapshot.rglob("*"):
        if file.is_file():
            link = directory / file.relative_to(snapshot)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    shards = [name for name in sizes if name.endswith(".safetensors") and not name.startswith("consolidated")]
    if "model.safetensors" in shards:
        shards = [name for name in shards if name == "model.safetensors" or "/" in name]
    for name in shards:
        shard = directory / name
        if not shard.exists():
            shard.parent.mkdir(parents=True, exist_ok=True)
            with shard.open("wb") as sparse:
                sparse.write(_header(repo_id, name, commit, hub)[: sizes[name]])
                sparse.truncate(sizes[name])


def _header(repo_id: str, name: str, commit: str, hub: HubOptions) -> bytes:
    """The first bytes of a shard on the hub: at least its header."""
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not in its __all__

    url = hf_hub_url(repo_id, name, revision=commit)
    headers = build_hf_headers(token=hub.token)

    def read(first: int, last: int) -> bytes:
        with_range = {**headers, "Range": f"bytes={first}-{last}"}
        with get_session().stream("GET", url, headers=with_range, timeout=_TIMEOUT_S) as response:
            if response.is_error:
                response.read()
                hf_raise_for_status(response)
            if response.status_code != 206:  # it would send all weights
                raise OSError(f"the hub does not send parts of {name}")
            return bytes(response.read())

    begin = read(0, _FIRST_BYTES - 1)
    end = 8 + int.from_bytes(begin[:8], "little")
    if end <= len(begin) or len(begin) < _FIRST_BYTES:
        return begin
    if end > MAX_HEADER_BYTES:
        raise OSError(f"{name} claims a header of {end - 8} bytes, more than the format allows")
    return begin + read(len(begin), end - 1)


def _is_complete(snapshot: Path) -> bool:
    """Whether the weights are in the cache already."""
    if (snapshot / "model.safetensors").is_file():
        return True
    try:
        index = json.loads((snapshot / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return all((snapshot / shard).is_file() for shard in set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # reading it reports the error


@contextmanager
def _hub_errors(repo_id: str, hub: HubOptions) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except HermesError:
        raise
    # All kinds, because the hub's client passes on errors of its HTTP library, which has changed before.
    except Exception as error:
        match error:
            case errors.GatedRepoError():
                reason = f"is gated: accept its terms on the hub, then log in (`hf auth login`) or pass {_TOKEN}"
            case errors.RepositoryNotFoundError():
                reason = f"is neither a directory here nor a model on the hub; if it is private, pass {_TOKEN}"
            case errors.RevisionNotFoundError():
                reason = "is not on the hub, though the model is"
            case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
                reason = (
                    "is no directory here and not complete in the hub's cache, and the hub is out of reach; "
                    "go online (with HF_HUB_OFFLINE unset) or give a directory"
                )
            case errors.HFValidationError():
                reason = "is neither a directory here nor a hub id"
            case _:
                reason = f"could not be downloaded from the hub ({type(error).__name__}: {error})"
        source = f"{repo_id!r}" + (f" at revision {hub.revision!r}" if hub.revision else "")
        raise CheckpointError(f"{source} {reason}") from error
