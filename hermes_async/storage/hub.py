"""Downloads checkpoints from the Hugging Face hub, and explains its errors."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hermes_async.errors import CheckpointError, HermesError, UnsupportedModelError
from hermes_async.storage.file_kinds import exists, is_file
from hermes_async.storage.gguf_models import chosen_model, gguf_models, listed
from hermes_async.storage.headers import MAX_HEADER_BYTES
from hermes_async.storage.opening_watch import waits_for_others
from hermes_async.storage.other_formats import check_repository
from hermes_async.storage.own_file import scratch_folder

_FIRST_BYTES = 100_000  # of a shard on the hub; nearly all headers are shorter
_TIMEOUT_S = 30.0
_TOKEN = "a token (token=, or --token)"  # noqa: S105 - a word of messages

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_HUB_ID = re.compile(rf"{_NAME}(/{_NAME}(:{_NAME}(/{_NAME})*)?)?")
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
    """Whether this could be a model on the hub: "name" "organization/name", "organization/name:Q4_K_M"."""
    return _HUB_ID.fullmatch(source) is not None


def names_gguf(source: str) -> bool:
    """Whether a hub id names a model in GGUF: "organization/name:Q4_K_M"."""
    return is_hub_id(source) and ":" in source


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


def download(source: str, hub: HubOptions, *, local_files_only: bool = False, weights: bool = True) -> Path:
    """Downloads a model into the hub's cache.

    The weights are not downloaded if the file names show that the model cannot run.

    Args:
        source: A hub id. With ":Q4_K_M" at its end, the GGUF file whose name ends so.
        local_files_only: Use the files in the cache, without asking the hub.
        weights: Download safetensors too.

    Returns:
        The snapshot with the model's safetensors, configuration and tokenizer. Or a GGUF file in it; of several parts,
        the first.

    Raises:
        CheckpointError: The model does not exist or is not accessible, or the hub cannot be reached.
        UnsupportedModelError: The model is on the hub, but not in safetensors.
    """
    repo_id, _, wanted = source.partition(":")
    with _hub_errors(repo_id, hub), waits_for_others():
        if wanted:
            return _download_gguf(repo_id, wanted, hub, local_files_only=local_files_only)
        if local_files_only:
            return _fetch(repo_id, hub, _WANTED, _UNWANTED, local_files_only=True)
        snapshot = _fetch(repo_id, hub, _WANTED, (*_UNWANTED, "*.safetensors"))
        if not any(snapshot.rglob("*.safetensors")):  # weights in the cache were checked when they were downloaded
            names = _sizes(repo_id, snapshot.name, hub)
            models = [] if any(name.endswith(".safetensors") for name in names) else gguf_models(names)
            if models:
                raise UnsupportedModelError(
                    f"{repo_id} has its weights in GGUF; choose one of its models by its name, or by the end of it: "
                    f"{repo_id}:{models[0].name}. It has {listed(models)}",
                    path=Path(repo_id),
                )
            check_repository(repo_id, names)
        return _fetch(repo_id, hub, _WANTED, _UNWANTED) if weights else snapshot


def _download_gguf(repo_id: str, wanted: str, hub: HubOptions, *, local_files_only: bool) -> Path:
    """Downloads all parts of one model in GGUF; returns the first."""
    snapshot = _fetch(repo_id, hub, (), (), local_files_only=local_files_only)
    files = _gguf_sizes(repo_id, wanted, snapshot, hub, local_files_only=local_files_only)
    patterns = tuple(map(glob.escape, files))
    return _fetch(repo_id, hub, patterns, (), local_files_only=local_files_only) / next(iter(files))


def _gguf_sizes(
    repo_id: str, wanted: str, snapshot: Path, hub: HubOptions, *, local_files_only: bool = False
) -> dict[str, int]:
    """The files of the one model whose name ends with `wanted`, in order, and their sizes.

    If the hub cannot be asked, a model in the cache is taken, as `snapshot_download` does with safetensors.
    """
    from huggingface_hub import constants

    here = snapshot.rglob("*.gguf")
    sizes = {file.relative_to(snapshot).as_posix(): file.stat().st_size for file in here}
    if not (local_files_only or constants.HF_HUB_OFFLINE):
        try:
            sizes = _sizes(repo_id, snapshot.name, hub)
        except Exception:  # all kinds, as in `_hub_errors`
            if not any(model.is_called(wanted) for model in gguf_models(sizes)):
                raise
    return {name: sizes[name] for name in chosen_model(repo_id, gguf_models(sizes), wanted).files}


def _fetch(
    repo_id: str, hub: HubOptions, wanted: tuple[str, ...], unwanted: tuple[str, ...], *, local_files_only: bool = False
) -> Path:
    """The snapshot of a repository, with the files that match these patterns."""
    # Imported here: a checkpoint on disk needs no HTTP client.
    from huggingface_hub import snapshot_download

    snapshot = Path(
        snapshot_download(
            repo_id,
            revision=hub.revision,
            token=hub.token,
            cache_dir=None if hub.cache_dir is None else Path(hub.cache_dir),
            local_files_only=local_files_only,
            allow_patterns=list(wanted),
            ignore_patterns=list(unwanted),
        )
    )
    if ".." in snapshot.parts or snapshot.parent.name != "snapshots":  # a damaged file of the cache names the commit
        raise CheckpointError(
            f"the hub's cache has {str(snapshot)!r} as the snapshot of {repo_id}, which is not in the model's folder; "
            "remove that model from the cache",
            path=snapshot,
        )
    return snapshot


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
    hub's. The directory is deleted when the block is left. For a model in GGUF, the file in it is yielded.

    Raises:
        CheckpointError: As `download`.
        UnsupportedModelError: The model is on the hub, but not in safetensors.
    """
    if exists(Path(source)) or not is_hub_id(source):
        yield source
        return
    repo_id, _, wanted = source.partition(":")
    if wanted:
        with scratch_folder() as folder:
            with _hub_errors(repo_id, hub):
                file = _gguf_headers(repo_id, wanted, hub, Path(folder))
            yield file
        return
    snapshot = download(source, hub, weights=False)
    if _is_complete(snapshot):
        yield snapshot
        return
    with scratch_folder() as folder:
        directory = Path(folder, source.rpartition("/")[2])
        with _hub_errors(source, hub):
            _put_headers(source, snapshot, hub, directory)
        yield directory


