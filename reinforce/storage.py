"""Files in a local folder or an object store: atomic publishing, locks and claims.

A file is finished elsewhere before it is published: on a local disk by ``os.replace`` of a synced temporary file in the
same file system, in an object store by one put of the finished file. A lock of a file on a local disk ends with the
process that has it, also by a kill. A claim is a file that only one of several processes can create, by a conditional
put, and that names its owner. Some stores ignore the condition, so it is read back; one that was not written for long
is over.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import posixpath
import shutil
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from reinforce.errors import DamagedJson, StorageError, UserError
from reinforce.processes.attempts import CLAIMS, CONDITIONAL_PUTS, FIRST_WRITE, READS
from reinforce.source.urls import (
    ShortRead,
    filesystem,
    is_conflict,
    is_full,
    is_unsupported,
    list_whole,
    read_start,
)
from teachers.redact import redact
from teachers.weights import replacing

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_JSON_BYTES = 16 * 2**20  # of a file that is read as JSON
_PUTS_AT_ONCE = 16
_TEMPORARY_FOLDER = ".tmp"
_TEMPORARY_PREFIX = "reinforce-"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the process that `ray job submit` starts
_UPLOADED_FOLDER = "working_dir_files"  # in Ray's temporary folder, with what --working-dir uploaded
_DAMAGED = "damaged"  # key of what a file is that is no claim


@contextlib.contextmanager
def lock_file(path: str, busy: str, fix: str) -> Iterator[None]:
    """Lock the file at ``path``. If another process has it, raises UserError: ``busy``, its owner, and the ``fix``."""
    import fcntl

    with contextlib.ExitStack() as stack:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a+"))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}. Check the disk and the permissions.") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read(100)
            raise UserError(f"{busy}{f' ({owner})' if owner else ''}. {fix}") from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def is_job_folder(path: str) -> bool:
    """Whether a local path is in the folder of a Ray job, which Ray deletes after it."""
    return _is_relative(path) or _UPLOADED_FOLDER in Path(path.partition("://")[2] or path).parts


def _is_relative(path: str) -> bool:
    return not os.path.isabs(os.path.expanduser(path.partition("://")[2] or path))


def forget_credentials(url: str) -> None:
    """Forget the connections to the storage of a URL. The next one takes the credentials that are in force then."""
    fs, _ = filesystem(url)
    if not isinstance(fs, LocalFileSystem):
        type(fs).clear_instance_cache()


def write_file(data: bytes, url: str) -> None:
    """Write a small file at a path or fsspec URI, atomically; create missing folders."""
    fs, path = filesystem(url)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        temporary.write_bytes(data)
        temporary.chmod(0o644)  # temporary files can be read by their owner only


def write_json(data: Mapping[str, Any], url: str) -> None:
    """Write JSON as ``write_file``. Raises UserError if it cannot be written."""
    try:
        write_file(json_bytes(data), url)
    except OSError as error:
        raise UserError(f"{url} cannot be written: {error}. Name another file.") from error


def json_bytes(data: Mapping[str, Any]) -> bytes:
    """The content of a file of JSON."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


