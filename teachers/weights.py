"""Checkpoint files by path or URL: downloaded and converted once per node, and identified by their content.

Files are cached in the folder ``REINFORCE_CACHE`` (default ``~/.cache/reinforce``). A lock per file makes the other
processes of a node wait for the one that writes it. Nodes may share the folder, since files appear by atomic rename.
"""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Host of hub models.
HUB = "huggingface.co"
#: Suffixes of checkpoints that can be read.
CHECKPOINTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

# Keys of fsspec's ``info``: content hashes of object stores, then times that change when a file is replaced.
_TAGS = ("ETag", "etag", "Content-MD5", "md5Hash", "md5", "checksum", "crc32c")
_TIMES = ("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created")


def is_url(location: str | Path) -> bool:
    """Whether a location is an fsspec URI rather than a local path."""
    return "://" in str(location) and not str(location).startswith("file://")


def cache_folder() -> Path:
    return Path(os.environ.get("REINFORCE_CACHE", "~/.cache/reinforce")).expanduser()


def identity(location: str | Path) -> str:
    """Identity of a file's content: sha256 of a local file, size and ETag (or time) of a remote one.

    Raises FileNotFoundError, or ValueError for an unknown protocol.
    """
    if not is_url(location):
        digest = hashlib.sha256()
        with _local(location).open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return f"sha256:{digest.hexdigest()}"
    return _remote_identity(_info(str(location))[2])


def fetch(location: str | Path) -> Path:
    """Return a local path of the file: its own if it is local, else of its copy in the cache, downloaded if missing.

    The cache key includes the identity of the remote content, so an object that was replaced is downloaded again.
    Raises FileNotFoundError, or ValueError for an unknown protocol.
    """
    if not is_url(location):
        return _local(location)
    url = str(location)
    fs, path, info = _info(url)
    name = path.partition("?")[0].rsplit("/", 1)[-1]
    target = cache_folder() / "weights" / _digest(url, _remote_identity(info)) / name
    with _lock_if_missing(target) as missing:
        if missing:
            with replacing(target) as temporary:
                fs.get_file(path, str(temporary))
                if info.get("size") not in (None, found := temporary.stat().st_size):
                    raise OSError(f"{url}: received {found} of {info['size']} bytes")
    return target


def as_safetensors(path: Path) -> Path:
    """Return the weights as a safetensors file, which the processes of a node map into memory and share.

    A torch checkpoint (.bin, .pt, .pth, .ckpt) is converted in the cache: the dict itself or its ``state_dict``,
    without DistributedDataParallel's ``module.`` prefix. Pickled code is never run. Raises ValueError for other files.
    """
    if path.suffix == ".safetensors":
        return path
    if path.suffix not in CHECKPOINTS:
        raise ValueError(f"{path} is not a checkpoint that can be read: use one of {', '.join(CHECKPOINTS)}")
    stat = path.stat()
    key = _digest(str(path.resolve()), f"{stat.st_size}-{stat.st_mtime_ns}")
    target = cache_folder() / "safetensors" / key / f"{path.stem}.safetensors"
    with _lock_if_missing(target) as missing:
        if missing:
            from safetensors.torch import save_file

            state = _state_dict(path)
            with replacing(target) as temporary:
                save_file(state, str(temporary))
    return target


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of this name, shared by the processes of this node."""
    from filelock import FileLock

    folder = cache_folder() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{_digest(name)}.lock"):
        yield


@contextmanager
def _lock_if_missing(target: Path) -> Iterator[bool]:
    """Yield whether the file is missing; if so, under its lock, so that one process makes it.

    What a process that was killed has left of the file is deleted first.
    """
    if target.exists():
        yield False
        return
    with locked(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f".{glob.escape(target.name)}.*"):
            stale.unlink()
        yield not target.exists()


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary file in the target's folder, which is renamed to the target if the block succeeds."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _state_dict(path: Path) -> dict[str, torch.Tensor]:
    import pickle

    import torch

    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            loaded = torch.load(
                path, map_location="cpu", weights_only=True
            )  # the format of torch before 1.6 is no zip file
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path} cannot be read as plain tensors, and code in checkpoints is not run: {reason[0]} "
            "Save the state_dict with safetensors.torch.save_file."
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a state_dict")
    others = [str(key) for key, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"{path} is not a state_dict: {', '.join(others[:5])} are not tensors. Save only the state_dict."
        )
    if all(key.startswith("module.") for key in loaded):
        loaded = {key.removeprefix("module."): value for key, value in loaded.items()}
    # Contiguous and independent tensors, as safetensors requires. Tied weights are written twice.
    seen: set[int] = set()
    state = {}
    for key, value in loaded.items():
        pointer = value.untyped_storage().data_ptr()
        state[key] = value.clone(memory_format=torch.contiguous_format) if pointer in seen else value.contiguous()
        seen.add(pointer)
    return state


def _local(location: str | Path) -> Path:
    path = Path(str(location).removeprefix("file://")).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}")
    return path


def _info(url: str) -> tuple[Any, str, dict[str, Any]]:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{url} cannot be read: {error}") from error
    try:
        info = fs.info(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url} does not exist") from error
    except Exception as error:  # each storage driver has its own errors for credentials and connections
        raise OSError(f"{url} cannot be read: {type(error).__name__}: {error}") from error
    if info.get("type") == "directory":
        raise FileNotFoundError(f"{url} is a folder, not a file")
    return fs, path, info


def _remote_identity(info: dict[str, Any]) -> str:
    for key in (*_TAGS, *_TIMES):
        if info.get(key):
            return f"size:{info.get('size')} {key.lower()}:{str(info[key]).strip(chr(34))}"
    return f"size:{info.get('size')}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