def _gguf_headers(repo_id: str, wanted: str, hub: HubOptions, directory: Path) -> Path:
    """Writes sparse files with the headers of a model in GGUF; returns the first. A model in the cache stays there."""
    from hermes_async.storage.gguf import read_header  # imported here: it needs torch, and `--help` does not

    snapshot = _fetch(repo_id, hub, (), ())
    sizes = _gguf_sizes(repo_id, wanted, snapshot, hub)
    files = [snapshot / name for name in sizes]
    if all(is_file(file) for file in files):
        return files[0]
    for name, nbytes in sizes.items():
        begin = _RemoteFile(repo_id, name, snapshot.name, hub)
        read_header(Path(repo_id, name), begin, nbytes)
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as sparse:
            sparse.write(begin.data)
            sparse.truncate(nbytes)
    return directory / next(iter(sizes))


def _put_headers(repo_id: str, snapshot: Path, hub: HubOptions, directory: Path) -> None:
    commit = snapshot.name  # one commit for all files
    sizes = _sizes(repo_id, commit, hub)
    for file in snapshot.rglob("*"):
        if is_file(file):
            link = directory / file.relative_to(snapshot)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    shards = [name for name in sizes if name.endswith(".safetensors") and not name.startswith("consolidated")]
    if "model.safetensors" in shards:
        shards = [name for name in shards if name == "model.safetensors" or "/" in name]
    for name in shards:
        shard = directory / name
        if not exists(shard):
            shard.parent.mkdir(parents=True, exist_ok=True)
            with shard.open("wb") as sparse:
                sparse.write(_header(repo_id, name, commit, hub)[: sizes[name]])
                sparse.truncate(sizes[name])


def _header(repo_id: str, name: str, commit: str, hub: HubOptions) -> bytes:
    """The first bytes of a shard on the hub: at least its header."""
    read = _RemoteFile(repo_id, name, commit, hub).read_range
    begin = read(0, _FIRST_BYTES - 1)
    end = 8 + int.from_bytes(begin[:8], "little")
    if end <= len(begin) or len(begin) < _FIRST_BYTES:
        return begin
    if end > MAX_HEADER_BYTES:
        raise OSError(f"{name} claims a header of {end - 8} bytes, more than the format allows")
    return begin + read(len(begin), end - 1)


def _is_complete(snapshot: Path) -> bool:
    """Whether the weights are in the cache already."""
    if is_file(snapshot / "model.safetensors"):
        return True
    try:
        index = json.loads((snapshot / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return all(is_file(snapshot / shard) for shard in set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # reading it reports the error


class _RemoteFile:
    """A file on the hub, of which the first bytes are read, and some more. All mutable state: `data`, `_position`."""

    def __init__(self, repo_id: str, name: str, commit: str, hub: HubOptions) -> None:
        self.data = bytearray()
        self._position = 0
        self._repo_id, self._name, self._commit, self._hub = repo_id, name, commit, hub

    def read(self, nbytes: int) -> bytes:
        """The next `nbytes` bytes."""
        start, end = self._position, self._position + nbytes
        while len(self.data) < end:
            first = len(self.data)
            more = self.read_range(first, max(end, 2 * first, _FIRST_BYTES) - 1)
            if not more:
                raise OSError(f"the hub sends less of {self._name} than its size")
            self.data += more
        self._position = end
        return bytes(self.data[start:end])

    def read_range(self, first: int, last: int) -> bytes:
        """The bytes `first` to `last` (inclusive), or those of them that there are."""
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not in __all__

        url = hf_hub_url(self._repo_id, self._name, revision=self._commit)
        headers = {**build_hf_headers(token=self._hub.token), "Range": f"bytes={first}-{last}"}
        with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
            if response.is_error:
                response.read()
                hf_raise_for_status(response)
            if response.status_code != 206:  # it would send all weights
                raise OSError(f"the hub does not send parts of {self._name}")
            return bytes(response.read())


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
