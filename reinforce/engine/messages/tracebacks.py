"""Text of errors, with the place in the user's code at which they were raised."""

from __future__ import annotations

import linecache
import os
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import teachers

_MAX_FRAMES = 5
_MAX_SOURCE = 160  # characters; a longer line is left out and not cut, since half a secret is not redacted
#: Folders of ``reinforce`` and ``teachers``.
_OURS = tuple(str(path) + os.sep for path in (Path(__file__).parents[2], *teachers.__path__))
_STANDARD = sysconfig.get_path("stdlib") + os.sep
_INSTALLED = ("site-packages", "dist-packages")
#: Installed packages that load and run named models.
_LIBRARIES = frozenset(
    (
        *("PIL", "filelock", "fsspec", "huggingface_hub", "numpy", "open_clip", "openai"),
        *("safetensors", "timm", "torch", "torchvision", "transformers"),
    )
)


def error_with_frames(error: BaseException) -> str:
    """Type and message of an error and its frames in the user's code."""
    return f"{type(error).__name__}: {error}{user_frames(error)}"


def user_frames(error: BaseException) -> str:
    """The innermost frames of an error in the user's code, as `` (FILE:LINE in FUNCTION: `SOURCE` -> ...)``.

    The frames of its cause if the error itself has none. Empty if no code of the user is involved.
    """
    cause: BaseException | None = error
    while cause is not None:
        frames = [*_user_frames(cause)]
        if frames:
            shown = frames if len(frames) <= _MAX_FRAMES else [frames[0], "...", *frames[1 - _MAX_FRAMES :]]
            return f" ({' -> '.join(shown)})"
        cause = cause.__cause__
    return ""


def shorten(text: str, characters: int) -> str:
    """Cut a text in its middle, since its end names the place of the error. Redact it before: half a secret stays."""
    half = (characters - 5) // 2
    return text if len(text) <= characters else f"{text[:half]} ... {text[-half:]}"


def _user_frames(error: BaseException) -> Iterator[str]:
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if not _is_ours(frame)]
    package = _package(frames[0][0]) if frames else ""
    for frame, line in frames:
        file = frame.f_code.co_filename
        installed = any(folder in Path(file).parts for folder in _INSTALLED)
        if not installed or (_package(frame) == package and package not in _LIBRARIES):
            source = linecache.getline(file, line, frame.f_globals).strip()
            shown = f": `{source}`" if 0 < len(source) <= _MAX_SOURCE else ""
            yield f"{file.removeprefix(os.getcwd() + os.sep)}:{line} in {frame.f_code.co_name}{shown}"


def _is_ours(frame: FrameType) -> bool:
    """Whether a frame is of this project, of the standard library, or of no file."""
    file = frame.f_code.co_filename
    standard = file.startswith(_STANDARD) and not any(folder in Path(file).parts for folder in _INSTALLED)
    return file.startswith(("<", *_OURS)) or standard


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
