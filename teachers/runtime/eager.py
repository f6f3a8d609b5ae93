"""Forward passes without compiled code, where operations are counted or a plain path is compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch

_eager: ContextVar[bool] = ContextVar("eager", default=False)


@contextmanager
def eager() -> Iterator[None]:
    """Context without compiled code.

    A mode that sees operations, such as torch's counter of them, would not see those of compiled code. And torch never
    again runs compiled code of a function that was called inside of such a mode.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    token = _eager.set(True)
    try:
        with nullcontext() if set_stance is None else set_stance("force_eager"):
            yield
    finally:
        _eager.reset(token)


def is_eager() -> bool:
    """Whether this thread is inside of ``eager``."""
    return _eager.get()
