"""URLs of sources: the shards that they name, and how their bytes are read.

An object store may answer with fewer bytes than were asked for and a Content-Length that fits them. No driver notices
that, and where the answer has no checksum, the file looks damaged. Its size is known, so the bytes are asked for again.
A listing is a chain of pages, each with the token of the next one, and a token may expire before it is used. Each
driver has exceptions of its own, which are classified here: broken data is not an error of the storage.
"""

from __future__ import annotations

import bisect
import bz2
import contextlib
import errno
import gzip
import hashlib
import itertools
import lzma
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from glob import escape
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from reinforce.errors import StorageError, UserError
from reinforce.processes.attempts import BOTOCORE_REQUESTS, READS, S3FS_REQUESTS, prefetch
from reinforce.source.parquet_file import read_table
from teachers.redact import CONTAINER_SCHEMES

#: Packages whose exceptions are errors of a storage, beside OSError.
_DRIVERS = frozenset({"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "adlfs", "requests", "urllib3"})
#: What a source can be, for messages.
SOURCES = "tars, Parquet, jsonl or csv files, COCO's captions, a folder of these or of images, or a reinforced dataset"
#: What is neither a file nor a folder.
NOT_A_FILE = "a pipe or device, not a file"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota reached, file too large
_CONFLICTS = (409, 412)  # HTTP status of a conditional put that met another one, or a file
_NO_RANGE = (errno.EINVAL, 416)  # of a read from a range that a file does not have
_INVALID = (errno.EINVAL, errno.EIO, 400)  # what drivers raise for a request that the storage finds invalid
_NO_NEXT_PAGE = ("PaginationError", "KeyError")  # botocore's for a token that is repeated, s3fs's for one that is lost
T = TypeVar("T")
R = TypeVar("R")


class ShortRead(OSError):
    """A storage has sent fewer bytes than there are, each time."""


#: What a file system lists of a file: its size, and by driver its modification time or ETag.
Info = Mapping[str, Any]
#: Receives a file before its bytes are read: file system and path, the open file if there is one, and what is listed of
#: it if that is known.
OpenWatcher = Callable[[Any, str, Any, Info | None], None]

W = TypeVar("W", bound=OpenWatcher)
_WATCHER: ContextVar[OpenWatcher | None] = ContextVar("_WATCHER", default=None)


@contextmanager
def storage_errors(failure: str, fix: str) -> Iterator[None]:
    """Raise UserError, with ``failure`` and ``fix`` around the error's own text, for what a storage raises inside."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each storage driver raises its own exceptions
        raise UserError(f"{failure}: {type(error).__name__}: {error}. {fix}") from error


@contextmanager
def watching_opened(watcher: W) -> Iterator[W]:
    """Call ``watcher`` for each file that this thread opens in the block with ``open_whole``; yields it."""
    token = _WATCHER.set(watcher)
    try:
        yield watcher
    finally:
        _WATCHER.reset(token)


def report_opened(fs: Any, path: str, file: Any = None, info: Info | None = None) -> None:
    """Call the watcher for a file that is about to be read."""
    if (watcher := _WATCHER.get()) is not None:
        watcher(fs, path, file, info)


def open_whole(fs: Any, path: str, **options: Any) -> Any:
    """Open a file of an fsspec file system to read it. Reading raises ShortRead if it ends before its size."""
    file = fs.open(path, "rb", **options)
    cache, size = getattr(file, "cache", None), getattr(file, "size", None)
    if size and cache is not None and hasattr(cache, "fetcher"):
        fetch = cache.fetcher
        cache.fetcher = lambda start, end: _read(lambda: fetch(start, end), min(end, size) - start, path)
    try:
        report_opened(fs, path, file)
    except BaseException:
        file.close()
        raise
    return file


def read_up_to(file: Any, size: int) -> bytes:
    """Read ``size`` bytes of an open file, whose reads may return fewer, or all up to its end."""
    data = bytearray()
    while len(data) < size and (part := file.read(size - len(data))):
        data += part
    return bytes(data)


def read_range(fs: Any, path: str, start: int, end: int) -> bytes:
    """Read the bytes of a file from ``start`` to ``end``, which it is known to have. Raises ShortRead."""
    return _read(lambda: fs.cat_file(path, start=start, end=end), end - start, path)


def read_start(fs: Any, path: str, size: int) -> bytes:
    """Read a file, at most ``size`` bytes. Object stores refuse ranges of a file without bytes."""
    try:
        data: bytes = fs.cat_file(path, end=size)
    except Exception as error:  # each driver has its own exceptions
        if _codes(error).isdisjoint(_NO_RANGE):
            raise
        fs.invalidate_cache()
        if fs.info(path)["size"]:
            raise
        return b""
    return data


def read_whole(fs: Any, path: str) -> bytes:
    """Read a file that may end anywhere, such as a list of lines. Raises ShortRead."""
    data: bytes = fs.cat_file(path)
    size = fs.info(path).get("size") or 0
    return data if len(data) >= size else _read(lambda: fs.cat_file(path), size, path)


def list_whole(read: Callable[[], T]) -> T:
    """The entries of a listing. It starts again where the storage finds a request invalid, or a page leads nowhere.

    Raises OSError where pages lead nowhere each time.
    """
    try:
        return READS.call(
            read,
            lambda error: (
                type(error).__name__ in _NO_NEXT_PAGE
                or any(getattr(error, name, None) in _INVALID for name in ("errno", "code", "status_code"))
            ),
        )
    except Exception as error:  # each driver has its own exceptions
        if type(error).__name__ not in _NO_NEXT_PAGE:
            raise
        what = f"a page of the listing names no next page ({type(error).__name__}: {error})"
        raise OSError(errno.EIO, what) from error


def _read(read: Callable[[], bytes], size: int, path: str) -> bytes:
    def read_whole() -> bytes:
        if len(data := read()) < size:
            raise ShortRead(f"{path}: the storage sent {len(data):,} of {size:,} bytes")
        return data

    return READS.call(read_whole, lambda error: isinstance(error, ShortRead))


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


def _codes(error: Exception) -> set[object]:
    return {getattr(error, name, None) for name in ("errno", "code", "status", "status_code")}


#: Compression by the ending of a tar's name.
COMPRESSIONS: dict[str, str | None] = {
    ".tar": None,
    ".tar.gz": "gzip",
    ".tgz": "gzip",
    ".tar.xz": "xz",
    ".txz": "xz",
    ".tar.bz2": "bzip2",
    ".tbz2": "bzip2",
    ".tar.zst": "zstd",
    ".tzst": "zstd",
}
_ENDING = re.compile(rf"({'|'.join(map(re.escape, COMPRESSIONS))})\Z")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_SPECIAL = re.compile(r"[?#]|::")  # after them, the canonical form is not that of the folder and the name
_HEAD_BYTES = 2**16  # of a text file, that distinguishes a table from a list
_MAX_URLS = 10_000_000
_TOO_MANY = f"source {{}}: more than {_MAX_URLS:,} URLs. Check the ranges in braces."
_CONNECTIONS = 32  # requests in flight; botocore's default is 10
_MAX_STEM_CHARS = 100  # with the hash and .parquet, well below the 255 bytes that file systems allow for a name
_HASH_DIGITS = 10  # of a shard's name
_GLOB = re.compile(r"[*?\[]")
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])")


def filesystem(url: str, redirects: bool = True) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path in it. Raises UserError if there is no driver for it.

    With ``redirects=False`` a web server cannot send the reader to another address. Requests to S3 are retried with
    exponential backoff and jitter, unless the user has set other options: an error of the server is raised after
    seconds, an unreachable address after a minute, and a server that accepts connections but does not answer after
    three minutes. What is raised then counts against no shard.
    """
    options: dict[str, Any] = {}
    is_configured = "config_kwargs" in fsspec.config.conf.get("s3", {})
    if not is_configured and not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & {*os.environ}:
        retries = {"mode": "standard", "total_max_attempts": BOTOCORE_REQUESTS.count}
        of_s3 = {"config_kwargs": {"retries": retries, "max_pool_connections": _CONNECTIONS}}
        schemes = {segment.partition("://")[0] for segment in url.split("::") if "://" in segment}
        options = dict.fromkeys(schemes & {"s3", "s3a"}, of_s3)
    is_retried = bool(options)
    if not redirects and url.startswith(("http://", "https://")):
        options["allow_redirects"] = False
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{canonical(url)}: {error}. Check the part before `://`, or install the fsspec driver for it, which "
            "for gs:// and abfs:// are the extras gcs and azure: `pip install -e '.[gcs]'`."
        ) from error
    if is_retried and "s3" in fs.protocol:
        fs.retries = S3FS_REQUESTS.count
    return fs, path


def is_local(url: str) -> bool:
    return isinstance(filesystem(url)[0], LocalFileSystem)


def expand(
    source: str | Sequence[str],
    listed: dict[str, Info] | None = None,
    is_table: Callable[[bytes], bool] = lambda head: False,
) -> list[str]:
    """Expand URLs with braces or globs, ``.txt`` files of such URLs, or a list of these, to the URLs of shards.

    Braces expand as in a shell: ``{a,b}``, ``{00..10}`` (zero-padded), ``{0..10..2}``, ``{a..e}``, several, nested.
    In a text file, blank lines and lines that begin with ``#`` are skipped, and relative paths are relative to the
    folder of the file. The matches of a glob are sorted; otherwise the order is kept. Exact duplicates are removed.
    ``listed`` receives what the file system lists of each match of a glob. A text file whose first bytes ``is_table``
    accepts is a shard itself.
    Raises UserError for a glob without a match, an unreadable text file, unbalanced braces, or an empty result.
    """
    urls: dict[str, None] = {}
    for entry in [source] if isinstance(source, str) else source:
        for url in _expand(entry.strip(), {} if listed is None else listed, is_table):
            urls[url] = None
            if len(urls) > _MAX_URLS:
                raise UserError(_TOO_MANY.format(_printable(entry)))
    if not urls:
        raise UserError(f"source is empty. Give at least one URL, of {SOURCES}.")
    return list(urls)


def canonical(url: str) -> str:
    """Return the URL in the form that is written into files and logs: without user, password, query and fragment.

    Local paths become absolute and normalised, without ``file://``. Caching prefixes (``simplecache::``) are removed:
    they change how a file is read, not which file it is.
    """
    segments = url.split("::")
    kept = [segment for segment in segments[:-1] if "://" in segment] + segments[-1:]
    return "::".join(_canonical(segment) for segment in kept)


def is_public(url: str) -> bool:
    """Return whether the canonical form of the URL is enough to read it, given credentials from the environment."""
    return all(
        _canonical(segment).partition("://")[2] == segment.partition("://")[2]
        for segment in url.split("::")
        if "://" in segment and not segment.lower().startswith(("file://", "local://"))
    )


def shard_name(url: str) -> str:
    """Return ``<stem>-<10 hex digits>``: the file name without its ending, and a hash of the canonical URL."""
    return _name_at(canonical(url))


def _name_at(location: str) -> str:
    stem = location.rpartition("/")[2]
    stem = stem[: len(stem) - len(_ending(stem))]
    stem = _NOT_IN_NAMES.sub("_", stem)[:_MAX_STEM_CHARS].lstrip("._-") or "shard"
    digest = hashlib.blake2b(location.encode("utf-8", "surrogateescape"), digest_size=_HASH_DIGITS // 2).hexdigest()
    return f"{stem}-{digest}"


def shard_stem(name: str) -> str:
    """Return the part of a shard's name that comes from the file name."""
    return name[: -_HASH_DIGITS - 1]


def shard_names(urls: Sequence[str]) -> list[str]:
    """Return :func:`shard_name` of each URL. Raises UserError if two URLs have the same name, and so the same file."""
    names = [_name_at(location) for location in _canonical_urls(urls)]
    if len({*names}) == len(names):
        return names
    owners: dict[str, str] = {}
    for url, name in zip(urls, names, strict=True):
        if owners.setdefault(name, url) != url:
            raise UserError(
                f"source: {canonical(owners[name])} and {canonical(url)} get the same shard name {name}. "
                "If they are the same file, list it once; otherwise rename one of them."
            )
    return list(owners)


def _canonical_urls(urls: Iterable[str]) -> Iterator[str]:
    """Yield :func:`canonical` of each URL; that of a folder is computed once for all files in it with plain names."""
    folders: dict[str, str | None] = {}
    for url in urls:
        folder, _, name = url.rpartition("/")
        if folder not in folders:
            plain = folder and not _SPECIAL.search(folder)
            folders[folder] = canonical(f"{folder}/x").removesuffix("x") if plain else None
        start = folders[folder]
        yield canonical(url) if start is None or not _PLAIN_NAME.fullmatch(name) else start + name


def find_unreferable(urls: Sequence[str]) -> tuple[str | None, str | None]:
    """Return the first URL of a compressed tar, and the first that is not :func:`is_public`; None where there is none.

    Images in neither can be read by reference.
    """
    packed = private = None
    for url, location in zip(urls, _canonical_urls(urls), strict=True):
        if packed is None and COMPRESSIONS.get(_ending(location)):
            packed = url
        if private is None and location != url and not is_public(url):
            private = url
    return packed, private


def compression(url: str) -> str | None:
    """Return ``gzip``, ``xz``, ``bzip2`` or ``zstd`` by the URL's ending, or None for a plain tar."""
    return COMPRESSIONS.get(_ending(canonical(url)))


def _ending(path: str) -> str:
    found = _ENDING.search(path.lower())
    return found[0] if found else ""


def _canonical(segment: str) -> str:
    scheme, is_remote, rest = segment.partition("://")
    scheme = scheme.lower()
    if not is_remote or scheme in ("file", "local"):
        return os.path.abspath(LocalFileSystem._strip_protocol(segment))
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority, slash, path = rest.partition("/")
    if scheme not in CONTAINER_SCHEMES:
        authority = authority.rpartition("@")[2]
    return f"{scheme}://{authority}{slash}{path}"


def _printable(pattern: str) -> str:
    """Return a pattern for messages: without secrets, but with its globs."""
    pattern = re.sub(r"(https?://[^?#]*)[?#].*", r"\1", pattern)
    return re.sub(r"://[^/@]*@", "://", pattern)


def _expand(
    entry: str,
    listed: dict[str, Info],
    is_table: Callable[[bytes], bool],
    folder: str = "",
    lists: tuple[str, ...] = (),
) -> Iterator[str]:
    """Yield the URLs of one entry. ``folder`` is put before relative ones; ``lists`` are the text files being read."""
    if not entry:
        raise UserError(f"source has an empty entry. Remove it, or give a URL, of {SOURCES}.")
    if entry.startswith("pipe:"):
        raise UserError(
            f"source {_printable(entry)}: commands are not run. Give the URL itself, such as s3://bucket/shard.tar."
        )
    if folder and ("://" in entry or "::" in entry or entry.startswith(("/", "~"))):
        folder = ""
    globs = has_glob(entry)  # expanding braces adds no glob
    literal = folder if "://" in folder else escape(folder)
    for url in expand_braces(entry, entry):
        for match in _expand_glob(literal + url, listed) if globs and has_glob(url) else (folder + url,):
            if match.partition("?")[0].endswith(".txt"):
                yield from _expand_list(match, listed, is_table, lists)
            else:
                yield match


def _expand_list(
    url: str, listed: dict[str, Info], is_table: Callable[[bytes], bool], lists: tuple[str, ...]
) -> Iterator[str]:
    """Yield the URLs of a text file, or its own if it is a table."""
    shown = canonical(url)
    if shown in lists:
        raise UserError(f"source {shown}: this list of URLs contains itself. Remove the line that names it.")
    try:
        fs, path = filesystem(url)
        data = read_whole(fs, path)
        if is_table(data[:_HEAD_BYTES]):
            yield url
            return
        text = data.decode("utf-8-sig")
    except UserError:
        raise
    except Exception as error:  # each driver has its own exceptions
        raise UserError(
            f"source {shown}: cannot read this list of URLs ({type(error).__name__}: {error}). "
            "It must be a UTF-8 text file with one URL per line."
        ) from error
    head, slash, _ = url.partition("?")[0].rpartition("/")
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise UserError(f"source {shown}: this list contains no URL. Write one URL per line.")
    for line in lines:
        yield from _expand(line, listed, is_table, head + slash, (*lists, shown))


def has_glob(url: str) -> bool:
    if not _GLOB.search(url):
        return False
    if url.lower().startswith(("http://", "https://")):  # `?` begins a query, and `[` may belong to an IPv6 host
        return bool(_GLOB.search(urlsplit(url).path))
    return True


def _expand_glob(pattern: str, listed: dict[str, Info]) -> list[str]:
    segments = pattern.split("::")
    index = next(i for i, segment in enumerate(segments) if has_glob(segment))
    try:
        fs, path = filesystem("::".join(segments[index:]))
        found = list_whole(lambda: fs.glob(path, detail=True))
        names = sorted(name for name, info in found.items() if info["type"] != "directory")
        if not names and fs.isfile(path):
            return [pattern]  # a file whose name contains the characters of a glob
    except UserError:
        raise
    except Exception as error:  # each driver has its own exceptions
        raise UserError(
            f"source {_printable(pattern)}: cannot be listed ({type(error).__name__}: {error}). "
            "Check the address and your credentials for it."
        ) from error
    if not names:
        raise UserError(f"source {_printable(pattern)}: no file matches. Check the folder and the pattern.")
    # Drivers return paths without the scheme, and some without the host: take both from the pattern.
    before = segments[index].removesuffix(path) if segments[index].endswith(path) else ""
    urls = ["::".join([*segments[:index], before + name, *segments[index + 1 :]]) for name in names]
    listed.update(zip(urls, map(found.__getitem__, names), strict=True))
    return urls


def expand_braces(pattern: str, entry: str) -> Iterator[str]:
    """Expand the braces of a pattern as a shell does; the last brace varies fastest. ``entry`` is for messages."""
    start = pattern.find("{")
    if start < 0:
        yield pattern
        return
    depth, edges = 0, [start]  # the opening brace, the commas directly inside of it, and the brace that closes it
    for end in range(start, len(pattern)):
        depth += (pattern[end] == "{") - (pattern[end] == "}")
        if depth == 0 or (depth == 1 and pattern[end] == ","):
            edges.append(end)
        if depth == 0:
            break
    else:
        raise UserError(f"source {_printable(entry)}: a brace is not closed. Write ranges as {{000..999}}.")
    head, body, tail = pattern[:start], pattern[start + 1 : end], pattern[end + 1 :]
    options: Iterable[str]
    if match := _NUMBERS.fullmatch(body):  # 000..999 or 0..9..3
        first, last, step = match.groups()
        width = max(len(first), len(last)) if re.match(r"-?0\d", first) or re.match(r"-?0\d", last) else 0
        low, high, stride = int(first), int(last), abs(int(step or 1))
        if stride == 0:
            raise UserError(f"source {_printable(entry)}: the step of {{{body}}} is 0. Write a positive step.")
        numbers = range(low, high + 1, stride) if low <= high else range(low, high - 1, -stride)
        if len(numbers) > _MAX_URLS:
            raise UserError(_TOO_MANY.format(_printable(entry)))
        options = (f"{number:0{width}d}" for number in numbers)
    elif match := _LETTERS.fullmatch(body):  # a..e
        low, high = map(ord, match.groups())
        options = map(chr, range(low, high + 1) if low <= high else range(low, high - 1, -1))
    else:
        parts = [pattern[a + 1 : b] for a, b in itertools.pairwise(edges)]
        inner = (option for part in parts for option in expand_braces(part, entry))
        # The braces of what is neither a range nor alternatives are literal.
        options = map("{{{}}}".format, inner) if len(parts) == 1 else inner
    for option in options:
        for rest in expand_braces(tail, entry) if "{" in tail else (tail,):
            yield head + option + rest


BLOCK_BYTES = 8 * 2**20  # bytes per request to an object store
#: Errors of a storage that has no file at a path which may be read.
NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)  # errors of file systems for impossible paths
_FEW = 16  # unreadable files of a shard that do not mean yet that its storage fails
_OTHERS = 8  # files that are tried to learn whether a storage works
_SKIPPED_BYTES = 2**20  # that are read at once to be left out
_THREADS, _LOCAL_THREADS = 16, 2  # that read files ahead
_COMPRESSED_MAGIC = {
    b"\x1f\x8b": ".tar.gz",
    b"\xfd7zXZ": ".tar.xz",
    b"BZh": ".tar.bz2",
    b"\x28\xb5\x2f\xfd": ".tar.zst",
}


class Stream(Protocol):
    """A stream of bytes. ``read`` may return fewer bytes than asked for, and returns none at the end.

    It raises EOFError if its data is broken (by a decompressor); other exceptions pass through.
    """

    def read(self, size: int, /) -> bytes: ...

    def skip(self, count: int, /) -> None:
        """Leave out bytes, which are read where a stream has no better way."""
        while count and (data := self.read(min(count, _SKIPPED_BYTES))):
            count -= len(data)


@contextmanager
def open_stream(url: str, kind: str | None = None) -> Iterator[tuple[Stream, int | None]]:
    """Open a shard and yield its uncompressed bytes and their number, or None where that is not known in advance.

    ``kind`` is its compression, if that does not follow from the ending of a tar. Reading raises EOFError where the
    data is broken, and otherwise what the storage raises.
    """
    fs, path = filesystem(url)
    kind = kind or compression(url)
    check_file(fs, path)
    with open_whole(fs, path, block_size=BLOCK_BYTES, cache_type="readahead") as file:
        size = getattr(file, "size", None)
        if size == 0 and fs.isdir(path):  # s3fs opens a folder as an empty file
            raise IsADirectoryError(errno.EISDIR, "a folder")
        yield (_PlainStream(file), size) if kind is None else (_Decompressor(file, kind), None)


def check_file(fs: Any, path: str) -> None:
    """Raise IsADirectoryError for a local path that is a folder, pipe or device; opening a pipe would block."""
    if isinstance(fs, LocalFileSystem) and not stat.S_ISREG(mode := os.stat(path).st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder" if stat.S_ISDIR(mode) else NOT_A_FILE)


class UnreadableFile(Exception):
    """A file that does not exist or cannot be read, in a storage that works."""


class FileReader:
    """Reads the small files of a folder, and distinguishes one that cannot be read from a storage that fails.

    ``others`` are URLs of files there that are tried where none was read before.
    """

    def __init__(self, others: Callable[[], Iterable[str]]) -> None:
        self._others = others
        self._last: str | None = None
        self._read = self._unreadable = 0

    def read(self, url: str, limit: int) -> bytes:
        """Read a file; of one of more than ``limit`` bytes, one byte more than that.

        Raises UnreadableFile, or the errors of a storage that reads no other file either or that has failed at more
        files than it has read.
        """
        data = self._try(url, limit)
        if isinstance(data, Exception):
            if self._unreadable >= max(_FEW, self._read):
                raise data
            for other in [self._last] if self._last else itertools.islice(self._others(), _OTHERS):
                with contextlib.suppress(UnreadableFile):
                    if other != url and isinstance(self._try(other, 1), bytes):
                        break
            else:  # no other file can be read now
                raise data
            again = self._try(url, limit)
            if isinstance(again, Exception):
                self._unreadable += 1
                raise UnreadableFile(_describe(again)) from again
            data = again
        self._last = url
        self._read += 1
        return data

    def _try(self, url: str, limit: int) -> bytes | Exception:
        """The bytes of a file, or an error that may be the file's or the storage's. Raises UnreadableFile."""
        try:
            fs, path = filesystem(url)
            check_file(fs, path)
            with open_whole(fs, path, block_size=limit + 1, cache_type="none") as file:
                data: bytes = file.read(limit + 1)
            return data
        except Exception as error:  # each driver has its own exceptions
            if isinstance(error, NO_FILE) or getattr(error, "errno", None) in _NO_NAME:
                raise UnreadableFile(_describe(error)) from error
            if not is_storage_error(error):
                raise
            return error


def _describe(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def read_ahead(read: Callable[[T], R], items: Iterable[T], folder: str) -> Iterator[R]:
    """Yield ``read(item)`` in order; it reads files, most of them in ``folder``, ahead in threads."""
    threads = _THREADS if "://" in folder else _LOCAL_THREADS
    with ThreadPoolExecutor(threads) as pool:
        yield from prefetch(pool, read, items, threads)


class _PlainStream(Stream):
    """An uncompressed file. Raises EOFError if its first bytes are those of a compressed file."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._started = False

    def read(self, size: int, /) -> bytes:
        data: bytes = self._file.read(size)
        if not self._started:
            self._started = True
            for magic, ending in _COMPRESSED_MAGIC.items():
                if data.startswith(magic):
                    raise EOFError(f"compressed data; name the file {ending}")
        return data

    def skip(self, count: int, /) -> None:
        self._started = True
        self._file.seek(count, 1)


class _Decompressor(Stream):
    """Decompresses a file. Raises EOFError for broken data; errors of the storage pass through."""

    def __init__(self, file: Any, kind: str) -> None:
        self._file = _ErrorRecorder(file)
        decompressor, self._step = _DECOMPRESSORS[kind]
        self._stream = decompressor(self._file)
        self._kind = kind

    def read(self, size: int, /) -> bytes:
        try:  # small steps: what a decompressor has buffered when it fails is lost
            data: bytes = self._stream.read1(min(size, self._step))
        except Exception as error:  # each library raises its own types: zlib.error, LZMAError, OSError, EOFError
            if self._file.error is not None:
                raise self._file.error from None
            raise EOFError(f"broken {self._kind} data ({error})") from error
        return data


class _ErrorRecorder:
    """A compressed file that records the error it raised, to distinguish it from an error of the decompressor."""

    closed = False

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: Exception | None = None

    def read(self, size: int = -1, /) -> bytes:
        try:
            data: bytes = self._file.read(size)
        except Exception as error:
            self.error = error
            raise
        return data

    def close(self) -> None:
        """Do nothing: pyarrow closes its input, but ``open_stream`` closes the file."""

    def seek(self, *_: object) -> int:
        raise OSError("the stream cannot seek")


#: How each kind of compression is opened, and how many bytes are read from it at a time.
_DECOMPRESSORS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "gzip": (lambda file: gzip.GzipFile(fileobj=file, mode="rb"), 2**16),
    "xz": (lzma.LZMAFile, 2**16),
    "bzip2": (bz2.BZ2File, 2**16),
    "zstd": (lambda file: pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"), 2**12),
}


FOLDER = "views"
_AT = "@"  # between the name and the fingerprint of a view


def with_fingerprint(name: str, fingerprint: str) -> str:
    """A view with its fingerprint, as ``input.view`` may name it and dataset.json records it."""
    return f"{name}{_AT}{fingerprint}"


def split_view(view: str) -> tuple[str, str]:
    """The name and the fingerprint of a view; the latter is empty if it has none."""
    name, _, fingerprint = view.partition(_AT)
    return name, fingerprint


def rows_path(name: str, fingerprint: str, shard: str) -> tuple[str, ...]:
    """The parts of the path, in the dataset, of the file that has why each row of a shard is left out."""
    return FOLDER, name, f"rows-{fingerprint}", f"{shard}.parquet"


def digest_of(content: bytes) -> int:
    """BLAKE2b-64 of bytes: of an encoded image, as its layer has it, or of a file of a view, as the view states it."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def shards_path(name: str, fingerprint: str) -> tuple[str, ...]:
    """The parts of the path of the file that counts the rows of each shard, with the digests of their files."""
    return FOLDER, name, f"shards-{fingerprint}.parquet"


@dataclass(frozen=True)
class RowDigests:
    """The digest of the file with the rows of each shard."""

    shards: pa.StringArray
    digests: npt.NDArray[np.uint64]

    @classmethod
    def parse(cls, content: bytes) -> RowDigests:
        """Read them from the file at ``shards_path``. Raises what Arrow raises."""
        table = read_table(pa.BufferReader(content), ["shard", "digest"])
        return cls(table["shard"].combine_chunks(), table["digest"].to_numpy())

    def check(self, shard: str, content: bytes) -> bool:
        """Whether a file has the digest of the rows of a shard."""
        place = bisect.bisect_left(self.shards, shard, key=str)
        known = place < len(self.shards) and self.shards[place].as_py() == shard
        return known and int(self.digests[place]) == digest_of(content)