class Storage:
    """The files below a folder or fsspec URI.

    ``url`` has no credentials and is safe to print. ``fs`` is the fsspec file system, ``root`` the path in it,
    ``local`` whether it is a local disk, and ``relative`` whether ``url`` is a local path relative to the working
    directory.
    """

    def __init__(self, url: str) -> None:
        self.url, self._url = redact(url.rstrip("/")), url
        self.fs, root = filesystem(url.rstrip("/"))
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)
        self.relative = self.local and _is_relative(self.url)

    def refresh(self) -> None:
        """Take the credentials that are in force now."""
        forget_credentials(self._url)
        self.fs, _ = filesystem(self._url.rstrip("/"))

    def path(self, *parts: str) -> str:
        return posixpath.join(self.root, *parts)

    def names(self, *parts: str, folders: bool = False) -> list[str]:
        """Names in a folder in ascending order, or only those of ``folders``; none if it does not exist."""
        found: list[Any] = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), self.storage_errors("listed", *parts):
            found = list_whole(lambda: self.fs.ls(self.path(*parts), detail=folders, refresh=True))
        paths = [one["name"] for one in found if one["type"] == "directory"] if folders else found
        return sorted(posixpath.basename(str(path).rstrip("/")) for path in paths)

    def read_json(self, *parts: str) -> dict[str, Any] | None:
        """Read a JSON object; return None if the file does not exist. Raises DamagedJson, and UserError for what is no
        small file."""
        path = self.path(*parts)

        def parse(content: bytes) -> Any:
            if not content:
                raise DamagedJson(path, "empty: it has 0 bytes")
            return json.loads(content)

        try:
            data = self.read_parsed(parse, *parts, limit=_JSON_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, RecursionError) as error:
            raise DamagedJson(path, f"not valid JSON ({error})") from error
        if not isinstance(data, dict):
            raise DamagedJson(path, "not a JSON object")
        return data

    def read_bytes(self, *parts: str, limit: int) -> bytes:
        """Read a small file. Raises UserError for one of more than ``limit`` bytes, and for pipes and devices."""
        path = self.path(*parts)
        if self.local and os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would block
            raise UserError(f"{path} is not a file. Remove it, and restore the file.")
        with self.storage_errors("read", *parts):
            content = read_start(self.fs, path, limit + 1)
        if len(content) > limit:
            raise UserError(f"{path} has more than {limit:,} bytes. Restore it from a backup or from another copy.")
        return content

    def read_parsed(self, parse: Callable[[bytes], T], *parts: str, limit: int) -> T:
        """Read a small file and parse it. Raises what ``parse`` raises, unless only a part of the file has arrived."""

        def read() -> T:
            content = self.read_bytes(*parts, limit=limit)
            try:
                return parse(content)
            except Exception:
                with self.storage_errors("read", *parts):
                    self.fs.invalidate_cache()
                    size = self.fs.info(self.path(*parts))["size"]
                if size <= len(content):
                    raise
            raise ShortRead(f"the storage sent {len(content):,} of {size:,} bytes")

        try:
            return READS.call(read, lambda error: isinstance(error, ShortRead))
        except ShortRead as error:
            raise StorageError(f"{self.path(*parts)} cannot be read: {error}. Check it.") from error

    def write_bytes(self, data: bytes, *parts: str) -> None:
        """Publish a small file."""
        with self.storage_errors("written", *parts), self.staging() as (file, local_path):
            file.write(data)
            file.flush()
            self.publish(file, local_path, self.path(*parts))

    def create(self, data: bytes, *parts: str) -> bool:
        """Publish a small file unless there is one -> whether it was published.

        One of several writers succeeds: by a link on a local disk, by a conditional put in an object store, which is
        tried again where the store reports a conflict and has no such file. Some stores ignore the condition, or refuse
        it; so read the file back before relying on it.
        """
        path = self.path(*parts)
        with self.storage_errors("written", *parts):
            if self.local:
                with self.staging() as (file, local_path):
                    file.write(data)
                    file.flush()
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    try:
                        os.link(local_path, path)
                    except FileExistsError:
                        return False
                    return True
            return CONDITIONAL_PUTS.call(lambda: self._put_new(data, path), is_conflict)

    def _put_new(self, data: bytes, path: str) -> bool:
        try:
            self.fs.pipe_file(path, data, mode="create")
        except Exception as error:  # each driver has its own exceptions
            self.fs.invalidate_cache()
            if self.fs.exists(path):
                return False
            if not is_unsupported(error):
                raise
            self.fs.pipe_file(path, data)
        return True

    def remove(self, *parts: str) -> None:
        """Remove a file, if there is one."""
        with self.storage_errors("removed", *parts), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(*parts))

    @contextlib.contextmanager
    def new_file(self, *parts: str) -> Iterator[str]:
        """Yield a local path for a file of any size; publish it when the block ends, delete it if the block raises.

        The block may replace the file at the path, and create others in its folder, which are deleted.
        """
        with self.temporary_folder() as folder:
            local_path = os.path.join(folder, parts[-1])
            with open(local_path, "xb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)  # the mode of new files under the umask
            with self.space_errors(*parts):
                yield local_path
            os.chmod(local_path, mode)
            with self.storage_errors("written", *parts), open(local_path, "rb") as file:
                self.publish(file, local_path, self.path(*parts))

    def put_folder(self, folder: str, *parts: str) -> None:
        """Publish the files of a local folder, each atomically; many at a time to an object store."""
        paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        targets = [(*parts, *path.relative_to(folder).parts) for path in paths]
        if self.local:
            for path, target in zip(paths, targets, strict=True):
                with self.new_file(*target) as local_path:
                    shutil.copyfile(path, local_path)
            return
        with ThreadPoolExecutor(_PUTS_AT_ONCE) as pool:
            names = [self.path(*target) for target in targets]
            list(pool.map(self.fs.put_file, map(str, paths), names))

    def write_json(self, data: Mapping[str, Any], *parts: str) -> None:
        self.write_bytes(json_bytes(data), *parts)

    def check_writable(self) -> None:
        """Raise UserError if nothing can be written here, in an object store after some attempts, or if Ray deletes it
        after the job."""
        if self.local and JOB_VARIABLE in os.environ and is_job_folder(self.url):
            raise UserError(
                f"output {self.url} is in the temporary folder of a Ray job, {os.getcwd()}, and would be lost. Set "
                "`output` to an absolute path that every node reaches, or to a URL such as s3://BUCKET/FOLDER."
            )

        def write() -> None:
            probe = (_TEMPORARY_FOLDER, f"write-test-{uuid.uuid4().hex}")
            try:
                self.write_bytes(b"", *probe)
                self.fs.rm_file(self.path(*probe))
            except Exception as error:
                cause = error.__cause__ or error
                raise UserError(
                    f"output {self.url} cannot be written: {type(cause).__name__}: {cause}. Check the path, the "
                    "permissions and (for an object store) the address and the credentials."
                ) from cause

        def wait(error: Exception, pause: float) -> None:
            _LOG.warning("%s It is tried again in %g s.", redact(str(error)), pause)
            time.sleep(pause)
            self.refresh()

        if self.local:
            write()
            return

        def passes(error: Exception) -> bool:
            return getattr(error.__cause__, "errno", None) is not None or "expired" in str(error.__cause__)  # by s3fs

        FIRST_WRITE.call(write, passes, wait)

    @contextlib.contextmanager
    def storage_errors(self, what: str, *parts: str) -> Iterator[None]:
        """Turn errors of the storage into StorageError with the path; missing files and folders stay what they are.

        ``what`` is the action as a past participle, such as ``read`` or ``written``, for the message. A full disk of a
        local dataset is a UserError instead, because it fails all shards alike.
        """
        try:
            yield
        except (UserError, ValueError, TypeError, LookupError):  # not raised by the storage driver
            raise
        except Exception as error:  # each driver has its own exceptions
            if what != "written" and isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise
            full = is_full(error)
            place = self.url if self.local else f"{tempfile.gettempdir()} of the machine that writes it"
            fix = f"make room in {place}" if full else "check the storage, the network and the permissions"
            raise (UserError if full and self.local else StorageError)(
                f"{self.path(*parts)} cannot be {what}: {type(error).__name__}: {error}; {fix}."
            ) from error

    @contextlib.contextmanager
    def space_errors(self, *parts: str) -> Iterator[None]:
        """Treat errors of a full disk as ``storage_errors`` does; all others stay what they are."""
        try:
            yield
        except Exception as error:  # libraries have their own exceptions
            if isinstance(error, UserError) or not is_full(error):
                raise
            with self.storage_errors("written", *parts):
                raise

    def temporary_folder(self) -> tempfile.TemporaryDirectory[str]:
        """A local folder, which is deleted at the end of the block; on the disk of a local dataset."""
        return tempfile.TemporaryDirectory(prefix=_temporary_prefix(), dir=self._temporary())

    @contextlib.contextmanager
    def staging(self) -> Iterator[tuple[IO[bytes], str]]:
        """Yield a local temporary file and its path; it is deleted at the end unless it was published.

        For an object store the file has no name, so that a killed process leaves nothing behind. For a local dataset it
        is in the dataset's temporary folder, which the next run empties, and this one of its workers' files.
        """
        file: IO[bytes]
        if self.local:
            path = os.path.join(self._temporary(), f"{_temporary_prefix()}{uuid.uuid4().hex}")
            file = open(path, "xb")  # noqa: SIM115 - closed below, without raising
        else:
            file = tempfile.TemporaryFile()  # noqa: SIM115 - as above
            path = f"/dev/fd/{file.fileno()}"
        try:
            yield file, path
        finally:
            with contextlib.suppress(OSError):
                file.close()
            if self.local:
                Path(path).unlink(missing_ok=True)

    def _temporary(self) -> str:
        """Return the folder for temporary files; for a local dataset it is in the same file system."""
        folder = os.path.join(self.root, _TEMPORARY_FOLDER) if self.local else tempfile.gettempdir()
        os.makedirs(folder, exist_ok=True)
        return folder

    def publish(self, file: IO[bytes], local_path: str, path: str) -> None:
        """Make a finished local file appear at ``path``: a put to an object store, or a rename after fsync."""
        if not self.local:
            file.seek(0)  # on macOS, opening /dev/fd shares the file position
            self.fs.put_file(local_path, path)
            return
        os.fsync(file.fileno())
        folder = os.path.dirname(path)
        os.makedirs(folder, exist_ok=True)
        os.replace(local_path, path)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock a local dataset against a second run, and delete the temporary files of a killed run.

        Object stores need no lock: they have no temporary files, two runs of one config put equal objects, and claims
        on recipes keep those of other configs from starting.
        """
        if not self.local:
            yield
            return
        busy = f"another run is writing to {self.url}"
        with lock_file(self.path(_TEMPORARY_FOLDER, "lock"), busy, "Wait for it, or stop it."):
            self.remove_temporary()
            yield

    def remove_temporary(self, host: str | None = None, pid: int = 0) -> None:
        """Delete the temporary files that a process, which has ended, or all have left in a local dataset."""
        prefix = _TEMPORARY_PREFIX if host is None else _temporary_prefix(host, pid)
        for stale in Path(self.root, _TEMPORARY_FOLDER).glob(f"{glob.escape(prefix)}*") if self.local else ():
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                stale.unlink(missing_ok=True)


def _temporary_prefix(host: str = "", pid: int = 0) -> str:
    """The prefix of the temporary files of a process, by default of this one."""
    return f"{_TEMPORARY_PREFIX}{host or socket.gethostname()}-{pid or os.getpid()}-"


def as_seen_by_workers(url: str) -> str:
    """A URL, or the absolute path of a local folder, because workers have other working folders."""
    storage = Storage(url)
    return storage.root if storage.local else url


@dataclass(frozen=True)
class ClaimFile:
    """A claim of the process with ``token``, which is over after ``seconds``.

    ``over_here`` decides about one of another process of this machine before that. ``content`` is stored with it.
    """

    storage: Storage
    path: tuple[str, ...]
    token: str
    seconds: float
    over_here: Callable[[Mapping[str, Any]], bool]
    content: Mapping[str, Any] = field(default_factory=dict)

    def take(self, shared: Callable[[Mapping[str, Any]], bool] = lambda claim: False) -> dict[str, Any]:
        """Create the claim unless another process has one -> the claim that is there. Raises StorageError.

        One that is ``shared`` is kept although it is over.
        """
        why = "other processes remove it, or the storage loses it; run again"
        for _ in range(CLAIMS.count):
            found = self.read()
            if found is None:
                self.storage.create(self._json(), *self.path)
            elif found.get("token") == self.token or shared(found) or not self.is_over(found):
                return found
            else:
                if _DAMAGED in found:
                    why = f"it is {found[_DAMAGED]}, each time that it is read back; check the storage, and run again"
                self.storage.remove(*self.path)
        raise StorageError(f"{self.storage.path(*self.path)} cannot be written: {why}.")

    def read(self) -> dict[str, Any] | None:
        """The claim that is there, without keys if it is none. Raises StorageError."""
        try:
            self.storage.fs.invalidate_cache()
            return self.storage.read_json(*self.path)
        except DamagedJson as error:  # no process has written it, or the storage has not stored it
            return {_DAMAGED: error.args[1]}
        except StorageError:
            raise
        except UserError:
            return {}

    def is_over(self, claim: Mapping[str, Any]) -> bool:
        at = claim.get("time")
        if not isinstance(at, (int, float)) or abs(time.time() - at) > self.seconds:
            return True
        return claim.get("host") == socket.gethostname() and self.over_here(claim)

    def renew(self) -> None:
        self.storage.write_bytes(self._json(), *self.path)

    def release(self) -> None:
        """Remove the claim if it is this process's, or no claim."""
        with contextlib.suppress(StorageError, FileNotFoundError):
            if (found := self.read()) and (found.get("token") == self.token or _DAMAGED in found):
                self.storage.remove(*self.path)

    def _json(self) -> bytes:
        owner = {"token": self.token, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        return json.dumps({**self.content, **owner}, ensure_ascii=False).encode()
