"""Classification of the exceptions of fsspec drivers. Each driver has its own."""

from __future__ import annotations

import errno
import re

from reinforce.errors import StorageError

#: Packages whose exceptions are errors of a storage, beside OSError.
_DRIVERS = frozenset({"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "adlfs", "requests", "urllib3"})
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota reached, file too large
_CONFLICTS = (409, 412)  # HTTP status of a conditional put that met another one, or a file
_NO_RANGE = (errno.EINVAL, 416)  # of a read from a range that a file does not have


def is_storage_error(error: Exception) -> bool:
    """Whether an error comes from a storage or from the network to it."""
    if isinstance(error, (OSError, StorageError)):
        return True
    return type(error).__module__.partition(".")[0] in _DRIVERS


def is_full(error: Exception) -> bool:
    """Whether a disk is full, by Python or by a library in Rust, such as safetensors, which has it in its message."""
    in_rust = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(in_rust[1]) if in_rust else None
    return number in _NO_SPACE


def is_unsupported(error: Exception) -> bool:
    """Whether a storage or its driver has no conditional puts."""
    if isinstance(error, (NotImplementedError, TypeError)) or "NotImplemented" in str(error):
        return True
    return getattr(error, "errno", None) == errno.ENOSYS  # s3fs raises it for status 501


def is_conflict(error: Exception) -> bool:
    """Whether a storage reports that a conditional put met another one, or a file."""
    response = getattr(error.__cause__, "response", None)  # of botocore
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    return isinstance(error, FileExistsError) or not {status, *_codes(error)}.isdisjoint(_CONFLICTS)


def lacks_range(error: Exception) -> bool:
    """Whether a storage reports that a file does not have the bytes that were asked for."""
    return not _codes(error).isdisjoint(_NO_RANGE)


def _codes(error: Exception) -> set[object]:
    return {getattr(error, name, None) for name in ("errno", "code", "status", "status_code")}
