"""Counts of fast paths for people: lines of ``status``, and what was asked for or expected and did not happen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from teachers.fast_paths.usage import Usage

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
    return [_problem(one) for one in usages if one.reason is not None or one.used < one.plain]


def _problem(one: Usage) -> str:
    calls, key = one.used + one.plain, f"{one.path}: true" if one.asked else one.path
    makes_error = one.path in _STRICT and not one.asked
    fixes = [f"`{one.path}: true` makes that an error" if makes_error else f"`{one.path}: false` turns it off"]
    if one.reason is not None:
        some = f" ({one.used:,} of {calls:,} calls ran it)" if one.used else ""
        ran = f"fell back{some}: {one.reason}"
    else:
        ran = f"ran in {one.used:,} of {calls:,} calls" if one.used else f"never ran in {calls:,} calls"
        fixes = [*_FIXES.get(one.path, ()), *fixes]
    return f"{one.model or 'a model'}: fast path `{key}` {ran}; {', '.join(fixes)}"
