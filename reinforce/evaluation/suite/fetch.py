"""Download of a suite's sets from the Hub into a folder: each at one revision, which is recorded there.

The same command continues: complete files are kept, others go on where they ended, at the recorded revision.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce.errors import UserError
from reinforce.evaluation.registry import SuiteSet, select_sets
from reinforce.storage import write_file
from reinforce.terminal import format_bytes
from teachers.redact import redact

#: Beside the sets: the repository, the revision and the bytes of each, by its key.
REVISIONS = "revisions.json"
_CONNECTIONS = 4  # few, so that the Hub's limit of requests is not reached


@dataclass(frozen=True)
class _Published:
    """A set as the Hub has it at a revision: sizes of its files in bytes by name."""

    one: SuiteSet
    repository: str
    revision: str
    files: dict[str, int]

    def missing(self, folder: Path) -> dict[str, int]:
        """The files that are not complete in the folder of the set."""
        sizes = {name: folder / name for name in self.files}
        sizes_here = {name: path.stat().st_size for name, path in sizes.items() if path.is_file()}
        return {name: size for name, size in self.files.items() if sizes_here.get(name) != size}


def fetch_sets(suite: str, root: Path, names: Sequence[str], *, dry_run: bool, log: Callable[[str], None]) -> None:
    """Download the sets that are not complete below ``root``; with ``dry_run``, only log what each takes.

    Raises UserError where the disk has no room, and at the end for sets that could not be downloaded.
    """
    recorded = _read_revisions(root)
    failed: list[str] = []
    found: list[_Published] = []
    needed = total = 0
    for one in select_sets(suite, names):
        with _failing(one, failed, log):
            if not one.on_hub:
                raise UserError(f"it is not on the Hub in its layout; see {one.page} and docs/evaluation.md")
            published = _look_up(one, recorded.get(one.key, {}).get("revision"))
            found.append(published)
            missing, size = sum(published.missing(root / one.folder).values()), sum(published.files.values())
            needed, total = needed + missing, total + size
            recorded[one.key] = {"repository": published.repository, "revision": published.revision, "bytes": size}
            sizes = f"{format_bytes(size)}, {format_bytes(missing)} to download"
            log(f"{one.name}: {sizes}; revision {published.revision[:12]}")
    log(f"{len(found)} sets: {format_bytes(total)}, {format_bytes(needed)} to download")
    if not dry_run:
        _check_room(root, needed)
        write_file((json.dumps(recorded, indent=2) + "\n").encode(), str(root / REVISIONS))
        for published in found:
            with _failing(published.one, failed, log):
                _download(published, root)
                log(f"{published.one.name}: complete")
    if failed:
        raise UserError(f"sets that are not complete: {', '.join(failed)}. The same command continues.")


@contextlib.contextmanager
def _failing(one: SuiteSet, failed: list[str], log: Callable[[str], None]) -> Iterator[None]:
    """Log a UserError inside, and add the set to those that ``failed``."""
    try:
        yield
    except UserError as error:
        failed.append(one.key)
        log(f"{one.name}: {error}")


def _look_up(one: SuiteSet, revision: str | None) -> _Published:
    """The files of a set at a revision; default: of its branch. Raises UserError."""
    from huggingface_hub import HfApi

    repository, _, branch = one.published.partition("@")
    try:
        info = HfApi().dataset_info(repository, revision=revision or branch or None, files_metadata=True)
    except Exception as error:  # of the Hub, of the network, of the client's checks
        gone = (
            f" Or remove {one.key} from {REVISIONS}, if the Hub has revision {revision[:12]} no longer."
            if revision
            else ""
        )
        raise UserError(_describe(one, error) + gone) from error
    files = {sibling.rfilename: int(sibling.size or 0) for sibling in info.siblings or ()}
    if not files:
        raise UserError(f"the Hub lists no files; see {one.page}")
    return _Published(one, repository, str(info.sha), files)


def _download(published: _Published, root: Path) -> None:
    from huggingface_hub import snapshot_download

    one, folder = published.one, root / published.one.folder
    for name in published.missing(folder):
        (folder / name).unlink(missing_ok=True)  # of another size, which the client may take for complete
    try:
        snapshot_download(
            published.repository, repo_type="dataset", revision=published.revision, local_dir=folder,
            max_workers=_CONNECTIONS,
        )  # fmt: skip
    except Exception as error:
        raise UserError(_describe(one, error)) from error
    if missing := published.missing(folder):
        raise UserError(f"{len(missing)} of {len(published.files)} files are not complete, such as {min(missing)}")


def _describe(one: SuiteSet, error: Exception) -> str:
    text = redact(" ".join(str(error).split()))[:300]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        advice = f"Look at {one.page}; where it asks for a login or for consent, give them there and set HF_TOKEN."
    elif status == 429:
        advice = "That is the limit of requests: wait for some minutes, and set HF_TOKEN, which has a higher one."
    else:
        advice = "Try again."
    return f"{type(error).__name__}: {text} {advice}"


def _check_room(root: Path, needed: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"{root}: {format_bytes(needed)} are to be downloaded, and {format_bytes(free)} are free. Make room, or "
            "choose sets with --sets."
        )


def _read_revisions(root: Path) -> dict[str, Any]:
    path = root / REVISIONS
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): dict(about) for key, about in found.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Remove it; the sets are then of the newest revisions."
        ) from error
