"""Imports: of large libraries, of the main module by other processes, and of packages that may be missing."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

from reinforce.errors import UserError


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect no garbage inside, where torch, open_clip and transformers are imported.

    They make a million objects that stay. Looking through these again and again takes a sixth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def without_main_module() -> Iterator[None]:
    """Inside, processes that multiprocessing starts do not import the program's main module.

    Otherwise a script without ``if __name__ == "__main__"`` would run again in each of them. Nothing that is sent to
    them may be defined in the main module.
    """
    main = sys.modules["__main__"]
    names: dict[str, Any] = main.__dict__
    saved: dict[str, Any] = {name: names[name] for name in ("__spec__", "__file__") if name in names}
    names.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        names.update(saved)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def require(extra: str, what: str, *packages: str) -> None:
    """Raise UserError, which names the extra, if ``what`` needs a package that is not installed."""
    missing = [package for package in packages if not installed(package)]
    if missing:
        raise UserError(install_hint(extra, what, *missing))


def install_hint(extra: str, what: str, *packages: str) -> str:
    """Which packages ``what`` needs, and the extra that has them."""
    return f"{what} needs {', '.join(packages)}: run pip install -e '.[{extra}]' in the checkout"


#: What to do about images of telephones where their decoder is missing.
HEIC_HINT = install_hint("heic", "HEIC", "pillow-heif")


@functools.cache
def reads_heic() -> bool:
    """Whether the package of the extra `heic` is installed."""
    return installed("pillow_heif")
