"""Whether a process uses fast paths, which of them each model has, and how often they really ran, also for people.

A fast path has the name of the config key that turns it off, such as ``compile``. Each counts its own calls: a call is
``used`` only where the fast code ran, not where it was asked for.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from teachers.spec import ModelSpec

Spec = TypeVar("Spec", bound="ModelSpec")

#: ``plain`` turns every fast path off, as ``accelerator: plain`` in a config does; ``fast`` is the default.
VARIABLE = "REINFORCE_ACCELERATOR"
_LOG = logging.getLogger(__name__)
_model: ContextVar[str] = ContextVar("model", default="")


@dataclass
class Usage:
    """Calls of one path of one model, by its name in the config.

    ``asked``: the user set the path's key to true. ``used`` calls ran the fast code, ``plain`` calls the plain way; one
    thread at a time counts them. ``reason`` is that of the first fallback, None without one.
    """

    model: str
    path: str
    asked: bool = False
    used: int = 0
    plain: int = 0
    reason: str | None = None

    @property
    def counts(self) -> dict[str, int | str]:
        """``used``, ``plain`` and ``reason``, those that there are."""
        values = {"used": self.used, "plain": self.plain, "reason": self.reason}
        return {name: value for name, value in values.items() if value}

    def __add__(self, other: Usage) -> Usage:
        """The sum of two counts of the same path, such as of two workers."""
        calls = (self.used + other.used, self.plain + other.plain)
        return Usage(self.model, self.path, self.asked or other.asked, *calls, self.reason or other.reason)

    def fall_back(self, reason: str) -> None:
        """Log a warning, and keep the first reason for the summary of the run."""
        self.reason = self.reason or reason
        _LOG.warning("%s runs without the fast path `%s`: %s", self.model or "a model", self.path, reason)


@dataclass
class _Process:
    """What this process has been set to, and the paths that were registered since."""

    fast: bool = True
    paths: list[Usage] = field(default_factory=list)


_process = _Process()


def enabled() -> bool:
    """Whether this process uses fast paths: False where its config or the environment variable says ``plain``.

    Raises ValueError for another value of the variable.
    """
    value = os.environ.get(VARIABLE) or "fast"
    if value not in ("plain", "fast"):
        raise ValueError(f"{VARIABLE} is {value!r} in the environment: set it to plain or fast, or unset it")
    return _process.fast and value == "fast"


def in_force(spec: Spec) -> Spec:
    """The spec with which a model is loaded in this process: without fast paths where they are off."""
    return spec if enabled() else spec.plain()


def set_enabled(fast: bool) -> None:
    """Set what the config says, before models are loaded. Counts of earlier models are forgotten."""
    _process.fast = fast
    _process.paths.clear()


@contextlib.contextmanager
def loading(model: str) -> Iterator[None]:
    """Context in which ``fast_path`` registers paths of this model."""
    token = _model.set(model)
    try:
        yield
    finally:
        _model.reset(token)


def fast_path(name: str, asked: bool = False) -> Usage:
    """Register a path of the model that is being loaded -> its counts. ``asked``: the user set its key to true.

    Call it only where ``enabled()``, since a path that is turned off needs no count.
    """
    path = Usage(_model.get(), name, asked)
    _process.paths.append(path)
    return path


def snapshot() -> tuple[Usage, ...]:
    """A copy of the counts so far, one for each model and path, in the order in which they were registered."""
    return total(_process.paths)


def growth(before: Iterable[Usage], now: Iterable[Usage]) -> tuple[Usage, ...]:
    """What was counted between two snapshots; paths without calls or a fallback in between are left out."""
    known = {(one.model, one.path): one for one in before}
    grown = []
    for one in now:
        old = known.get((one.model, one.path), Usage(one.model, one.path))
        reason = None if one.reason == old.reason else one.reason
        grown.append(replace(one, used=one.used - old.used, plain=one.plain - old.plain, reason=reason))
    return tuple(one for one in grown if one.used or one.plain or one.reason)


def total(usages: Iterable[Usage]) -> tuple[Usage, ...]:
    """The sums by model and path, such as those of several workers."""
    found: dict[tuple[str, str], Usage] = {}
    for usage in usages:
        key = usage.model, usage.path
        found[key] = found.get(key, Usage(*key)) + usage
    return tuple(found.values())


#: What to do about a path that does not run, besides turning it off.
_FIXES = {"compile": ["TORCH_LOGS=+dynamo in the environment shows why"]}
#: Paths that raise where they are asked for and fail.
_STRICT = ("held_weights", "fused_attention", "compile")


def parse(records: Iterable[Mapping[str, Any]]) -> tuple[Usage, ...]:
    """Counts from a JSON file, also of another version of this package."""
    known = {one.name for one in fields(Usage)}
    return tuple(Usage(**{key: value for key, value in one.items() if key in known}) for one in records)


def usage_lines(usages: Iterable[Usage]) -> list[str]:
    """One line for each model with its paths: calls that ran the fast code, and those that ran the plain way."""
    parts: dict[str, list[str]] = {}
    for one in usages:
        calls = f" {one.used:,} fast, {one.plain:,} plain calls" if one.used or one.plain else ""
        reason = f" (off: {one.reason})" if one.reason else ""
        parts.setdefault(one.model, []).append(f"{one.path}{calls}{reason}")
    return [f"fast paths of {model or 'a model'}: {'; '.join(paths)}" for model, paths in parts.items()]


def problem_lines(usages: Iterable[Usage]) -> list[str]:
    """One line with the fix for each path that fell back, or that ran in fewer than half of its calls."""
    lines = []
    for one in usages:
        if one.reason is None and one.used >= one.plain:
            continue
        calls, key = one.used + one.plain, f"{one.path}: true" if one.asked else one.path
        makes_error = one.path in _STRICT and not one.asked
        fixes = [f"`{one.path}: true` makes that an error" if makes_error else f"`{one.path}: false` turns it off"]
        if one.reason is not None:
            some = f" ({one.used:,} of {calls:,} calls ran it)" if one.used else ""
            ran = f"fell back{some}: {one.reason}"
        else:
            ran = f"ran in {one.used:,} of {calls:,} calls" if one.used else f"never ran in {calls:,} calls"
            fixes = [*_FIXES.get(one.path, ()), *fixes]
        lines.append(f"{one.model or 'a model'}: fast path `{key}` {ran}; {', '.join(fixes)}")
    return lines
