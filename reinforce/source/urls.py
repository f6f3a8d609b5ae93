"""Source shards by fsspec URL: expanding what a user writes, the form that may be written down, shard names."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from glob import escape
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from reinforce.errors import UserError
from teachers.redact import USER_IS_ADDRESS

#: Endings of a tar and how it is compressed.
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
_MOST_URLS = 10_000_000
_BOTOCORE_ATTEMPTS = 4
_S3_ATTEMPTS = 3
_LONGEST_STEM = 100  # with the hash and .parquet well below the 255 bytes a file name may have
_GLOB = re.compile(r"[*?\[]")
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])")


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. Raises UserError if there is no driver for it."""
    patience = _patience(url)
    try:
        fs, path = fsspec.core.url_to_fs(url, **patience)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{canonical(url)}: {error}. Check the part before `://`, or install the fsspec driver for it."
        ) from error
    if patience and "s3" in fs.protocol:
        fs.retries = _S3_ATTEMPTS  # of s3fs, each of which makes botocore's
    return fs, path


def _patience(url: str) -> dict[str, Any]:
    """How often S3 is asked again, with exponential backoff, jitter and a budget, unless the user has said it.

    An error of the server costs seconds before it is raised, an address at which nobody is a minute, one that accepts
    and is silent three. What is raised then costs a shard an attempt.
    """
    said = "config_kwargs" in fsspec.config.conf.get("s3", {}) or {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & {*os.environ}
    options = {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": _BOTOCORE_ATTEMPTS}}}
    schemes = {segment.partition("://")[0] for segment in url.split("::") if "://" in segment}
    return {} if said else dict.fromkeys(schemes & {"s3", "s3a"}, options)


def expand(source: str | Sequence[str]) -> list[str]:
    """Shard URLs from URLs with braces or globs, ``.txt`` files of such URLs, or a list of these.

    Braces are the shell's: ``{a,b}``, ``{00..10}`` (zero-padded), ``{0..10..2}``, ``{a..e}``, several, nested.
    In a text file, blank lines and lines beginning with ``#`` are skipped; relative lines are relative to its
    folder. Globs give their matches sorted; otherwise order is kept. Of exact duplicates the first stays.
    Raises UserError for a glob without a match, an unreadable text file, unbalanced braces, or no URL at all.
    """
    urls: dict[str, None] = {}
    for entry in [source] if isinstance(source, str) else source:
        for url in _expand(entry.strip()):
            urls[url] = None
            if len(urls) > _MOST_URLS:
                raise _too_many(entry)
    if not urls:
        raise UserError("source is empty. Give at least one URL of a WebDataset tar.")
    return list(urls)


def canonical(url: str) -> str:
    """The URL as it may be written into files and logs: no user, password, query or fragment.

    Local paths are absolute and normalised, without ``file://``. Caching wrappers (``simplecache::``) are
    dropped: they say how a file is read, not which it is.
    """
    segments = url.split("::")
    kept = [segment for segment in segments[:-1] if "://" in segment] + segments[-1:]
    return "::".join(_canonical(segment) for segment in kept)


def is_public(url: str) -> bool:
    """Whether its canonical form still says all that it takes to read the file."""
    return all(
        _canonical(segment).partition("://")[2] == segment.partition("://")[2]
        for segment in url.split("::")
        if "://" in segment and not segment.lower().startswith(("file://", "local://"))
    )


def shard_name(url: str) -> str:
    """``<stem>-<10 hex>``: the file name without its ending and a hash of the canonical URL, from the URL alone."""
    where = canonical(url)
    stem = where.rpartition("/")[2]
    stem = stem[: len(stem) - len(_ending(stem))]
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", stem)[:_LONGEST_STEM].lstrip("._-") or "shard"
    digest = hashlib.blake2b(where.encode("utf-8", "surrogateescape"), digest_size=5).hexdigest()
    return f"{stem}-{digest}"


def shard_names(urls: Sequence[str]) -> list[str]:
    """:func:`shard_name` of each URL. Raises UserError where two URLs would share a name, and so a file."""
    owners: dict[str, str] = {}
    for url in urls:
        name = shard_name(url)
        if owners.setdefault(name, url) != url:
            raise UserError(
                f"source: {canonical(owners[name])} and {canonical(url)} get the same shard name {name}. "
                "If they are one file, list it once; otherwise rename one of them."
            )
    return list(owners)


def compression(url: str) -> str | None:
    """``gzip``, ``xz``, ``bzip2`` or ``zstd`` by the URL's ending; None for a plain tar."""
    return COMPRESSIONS.get(_ending(canonical(url)))


def _too_many(pattern: str) -> UserError:
    return UserError(f"source {_shown(pattern)}: more than {_MOST_URLS:,} URLs. Check the ranges in braces.")


def _ending(path: str) -> str:
    lower = path.lower()
    return max((ending for ending in COMPRESSIONS if lower.endswith(ending)), key=len, default="")


def _canonical(segment: str) -> str:
    scheme, is_remote, rest = segment.partition("://")
    scheme = scheme.lower()
    if not is_remote or scheme in ("file", "local"):
        return os.path.abspath(LocalFileSystem._strip_protocol(segment))
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority, slash, path = rest.partition("/")
    if scheme not in USER_IS_ADDRESS:
        authority = authority.rpartition("@")[2]
    return f"{scheme}://{authority}{slash}{path}"


def _shown(pattern: str) -> str:
    """A pattern for messages: without secrets, but with its globs."""
    pattern = re.sub(r"(https?://[^?#]*)[?#].*", r"\1", pattern)
    return re.sub(r"://[^/@]*@", "://", pattern)


def _expand(entry: str, folder: str = "", lists: tuple[str, ...] = ()) -> Iterator[str]:
    """URLs of one entry; relative ones begin with ``folder``. ``lists`` are the text files being read."""
    if not entry:
        raise UserError("source has an empty entry. Remove it, or give a URL of a WebDataset tar.")
    if entry.startswith("pipe:"):
        raise UserError(f"source {_shown(entry)}: commands are not run. Give the URL itself, such as s3://... .")
    if folder and ("://" in entry or "::" in entry or entry.startswith(("/", "~"))):
        folder = ""
    globs = _has_glob(entry)  # braces bring no glob of their own
    literal = folder if "://" in folder else escape(folder)
    for url in _braces(entry, entry):
        for found in _glob(literal + url) if globs and _has_glob(url) else (folder + url,):
            if found.partition("?")[0].endswith(".txt"):
                yield from _listed(found, lists)
            else:
                yield found


def _listed(url: str, lists: tuple[str, ...]) -> Iterator[str]:
    shown = canonical(url)
    if shown in lists:
        raise UserError(f"source {shown}: this list of URLs contains itself. Remove the line that names it.")
    try:
        fs, path = filesystem(url)
        text = fs.cat_file(path).decode("utf-8-sig")
    except UserError:
        raise
    except Exception as error:  # each driver has its own exceptions
        raise UserError(
            f"source {shown}: cannot read this list of URLs ({type(error).__name__}: {error}). "
            "It must be a readable UTF-8 text file with one URL a line."
        ) from error
    head, slash, _ = url.partition("?")[0].rpartition("/")
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise UserError(f"source {shown}: this list names no URL. Write one URL a line into it.")
    for line in lines:
        yield from _expand(line, head + slash, (*lists, shown))


def _has_glob(url: str) -> bool:
    if not _GLOB.search(url):
        return False
    if url.lower().startswith(("http://", "https://")):  # `?` begins a query there, `[` may be an IPv6 host
        return bool(_GLOB.search(urlsplit(url).path))
    return True


def _glob(pattern: str) -> list[str]:
    segments = pattern.split("::")
    at = next(i for i, segment in enumerate(segments) if _has_glob(segment))
    try:
        fs, path = filesystem("::".join(segments[at:]))
        found = fs.glob(path, detail=True)
        names = sorted(name for name, info in found.items() if info["type"] != "directory")
        if not names and fs.isfile(path):
            return [pattern]  # its name has a glob's characters
    except UserError:
        raise
    except Exception as error:  # each driver has its own exceptions
        raise UserError(
            f"source {_shown(pattern)}: cannot be listed ({type(error).__name__}: {error}). "
            "Check the address and your credentials for it."
        ) from error
    if not names:
        raise UserError(f"source {_shown(pattern)}: no file matches. Check the folder and the pattern.")
    # a driver's paths lack the scheme, some also the host: take from the pattern what stood before its path
    before = segments[at].removesuffix(path) if segments[at].endswith(path) else ""
    return ["::".join([*segments[:at], before + name, *segments[at + 1 :]]) for name in names]


def _braces(pattern: str, whole: str) -> Iterator[str]:
    """Shell brace expansion of a pattern; the last brace turns fastest."""
    start = pattern.find("{")
    if start < 0:
        yield pattern
        return
    end, commas = _closing(pattern, start, whole)
    head, body, tail = pattern[:start], pattern[start + 1 : end], pattern[end + 1 :]
    options = _range(body, whole)
    if options is None and commas:
        edges = [start, *commas, end]
        parts = [pattern[a + 1 : b] for a, b in pairwise(edges)]
        options = (option for part in parts for option in _braces(part, whole))
    if options is None:  # neither a range nor alternatives: the braces stand for themselves
        options = ("{" + option + "}" for option in _braces(body, whole))
    for option in options:
        for rest in _braces(tail, whole) if "{" in tail else (tail,):
            yield head + option + rest


def _closing(pattern: str, start: int, whole: str) -> tuple[int, list[int]]:
    """Where the brace at ``start`` closes, and the commas directly inside it."""
    depth = 0
    commas: list[int] = []
    for i in range(start, len(pattern)):
        if pattern[i] == "{":
            depth += 1
        elif pattern[i] == "}":
            depth -= 1
            if depth == 0:
                return i, commas
        elif pattern[i] == "," and depth == 1:
            commas.append(i)
    raise UserError(f"source {_shown(whole)}: a brace is not closed. Write ranges as {{000..999}}.")


def _range(body: str, whole: str) -> Iterator[str] | None:
    if match := _NUMBERS.fullmatch(body):
        first, last, step = match.groups()
        width = max(len(first), len(last)) if re.match(r"-?0\d", first) or re.match(r"-?0\d", last) else 0
        low, high, stride = int(first), int(last), abs(int(step or 1))
        if stride == 0:
            raise UserError(f"source {_shown(whole)}: the step of {{{body}}} is 0. Write a positive step.")
        numbers = range(low, high + 1, stride) if low <= high else range(low, high - 1, -stride)
        if len(numbers) > _MOST_URLS:
            raise _too_many(whole)
        return (f"{number:0{width}d}" for number in numbers)
    if match := _LETTERS.fullmatch(body):
        low, high = map(ord, match.groups())
        return map(chr, range(low, high + 1) if low <= high else range(low, high - 1, -1))
    return None
